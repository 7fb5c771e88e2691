"""Attention over packed tokens, in the forms that encoders and decoders have it.

An input's hidden states are the same to the last bit alone and in any company: each operation works row by row in a
fixed order. T tokens, H hidden, A heads of D = H / A; C rows of L cells, as `graphs.rows` lays them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quiver.graphs.builder import MICROSOFT, GraphBuilder

NEVER = -1e9
"""Added to the score of a token that is not seen: its exponential is exactly zero."""
BLOCK = 128
NARROWEST = 16
PART = 512
"""Queries at a time where inputs are long: the scores of 8,192 tokens at once would fill gigabytes."""
LONG = 1024
"""A model that reads more tokens than this computes its scores in parts."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How the hidden size splits: A heads of D."""

    count: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Which tokens of its own input a token sees, and what their distance adds to their scores."""

    causal: bool = False
    """Only those before it, and itself."""
    window: int | None = None
    """Only those at most so many tokens away."""
    slopes: NDArray[Any] | None = None  # (A,)
    """Each head's score falls by its slope with each token of distance (ALiBi, Press et al. 2021)."""
    by_distance: NDArray[Any] | None = None  # (2 N - 1, A)
    """What each head's score gains at the distance d of a key from its query, in row N - 1 + d."""

    @property
    def is_plain(self) -> bool:
        """Whether every token sees all others alike."""
        return not self.causal and self.window is None and self.slopes is None and self.by_distance is None


PLAIN = Pattern()


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """How a layer attends."""

    heads: Heads
    pattern: Pattern = PLAIN
    long: bool = False
    """Inputs may be so long that scores are computed in parts."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of some rows: the input of each, and its place in that input; (C, L) both."""

    segments: str
    positions: str | None


def attention(g: GraphBuilder, query: str, key: str, value: str, how: Attention) -> str:
    """(T, H) queries, keys and values -> (T, H).

    The softmax is an exponential over values that are extended by a column of ones: numerator and denominator come
    from one product that adds key after key, in which the tokens of other inputs are exact zeros. A fused Softmax
    sums in vector lanes, so its last bit would depend on where in the row an input stands.
    """
    heads = how.heads
    g.key_block = min(g.key_block, key_block(heads.size + 1))
    query, key, value = (_to_rows(g, x, heads) for x in (query, key, value))  # (L, C, A, D)
    value = g.op("Concat", value, _ones(g, heads.count), axis=-1)  # (L, C, A, D + 1)
    if how.long:
        return _attention_in_parts(g, query, key, value, how)
    cells = _cells(g, how.pattern)
    mixed = _mix(g, query, key, value, _bias(g, how.pattern, cells, cells), heads.size)
    return _from_rows(g, g.op("Transpose", mixed, perm=[0, 2, 1, 3]), heads)


def key_block(width: int) -> int:
    """Return how many terms ONNX Runtime's products add up at a time, where the result is so wide.

    It keeps square blocks of the right-hand matrix at hand, and makes them longer where that one is narrow.
    """
    columns, rows = BLOCK, BLOCK
    while columns > NARROWEST and columns // 2 >= width:
        columns, rows = columns // 2, rows * 2
    return rows


def _mix(g: GraphBuilder, query: str, key: str, value: str, bias: str, size: int) -> str:
    """Let queries (P, C, A, D) look at keys (L, C, A, D), values (L, C, A, D + 1) -> (C, A, P, D)."""
    # transBatch reads the heads where they lie instead of a transposed copy.
    scores = g.op("FusedMatMul", query, key, domain=MICROSOFT, transBatchA=1, transBatchB=1, transB=1)  # (C, A, P, L)
    scores = g.op("Add", scores, bias)
    weights = g.op("Exp", g.op("Sub", scores, g.op("ReduceMax", scores, axes=[-1], keepdims=1)))
    sums = g.op("FusedMatMul", weights, value, domain=MICROSOFT, transBatchB=1)  # (C, A, P, D + 1)
    mixed, total = g.ops("Split", [sums, g.ints(size, 1)], 2, axis=-1)
    return g.op("Div", mixed, total)


