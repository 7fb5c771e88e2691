"""Files of vectors: JSON lines and NumPy's arrays. Parquet has a file of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import orjson

from quiver.bulk.files import AppendFile
from quiver.bulk.lines import Rows
from quiver.bulk.parquet import ParquetSink
from quiver.errors import ConfigError

OutputForm = Literal["jsonl", "npy", "parquet"]
HEADER_BYTES = 128
"""Of an .npy file; its rows begin behind it, however many they are."""


class Sink(Protocol):
    """Takes rows in their order. Raises `OutputFailed`."""

    def write(self, rows: Rows) -> None:
        """Append rows; at least one."""

    def sync(self) -> dict[str, int]:
        """Return the size of each file, once it is on the disk."""

    def finish(self, whole: Path) -> None:
        """Make the whole output of what was written, as `whole`, which may be the part itself."""

    def close(self) -> None:
        """Let go of the files."""


class JsonlSink:
    """An object a line: `id` where there are ids, `text`, `embedding` (the shortest digits that give the float32)."""

    def __init__(self, part: Path, sizes: Mapping[str, int], *, dimensions: int, has_ids: bool) -> None:
        del dimensions
        self._file = AppendFile(part, sizes.get("part", 0))
        self._has_ids = has_ids

    def write(self, rows: Rows) -> None:
        """Append rows."""
        ids = [{"id": line.id} for line in rows.lines] if self._has_ids else [{}] * len(rows.lines)
        options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        objects = zip(rows.lines, rows.vectors, ids, strict=True)
        written = [orjson.dumps({**i, "text": line.text, "embedding": v}, option=options) for line, v, i in objects]
        self._file.write(b"".join(written))

    def sync(self) -> dict[str, int]:
        """Return the size of the part."""
        return {"part": self._file.sync()}

    def finish(self, whole: Path) -> None:
        """Do nothing: the part is the whole."""

    def close(self) -> None:
        """Close the part."""
        self._file.close()


class NpySink:
    """One array (N, D) of float32; ids go into a file beside it, one JSON value a line."""

    def __init__(self, part: Path, sizes: Mapping[str, int], *, dimensions: int, has_ids: bool) -> None:
        self._dimensions = dimensions
        self._file = AppendFile(part, sizes.get("part", 0))
        self._ids = AppendFile(ids_beside(part), sizes.get("ids", 0)) if has_ids else None
        if not self._file.size:
            self._file.write(npy_header(0, dimensions))

    def write(self, rows: Rows) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(rows.vectors, "<f4").tobytes())
        if self._ids:
            self._ids.write(b"".join([orjson.dumps(line.id) + b"\n" for line in rows.lines]))

    def sync(self) -> dict[str, int]:
        """Return the size of the part, and of the ids."""
        return {"part": self._file.sync()} | ({"ids": self._ids.sync()} if self._ids else {})

    def finish(self, whole: Path) -> None:
        """Say in the header how many rows there are."""
        del whole
        num_rows = (self._file.size - HEADER_BYTES) // (4 * self._dimensions)
        self._file.put(npy_header(num_rows, self._dimensions))
        self._file.sync()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._ids:
            self._ids.close()


def npy_header(num_rows: int, dimensions: int) -> bytes:
    """Return the header of an array (N, D) of float32: version 1.0, always of the same size."""
    about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({num_rows}, {dimensions}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + about.encode().ljust(HEADER_BYTES - 11) + b"\n"


def ids_beside(part: Path) -> Path:
    """Return where the ids of an .npy file go: OUT.ids.jsonl."""
    return part.with_name(part.name.removesuffix(".part") + ".ids.jsonl")


SINKS: Mapping[str, Callable[..., Sink]] = {"jsonl": JsonlSink, "npy": NpySink, "parquet": ParquetSink}

GROWING = frozenset({"jsonl", "npy"})
"""Formats whose part becomes the output as it is."""


def form_of(output: Path, form: str | None) -> str:
    """Return the format of an output by its name, or as it is asked for. Raises `ConfigError`."""
    name = form or {".ndjson": "jsonl"}.get(output.suffix.lower(), output.suffix.lower().removeprefix("."))
    if name not in get_args(OutputForm):
        what = f"no output is called {form!r}" if form else f"{output} does not show its format"
        raise ConfigError(f"{what}: give --output-format {', '.join(get_args(OutputForm))}")
    return name
