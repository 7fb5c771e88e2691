"""In what order tickets are taken: first come, first served, as far as nobody takes more than a share.

    stamp of a ticket    when its request came, and a little later for each input before it: a request is due at half
                         the speed, so a big one leaves room between its inputs for what comes after it
    key of a caller      the stamp of its next ticket; if it has had more than half the speed lately, later than that

The smallest key is next. So requests of the usual size are answered in the order in which they came, which is what
keeps their deadlines; one of two thousand inputs lets a single one pass at once; and no caller starves another.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

PACE = 2
"""The part of the speed, as one in so many, at which a request, and a caller, is due."""
MAX_AHEAD_SECONDS = 1.0
"""Whoever had all of an idle model pays for it no longer than this once others come."""


class Line(Generic[T]):
    """One caller's items by their stamps, and until when its share is used."""

    __slots__ = ("clock", "items")

    def __init__(self) -> None:
        self.items: list[tuple[float, int, T]] = []
        self.clock = -math.inf

    @property
    def key(self) -> float:
        """When it is due."""
        return max(self.clock, self.items[0][0])


class Turns(Generic[T]):
    """Lines of callers that take turns by their keys."""

    def __init__(self, is_gone: Callable[[T], bool] = lambda _: False) -> None:
        """Drop what `is_gone` says of when it comes first."""
        self._is_gone = is_gone
        self._lines: dict[str, Line[T]] = {}
        self._keys: list[tuple[float, int, str]] = []
        """A heap of keys; one that is no longer its caller's is dropped when it comes first."""
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def push(self, item: T, caller: str, stamp: float) -> None:
        """Put an item in its caller's line."""
        line = self._lines.setdefault(caller, Line())
        heapq.heappush(line.items, (stamp, next(self._numbers), item))
        if line.items[0][2] is item:
            self._note(caller, line)

    def pop(self) -> T | None:
        """Take the item that is due next; None if there is none."""
        if (caller := self._first()) is None:
            return None
        return self._drop_head(caller, self._lines[caller])

    def charge(self, caller: str, stamp: float, seconds: float, now: float) -> None:
        """Count what a caller has had for an item of that stamp: its next one is due no sooner than its share allows."""
        if line := self._lines.get(caller):
            line.clock = min(max(line.clock, stamp) + PACE * seconds, now + MAX_AHEAD_SECONDS)
            self._note(caller, line)

    def lag(self, caller: str, now: float) -> float:
        """Return how long ago that was due which comes before a new item of a caller: its own, or anybody's."""
        while (line := self._lines.get(caller)) and self._is_gone(line.items[0][2]):
            self._drop_head(caller, line)
        if line:
            return max(0.0, now - line.items[0][0])
        first = self._first()
        return 0.0 if first is None else max(0.0, now - self._lines[first].key)

    def first_stamp(self) -> float | None:
        """Return the smallest stamp of all lines' first items; looks at every caller."""
        heads = [line.items[0] for line in self._lines.values()]
        return min([stamp for stamp, _, item in heads if not self._is_gone(item)], default=None)

    def _first(self) -> str | None:
        """Return the caller whose key is the smallest; drop items that are gone, and keys that hold no longer."""
        while self._keys:
            key, _, caller = self._keys[0]
            line = self._lines.get(caller)
            if line is None or line.key != key:
                heapq.heappop(self._keys)
            elif self._is_gone(line.items[0][2]):
                self._drop_head(caller, line)
            else:
                return caller
        return None

    def _drop_head(self, caller: str, line: Line[T]) -> T:
        _, _, item = heapq.heappop(line.items)
        if line.items:
            self._note(caller, line)
        else:
            del self._lines[caller]
        return item

    def _note(self, caller: str, line: Line[T]) -> None:
        """Let a caller's key be known, at each change of it."""
        heapq.heappush(self._keys, (line.key, next(self._numbers), caller))
