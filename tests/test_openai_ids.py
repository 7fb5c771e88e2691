"""Token ids of OpenAI's tokenizer: the texts behind them are what is embedded."""

import base64
import hashlib
import json

import pytest

from conftest import assembled
from quiver import app
from quiver.api.call import Call
from quiver.config import Config, EngineConfig
from quiver.engine import openai_ids
from quiver.engine.openai_ids import OpenAIIds
from quiver.errors import ConfigError

WORDS = [b"to", b" be", b" or", b" not", "ç".encode()[:1], "ç".encode()[1:], b"!", b" to"]
TO_BE = [0, 1]
CACHED = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""The SHA-1 of the table's address: so tiktoken names its copy."""


def written(folder, name="cl100k_base.tiktoken", words=WORDS):
    """Write a small table in the form of OpenAI's; returns its path and its SHA-256."""
    lines = [b"%b %d\n" % (base64.b64encode(word), number) for number, word in enumerate(words)]
    path = folder / name
    path.write_bytes(b"".join(lines))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def table(tmp_path):
    """Return a table of a few words."""
    path, digest = written(tmp_path)
    return openai_ids.load(path, sha256=digest)


async def ask(parts, given, **more):
    """Embed by OpenAI's API; returns status and decoded reply."""
    body = json.dumps({"input": given, **more}).encode()
    reply = await parts.api.receive(Call("POST", "/v1/embeddings", {"content-type": "application/json"}, body))
    return reply.status, json.loads(reply.body)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (TO_BE, ["to be"]),
        ([TO_BE, [0, 1, 2, 3, 7, 1]], ["to be", "to be or not to be"]),
        ([[4, 5], [6]], ["ç", "!"]),
        ([[4]], ["\N{REPLACEMENT CHARACTER}"]),
        ([[0, 100257]], ["to<|endoftext|>"]),
    ],
)
async def test_ids_are_the_texts_behind_them(table, given, texts):
    """Vectors and usage are those of the texts, half a character is a mark, a special token is its name."""
    async with assembled(openai_ids=OpenAIIds("cl100k", table)) as parts:
        status, by_ids = await ask(parts, given)
        assert status == 200, by_ids
        assert by_ids == (await ask(parts, texts))[1]


async def test_a_request_may_say_whose_its_ids_are(table):
    """`token_encoding` counts more than the setting, in both directions."""
    async with assembled(openai_ids=OpenAIIds("cl100k", table)) as parts:
        _, native = await ask(parts, TO_BE, token_encoding="native")  # noqa: S106
    async with assembled(openai_ids=OpenAIIds("native", table)) as parts:
        assert (await ask(parts, TO_BE))[1] == native
        _, texts = await ask(parts, "to be")
        assert native != texts
        assert (await ask(parts, TO_BE, token_encoding="cl100k"))[1] == texts  # noqa: S106


REFUSED = {
    "an id that is none": (OpenAIIds("cl100k"), [TO_BE, [0, 8]], {}, "input[1]"),
    "an id between the words and the special tokens": (OpenAIIds("cl100k"), [100256], {}, "input[0]"),
    "a negative id": (OpenAIIds("cl100k"), [-1], {}, "input[0]"),
    "no ids": (OpenAIIds("cl100k"), [TO_BE, []], {}, "input[1]"),
    "ids where none are taken": (OpenAIIds("refuse"), TO_BE, {}, "input"),
    "OpenAI's ids without a table": (OpenAIIds("native"), TO_BE, {"token_encoding": "cl100k"}, "token_encoding"),
    "another tokenizer": (OpenAIIds("native"), TO_BE, {"token_encoding": "o200k"}, "token_encoding"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_has_no_text_is_refused_with_its_place(table, name):
    """400 in OpenAI's shape names the input or the field; texts are answered as ever."""
    ids, given, more, param = REFUSED[name]
    ids = OpenAIIds(ids.meaning, table if ids.meaning == "cl100k" else None)
    async with assembled(openai_ids=ids) as parts:
        status, reply = await ask(parts, given, **more)
        assert (status, reply["error"]["param"]) == (400, param), reply
        assert (await ask(parts, "to be"))[0] == 200


async def test_teis_ids_are_the_models_own(table):
    """What OpenAI's API takes ids for is of no concern to another API."""
    async with assembled(openai_ids=OpenAIIds("cl100k", table)) as parts:
        body = json.dumps({"inputs": TO_BE}).encode()
        by_ids = await parts.api.receive(Call("POST", "/tei/embed", {}, body))
        _, native = await ask(parts, TO_BE, token_encoding="native")  # noqa: S106
    assert json.loads(by_ids.body) == [native["data"][0]["embedding"]]


@pytest.mark.parametrize("name", ["cl100k_base.tiktoken", CACHED])
def test_a_table_is_found_in_its_directory(tmp_path, name):
    """By its own name, and by the one that it has in tiktoken's cache."""
    _, digest = written(tmp_path, name)
    assert openai_ids.load(tmp_path, sha256=digest).decode(TO_BE, 0) == "to be"


def test_a_server_without_the_table_does_not_start(tmp_path):
    """The setting alone, an empty directory, no file, and another file: each says what is wrong and what to give."""
    another, _ = written(tmp_path)
    faults = {
        None: "cl100k_file (TIKTOKEN_CACHE_DIR)",
        tmp_path / "missing": "No such file",
        (tmp_path / "empty"): "holds neither cl100k_base.tiktoken nor tiktoken's copy of it",
        another: "is not OpenAI's cl100k_base.tiktoken (its SHA-256 is",
    }
    (tmp_path / "empty").mkdir()
    for file, reason in faults.items():
        with pytest.raises(ConfigError) as refused:
            app.build(Config(engine=EngineConfig(openai_ids="cl100k", cl100k_file=file)))
        assert reason in refused.value.message


def test_a_table_that_is_not_asked_for_is_not_read(tmp_path):
    """A deployment's TIKTOKEN_CACHE_DIR stops nothing, whatever lies there."""
    assert openai_ids.configured(EngineConfig(cl100k_file=tmp_path / "missing")).table is None


@pytest.mark.parametrize("line", [b"dG8 0", b"dG8= zero", b"dG8=", b"d\xc3\xa7= 0"])
def test_a_line_that_is_no_token_is_refused(tmp_path, line):
    """A damaged table is told from a good one, even where nobody knows its digest."""
    path = tmp_path / "table"
    path.write_bytes(line)
    with pytest.raises(ConfigError, match="not a token in base64 and its id"):
        openai_ids.load(path, sha256=hashlib.sha256(line).hexdigest())
