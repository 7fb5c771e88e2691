"""A model of transformers over a batch: its inputs end to end in one row where it allows that, padded where it does not.

Whether it does is not looked up but tried: packed, a model must give what it gives for each input alone in its own
attention. So an architecture that comes with the next transformers runs packed if it can, and rightly if it cannot.

B inputs, T tokens, L tokens of the longest input, D numbers of a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from quiver.backends.pytorch import attention
from quiver.backends.pytorch.attention import Packing
from quiver.types import Ints, PackedBatch

_TRIED_LENGTHS = (5, 150, 18)
"""Tokens of the inputs that a model is tried with; the second reaches beyond ModernBERT's windows."""
_MAX_ERROR = 1e-3
_MAX_ERROR_IN_16_BITS = 0.1
"""Of the states' spread. Inputs that see each other, or stand in a wrong place, miss by most of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A batch on the device."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    type_ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (B + 1,)
    lengths: list[int]

    @classmethod
    def of(cls, batch: PackedBatch, device: str) -> Self:
        """Copy a batch to the device."""
        ids, positions, type_ids = _to_device(np.stack([batch.ids, batch.positions, batch.type_ids]), device)
        return cls(ids, positions, type_ids, _to_device(batch.cu_seqlens, device), batch.lengths.tolist())

    def real(self) -> Tensor:
        """(B, L): where a token stands, and no filling."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(max(self.lengths), device=self.ids.device) < lengths[:, None]


class Trunk:
    """The part of a model that runs over tokens."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self._model = model
        has_types = getattr(model.config, "type_vocab_size", 1) > 1
        self._takes_types = has_types and "token_type_ids" in signature(model.forward).parameters
        self._has_varlen = attention.has_varlen(device, model.dtype)
        self._first_position = _first_position(model)
        self._padding: int = model.config.pad_token_id or 0
        self.vocab_size: int = model.get_input_embeddings().num_embeddings

    @property
    def max_positions(self) -> int | None:
        """Most tokens of an input; None where nothing limits them."""
        rows = getattr(self._model.config, "max_position_embeddings", None)
        return rows and rows - self._first_position

    def packed(self, inputs: Inputs) -> Tensor:
        """Run all inputs as one row -> (T, D)."""
        output = self._model(
            input_ids=inputs.ids[None],
            position_ids=(inputs.positions + self._first_position)[None],
            packing=Packing(inputs.lengths, inputs.cu_seqlens.int() if self._has_varlen else None),
            **({"token_type_ids": inputs.type_ids[None]} if self._takes_types else {}),
        )
        states: Tensor = output[0][0]
        return states

    def padded(self, inputs: Inputs) -> Tensor:
        """Run inputs side by side, filled up to the longest -> (T, D)."""
        return self.side_by_side(inputs)[inputs.real()]

    def side_by_side(self, inputs: Inputs) -> Tensor:
        """Run inputs filled up to the longest -> (B, L, D), or what a model's own head makes of it: (B, ·)."""
        real = inputs.real()
        output = self._model(
            input_ids=_laid(inputs.ids, real, self._padding),
            attention_mask=real.long(),
            **({"token_type_ids": _laid(inputs.type_ids, real, 0)} if self._takes_types else {}),
        )
        states: Tensor = output[0]
        return states

    def try_packing(self) -> bool:
        """Put the model into our attention if it gives there what it gives by itself; tell whether it does."""
        inputs = self._drawn()
        with torch.inference_mode():
            alone = torch.cat([self.padded(Inputs.of(_end_to_end([one]), self.device)) for one in inputs])
            own = self._model.config._attn_implementation  # noqa: SLF001  it has no other name
            self._model.set_attn_implementation(attention.NAME)
            is_same = self._comes_out_as(alone, Inputs.of(_end_to_end(inputs), self.device))
        if not is_same:
            self._model.set_attn_implementation(own)
        return is_same

    def _drawn(self) -> list[Ints]:
        rng = np.random.default_rng(0)
        lengths = [min(length, self.max_positions or length) for length in _TRIED_LENGTHS]
        # Without the padding's id, which some architectures leave out when they count positions.
        words = np.delete(np.arange(self.vocab_size), self._padding)
        return [rng.choice(words, length) for length in lengths]

    def _comes_out_as(self, wanted: Tensor, inputs: Inputs) -> bool:
        try:
            error = (self.packed(inputs) - wanted).float().square().mean()
        except Exception:  # noqa: BLE001  an architecture that cannot be packed may fail in any way
            return False
        spread = wanted.float().var(dim=0, correction=0).mean()
        limit = _MAX_ERROR if wanted.dtype == torch.float32 else _MAX_ERROR_IN_16_BITS
        return bool((error / spread).sqrt() <= limit)


def _to_device(array: Ints, device: str) -> Tensor:
    """Copy numbers, without waiting for what other lanes have given the device to do."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def _first_position(model: Any) -> int:
    """Return the row of the position table that a first token takes: behind the padding's, if that has one."""
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def _laid(tokens: Tensor, real: Tensor, filling: int) -> Tensor:
    """(T,) -> (B, L)."""
    laid = torch.full_like(real, filling, dtype=tokens.dtype)
    laid[real] = tokens
    return laid


def _end_to_end(inputs: Sequence[Ints]) -> PackedBatch:
    lengths = [len(ids) for ids in inputs]
    positions = np.fromiter(chain(*map(range, lengths)), np.int64)
    return PackedBatch(np.concatenate(inputs), positions, np.zeros_like(positions), np.cumsum([0, *lengths]))
