"""Files of texts: what is read from them, and what is said of a line that is bad."""

import io
import json
import re
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from quiver.bulk.chunks import MAX_LINES, Chunks
from quiver.bulk.lines import Bad, BadLine, Columns, Line
from quiver.bulk.sources import MAX_LINE_BYTES, STDIN, Corpus, RawLines
from quiver.errors import ConfigError, MissingExtra, Refused

TEXTS = ["a first text", 'with, a comma and "quotes"', "über 矢筒", " spaces stay "]


def write(path, texts=TEXTS):
    """Write texts, with ids, in the format that the name says."""
    ids = range(10, 10 + len(texts))
    match path.suffix:
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        case ".jsonl":
            lines = [json.dumps({"text": t, "n": i, "more": [1]}) for t, i in zip(texts, ids, strict=True)]
            path.write_text("\n".join(lines), encoding="utf-8")  # no end of line at the end
        case ".csv":
            rows = [f'{i},"{t.replace(chr(34), chr(34) * 2)}",x' for t, i in zip(texts, ids, strict=True)]
            path.write_text("\r\n".join(["n,text,more", *rows, ""]), encoding="utf-8")
        case ".tsv":
            rows = [f'{i}\t"{t.replace(chr(34), chr(34) * 2)}"' for t, i in zip(texts, ids, strict=True)]
            path.write_text("\n".join(["n\ttext", *rows]), encoding="utf-8")
        case ".parquet":
            parquet.write_table(pa.table({"n": list(ids), "text": texts}), path, row_group_size=3)
    return path


