"""Plain ONNX Runtime in process: what one writes in twenty lines, padded batches and all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.peer import Embed, Peer, in_process

PEERS = (
    Peer(
        name="onnxruntime",
        title="ONNX Runtime, padded",
        about="The ONNX file with all optimisations; batches of 32 sorted by length, pooled in NumPy.",
        command=in_process("peers.onnxruntime", "{onnx}"),
        environment="onnxruntime",
        packages=("onnxruntime", "tokenizers"),
        is_server=False,
        baseline="quiver-engine",
    ),
)


def load(folder: str, _variant: str = "") -> Embed:
    """Open a session on the graph of a directory."""
    import onnxruntime as ort  # noqa: PLC0415  only in the environment that has it

    from peers.inside import padding  # noqa: PLC0415

    options = ort.SessionOptions()
    options.intra_op_num_threads = padding.cores()
    session = ort.InferenceSession(Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"])
    tokenizer = padding.padded_tokenizer(Path(folder) / "tokenizer.json")
    names = [given.name for given in session.get_inputs()]

    def forward(texts: Sequence[str]) -> Any:
        given = padding.inputs_of(tokenizer, texts)
        (hidden,) = session.run(["last_hidden_state"], {name: given[name] for name in names})  # (B, T, H)
        return padding.mean_of(hidden, given["attention_mask"])

    return padding.in_batches(forward)
