"""The whole contract between the engine and a runtime: read this and you know what a backend is.

Add one: a file beside this with `load(files, spec, *, dtype, lanes) -> Backend`, and the conformance tests run on it.
"""

import os
from typing import Protocol

from quiver.types import Floats, PackedBatch

# ONNX Runtime's own builds report to their maker, with an id that they keep in the home, unless this is said before
# they are imported; all who import them are below.
os.putenv("ORT_DISABLE_TELEMETRY", "1")


class Backend(Protocol):
    """One model on one runtime."""

    name: str
    """What runs it, for people: `onnx`, `onnx file`, `torch cuda` …"""
    lanes: int
    """Forward passes at a time that pay."""
    batch_tokens: int
    """Tokens that fill one forward pass."""
    padded: bool
    """It pads inside itself, so that a batch costs its count times its longest input."""
    exact: bool
    """The last bit matters: where an input's company shows in it, the engine runs each input alone. A GPU says False:
    there, batches are worth more."""
    pooled: bool
    """It has a row for each input, (B, ·), and none for each token, (T, ·)."""
    vocab_size: int
    max_positions: int

    def forward(self, batch: PackedBatch) -> Floats:
        """Return float32 hidden states (T, H), or of a head (T, D), or (B, D) vectors or logits where it is `pooled`.

        Where no input of the batch wants its tokens, a device may pool by itself: (B, H) means, first or last states as
        the model has it, or (B, V) largest logits of words.

        Blocks, and may be called by `lanes` threads at once, and by one more that asks for a token to see whether it
        lives. Raises `MemoryError` where there is none for so large a batch.
        """
        ...

    def close(self) -> None:
        """Give back the model's memory; no forward pass may be running."""
        ...
