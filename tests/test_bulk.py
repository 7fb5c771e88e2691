"""Bulk runs in this process: every line gets its own vector once, whatever is asked for and whatever goes wrong."""

import asyncio
import contextlib
import errno
import json
import os
import re

import numpy as np
import pytest
from pyarrow import parquet

from bulk_process import hash_embedder
from conftest import assembled
from fakes import HIDDEN, hash_model
from quiver.bulk import BulkOptions, Columns, Wanted, run_bulk
from quiver.bulk.chunks import MAX_LINES
from quiver.bulk.embedders import Embedder, on_engine
from quiver.bulk.files import AppendFile
from quiver.bulk.lines import BadLine, Fault, OutputFailed, Vectors
from quiver.bulk.pipeline import outcomes
from quiver.bulk.window import Outcomes, Window
from quiver.config import Config
from quiver.errors import ConfigError, InvalidInput, LaneDied, Refused
from quiver.types import Caller, EmbedRequest

FORMS = ("jsonl", "npy", "parquet")
NUM_LINES = 3 * MAX_LINES + 17


def texts_of(count, kinds=None):
    """Return texts, `kinds` of them distinct."""
    return [f"text number {i % (kinds or count)}" for i in range(count)]


def corpus(path, texts, first_id=0):
    """Write JSON lines with ids."""
    lines = [json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts, first_id)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


async def bulk(file, output, *, opening=None, column="text", id_column=None, allow_empty=False, **options):
    """Run with the hash model, or with what is given; returns how far it came."""
    columns = Columns(text=column, id=id_column, allow_empty=allow_empty)
    files = file if isinstance(file, tuple) else (file,)
    options = BulkOptions(files=files, output=output, columns=columns, **options)
    return await run_bulk(options, Config(), opening or hash_embedder(options.wanted))


async def directly(texts, **request):
    """Return the vectors of the engine alone."""
    async with assembled(hash_model()) as parts:
        return (await parts.engine.embed(EmbedRequest(inputs=texts, **request), Caller("test"))).vectors


def vectors_of(output):
    """Read an output -> (N, D)."""
    if output.suffix == ".npy":
        return np.load(output)
    if output.suffix == ".parquet":
        return np.stack(parquet.read_table(output)["embedding"].to_numpy())
    return np.float32([json.loads(line)["embedding"] for line in output.read_text(encoding="utf-8").splitlines()])


def left_beside(output):
    """List what lies beside an output."""
    return sorted(p.name for p in output.parent.glob(f"{output.name}.*"))


@contextlib.asynccontextmanager
async def lent(embed, *, dimensions=HIDDEN, max_flights=4):
    """Lend a run something that computes; the text by which it finds out the size of vectors is answered for it."""

    async def embed_all(texts):
        if texts == ["quiver"]:
            return Vectors(np.ones((1, dimensions), np.float32), 1)
        return await embed(texts)

    yield Embedder("lent", embed_all, max_flights, is_exact=True)


class Counting:
    """An embedder that counts: which texts it was asked for, and how often at once."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.texts = []
        self.running = self.most = 0

    async def __call__(self, texts):
        """Give each text a vector of its length."""
        self.texts += texts
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return Vectors(np.float32([[len(text)] * HIDDEN for text in texts]), len(texts))


@pytest.mark.parametrize("form", FORMS)
async def test_every_line_has_its_vector(tmp_path, form):
    """Each format holds the engine's own vectors, bit for bit and in the order of the lines, and nothing is left beside it."""
    texts = texts_of(NUM_LINES)
    output = tmp_path / f"out.{form}"
    state = await bulk(corpus(tmp_path / "in.jsonl", texts), output)
    assert (state.num_rows, state.num_bad) == (NUM_LINES, 0)
    vectors = vectors_of(output)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, await directly(texts))
    assert left_beside(output) == []


