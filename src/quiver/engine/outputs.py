"""Full-precision vectors to what a client asked for: fewer dimensions, fewer bits, base64.

B inputs, D dimensions. int8 and uint8 are symmetric with a scale for each vector, so that any cosine survives;
binary and ubinary are packed sign bits, in the form that Cohere, Jina and sentence-transformers use.
"""

import base64

import numpy as np
from numpy.typing import NDArray

from quiver.engine.pooling import normalise
from quiver.errors import InvalidInput
from quiver.types import Floats


def cut(vectors: Floats, dimensions: int | None, *, unit_length: bool, layer_norm: bool = False) -> Floats:
    """(B, H) -> (B, dimensions): the Matryoshka cut, scaled to unit length again where the model's vectors have it.

    Models that were trained so have their vectors standardised first (`layer_norm`).
    """
    hidden = vectors.shape[1]
    if dimensions is None or dimensions == hidden:
        return vectors
    if not 1 <= dimensions <= hidden:
        raise InvalidInput(
            f"dimensions is {dimensions}, but this model's vectors have 1 to {hidden}", param="dimensions"
        )
    if layer_norm:
        vectors = vectors - vectors.mean(axis=1, keepdims=True)
        vectors = vectors / np.sqrt((vectors * vectors).mean(axis=1, keepdims=True) + np.float32(1e-5))
    shorter = np.ascontiguousarray(vectors[:, :dimensions])
    return normalise(shorter) if unit_length else shorter


def to_int8(vectors: Floats) -> tuple[NDArray[np.int8], Floats]:
    """(B, D) -> (B, D) integers in -127..127 and (B,) scales: integer × scale is the number again."""
    scales = np.maximum(np.abs(vectors).max(axis=1), np.float32(1e-12)) / np.float32(127)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales


def to_uint8(vectors: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """(B, D) -> (B, D) integers around 128 and (B,) scales: (integer - 128) × scale is the number again."""
    integers, scales = to_int8(vectors)
    return (integers.astype(np.int16) + 128).astype(np.uint8), scales


def to_ubinary(vectors: Floats) -> NDArray[np.uint8]:
    """(B, D) -> (B, ceil(D / 8)): a bit for each number above zero, the first in the highest bit."""
    return np.packbits(vectors > 0, axis=1)


def to_binary(vectors: Floats) -> NDArray[np.int8]:
    """(B, D) -> (B, ceil(D / 8)): `to_ubinary` minus 128."""
    return (to_ubinary(vectors).astype(np.int16) - 128).astype(np.int8)


def to_base64(vector: NDArray[np.generic]) -> str:
    """One vector -> its bytes, little-endian, in standard base64."""
    little = vector.astype(vector.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode("ascii")
