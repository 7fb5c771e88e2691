"""Input files cut into partitions that can be read, done and written each by itself, and done again with the same bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from quiver.bulk.lines import Bad, Columns, Line
from quiver.bulk.parquet import ParquetRows, group_sizes
from quiver.bulk.sources import READERS, InputForm, RawLines, input_form_of
from quiver.errors import ConfigError
from quiver.scale.storage import Location

SPLIT: frozenset[str] = frozenset({"txt", "jsonl"})
"""Formats in which each end of line ends a row; in CSV a row may hold some."""
MAX_PARTITION_BYTES = 8 << 20
MIN_PARTITION_BYTES = 1 << 20
"""Each costs some tenths of a second besides its work."""
PARTITIONS = 64
"""That so many are made of a small input keeps all actors busy to the end."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of one file: bytes of lines, or row groups of Parquet."""

    number: int
    file: str
    form: InputForm
    start: int
    stop: int
    num_bytes: int

    @property
    def name(self) -> str:
        """What its output is called, without an ending."""
        return f"part-{self.number:05}"


def cut(files: Sequence[str], form: str | None, partition_bytes: int = 0) -> list[Partition]:
    """Cut files into partitions of about so many bytes; 0: as many as there should be. Raises `ConfigError` or `Refused`."""
    sizes = {file: Location(file).size() for file in files}
    if len(sizes) < len(files):
        raise ConfigError("a file is named twice: name each once")
    if not partition_bytes:
        partition_bytes = min(MAX_PARTITION_BYTES, max(MIN_PARTITION_BYTES, sum(sizes.values()) // PARTITIONS))
    parts = [
        (file, kind, *part)
        for file, size in sizes.items()
        for kind in [input_form_of(PurePosixPath(file), form)]
        for part in _parts(file, kind, size, partition_bytes)
    ]
    return [Partition(number, *part) for number, part in enumerate(parts)]


def _parts(file: str, form: InputForm, size: int, most: int) -> Iterator[tuple[int, int, int]]:
    if form == "parquet":
        yield from _groups(group_sizes(Location(file).open(), file), most)
    elif form in SPLIT:
        yield from ((start, min(start + most, size), min(most, size - start)) for start in range(0, size, most))
    else:
        yield (0, size, size)


def _groups(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    start, held = 0, 0
    for number, (_, num_bytes) in enumerate(sizes):
        held += num_bytes
        if held >= most or number == len(sizes) - 1:
            yield start, number + 1, held
            start, held = number + 1, 0


class PartOfLines(RawLines):
    """The lines that begin in a part of a file; their numbers count from its beginning."""

    def __init__(self, name: str, file: BinaryIO, start: int, stop: int) -> None:
        super().__init__(name, file)
        self._limit = stop - start
        if start:
            file.seek(start - 1)
            self._skipped = len(file.readline()) - 1  # the rest of a line that the part before has
        else:
            self._skipped = 0

    def __iter__(self) -> Iterator[bytes]:
        if self._skipped >= self._limit:
            return
        for raw in super().__iter__():
            yield raw
            if self._skipped + self.done_bytes >= self._limit:
                return


def read(partition: Partition, columns: Columns) -> Iterator[Line | Bad]:
    """Read a partition. Raises `Refused` or `BadLine`."""
    with Location(partition.file).open() as file:
        if partition.form == "parquet":
            groups = list(range(partition.start, partition.stop))
            yield from ParquetRows(partition.file, columns, source=file, groups=groups)
            return
        name = partition.file if not partition.start else f"{partition.file} behind byte {partition.start}"
        lines: Any = PartOfLines(name, file, partition.start, partition.stop)
        yield from READERS[partition.form](lines, columns)