async def test_texts_and_ids_are_carried_over(tmp_path):
    """Texts and ids stand beside the vectors: in JSON lines and Parquet in each row, for NumPy in a file of their own."""
    file = corpus(tmp_path / "in.jsonl", texts_of(300), first_id=7)
    for form in FORMS:
        await bulk(file, tmp_path / f"out.{form}", id_column="n")
    ids = list(range(7, 307))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["id"], line["text"]) for line in lines] == list(zip(ids, texts_of(300), strict=True))
    table = parquet.read_table(tmp_path / "out.parquet")
    assert (table["id"].to_pylist(), table["text"].to_pylist()) == (ids, texts_of(300))
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert table.schema.field("embedding").type.list_size == HIDDEN
    assert list(map(json.loads, (tmp_path / "out.npy.ids.jsonl").read_text().splitlines())) == ids


async def test_ids_of_two_kinds_do_not_go_into_one_column(tmp_path):
    """JSON lines keep whole numbers and texts as they are; Parquet names the line where the kind changes."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"text":"a","n":1}\n{"text":"b","n":"two"}\n', encoding="utf-8")
    await bulk(file, tmp_path / "out.jsonl", id_column="n")
    with pytest.raises(BadLine, match=r"in\.jsonl:2: the ids are texts and whole numbers"):
        await bulk(file, tmp_path / "out.parquet", id_column="n")


@pytest.mark.parametrize(
    "wanted", [Wanted(dimensions=8), Wanted(normalize=True), Wanted(dimensions=4, normalize=False)]
)
async def test_what_is_wanted_is_passed_on(tmp_path, wanted):
    """Dimensions and scaling are those of a request that asks for them."""
    output = tmp_path / "out.npy"
    await bulk(corpus(tmp_path / "in.jsonl", texts_of(20)), output, wanted=wanted)
    expected = await directly(texts_of(20), dimensions=wanted.dimensions, normalize=wanted.normalize)
    np.testing.assert_array_equal(vectors_of(output), expected)


@pytest.mark.parametrize("wanted", [Wanted(dimensions=HIDDEN + 1), Wanted(prompt_name="nobody")])
async def test_what_cannot_be_had_is_said_before_any_line(tmp_path, wanted):
    """A wish that the model cannot fulfil is no line's fault, and nothing is written."""
    with pytest.raises(InvalidInput, match=r"dimensions is 33|nobody"):
        await bulk(corpus(tmp_path / "in.jsonl", texts_of(20)), tmp_path / "out.npy", wanted=wanted, skip_bad=True)
    assert left_beside(tmp_path / "out.npy") == []


async def test_duplicates_cost_once(tmp_path):
    """Of 1,000 lines with 10 texts, 10 are computed, and each line has its own vector."""
    embed, output = Counting(), tmp_path / "out.npy"
    texts = ["x" * (1 + i % 10) for i in range(1000)]
    await bulk(corpus(tmp_path / "in.jsonl", texts), output, opening=lent(embed))
    assert sorted(embed.texts) == sorted(set(texts))
    assert vectors_of(output)[:, 0].tolist() == [len(text) for text in texts]


async def test_distinct_texts_are_all_computed(tmp_path):
    """Negative control: what differs by a space is not taken for the same."""
    embed = Counting()
    texts = ["a", "a ", " a", "A"]
    await bulk(corpus(tmp_path / "in.jsonl", texts), tmp_path / "out.npy", opening=lent(embed))
    assert embed.texts == texts


async def test_the_window_is_bounded():
    """It forgets the oldest chunk, whole, when texts or bytes are too many, and then has such a text computed again."""
    flight = asyncio.get_running_loop().create_task(asyncio.sleep(0))
    window = Window(1, max_texts=4)
    for texts in (["a", "b"], ["c", "d"], ["e"]):
        window.add(texts, flight)
        window.trim()
    assert window.unknown(["a", "b", "c", "d", "e", "a"]) == ["a", "b"]
    heavy = Window(1000, max_bytes=9000)
    for texts in (["a"], ["b"], ["c"]):
        heavy.add(texts, flight)
        heavy.trim()
    assert heavy.unknown("abc") == ["a"]
    await flight


