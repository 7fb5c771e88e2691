"""What everyone writes around a runtime that takes padded batches: tokens in, masked means out."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

BATCH = 32
MAX_TOKENS = 256


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tokenizer(path: Path) -> Any:
    """Load a tokenizer that truncates as the model's own settings say, and does not pad."""
    found = Tokenizer.from_file(str(path))
    found.no_padding()
    found.enable_truncation(MAX_TOKENS)
    return found


def padded_tokenizer(path: Path) -> Any:
    """Load a tokenizer that pads to the longest of a batch."""
    found = tokenizer(path)
    found.enable_padding()
    return found


def inputs_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Encode texts as a graph of BERT's asks for them, each (B, T)."""
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encodings], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encodings], np.int64),
    }


def mean_of(hidden: Any, mask: Any) -> Any:
    """Average hidden states (B, T, H) over the tokens that are not padding, to unit length: (B, H)."""
    weights = mask.astype(np.float32)[:, :, None]
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def in_batches(forward: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    """Run texts in batches of similar lengths, and give the vectors back in the order of the texts."""

    def embed(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = [forward([texts[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        sorted_vectors = np.concatenate(parts)  # (N, D)
        vectors = np.empty_like(sorted_vectors)
        vectors[order] = sorted_vectors
        return vectors

    return embed
