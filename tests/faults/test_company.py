"""Two thousand inputs of random lengths: no bit of a vector shows in what company it was computed."""

import numpy as np
import pytest

from company import are_bit_identical

MAX_LENGTH = 512
RANDOM_LENGTHS = 2000


@pytest.mark.faults
async def test_random_lengths_are_bit_identical_in_any_company(minilm):
    """1 to 512 random tokens each: the same bits alone and among 32 callers' others."""
    lengths = [1, 2, 3, 4, *np.random.default_rng(7).integers(1, MAX_LENGTH + 1, RANDOM_LENGTHS - 4)]
    assert await are_bit_identical(minilm, lengths, seed=8)