def _attention_in_parts(g: GraphBuilder, query: str, key: str, value: str, how: Attention) -> str:
    """As many queries at a time as a part has -> (T, H)."""
    heads, cells = how.heads, _cells(g, how.pattern)
    length = g.op("Gather", g.op("Shape", g.input("cells", "L", "C")), g.constant(np.int64(0)))
    part = g.op("Min", length, g.constant(np.int64(PART)))
    # Every part must have the same shape: the last one is filled up.
    count = g.op("Div", g.op("Sub", g.op("Add", length, part), g.constant(np.int64(1))), part)
    missing = g.op("Sub", g.op("Mul", count, part), length)
    query = _filled(g, query, missing, axis=0)
    segments = _filled(g, cells.segments, missing, axis=1)
    positions = cells.positions and _filled(g, cells.positions, missing, axis=1)

    def compute(inner: GraphBuilder, index: str) -> str:
        start = inner.op("Mul", index, part)
        mine = Cells(
            _part(inner, segments, start, part, axis=1), positions and _part(inner, positions, start, part, axis=1)
        )
        bias = _bias(inner, how.pattern, mine, cells)
        return _mix(inner, _part(inner, query, start, part, axis=0), key, value, bias, heads.size)

    mixed = g.op("Transpose", g.loop(count, compute), perm=[1, 0, 3, 2, 4])  # (C, parts, P, A, D)
    rows = g.op("Reshape", mixed, _concat(g, g.ints(0), g.op("Mul", count, part), g.ints(heads.count, heads.size)))
    return _from_rows(g, _part(g, rows, g.constant(np.int64(0)), length, axis=1), heads)


def _bias(g: GraphBuilder, pattern: Pattern, queries: Cells, keys: Cells) -> str:
    """What is added to the scores, (C, 1 or A, P, L): NEVER between two inputs, and what the pattern says."""
    seen = g.op("Equal", _as_keys(g, keys.segments), _as_queries(g, queries.segments))
    if g.unseen is not None:
        tokens = g.op("Transpose", g.op("Gather", g.input("ids", "T"), g.input("cells", "L", "C")), perm=[1, 0])
        ordinary = g.op("Not", g.op("Equal", tokens, g.constant(np.int64(g.unseen))))  # (C, L)
        seen = g.op("And", seen, _as_keys(g, ordinary))
    if pattern.is_plain:
        return g.op("Where", seen, g.scalar(0), g.scalar(NEVER))
    assert queries.positions is not None
    assert keys.positions is not None
    distance = g.op("Sub", _as_keys(g, keys.positions), _as_queries(g, queries.positions))  # (C, 1, P, L)
    if pattern.causal:
        seen = g.op("And", seen, g.op("LessOrEqual", distance, g.constant(np.int64(0))))
    if pattern.window is not None:
        near = g.op("LessOrEqual", g.op("Abs", distance), g.constant(np.int64(pattern.window)))
        seen = g.op("And", seen, near)
    bias = g.op("Where", seen, g.scalar(0), g.scalar(NEVER))
    if pattern.slopes is not None:
        falls = g.constant(-pattern.slopes.astype(np.float32).reshape(1, -1, 1, 1))
        bias = g.op("Add", bias, g.op("Mul", g.op("Cast", g.op("Abs", distance), to=1), falls))
    if pattern.by_distance is not None:
        bias = g.op("Add", bias, _gains(g, distance, pattern.by_distance))
    return bias


