"""The default model's real weights give the numbers that other implementations publish for them."""

import json
from pathlib import Path

import numpy as np

from conftest import assembled
from quiver.types import Caller, EmbedRequest

COSINES = json.loads((Path(__file__).parent / "cosines.json").read_text(encoding="utf-8"))
"""30 pairs of sentences and their cosines, computed by sentence-transformers 6.2.0 with transformers 5.23."""

FIRST_NUMBERS = {"hello world": (-0.034478, 0.03102, 0.00673, 0.02611, -0.039362)}
"""From the tests of qdrant/fastembed, to 1e-3."""

SUMS = {
    "Hello, World!": 0.59605527,
    "This is an example passage.": 0.36542925,
    "fastembed-rs is licensed under Apache-2.0": -0.16450031,
    "Some other short text here blah blah blah": -0.40903988,
}
"""Sums of the unit vectors, from the tests of fastembed-rs, to 1e-2."""


async def vectors_of(model, texts):
    """Embed texts through the engine."""
    async with assembled(model) as parts:
        request = EmbedRequest(inputs=texts, truncate=True)
        return (await parts.service.embed(request, Caller("test"))).vectors


async def test_cosines_are_those_of_sentence_transformers(minilm):
    """The 30 pairs are as similar as they are there: to 1e-4, and in 8 bits to 0.02."""
    assert len(COSINES) == 30
    first, second = [await vectors_of(minilm, [pair[side] for pair in COSINES]) for side in ("a", "b")]
    found, wanted = (first * second).sum(axis=1), np.array([pair["cosine"] for pair in COSINES])
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 if minilm.dtype == "float32" else 0.02)


async def test_first_numbers_are_those_of_fastembed(minilm):
    """The vector of a text begins with the published numbers."""
    found = await vectors_of(minilm, list(FIRST_NUMBERS))
    atol = 1e-3 if minilm.dtype == "float32" else 1e-2
    np.testing.assert_allclose(found[:, :5], list(FIRST_NUMBERS.values()), rtol=0, atol=atol)


async def test_sums_are_those_of_fastembed_rs(minilm):
    """The numbers of each unit vector add up to the published sum."""
    found = await vectors_of(minilm, list(SUMS))
    atol = 1e-2 if minilm.dtype == "float32" else 0.1  # 384 roundings add up
    np.testing.assert_allclose(found.sum(axis=1), list(SUMS.values()), rtol=0, atol=atol)