async def test_several_chunks_are_at_work_but_no_more(tmp_path):
    """As many chunks as are allowed are at work at once, so that nobody waits for the disk, and never more."""
    embed = Counting(seconds=0.1)
    await bulk(corpus(tmp_path / "in.jsonl", texts_of(2000)), tmp_path / "out.npy", opening=lent(embed, max_flights=3))
    assert embed.most == 3


async def test_the_engine_is_asked_in_the_bulk_lane():
    """Lines go before nobody who waits for an answer."""
    asked = []

    class Engine:
        async def embed(self, request, caller):
            asked.append((request.priority, caller.id))
            raise LaneDied("enough")

    with pytest.raises(LaneDied):
        await on_engine(Engine(), "m", Wanted()).embed(["a"])
    assert asked == [("bulk", "bulk")]


# Bad lines


def with_bad_lines(path):
    """Write lines of which some are bad: no JSON, too long for the model, empty."""
    good = [json.dumps({"text": text}) for text in texts_of(NUM_LINES)]
    good[299] = "{junk"
    good[499] = json.dumps({"text": "x" * 600})
    good[599] = json.dumps({"text": ""})
    path.write_text("\n".join(good), encoding="utf-8")
    return path


async def test_a_bad_line_stops_the_run(tmp_path):
    """It is named with its file; what came before is kept, and once the line is mended the run goes on with it."""
    file, output = with_bad_lines(tmp_path / "in.jsonl"), tmp_path / "out.npy"
    with pytest.raises(BadLine, match=r"in\.jsonl:300: not JSON: .*\(256 lines are done; mend it and run again"):
        await bulk(file, output)
    corpus(file, texts_of(NUM_LINES))
    embed = Counting()
    async with hash_embedder() as inner:

        async def counted(texts):
            embed.texts += texts
            return await inner.embed(texts)

        await bulk(file, output, opening=contextlib.nullcontext(Embedder("test/hash", counted, 4, is_exact=True)))
    assert embed.texts == ["quiver", *texts_of(NUM_LINES)[256:]]
    np.testing.assert_array_equal(vectors_of(output), await directly(texts_of(NUM_LINES)))


async def test_a_text_that_the_model_refuses_is_named(tmp_path):
    """The line of a text that is too long is found among those it was sent with."""
    file = corpus(tmp_path / "in.jsonl", [*texts_of(400), "x" * 600, *texts_of(400)])
    with pytest.raises(BadLine, match=r"in\.jsonl:401: the text has 600 tokens, but the model reads at most 512"):
        await bulk(file, tmp_path / "out.npy")


@pytest.mark.parametrize("form", FORMS)
async def test_bad_lines_may_be_left_out(tmp_path, form):
    """With `skip_bad` they are listed beside the output with file, line and reason, and all others are there."""
    file, output = with_bad_lines(tmp_path / "in.jsonl"), tmp_path / f"out.{form}"
    state = await bulk(file, output, skip_bad=True)
    assert (state.num_rows, state.num_bad) == (NUM_LINES - 3, 3)
    errors = [json.loads(line) for line in (tmp_path / f"out.{form}.errors.jsonl").read_text().splitlines()]
    assert [(error["file"], error["line"]) for error in errors] == [(str(file), n) for n in (300, 500, 600)]
    reasons = (r"not JSON: ", r"the text has 600 tokens", r"the text is empty")
    assert all(re.match(reason, error["error"]) for reason, error in zip(reasons, errors, strict=True))
    good = [text for i, text in enumerate(texts_of(NUM_LINES)) if i not in {299, 499, 599}]
    np.testing.assert_array_equal(vectors_of(output), await directly(good))


