"""A model on PyTorch, as the engine sees it."""

import traceback

import torch
from torch import Tensor

from quiver.backends.pytorch.heads import Tail
from quiver.backends.pytorch.trunk import Inputs, Trunk
from quiver.types import Floats, PackedBatch

CPU_BATCH_TOKENS = 224
CUDA_BATCH_TOKENS = 16384
"""Fills an H200 (docs/performance.md): half of it costs a tenth of the rate, more gains nothing."""
LANES = 2
"""While the host pools one batch, the card computes the next. On two busy cores the second lane was worth a third or
more of the throughput: torch spreads a product over all cores, but not what lies between two of them."""


class TorchBackend:
    """A model in two parts: what runs over tokens, and what is made of their states.

    A tail of None is a head that only the model itself knows; it must see its inputs padded.
    """

    def __init__(self, trunk: Trunk, tail: Tail | None, *, lanes: int, max_tokens: int) -> None:
        self.name = f"torch {trunk.device}"
        self.exact = torch.device(trunk.device).type == "cpu"
        self.lanes = lanes or LANES
        batch_tokens = CPU_BATCH_TOKENS if self.exact else CUDA_BATCH_TOKENS
        self.batch_tokens = min(batch_tokens, tail.batch_tokens) if tail else batch_tokens
        self.padded = tail is None or not trunk.try_packing()
        self.pooled = tail is None or tail.pooled
        self.vocab_size = trunk.vocab_size
        self.max_positions = trunk.max_positions or max_tokens
        self._trunk = trunk
        self._tail = tail

    def forward(self, batch: PackedBatch) -> Floats:
        """Return the result (T, ·), or (B, ·) where it is pooled."""
        try:
            with torch.inference_mode():
                return _to_host(self._compute(batch))
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
            torch.cuda.empty_cache()
            raise MemoryError(f"no memory on the device for {len(batch.ids)} tokens") from error

    def _compute(self, batch: PackedBatch) -> Tensor:
        inputs = Inputs.of(batch, self._trunk.device)
        if self._tail is None:
            return self._trunk.side_by_side(inputs)
        states = self._trunk.padded(inputs) if self.padded else self._trunk.packed(inputs)
        reduce = None if batch.per_token else self._tail.reduce
        return (reduce or self._tail.apply)(states, inputs.cu_seqlens)

    def close(self) -> None:
        """Give back the model's memory."""
        del self._trunk, self._tail
        torch.cuda.empty_cache()


def _to_host(result: Tensor) -> Floats:
    """Copy a result to an array of float32."""
    result = result.float().contiguous()
    if result.is_cuda:
        host = torch.empty(result.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(result, non_blocking=True)
        torch.cuda.current_stream(result.device).record_event().synchronize()  # for this batch, not for the next lane's
        result = host
    array: Floats = result.numpy()
    return array