def _gains(g: GraphBuilder, distance: str, table: NDArray[Any]) -> str:
    """(C, 1, P, L) distances -> (C, A, P, L), as the table has them."""
    furthest = np.int64(len(table) // 2)
    # Cells of two inputs are at any distance; they are not seen, but must have a row.
    row = g.op("Add", g.op("Clip", distance, g.constant(-furthest), g.constant(furthest)), g.constant(furthest))
    gains = g.op("Gather", g.weight("distances", table), g.op("Squeeze", row, g.ints(1)))  # (C, P, L, A)
    return g.op("Transpose", gains, perm=[0, 3, 1, 2])


def _as_keys(g: GraphBuilder, cells: str) -> str:
    """(C, L) -> (C, 1, 1, L)."""
    return g.op("Unsqueeze", cells, g.ints(1, 2))


def _as_queries(g: GraphBuilder, cells: str) -> str:
    """(C, P) -> (C, 1, P, 1)."""
    return g.op("Unsqueeze", cells, g.ints(1, 3))


def _cells(g: GraphBuilder, pattern: Pattern) -> Cells:
    segments = g.input("segments", "C", "L")
    if pattern.is_plain:
        return Cells(segments, None)
    positions = g.op("Gather", g.input("positions", "T"), g.input("cells", "L", "C"))
    return Cells(segments, g.op("Transpose", positions, perm=[1, 0]))


def _to_rows(g: GraphBuilder, x: str, heads: Heads) -> str:
    """(T, H) -> (L, C, A, D)."""
    cells = g.input("cells", "L", "C")
    shape = g.op("Concat", g.op("Shape", cells), g.ints(heads.count, heads.size), axis=0)
    return g.op("Reshape", g.op("Gather", x, cells), shape)


def _from_rows(g: GraphBuilder, x: str, heads: Heads) -> str:
    """(C, L, A, D) -> (T, H)."""
    cells = g.op("Reshape", x, g.ints(-1, heads.count * heads.size))
    return g.op("Gather", cells, g.input("places", "T"))


def _ones(g: GraphBuilder, heads: int) -> str:
    """(L, C, A, 1) ones."""
    shape = g.op("Concat", g.op("Shape", g.input("cells", "L", "C")), g.ints(heads, 1), axis=0)
    return g.op("Expand", g.scalar(1), shape)


def _filled(g: GraphBuilder, x: str, missing: str, *, axis: int) -> str:
    """Lengthen one axis by repeating what it begins with; `missing` is less than its length."""
    return g.op("Concat", x, _part(g, x, g.constant(np.int64(0)), missing, axis=axis), axis=axis)


def _part(g: GraphBuilder, x: str, start: str, size: str, *, axis: int) -> str:
    """Take `size` items of one axis from `start` on; both are scalars."""
    end = g.op("Add", start, size)
    one = g.ints(0)
    return g.op("Slice", x, g.op("Unsqueeze", start, one), g.op("Unsqueeze", end, one), g.ints(axis))


def _concat(g: GraphBuilder, before: str, scalar: str, after: str) -> str:
    """Join lists and a scalar between them into one list."""
    return g.op("Concat", before, g.op("Unsqueeze", scalar, g.ints(0)), after, axis=0)


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Angles by which the halves of a head are turned, by position (Su et al. 2021)."""

    name: str
    cos: NDArray[np.float32]  # (P, D / 2)
    sin: NDArray[np.float32]

    @classmethod
    def of(cls, positions: int, size: int, base: float, name: str = "rotary") -> "Rotary":
        """Return the angles of so many positions for heads of a size."""
        # In float32 throughout, as transformers computes them, so that is what models were trained with.
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        return cls.with_frequencies(positions, 1 / np.float32(base) ** exponents, name)

    @classmethod
    def with_frequencies(cls, positions: int, frequencies: NDArray[Any], name: str = "rotary") -> "Rotary":
        """Return the angles for frequencies of one's own, (D / 2,)."""
        angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
        return cls(name, np.cos(angles), np.sin(angles))


def rotate(g: GraphBuilder, x: str, heads: Heads, angles: Rotary) -> str:
    """(T, A, D) -> (T, A, D), turned by each token's position."""
    return turn(g, x, heads, *look_up(g, angles))


def look_up(g: GraphBuilder, angles: Rotary) -> tuple[str, str]:
    """Take the cosines and the sines of each token's position, (T, D / 2) both."""
    positions = g.input("positions", "T")
    cos, sin = g.weight(f"{angles.name}.cos", angles.cos), g.weight(f"{angles.name}.sin", angles.sin)
    return g.op("Gather", cos, positions), g.op("Gather", sin, positions)


def turn(g: GraphBuilder, x: str, heads: Heads, cos: str, sin: str) -> str:
    """(T, A, D) -> (T, A, D), turned by the angles of these cosines and sines, (T, D / 2)."""
    cos, sin = (g.op("Unsqueeze", each, g.ints(1)) for each in (cos, sin))  # (T, 1, D / 2)
    half = heads.size // 2
    first, second = g.ops("Split", [x, g.ints(half, half)], 2, axis=-1)
    turned_first = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    turned_second = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    return g.op("Concat", turned_first, turned_second, axis=-1)


def split_heads(g: GraphBuilder, x: str, heads: Heads) -> str:
    """(T, A × D) -> (T, A, D)."""
    return g.op("Reshape", x, g.ints(0, heads.count, heads.size))


def join_heads(g: GraphBuilder, x: str, heads: Heads) -> str:
    """(T, A, D) -> (T, A × D)."""
    return g.op("Reshape", x, g.ints(0, heads.count * heads.size))


def share_heads(g: GraphBuilder, x: str, groups: int, heads: Heads) -> str:
    """(T, groups, D) -> (T, A, D): each key or value head serves A / groups query heads (grouped-query attention)."""
    if groups == heads.count:
        return x
    return g.op("Gather", x, g.ints(*np.repeat(np.arange(groups), heads.count // groups).tolist()), axis=1)
