"""Parquet, in and out: the only file that knows its format.

A Parquet file cannot be appended to, for its end tells where everything is. So rows go to a stream of Arrow's first
(OUT.part), which can; at the end it is written as Parquet in groups of a fixed number of rows, so that the bytes do not
tell where a run was interrupted.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from quiver.bulk.files import AppendFile, sync_file
from quiver.bulk.lines import Bad, BadLine, Columns, Id, Line, OutputFailed, Rows
from quiver.errors import MissingExtra, Refused

_ROWS_AT_ONCE = 1024
_BUFFER_BYTES = 1 << 20
_MAX_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 << 20


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415  an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtra("parquet", "Parquet") from error
    return pa, parquet


def group_sizes(source: Any, name: str) -> list[tuple[int, int]]:
    """Return rows and bytes of each row group of a Parquet file. Raises `MissingExtra` or `Refused`."""
    _, parquet = _arrow()
    try:
        about = parquet.ParquetFile(source).metadata
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read {name} as Parquet: {error}") from error
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


class ParquetRows:
    """The rows of a Parquet file, a part of a row group at a time; of all of its row groups, or some."""

    def __init__(
        self, path: Path | str, columns: Columns, *, source: Any = None, groups: Sequence[int] | None = None
    ) -> None:
        """`source` is an open file where there is no path to it. Raises `MissingExtra`, `Refused` or `BadLine`."""
        self.done_bytes = 0
        self._groups = groups
        self._name = str(path)
        self._columns = columns
        self._arrow, parquet = _arrow()
        try:
            self._file = parquet.ParquetFile(source or path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise Refused(f"cannot read {path} as Parquet: {error}") from error
        self._size = 0 if source else Path(path).stat().st_size
        self._names = [columns.text, *([columns.id] if columns.id is not None else [])]
        for name in self._names:
            if name not in self._file.schema_arrow.names:
                there = ", ".join(map(repr, self._file.schema_arrow.names[:8]))
                raise BadLine(f"{path}: there is no column {name!r}, but {there}")

    def __iter__(self) -> Iterator[Line | Bad]:
        about = self._file.metadata
        number = sum(about.row_group(i).num_rows for i in range(self._groups[0])) if self._groups else 0
        total = max(1, about.num_rows)
        try:
            for batch in self._file.iter_batches(
                _ROWS_AT_ONCE, row_groups=self._groups, columns=self._names, use_threads=False
            ):
                texts, ids = self._values(batch)
                for text, line_id in zip(texts, ids, strict=True):
                    number += 1
                    yield self._columns.line(self._name, number, text, line_id)
                self.done_bytes = self._size * number // total
        except (OSError, self._arrow.ArrowException, UnicodeDecodeError) as error:
            raise BadLine(f"{self._name}: the file is damaged behind row {number}: {error}") from error
        finally:
            self._file.close()

    def _values(self, batch: Any) -> tuple[Sequence[object], Sequence[object]]:
        texts = batch.column(self._columns.text).to_pylist()
        ids = batch.column(self._columns.id).to_pylist() if self._columns.id is not None else [None] * len(texts)
        return texts, ids


class ParquetSink:
    """Columns `id` (where there are ids), `text` and `embedding`, a list of fixed size of float32."""

    def __init__(self, part: Path, sizes: Mapping[str, int], *, dimensions: int, has_ids: bool) -> None:
        """Raises `MissingExtra`."""
        self._arrow, self._parquet = _arrow()
        self._part = part
        self._file = AppendFile(part, sizes.get("part", 0))
        self._dimensions = dimensions
        self._has_ids = has_ids
        self._schema: Any = None
        if self._file.size:
            with self._arrow.OSFile(str(part)) as source:
                self._schema = self._arrow.ipc.read_schema(source)

    def write(self, rows: Rows) -> None:
        """Append rows. Raises `BadLine` for an id of another kind than those before it."""
        if self._schema is None:
            self._schema = self._schema_for(rows.lines[0].id)
            self._file.write(self._schema.serialize())
        arrow = self._arrow
        numbers = arrow.array(np.ascontiguousarray(rows.vectors, np.float32).reshape(-1))
        columns = {
            "text": arrow.array([line.text for line in rows.lines], arrow.string()),
            "embedding": arrow.FixedSizeListArray.from_arrays(numbers, self._dimensions),
        }
        if self._has_ids:
            columns["id"] = arrow.array(self._ids(rows.lines), self._schema.field("id").type)
        batch = arrow.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        self._file.write(batch.serialize())

    def sync(self) -> dict[str, int]:
        """Return the size of the part, once it is on the disk."""
        return {"part": self._file.sync()}

    def finish(self, whole: Path) -> None:
        """Write the Parquet file, and wait until it is on the disk."""
        arrow, group_rows = self._arrow, max(1, min(_MAX_GROUP_ROWS, _GROUP_BYTES // (4 * self._dimensions)))
        self._file.sync()
        try:
            with arrow.OSFile(str(self._part)) as source, arrow.ipc.open_stream(source) as stream:
                options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
                with self._parquet.ParquetWriter(whole, stream.schema, **options) as writer:
                    for group in _groups(arrow, iter(stream), group_rows):
                        writer.write_table(group, row_group_size=group_rows)
        except OSError as error:
            raise OutputFailed(f"cannot write {whole}: {error.strerror or error}") from error
        sync_file(whole)

    def close(self) -> None:
        """Close the part."""
        self._file.close()

    def _schema_for(self, line_id: Id | None) -> Any:
        arrow = self._arrow
        kind = arrow.int64() if isinstance(line_id, int) else arrow.string()
        vector = arrow.list_(arrow.field("item", arrow.float32(), nullable=False), self._dimensions)
        fields = [("id", kind)] if self._has_ids else []
        return arrow.schema(
            [arrow.field(*f, nullable=False) for f in [*fields, ("text", arrow.string()), ("embedding", vector)]]
        )

    def _ids(self, lines: Sequence[Line]) -> list[Id | None]:
        kind = int if self._schema.field("id").type == self._arrow.int64() else str
        for line in lines:
            if not isinstance(line.id, kind):
                other = "texts and whole numbers: a column of Parquet has one kind; write jsonl, or make them alike"
                raise BadLine(f"{line.file}:{line.number}: the ids are {other}")
        return [line.id for line in lines]


def _groups(arrow: Any, batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Cut batches of any size into tables of so many rows; the last one has what is left."""
    held = None
    while part := list(islice(batches, 16)):
        table = arrow.Table.from_batches(part)
        held = table if held is None else arrow.concat_tables([held, table])
        while len(held) >= rows:
            yield held.slice(0, rows).combine_chunks()
            held = held.slice(rows)
    if held is not None and len(held):
        yield held.combine_chunks()