async def test_each_bad_text_is_told_at_each_of_its_lines(tmp_path):
    """A text that comes again is refused again, without being tried again."""
    file = corpus(tmp_path / "in.jsonl", ["a", "x" * 600, "b", "x" * 600])
    state = await bulk(file, tmp_path / "out.npy", skip_bad=True)
    assert (state.num_rows, state.num_bad) == (2, 2)


async def test_only_the_culprit_is_left_out():
    """Texts are halved until one alone is refused; all others keep their vectors, at their places."""

    async def embed(texts):
        if any(text == "bad" for text in texts):
            raise InvalidInput("input 0 is bad")
        return Vectors(np.float32([[float(text)] for text in texts]), len(texts))

    texts = ["0", "1", "bad", "3", "4", "5", "bad"]
    found = await outcomes(embed, texts, 1)
    assert isinstance(found, Outcomes)
    assert {row: str(fault) for row, fault in found.faults.items()} == {2: "the text is bad", 6: "the text is bad"}
    assert found.vectors[:, 0].tolist() == [0, 1, 0, 3, 4, 5, 0]
    assert found.num_tokens == 5
    assert isinstance(found.faults[2], Fault)


@pytest.mark.parametrize("content", ["", "\n\n"])
async def test_no_text_at_all(tmp_path, content):
    """Files without a text have no output, and the run says so."""
    file, output = tmp_path / "in.txt", tmp_path / "out.npy"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(BadLine, match="there is no text to embed in"):
        await bulk(file, output, skip_bad=True)
    assert not output.exists()
    assert left_beside(output) == (["out.npy.errors.jsonl"] if content else [])


# What is there already


async def test_an_output_is_not_written_over(tmp_path):
    """An output that is there stays as it is, unless `overwrite` is given; an input is never written over."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(20)), tmp_path / "out.jsonl"
    output.write_text("precious", encoding="utf-8")
    with pytest.raises(Refused, match=r"out\.jsonl is there already: give another output, or --overwrite"):
        await bulk(file, output)
    assert output.read_text(encoding="utf-8") == "precious"
    await bulk(file, output, overwrite=True)
    assert len(vectors_of(output)) == 20
    with pytest.raises(ConfigError, match="would be read and written"):
        await bulk(file, file, overwrite=True)


async def interrupted(file, output, **options):
    """Leave a run in the middle, as an engine that dies does."""

    async def embed(texts):
        if texts[0] != "text number 0":
            raise LaneDied("enough")
        return Vectors(np.float32([[len(text)] * HIDDEN for text in texts]), 0)

    with pytest.raises(LaneDied):
        await bulk(file, output, opening=lent(embed), **options)


async def test_a_run_goes_on_where_it_was(tmp_path):
    """After an engine that died, only what was not written is computed."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    assert left_beside(output) == ["out.npy.checkpoint", "out.npy.part"]
    embed = Counting()
    await bulk(file, output, opening=lent(embed))
    assert embed.texts == texts_of(600)[256:]
    assert vectors_of(output)[:, 0].tolist() == [len(text) for text in texts_of(600)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"wanted": Wanted(dimensions=8)}, "dimensions was 32 and is 8|gives other vectors"),
        ({"wanted": Wanted(normalize=True)}, "normalize was None and is True"),
        ({"id_column": "n"}, "has_ids was False and is True|not those that the output was begun with"),
        ({"output_form": "jsonl"}, "output_form was 'npy' and is 'jsonl'"),
    ],
)
async def test_a_run_goes_on_with_nothing_else(tmp_path, options, complaint):
    """Other wishes than those it was begun with are refused, and --overwrite begins anew."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    dimensions = options.get("wanted", Wanted()).dimensions or HIDDEN
    again = lent(Counting(), dimensions=dimensions)
    with pytest.raises(Refused, match=complaint):
        await bulk(file, output, opening=again, **options)


async def test_a_run_goes_on_with_no_other_weights(tmp_path):
    """A model of the same name that gives other vectors is seen by a text that is the same in every run."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    embedder = Embedder("lent", Counting(), 4, is_exact=True)
    with pytest.raises(Refused, match="the model gives other vectors now; --overwrite starts anew"):
        await bulk(file, output, opening=contextlib.nullcontext(embedder))
    await bulk(file, output, opening=contextlib.nullcontext(embedder), overwrite=True)
    assert len(vectors_of(output)) == 600


