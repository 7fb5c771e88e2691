"""CTranslate2's encoder in process: texts sorted by length, padded inside, all cores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.peer import Embed, Peer, in_process

PEERS = (
    Peer(
        name="ctranslate2",
        title="CTranslate2",
        about="Converted by its own converter, float32; batches of 32 sorted by length, pooled in NumPy.",
        command=in_process("peers.ctranslate2", "{ct2}"),
        environment="torch",
        packages=("ctranslate2", "tokenizers"),
        is_server=False,
        baseline="quiver-engine",
    ),
)


def load(folder: str, _variant: str = "") -> Embed:
    """Load the converted model of a directory."""
    import ctranslate2  # noqa: PLC0415  only in the environment that has it
    import numpy as np  # noqa: PLC0415

    from peers.inside import padding  # noqa: PLC0415

    encoder = ctranslate2.Encoder(folder, device="cpu", compute_type="float32", intra_threads=padding.cores())
    tokenizer = padding.tokenizer(Path(folder) / "tokenizer.json")

    def forward(texts: Sequence[str]) -> Any:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        hidden = np.asarray(encoder.forward_batch(ids).last_hidden_state)  # (B, T, H)
        lengths = np.array([len(one) for one in ids])
        mask = np.arange(hidden.shape[1]) < lengths[:, None]  # (B, T)
        return padding.mean_of(hidden, mask)

    return padding.in_batches(forward)
