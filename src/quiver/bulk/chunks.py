"""Lines in chunks, with a digest of all that was read: by it a later run knows that it reads the same lines again."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from quiver.bulk.lines import Bad, Line
from quiver.errors import Refused

MAX_LINES = 256
MAX_CHARACTERS = 16_384
"""Some twenty batches of a CPU's."""
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """How far a run has read: lines, bad ones included, and a digest of what stood in them."""

    num_lines: int = 0
    digest: str = hashlib.blake2b(digest_size=DIGEST_BYTES).hexdigest()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines that follow each other, and the place behind them."""

    items: Sequence[Line | Bad]
    end: Place
    done_bytes: int
    """Of the files, when it was read."""

    @property
    def lines(self) -> Sequence[Line]:
        """Those that are not bad."""
        return [item for item in self.items if isinstance(item, Line)]


class Chunks:
    """Reads chunks from lines; blocks."""

    def __init__(self, items: Iterable[Line | Bad], done_bytes: Callable[[], int] = lambda: 0) -> None:
        self._items = iter(items)
        self._done_bytes = done_bytes
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._num_lines = 0

    def next(self) -> Chunk | None:
        """Return the next chunk; None is the end."""
        items: list[Line | Bad] = []
        characters = 0
        for item in self._items:
            items.append(item)
            characters += len(item[2])
            if len(items) == MAX_LINES or characters >= MAX_CHARACTERS:
                break
        if not items:
            return None
        self._note(items)
        return Chunk(items, self.place, self._done_bytes())

    def skip(self, to: Place) -> None:
        """Read up to a place. Raises `Refused` where other lines stand before it."""
        while left := to.num_lines - self._num_lines:
            items = list(islice(self._items, min(left, MAX_LINES)))
            self._note(items)
            if not items:
                break
        if self.place != to:
            raise Refused(
                f"the first {to.num_lines:,} lines are not those that the output was begun with: give the same files "
                "(what comes later may have changed), or start anew with --overwrite"
            )

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self._num_lines, self._digest.hexdigest())

    def _note(self, items: Sequence[Line | Bad]) -> None:
        parts = [f"{type(i).__name__}{len(i[2])} {i.id if isinstance(i, Line) else ''!r} {i[2]}" for i in items]
        self._digest.update("".join(parts).encode("utf-8", "surrogatepass"))
        self._num_lines += len(items)
