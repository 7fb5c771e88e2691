"""Inputs laid end to end: pure functions, no clock, no locks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quiver.types import Encoding, PackedBatch


@dataclass(frozen=True, slots=True)
class Budget:
    """How much goes into one forward pass."""

    max_tokens: int
    padded: bool = False
    """The backend pads inside itself: a batch then costs its count times its longest input."""
    max_inputs: int = sys.maxsize

    def fits(self, count: int, longest: int, total: int) -> bool:
        """Tell whether `count` inputs of `total` tokens, the longest of `longest`, are within the budget."""
        return count <= self.max_inputs and (count * longest if self.padded else total) <= self.max_tokens

    def is_full(self, count: int, total: int) -> bool:
        """Tell whether not even the smallest input would fit to `count` of `total` tokens."""
        return count >= self.max_inputs or total >= self.max_tokens


def pack(encodings: Sequence[Encoding]) -> PackedBatch:
    """Lay encodings end to end."""
    if len(encodings) == 1:
        return _alone(encodings[0])
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))  # (B,)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    return PackedBatch(
        ids=np.concatenate([e.ids for e in encodings]),
        positions=positions,
        type_ids=np.concatenate([np.zeros(len(e), np.int64) if e.type_ids is None else e.type_ids for e in encodings]),
        cu_seqlens=cu_seqlens,
        per_token=any(e.per_token for e in encodings),
    )


def _alone(encoding: Encoding) -> PackedBatch:
    """Lay one encoding: who waits for a text alone counts microseconds."""
    size = len(encoding)
    return PackedBatch(
        ids=encoding.ids,
        positions=np.arange(size),
        type_ids=np.zeros(size, np.int64) if encoding.type_ids is None else encoding.type_ids,
        cu_seqlens=np.array([0, size]),
        per_token=encoding.per_token,
    )
