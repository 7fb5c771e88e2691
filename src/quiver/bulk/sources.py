"""Files of texts, read a line at a time: text, JSON lines, CSV. Parquet has a file of its own."""

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, TypeAlias, cast, get_args

import msgspec

from quiver.bulk import parquet
from quiver.bulk.lines import Bad, BadLine, Columns, Fault, Line
from quiver.errors import ConfigError, Refused

InputForm = Literal["txt", "jsonl", "csv", "tsv", "parquet"]
SUFFIXES: Mapping[str, InputForm] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
STDIN = Path("-")
MAX_LINE_BYTES = 16 << 20
"""A longer line is bad: binary junk has no ends of lines, and must not fill the memory."""
_BOM = b"\xef\xbb\xbf"

Items: TypeAlias = Iterator[Line | Bad]


class RawLines:
    """The lines of a file as bytes, their ends included, and how far it is read."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name = name
        self.number = 0
        """Of the line that was read last."""
        self.done_bytes = 0
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        while raw := self._file.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            self.done_bytes += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                self._skip_rest(raw)
            yield raw.removeprefix(_BOM) if self.number == 1 else raw

    def _skip_rest(self, part: bytes) -> None:
        while part and not part.endswith(b"\n"):
            part = self._file.readline(MAX_LINE_BYTES)
            self.done_bytes += len(part)


class Corpus:
    """All files of a run, one after the other."""

    def __init__(self, files: Sequence[Path], form: str | None, columns: Columns) -> None:
        """Raises `ConfigError` or `Refused` for a file that cannot be read as it is asked for."""
        self._files = [(path, input_form_of(path, form)) for path in files]
        self._columns = columns
        self._before = 0
        self._now: RawLines | parquet.ParquetRows | None = None
        sizes = [None if path == STDIN else _size(path) for path in files]
        self.total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        """None where nobody knows: standard input."""
        if columns.id is not None and any(form == "txt" for _, form in self._files):
            raise ConfigError("lines of plain text have no ids: --id-column is for jsonl, csv and parquet")

    @property
    def done_bytes(self) -> int:
        """How much of `total_bytes` is read."""
        return self._before + (self._now.done_bytes if self._now else 0)

    def __iter__(self) -> Items:
        for path, form in self._files:
            yield from self._read(path, form)
            self._before, self._now = self.done_bytes, None

    def _read(self, path: Path, form: InputForm) -> Items:
        if form == "parquet":
            self._now = parquet.ParquetRows(path, self._columns)
            yield from self._now
            return
        try:
            with _open(path) as file:
                self._now = RawLines(str(path), file)
                yield from READERS[form](self._now, self._columns)
        except OSError as error:
            raise Refused(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb")


def input_form_of(path: PurePath, form: str | None) -> InputForm:
    """Return the format of a file by its name, or as it is asked for. Raises `ConfigError`."""
    name = form or ("txt" if path == STDIN else SUFFIXES.get(path.suffix.lower()))
    if name in get_args(InputForm):
        if name == "parquet" and path == STDIN:
            raise ConfigError("Parquet cannot be read from standard input: give a file")
        return cast("InputForm", name)
    what = f"no format is called {form!r}" if form else f"{path} does not show its format"
    raise ConfigError(f"{what}: give --format {', '.join(get_args(InputForm))}")


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror or error}") from error
    if path.is_dir():
        raise Refused(f"cannot read {path}: it is a directory; name its files (FOLDER/*.jsonl)")
    return size


def _decoded(raw: bytes) -> str:
    """Return a line without its end. Raises `Fault`."""
    if len(raw) > MAX_LINE_BYTES:
        raise Fault(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return raw.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8 (byte {error.start + 1} of the line)") from error


def _read_txt(lines: RawLines, columns: Columns) -> Items:
    for raw in lines:
        try:
            text = _decoded(raw)
        except Fault as fault:
            yield Bad(lines.name, lines.number, str(fault))
        else:
            yield columns.line(lines.name, lines.number, text)


def _read_jsonl(lines: RawLines, columns: Columns) -> Items:
    for raw in lines:
        if raw.isspace():
            continue
        try:
            text, line_id = _fields(raw, columns)
        except Fault as fault:
            yield Bad(lines.name, lines.number, str(fault))
        else:
            yield columns.line(lines.name, lines.number, text, line_id)


def _fields(raw: bytes, columns: Columns) -> tuple[object, object]:
    """Return text and id of a JSON object. Raises `Fault`."""
    try:
        fields = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        _decoded(raw)  # a line that is too long, or not UTF-8, is told as that
        raise Fault(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Fault(f"not a JSON object, such as {{{msgspec.json.encode(columns.text).decode()}: …}}")
    for column in (columns.text, columns.id):
        if column is not None and column not in fields:
            raise Fault(f"has no {column!r}, but {_names(list(fields))}")
    return fields[columns.text], fields[columns.id] if columns.id is not None else None


def _read_csv(lines: RawLines, columns: Columns, delimiter: str = ",") -> Items:
    """Read rows with quotes as RFC 4180 has them; a row's number is that of its first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(_csv_lines(lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = lines.number + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Bad(lines.name, number, f"not CSV: {error}")
            continue
        if header is None:
            header = _header(lines, row, columns)
        elif row:
            yield _row(lines.name, number, header, row, columns)


def _header(lines: RawLines, row: list[str], columns: Columns) -> list[str]:
    """Check that a file has the columns; without them no line of it has. Raises `BadLine`."""
    for column in (columns.text, columns.id):
        if column is not None and column not in row:
            raise BadLine(f"{lines.name}:1: there is no column {column!r}, but {_names(row)}")
    return row


def _row(name: str, number: int, header: list[str], row: list[str], columns: Columns) -> Line | Bad:
    if len(row) != len(header):
        return Bad(name, number, f"has {len(row)} fields, but the header {len(header)}")
    line_id = row[header.index(columns.id)] if columns.id is not None else None
    return columns.line(name, number, row[header.index(columns.text)], line_id)


def _csv_lines(lines: RawLines) -> Iterator[str]:
    """Yield lines as text; what is not UTF-8 is found in the fields, where it spoils no other row."""
    for raw in lines:
        if len(raw) > MAX_LINE_BYTES:
            raise BadLine(f"{lines.name}:{lines.number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        yield raw.decode(errors="surrogateescape")


def _read_tsv(lines: RawLines, columns: Columns) -> Items:
    return _read_csv(lines, columns, "\t")


def _names(names: Sequence[object]) -> str:
    return ", ".join(map(repr, names[:8])) or "nothing"


READERS: Mapping[str, Callable[[RawLines, Columns], Items]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
}
"""How the lines of each format are read."""
