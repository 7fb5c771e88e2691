"""Attention within each of the inputs that lie end to end in one row: what transformers calls instead of its own.

T tokens of all inputs, D numbers of a head. A model hands its keyword arguments on to its attention layers, so a
`Packing` travels from the call of the model to here by itself.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

Window = tuple[int, int]
"""How far a token sees to its left and to its right; -1 is without end."""

NAME = "quiver_packed"
UNLIMITED = -1
UNKNOWN_TO_US = ("position_bias", "s_aux", "softcap")
"""What some architectures ask of their attention beside what is done here."""


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where the inputs of a row end."""

    lengths: list[int]
    cu_seqlens: Tensor | None
    """(B + 1,) int32 on the device, for torch's own attention over packed inputs; None: one input after another."""


def register() -> None:
    """Make `packed_attention` known to transformers by `NAME`."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Queries, keys and values of one row, (1, heads, T, D) -> (1, T, heads, D)."""
    for name in UNKNOWN_TO_US:
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    packing: Packing = options["packing"]
    causal = options.get("is_causal")
    causal = module.is_causal if causal is None else causal
    window = window_of(options.get("sliding_window"), max(packing.lengths), causal=causal)
    shared = query.shape[1] // key.shape[1]  # queries' heads to each head of keys
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    attend = _one_by_one if packing.cu_seqlens is None else _all_at_once
    return attend((query, key, value), packing, window, options.get("scaling")), None


def window_of(sliding: int | None, longest: int, *, causal: bool) -> Window:
    """Return what a layer's tokens see of their input; a window wider than the longest input is none."""
    reach = UNLIMITED if sliding is None or longest <= sliding else sliding - 1
    return reach, 0 if causal else reach


def has_varlen(device: str, dtype: torch.dtype) -> bool:
    """Tell whether torch's own attention over packed inputs can be used, with windows."""
    if torch.device(device).type != "cuda" or dtype == torch.float32:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  newer than the oldest torch that will do
    except ImportError:
        return False
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return ampere and "window_size" in inspect.signature(varlen_attn).parameters


def _all_at_once(
    states: tuple[Tensor, Tensor, Tensor], packing: Packing, window: Window, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  as above

    longest = max(packing.lengths)
    query, key, value = (x[0].transpose(0, 1) for x in states)  # (T, heads, D)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, longest, longest)
    mixed: Tensor = varlen_attn(query, key, value, *bounds, scale=scale, window_size=window)
    return mixed[None]


def _one_by_one(states: tuple[Tensor, Tensor, Tensor], packing: Packing, window: Window, scale: float | None) -> Tensor:
    causal = window == (UNLIMITED, 0)
    mixed = []
    for query, key, value in zip(*(x.split(packing.lengths, dim=2) for x in states), strict=True):
        mask = None if causal or window == (UNLIMITED, UNLIMITED) else _within(window, query)
        mixed.append(scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=causal))
    return torch.cat(mixed, dim=2).transpose(1, 2)


def _within(window: Window, query: Tensor) -> Tensor:
    """(L, L): whether a token, by row, sees another, by column."""
    place = torch.arange(query.shape[2], device=query.device)
    ahead = place - place[:, None]
    return (ahead >= -window[0]) & (ahead <= window[1])
