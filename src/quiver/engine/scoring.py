"""Vectors and logits to scores and an order; each score comes from its own row alone.

N documents, D dimensions, L labels, T tokens.
"""

from collections.abc import Sequence

import numpy as np

from quiver.types import Activation, Floats, Ints


def sigmoid(logits: Floats) -> Floats:
    """Map logits of any shape to 0..1."""
    scores: Floats = (1 / (1 + np.exp(-np.clip(logits, -80, 80)))).astype(np.float32)
    return scores


def softmax(logits: Floats) -> Floats:
    """(…, L) logits -> (…, L) probabilities."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def probabilities(logits: Floats, activation: Activation | None = None) -> Floats:
    """(…, L) logits -> (…, L): as asked, else one label's own probability, or shares among several."""
    if activation is None:
        activation = "sigmoid" if logits.shape[-1] == 1 else "softmax"
    return sigmoid(logits) if activation == "sigmoid" else softmax(logits)


def cosines(query: Floats, documents: Floats) -> Floats:
    """(D,) and (N, D) -> (N,)."""
    lengths = np.sqrt((documents * documents).sum(axis=1) * (query * query).sum())
    products = (documents * query).sum(axis=1)
    similarities: Floats = products / np.maximum(lengths, np.float32(1e-12))
    return similarities


def max_similarities(query: Floats, documents: Sequence[Floats]) -> Floats:
    """(T, D) and N × (T, D) -> (N,): for each token of the query its best token of a document, summed (Khattab 2020)."""
    return np.array([(query @ document.T).max(axis=1).sum() for document in documents], np.float32)


def best(scores: Floats, top_n: int | None) -> Ints:
    """(N,) -> indices of the best, the highest first; equals keep their order."""
    order: Ints = np.argsort(-scores, kind="stable").astype(np.int64)
    return order[:top_n]
