"""The texts of the last chunks, so that one that comes again is not computed again."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from quiver.bulk.lines import Fault
from quiver.types import Floats

MAX_TEXTS = 32_768
MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of some texts: a vector each, or why there is none."""

    vectors: Floats  # (B, D); a row of zeros where there is none
    faults: dict[int, Fault]
    num_tokens: int


Flight: TypeAlias = asyncio.Task[Outcomes]


class Window:
    """Where the vector of a text is, or will be; within a number of texts and of bytes, the oldest chunk goes first."""

    def __init__(self, dimensions: int, *, max_texts: int = MAX_TEXTS, max_bytes: int = MAX_BYTES) -> None:
        self._row_bytes = 4 * dimensions
        self._max_texts = max_texts
        self._max_bytes = max_bytes
        self._seats: dict[str, tuple[Flight, int]] = {}
        self._chunks: deque[tuple[Sequence[str], int]] = deque()
        self._num_bytes = 0

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Return the distinct texts that are not here."""
        return [text for text in dict.fromkeys(texts) if text not in self._seats]

    def add(self, texts: Sequence[str], flight: Flight) -> None:
        """Remember that a flight brings the vectors of these texts, in their order."""
        for row, text in enumerate(texts):
            self._seats[text] = (flight, row)
        size = sum(map(len, texts)) + len(texts) * self._row_bytes
        self._chunks.append((texts, size))
        self._num_bytes += size

    def seats(self, texts: Iterable[str]) -> list[tuple[Flight, int]]:
        """Return for each text its flight and its row."""
        return [self._seats[text] for text in texts]

    def trim(self) -> None:
        """Forget what is too much."""
        while len(self._chunks) > 1 and (len(self._seats) > self._max_texts or self._num_bytes > self._max_bytes):
            texts, size = self._chunks.popleft()
            self._num_bytes -= size
            for text in texts:
                del self._seats[text]
