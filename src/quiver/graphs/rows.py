"""Attention rows: a packed batch laid into a few rows of equal length, so that scores are not computed between all of it.

Linear layers take the batch as it is, T tokens; attention alone runs over C rows of L cells. Inputs share a row where
that is cheaper, and then a mask keeps them apart.

    lengths 100, 60, 32  ->  row 0: 100 tokens           instead of one row of 192:
                             row 1: 60 + 32 + 8 empty     2 × 100² scores for each head, not 192²

Products add up their terms in blocks, and the last bit of a sum shows where a block ends within it. So an input that
would straddle two blocks of its row begins with the second: it is then divided as it is when it is alone.
"""

from dataclasses import dataclass

import numpy as np

from quiver.types import Ints

MAX_ROWS = 8
MOVE_COST = 40
"""Moving a cell in and out of its row costs as much as this many scores (measured)."""
EMPTY = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """Where each token of a batch lies for attention."""

    cells: Ints  # (L, C) the token of each cell; of an empty one, any
    segments: Ints  # (C, L) the input of each cell; EMPTY where there is none
    places: Ints  # (T,) the cell of each token, row after row


def lay_rows(lengths: Ints, block: int) -> Rows:
    """Lay inputs of these many tokens, (B,), into the rows that cost least; products add up `block` keys at a time."""
    sizes = lengths.tolist()
    if len(sizes) == 1:
        return _alone(sizes[0])
    counts = range(1, min(len(sizes), MAX_ROWS) + 1)
    rows, width = min((_balanced(sizes, count, block) for count in counts), key=_cost)
    cells, segments = np.zeros((width, len(rows)), np.int64), np.full((len(rows), width), EMPTY, np.int64)
    places = np.empty(sum(sizes), np.int64)
    starts = np.cumsum([0, *sizes]).tolist()
    for row, inputs in enumerate(rows):
        for i, begin, size in inputs:
            tokens, span = np.arange(starts[i], starts[i + 1]), slice(begin, begin + size)
            cells[span, row], segments[row, span] = tokens, i
            places[tokens] = np.arange(row * width + begin, row * width + begin + size)
    return Rows(cells, segments, places)


def _alone(size: int) -> Rows:
    """Lay one input into a row of its own."""
    tokens = np.arange(size)
    return Rows(tokens[:, None], np.zeros((1, size), np.int64), tokens)


_Row = list[tuple[int, int, int]]
"""Inputs of a row: their index, the cell that they begin in, and their tokens."""


def _balanced(sizes: list[int], count: int, block: int) -> tuple[list[_Row], int]:
    """Share inputs among so many rows: the longest first, each into the row that holds least; and how long that makes them."""
    rows: list[_Row] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = loads.index(min(loads))
        begin = _begin(loads[row], sizes[i], block)
        rows[row].append((i, begin, sizes[i]))
        loads[row] = begin + sizes[i]
    return rows, max(loads)


def _begin(used: int, size: int, block: int) -> int:
    """Return the first free cell from which an input is divided into blocks as it is alone."""
    over = used % block
    return used if over == 0 or over + size <= block else used - over + block


def _cost(laid: tuple[list[_Row], int]) -> int:
    rows, width = laid
    return len(rows) * width * (width + MOVE_COST)