def read(*files, form=None, **columns):
    """Return all lines of files, good and bad."""
    return list(Corpus(files, form, Columns(**columns)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_format_gives_its_texts(tmp_path, suffix):
    """Each format gives the same texts in their order, each with where it stands."""
    file = write(tmp_path / f"a{suffix}")
    lines = read(file)
    assert [line.text for line in lines] == TEXTS
    assert {line.file for line in lines} == {str(file)}
    first = 2 if suffix in {".csv", ".tsv"} else 1
    assert [line.number for line in lines] == list(range(first, first + len(TEXTS)))


@pytest.mark.parametrize(("suffix", "kind"), [(".jsonl", int), (".csv", str), (".tsv", str), (".parquet", int)])
def test_ids_are_carried_over(tmp_path, suffix, kind):
    """An id is of the kind that its format gives it."""
    lines = read(write(tmp_path / f"a{suffix}"), id="n")
    assert [line.id for line in lines] == [kind(i) for i in range(10, 14)]


def test_files_follow_each_other(tmp_path):
    """Several files of several formats are one corpus, and how far it is read is told in bytes of all."""
    files = [write(tmp_path / name) for name in ("a.txt", "b.parquet", "c.csv")]
    corpus = Corpus(files, None, Columns())
    assert [line.text for line in corpus] == TEXTS * 3
    assert corpus.done_bytes == corpus.total_bytes == sum(file.stat().st_size for file in files)


def test_a_format_may_be_named(tmp_path):
    """`--format` is stronger than the suffix, and helps where there is none."""
    file = tmp_path / "noname"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    assert read(file, form="jsonl") == [Line(str(file), 1, "a")]
    assert read(file, form="txt") == [Line(str(file), 1, '{"text": "a"}')]
    with pytest.raises(ConfigError, match="noname does not show its format: give --format txt, jsonl"):
        read(file)
    with pytest.raises(ConfigError, match="no format is called 'xml'"):
        read(file, form="xml")


def test_a_text_of_a_column_of_another_name(tmp_path):
    """The column is looked up by its name; a file that does not have it says what it has."""
    file = tmp_path / "a.csv"
    file.write_text("title,body\none,two\n", encoding="utf-8")
    assert [line.text for line in read(file, text="body")] == ["two"]
    with pytest.raises(BadLine, match=r"a\.csv:1: there is no column 'text', but 'title', 'body'"):
        read(file)
    with pytest.raises(BadLine, match=r"a\.parquet: there is no column 'body', but 'n', 'text'"):
        read(write(tmp_path / "a.parquet"), text="body")


BAD = [
    ("a.txt", b"good\n\xff\xfe\ngood\n", 2, r"not UTF-8 \(byte 1 of the line\)"),
    ("a.txt", b"good\n\ngood\n", 2, "the text is empty; --allow-empty"),
    ("a.txt", b"good\n \t\ngood\n", 2, "the text is empty"),
    ("a.txt", b"good\n" + b"x" * (MAX_LINE_BYTES + 9) + b"\ngood\n", 2, "the line is longer than 16 MiB"),
    ("a.jsonl", b'{"text":"good"}\n{"text":\n{"text":"good"}\n', 2, "not JSON: "),
    ("a.jsonl", b'{"text":"good"}\n["good"]\n{"text":"good"}\n', 2, r'not a JSON object, such as \{"text": …\}'),
    ("a.jsonl", b'{"text":"good"}\n{"txt":"a"}\n{"text":"good"}\n', 2, "has no 'text', but 'txt'"),
    ("a.jsonl", b'{"text":"good"}\n{"text":null}\n{"text":"good"}\n', 2, "'text' is null, not a text"),
    ("a.jsonl", b'{"text":"good"}\n{"text":7}\n{"text":"good"}\n', 2, "'text' is a number, not a text"),
    ("a.jsonl", b'{"text":"good"}\n{"text":"\\ud800"}\n{"text":"good"}\n', 2, "not "),
    ("a.jsonl", b'{"text":"good"}\n\xff\n{"text":"good"}\n', 2, "not UTF-8"),
    ("a.jsonl", b'{"text":"good"}\n' + b"[" * 100_000 + b'\n{"text":"good"}\n', 2, "not JSON: "),
    ("a.csv", b"text,n\ngood,1\n\xff,2\ngood,3\n", 3, "not UTF-8"),
    ("a.csv", b"text,n\ngood,1\nalone\ngood,3\n", 3, "has 1 fields, but the header 2"),
    ("a.csv", b'text,n\ngood,1\n"a"b,2\ngood,3\n', 3, "not CSV: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "number", "why"), BAD)
def test_a_bad_line_is_told_with_its_place(tmp_path, name, content, number, why):
    """A bad line is one of its own, with its number and what is wrong; those around it are read."""
    file = tmp_path / name
    file.write_bytes(content)
    lines = read(file)
    (bad,) = [line for line in lines if isinstance(line, Bad)]
    assert (bad.file, bad.number) == (str(file), number)
    assert re.match(why, bad.why)
    assert [line.text for line in lines if isinstance(line, Line)] == ["good", "good"]


def test_bad_rows_of_parquet(tmp_path):
    """A null is a bad line, a column of numbers gives nothing but bad lines, and junk is no Parquet at all."""
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["good", None, "good"], "n": [1, 2, 3]}), file)
    assert [isinstance(line, Bad) for line in read(file)] == [False, True, False]
    assert read(file)[1] == Bad(str(file), 2, "'text' is null, not a text")
    assert {line.why for line in read(file, text="n")} == {"'n' is a number, not a text"}
    file.write_bytes(b"PAR1 but not for long")
    with pytest.raises(Refused, match=r"cannot read .*a\.parquet as Parquet: "):
        read(file)


def test_ids_that_no_format_keeps(tmp_path):
    """An id is a text or a whole number of 64 bits: another is a bad line, and plain text has none at all."""
    file = tmp_path / "a.jsonl"
    ids = ['"a"', "1", "null", "1.5", "true", str(2**63), "-9223372036854775808"]
    file.write_text("".join(f'{{"text":"t","n":{i}}}\n' for i in ids), encoding="utf-8")
    assert [isinstance(line, Line) for line in read(file, id="n")] == [True, True, False, False, False, False, True]
    with pytest.raises(ConfigError, match="lines of plain text have no ids"):
        read(write(tmp_path / "a.txt"), id="n")


def test_empty_texts_may_be_allowed(tmp_path):
    """With `allow_empty` an empty line of plain text is a text like any other."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\n\n")
    assert [line.text for line in read(file, allow_empty=True)] == ["a", ""]


def test_a_byte_order_mark_is_no_text(tmp_path):
    """What Windows puts before a file is dropped, and only there."""
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbftext\r\na\r\n")
    assert read(file) == [Line(str(file), 2, "a")]


def test_rows_of_several_lines(tmp_path):
    """A quoted field of CSV may have ends of lines in it; the row is told by its first line."""
    file = tmp_path / "a.csv"
    file.write_bytes(b'text\n"one\ntwo"\nthree\n')
    assert read(file) == [Line(str(file), 2, "one\ntwo"), Line(str(file), 4, "three")]


def test_a_file_that_is_not_there(tmp_path):
    """A missing file and a directory are told before anything is read."""
    with pytest.raises(Refused, match=r"cannot read .*a\.txt: No such file"):
        Corpus([tmp_path / "a.txt"], None, Columns())
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(Refused, match="it is a directory"):
        Corpus([tmp_path / "b.txt"], None, Columns())


def test_junk_without_ends_of_lines_fills_no_memory():
    """Of a line that has no end, no more than its bound is ever held."""

    class Endless(io.RawIOBase):
        left = 3 * MAX_LINE_BYTES
        largest = 0

        def readline(self, size=-1):
            self.largest = max(self.largest, size)
            taken = min(size, self.left)
            self.left -= taken
            return b"x" * taken

    file = Endless()
    lines = RawLines("junk", file)
    assert [len(line) for line in lines] == [MAX_LINE_BYTES + 1]
    assert file.largest == MAX_LINE_BYTES + 1
    assert lines.done_bytes == 3 * MAX_LINE_BYTES


def test_standard_input(monkeypatch):
    """`-` is read as plain text, or as it is told; how much there is nobody knows."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    corpus = Corpus([STDIN], "jsonl", Columns())
    assert corpus.total_bytes is None
    assert list(corpus) == [Line("-", 1, "a")]
    with pytest.raises(ConfigError, match="Parquet cannot be read from standard input"):
        Corpus([STDIN], "parquet", Columns())


def test_the_extra_is_named(tmp_path, monkeypatch):
    """Without pyarrow, a Parquet file says what to install; no other format asks for it."""
    files = [write(tmp_path / name) for name in ("a.parquet", "a.csv")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"Parquet needs .*pip install 'quiver\[parquet\]'"):
        read(files[0])
    assert len(read(files[1])) == len(TEXTS)


def lines(*texts):
    """Make lines of texts."""
    return [Line("a", i, text) for i, text in enumerate(texts, 1)]


def test_chunks_are_bounded():
    """A chunk ends by its number of lines or by its characters, and all of them together are the lines."""
    given = lines(*["short"] * (MAX_LINES + 1), "x" * 20_000, "y", "z")
    chunks = Chunks(given)
    taken = list(iter(chunks.next, None))
    assert [len(chunk.items) for chunk in taken] == [MAX_LINES, 2, 2]
    assert [item for chunk in taken for item in chunk.items] == given


def test_a_place_is_found_again():
    """The same lines lead to the same place, in whatever chunks; what comes behind it may differ."""
    chunks = Chunks(lines("a", "b", "c"))
    place = chunks.next().end
    again = Chunks(lines("a", "b", "c", "new"))
    again.skip(place)
    assert again.place == place
    assert [item.text for item in again.next().items] == ["new"]


@pytest.mark.parametrize(
    "other",
    [
        lines("a", "b"),
        lines("a", "b", "d"),
        lines("a", "bc", ""),
        [*lines("a", "b"), Bad("a", 3, "c")],
        [line._replace(id=1) for line in lines("a", "b", "c")],
    ],
)
def test_other_lines_are_seen(other):
    """Negative control: lines that are fewer, others, cut elsewhere, bad, or have other ids lead to no such place."""
    place = Chunks(lines("a", "b", "c")).next().end
    with pytest.raises(Refused, match="the first 3 lines are not those that the output was begun with"):
        Chunks(other).skip(place)
