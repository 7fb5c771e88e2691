"""Inputs laid end to end, pooled, cut and quantised."""

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import encodings
from quiver.engine import outputs
from quiver.engine.packing import Budget, pack
from quiver.engine.pooling import normalise, pool
from quiver.errors import InvalidInput

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(LENGTHS)
def test_a_packed_batch_gives_each_input_back(lengths):
    """Each input's tokens lie between its boundaries, its positions restart at zero, and nothing else is there."""
    inputs = encodings(lengths)

    batch = pack(inputs)

    assert batch.lengths.tolist() == lengths
    for i, encoding in enumerate(inputs):
        part = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        assert batch.ids[part].tolist() == encoding.ids.tolist()
        assert batch.positions[part].tolist() == list(range(lengths[i]))
    assert len(batch.ids) == len(batch.positions) == len(batch.type_ids) == sum(lengths)


@given(LENGTHS, st.sampled_from(["mean", "cls", "last_token"]))
def test_pooling_an_input_does_not_depend_on_its_company(lengths, how):
    """The pooled vector of an input has the same bits in a batch and alone."""
    hidden = np.random.default_rng(1).standard_normal((sum(lengths), 24), np.float32)
    ends = np.cumsum([0, *lengths])

    together = normalise(pool(hidden, ends, how))

    for i, length in enumerate(lengths):
        alone = normalise(pool(hidden[ends[i] : ends[i + 1]], np.array([0, length]), how))
        assert np.array_equal(together[i], alone[0])


def test_pooling_means_what_its_names_say():
    """Mean averages, cls takes the first token, last_token the last."""
    hidden = np.arange(10, dtype=np.float32).reshape(5, 2)
    ends = np.array([0, 2, 5])

    assert pool(hidden, ends, "mean").tolist() == [[1, 2], [6, 7]]
    assert pool(hidden, ends, "cls").tolist() == [[0, 1], [4, 5]]
    assert pool(hidden, ends, "last_token").tolist() == [[2, 3], [8, 9]]


def test_a_zero_vector_stays_zero_when_normalised():
    """Normalising divides by no zero."""
    assert normalise(np.zeros((1, 4), np.float32)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("padded", "fits"), [(False, True), (True, False)])
def test_a_padded_backend_is_priced_by_its_longest_input(padded, fits):
    """Ten inputs of ten tokens and one of sixty are 160 tokens packed, but 660 padded."""
    assert Budget(200, padded=padded).fits(11, 60, 160) is fits


def test_a_batch_may_be_bounded_in_inputs_too():
    """Two short inputs fit where two may, three do not, and with two it is full whatever tokens are left."""
    budget = Budget(100, max_inputs=2)
    assert [budget.fits(count, 1, count) for count in (1, 2, 3)] == [True, True, False]
    assert [budget.is_full(count, count) for count in (0, 1, 2)] == [False, False, True]
    assert [Budget(100).is_full(1, total) for total in (99, 100)] == [False, True]


def unit_vectors(count=5, dimensions=48):
    """Make random unit vectors (count, dimensions)."""
    return normalise(np.random.default_rng(2).standard_normal((count, dimensions), np.float32))


def test_a_cut_vector_has_unit_length_again():
    """The Matryoshka cut keeps the first numbers and scales them to unit length, where the model's vectors have it."""
    vectors = unit_vectors()

    short = outputs.cut(vectors, 16, unit_length=True)

    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    assert np.allclose(short, normalise(vectors[:, :16]))
    assert np.array_equal(outputs.cut(vectors, 16, unit_length=False), vectors[:, :16])
    assert outputs.cut(vectors, None, unit_length=True) is vectors
    assert outputs.cut(vectors, 48, unit_length=True) is vectors


@pytest.mark.parametrize("dimensions", [0, -1, 49, 10**9])
def test_impossible_dimensions_are_refused(dimensions):
    """A cut to no dimensions, or to more than there are, names the field and the range."""
    with pytest.raises(InvalidInput, match="1 to 48"):
        outputs.cut(unit_vectors(), dimensions, unit_length=True)


def test_integers_times_their_scale_are_the_vector():
    """int8 and uint8 use their whole range and give the numbers back to half a step."""
    vectors = unit_vectors()

    integers, scales = outputs.to_int8(vectors)
    shifted, same = outputs.to_uint8(vectors)

    assert np.abs(integers).max(axis=1).tolist() == [127] * 5
    assert np.abs(integers * scales[:, None] - vectors).max() <= scales.max() / 2 + 1e-7
    assert (shifted.astype(int) - 128).tolist() == integers.tolist()
    assert np.array_equal(scales, same)


def test_binary_outputs_are_packed_signs():
    """A bit stands for each number above zero, the first in the highest bit; binary is ubinary minus 128."""
    vectors = np.array([[1, -1, 1, 0, 0, 0, 0, 0.5, 1]], np.float32)

    assert outputs.to_ubinary(vectors).tolist() == [[0b10100001, 0b10000000]]
    assert outputs.to_binary(vectors).tolist() == [[0b10100001 - 128, 0]]


def test_base64_is_little_endian_float32():
    """Decoding the text gives the vector's bits back."""
    vector = unit_vectors()[0]

    text = outputs.to_base64(vector)

    assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), vector)
    assert outputs.to_base64(vector.astype(">f4")) == text