async def test_a_run_goes_on_with_the_same_lines_alone(tmp_path):
    """Lines that were changed behind its back are seen; lines that were added are embedded."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    corpus(file, ["another", *texts_of(600)[1:]])
    with pytest.raises(Refused, match="the first 256 lines are not those"):
        await bulk(file, output, opening=lent(Counting()))
    corpus(file, texts_of(700))
    await bulk(file, output, opening=lent(Counting()))
    assert len(vectors_of(output)) == 700


@pytest.mark.parametrize("damage", ["{", '{"job": 1}', "\x00\x00"])
async def test_a_checkpoint_that_is_none(tmp_path, damage):
    """A file that is no checkpoint of ours stops the run before anything is touched."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    part = (tmp_path / "out.npy.part").read_bytes()
    (tmp_path / "out.npy.checkpoint").write_text(damage, encoding="utf-8")
    with pytest.raises(Refused, match=r"out\.npy\.checkpoint is no checkpoint of this version"):
        await bulk(file, output)
    assert (tmp_path / "out.npy.part").read_bytes() == part


async def test_a_part_that_was_cut(tmp_path):
    """A part with fewer bytes than were written is not gone on with."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    await interrupted(file, output)
    os.truncate(tmp_path / "out.npy.part", 1000)
    with pytest.raises(OutputFailed, match="has 1000 bytes, but 32896 were written: --overwrite starts anew"):
        await bulk(file, output, opening=lent(Counting()))


async def test_two_runs_do_not_write_one_output(tmp_path):
    """While a process writes an output, another says so and leaves it alone."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(600)), tmp_path / "out.npy"
    other = AppendFile(tmp_path / "out.npy.part", 0)
    for overwrite in (False, True):
        with pytest.raises(OutputFailed, match=r"another process is writing .*out\.npy\.part"):
            await bulk(file, output, overwrite=overwrite)
    other.close()
    await bulk(file, output)
    assert len(vectors_of(output)) == 600


class FullDisk:
    """A disk on which no more than so many bytes fit."""

    def __init__(self, left):
        self.left = left
        self.write_really = os.write

    def write(self, descriptor, data):
        """Write what fits; nothing more once it is full."""
        taken = bytes(data[: self.left])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(taken)
        return self.write_really(descriptor, taken)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("room", [0, 10, 50_000])
async def test_a_full_disk(tmp_path, monkeypatch, form, room):
    """It is named with the file; once there is room again, the run goes on and its output has the same bytes."""
    file, output, right = corpus(tmp_path / "in.jsonl", texts_of(900)), tmp_path / f"out.{form}", tmp_path / f"r.{form}"
    await bulk(file, right)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", FullDisk(room).write)
        with pytest.raises(OutputFailed, match=rf"cannot write .*out\.{form}\.part: No space left on device"):
            await bulk(file, output, sync_seconds=0.0)
    await bulk(file, output)
    assert output.read_bytes() == right.read_bytes()


async def test_a_directory_that_is_not_there(tmp_path):
    """An output in no directory is said before anything is computed."""
    embed = Counting()
    with pytest.raises(OutputFailed, match=r"cannot write .*nowhere/out\.npy\.\w+: No such file or directory"):
        await bulk(corpus(tmp_path / "in.jsonl", ["a"]), tmp_path / "nowhere" / "out.npy", opening=lent(embed))
    assert embed.texts == []


def test_a_format_that_is_not_known(tmp_path):
    """A suffix that tells nothing asks for --output-format."""
    with pytest.raises(
        ConfigError, match=r"out\.bin does not show its format: give --output-format jsonl, npy, parquet"
    ):
        asyncio.run(bulk(corpus(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.bin"))
