"""Hidden states of packed tokens to one vector per input, each sum in a fixed order.

T tokens, B inputs, H hidden.
"""

import numpy as np

from quiver.types import Floats, Ints, Pooling


def pool(hidden: Floats, cu_seqlens: Ints, how: Pooling) -> Floats:
    """(T, H) hidden states -> (B, H)."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    match how:
        case "mean":
            # Row after row: a sum in vector lanes would move its last bit with the input's place in the batch.
            sums: Floats = np.add.reduceat(hidden, starts, axis=0)
            counts: Floats = (ends - starts).astype(np.float32)[:, None]
            return sums / counts
        case "cls":
            return hidden[starts]
        case "last_token":
            return hidden[ends - 1]


def normalise(vectors: Floats) -> Floats:
    """Scale each row of (B, D) to unit length; a row of zeros stays."""
    lengths = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    unit: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit


def largest_logits(logits: Floats, cu_seqlens: Ints) -> Floats:
    """(T, V) logits of words -> (B, V), the largest over the tokens of each input."""
    largest: Floats = np.maximum.reduceat(logits, cu_seqlens[:-1], axis=0)
    return largest


def word_weights(largest: Floats) -> Floats:
    """(B, V) largest logits -> weights as SPLADE has them: the largest log(1 + relu(logit)); both functions rise."""
    weights: Floats = np.log1p(np.maximum(largest, np.float32(0)))
    return weights
