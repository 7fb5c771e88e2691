"""Attention rows: every token has its cell, and an input is added up in the same blocks alone and in company."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from conftest import settings
from quiver.config import ModelsConfig
from quiver.engine import model
from quiver.engine.packing import pack
from quiver.graphs import attention
from quiver.graphs.rows import EMPTY, lay_rows
from quiver.models.hub import resolve
from quiver.types import Encoding

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=20).map(lambda sizes: np.array(sizes, np.int64))
STRADDLING = ((29, 127, 15, 2), (127, 29, 2, 15), (100, 60, 32), (65, 64, 64, 31), (120, 20, 20, 20, 20))


@given(LENGTHS, st.sampled_from([32, 128, 256]))
def test_every_token_has_its_own_cell(lengths, block):
    """Cells hold each input's tokens side by side and in order, and `places` finds each of them again."""
    rows = lay_rows(lengths, block)
    width = rows.segments.shape[1]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    assert len(set(rows.places.tolist())) == lengths.sum()
    assert (rows.segments.ravel()[rows.places] == owners).all()
    assert (rows.cells.T.ravel()[rows.places] == np.arange(lengths.sum())).all()
    assert (rows.segments != EMPTY).sum() == lengths.sum()
    assert (np.diff(rows.places)[np.diff(owners) == 0] == 1).all()
    assert (np.diff(rows.places // width)[np.diff(owners) == 0] == 0).all()


@given(LENGTHS, st.sampled_from([32, 128, 256]))
def test_no_input_straddles_a_block_that_it_would_not_straddle_alone(lengths, block):
    """Each begins where a block begins, or fits into what is left of one."""
    rows = lay_rows(lengths, block)
    begins = rows.places[np.concatenate(([0], np.cumsum(lengths)[:-1]))] % rows.segments.shape[1]
    assert all(begin % block == 0 or begin % block + size <= block for begin, size in zip(begins, lengths, strict=True))


def test_narrow_products_have_longer_blocks():
    """The rule that ONNX Runtime's products follow, for heads of 16, 32, 64 and 128."""
    assert [attention.key_block(size + 1) for size in (15, 16, 32, 64, 128)] == [1024, 512, 256, 128, 128]


@pytest.fixture(scope="module", params=[16, 32, 64, 128])
def wide(request, tmp_path_factory):
    """Load a model of two layers whose heads have a size."""
    folder = checkpoints.make(tmp_path_factory.mktemp("wide"), "bert", hidden=4 * request.param, heads=4)
    found = resolve(str(folder), None, ModelsConfig(), lambda *_: None)
    loaded = model.load(found.spec, found.files, settings(), lanes=1)
    yield loaded
    loaded.backend.close()


@pytest.mark.parametrize("lengths", STRADDLING, ids=str)
def test_company_does_not_show_whatever_the_size_of_the_heads(wide, lengths):
    """Inputs whose packed rows are longer than a block have the bits that they have alone."""
    draw = np.random.default_rng(sum(lengths))
    texts = [Encoding(draw.integers(0, 1500, n)) for n in lengths]
    alone = np.concatenate([wide.backend.forward(pack([text])) for text in texts])
    np.testing.assert_array_equal(wide.backend.forward(pack(texts)), alone)
