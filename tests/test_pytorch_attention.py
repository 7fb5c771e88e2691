"""Attention over packed inputs: what torch is asked for on a graphics card, and what is done without one."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("sliding", "longest", "causal", "window"),
    [
        (None, 100, False, (-1, -1)),
        (None, 100, True, (-1, 0)),
        (33, 34, False, (32, 32)),
        (33, 34, True, (32, 0)),
        (33, 33, False, (-1, -1)),
        (33, 33, True, (-1, 0)),
    ],
)
def test_window(sliding: int | None, longest: int, causal: bool, window: tuple[int, int]) -> None:  # noqa: FBT001
    """A layer's window, as torch's attention wants it; one that no input reaches across is none."""
    from quiver.backends.pytorch.attention import window_of  # noqa: PLC0415

    assert window_of(sliding, longest, causal=causal) == window


def plain_varlen(query: Any, key: Any, value: Any, *bounds: Any, scale: float, window_size: tuple[int, int]) -> Any:
    """Do what torch documents of its attention over packed inputs: (T, heads, D), each within its own bounds."""
    import torch  # noqa: PLC0415

    cu_query, cu_key, longest_query, longest_key = bounds
    assert cu_query.dtype == cu_key.dtype == torch.int32
    assert longest_query == longest_key == max(cu_query.diff())
    mixed = torch.empty_like(query)
    for start, end in pairwise(cu_query):
        for i in range(start, end):
            left = start if window_size[0] == -1 else max(start, i - window_size[0])
            right = end if window_size[1] == -1 else min(end, i + window_size[1] + 1)
            scores = torch.einsum("hd,thd->ht", query[i], key[left:right]) * scale
            mixed[i] = torch.einsum("ht,thd->hd", scores.softmax(dim=1), value[left:right])
    return mixed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sliding", [None, 9])
def test_both_ways_of_attention(sliding: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """The attention that torch documents for packed inputs, and ours over one after another, agree."""
    import torch  # noqa: PLC0415
    from torch.nn.attention import varlen  # noqa: PLC0415

    from quiver.backends.pytorch.attention import Packing, packed_attention  # noqa: PLC0415

    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    torch.manual_seed(0)
    lengths = [5, 30, 1, 9]
    states = [torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    module, options = torch.nn.Identity(), {"sliding_window": sliding, "is_causal": causal, "scaling": 0.3}
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ways = [
        packed_attention(module, *states, None, packing=Packing(lengths, bounds), **options)[0]
        for bounds in (None, cu_seqlens)
    ]

    assert ways[0].shape == (1, sum(lengths), 4, 8)
    torch.testing.assert_close(*ways)
