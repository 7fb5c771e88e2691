"""What a graphics card makes of the states of tokens before they leave it is what the host makes of them elsewhere."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from quiver.engine.packing import pack
from quiver.engine.pooling import largest_logits, pool
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Kind, Pooling

pytestmark = pytest.mark.torch

LENGTHS = (7, 120, 1, 33)
STATES = np.random.default_rng(0).standard_normal((sum(LENGTHS), 24)).astype(np.float32)
BOUNDS = np.cumsum([0, *LENGTHS])


def reduced(kind: Kind, pooling: Pooling = "mean", device: str = "cuda") -> np.ndarray | None:
    """Return what a device makes of the states; None where it leaves them to the host."""
    import torch  # noqa: PLC0415

    from quiver.backends.pytorch import heads  # noqa: PLC0415

    spec = ModelSpec(id="a/b", weights="a/b", dimensions=24, max_tokens=256, kind=kind, pooling=pooling)
    _, tail = heads.split(None, ModelFiles(Path("nowhere"), "a/b"), spec, device)
    assert tail is not None
    if tail.reduce is None:
        return None
    return tail.reduce(torch.from_numpy(STATES), torch.from_numpy(BOUNDS)).numpy()


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_vectors(pooling: Pooling) -> None:
    """A card's vectors are those of the host."""
    np.testing.assert_allclose(reduced("embed", pooling), pool(STATES, BOUNDS, pooling), rtol=0, atol=1e-6)


def test_words() -> None:
    """A card's largest logits are those of the host, to the bit."""
    np.testing.assert_array_equal(reduced("sparse"), largest_logits(STATES, BOUNDS))


@pytest.mark.parametrize("kind", ["embed", "sparse"])
def test_the_host_pools_on_a_cpu(kind: Kind) -> None:
    """On a CPU the host pools, each sum in a fixed order."""
    assert reduced(kind, device="cpu") is None


def test_who_wants_tokens_gets_them() -> None:
    """A batch tells whether any of its inputs wants a result for each token."""
    plain, whole = Encoding(np.arange(3)), Encoding(np.arange(5), per_token=True)

    assert not pack([plain, plain]).per_token
    assert pack([plain, whole]).per_token
