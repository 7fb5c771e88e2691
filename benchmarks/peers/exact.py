"""How near vectors come to the float64 reference, and whether a text's company moves its bits."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import reference
from peers.results import Exactness
from quiver.bench.workload import Workload
from sentences import SENTENCES

SENTENCES_TAKEN = 48
WORKLOAD_TAKEN = 16
COMPANY = 32
"""Texts of the largest request; and clients who send the texts alone, at the same time."""

Ask = Callable[[Sequence[Sequence[str]], int], Awaitable[list[Any]]]
"""Send each group of texts as one request, so many at a time, and return their vectors (n, D)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Texts, and their vectors by plain NumPy in float64."""

    texts: Sequence[str]
    vectors: Any  # (N, D)

    @classmethod
    def kept(cls, model: Path, folder: Path) -> "Reference":
        """Return the vectors of sentences and passages, computed once for a folder: it takes half a minute."""
        texts, file = default_texts(), folder / "reference.npz"
        if file.exists():
            stored = np.load(file)
            if list(stored["texts"]) == texts:
                return cls(texts, stored["vectors"])
        known = cls.of(model, texts)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, texts=np.array(texts), vectors=known.vectors)
        return known

    @classmethod
    def of(cls, model: Path, texts: Sequence[str]) -> "Reference":
        """Compute the vectors of some texts."""
        config = msgspec.json.decode((model / "config.json").read_bytes())
        weights = load_file(model / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        hidden = (reference.hidden_states(config, weights, tokenizer.encode(text).ids) for text in texts)
        return cls(texts, np.stack([reference.normalise(reference.pool(one, "mean")) for one in hidden]))


def default_texts() -> list[str]:
    """Choose sentences of all kinds, and texts of the workload."""
    step = len(SENTENCES) // SENTENCES_TAKEN
    return [*SENTENCES[: step * SENTENCES_TAKEN : step], *Workload(seed=7, size=WORKLOAD_TAKEN).texts]


async def measure(ask: Ask, known: Reference) -> Exactness:
    """Embed the texts alone, in requests of several sizes and orders, and alone beside others."""
    texts, size = list(known.texts), len(known.texts)
    orders = [list(range(size)), list(range(size))[::-1], list(np.random.default_rng(0).permutation(size))]
    alone = np.concatenate(await ask([[text] for text in texts], 1))  # (N, D)
    found = [np.concatenate(await ask([[text] for text in texts], COMPANY))]
    for order, batch in zip(orders, (2, COMPANY, 5), strict=True):
        groups = [[texts[i] for i in order[at : at + batch]] for at in range(0, size, batch)]
        there = np.concatenate(await ask(groups, 1))
        back = np.empty_like(there)
        back[order] = there
        found.append(back)
    return compare(alone, found, known)


def compare(alone: Any, found: Sequence[Any], known: Reference) -> Exactness:
    """Hold vectors (N, D) against the reference and against those that were computed in other companies."""
    doubles = alone.astype(np.float64)
    lengths = np.linalg.norm(doubles, axis=1, keepdims=True)
    cosines = (doubles / lengths * known.vectors).sum(axis=1)  # (N,)
    same = np.all([(other == alone).all(axis=1) for other in found], axis=0)  # (N,)
    return Exactness(
        texts=len(alone),
        least_cosine=float(cosines.min()),
        median_cosine=float(np.median(cosines)),
        largest_error=float(np.abs(doubles - known.vectors).max()),
        steady=float(same.mean()),
        largest_move=max(float(np.abs(other - alone).max()) for other in found),
    )
