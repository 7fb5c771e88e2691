"""OpenVINO in process: the same ONNX file, padded batches, all cores for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.peer import Embed, Peer, in_process

PEERS = (
    Peer(
        name="openvino",
        title="OpenVINO",
        about="The ONNX file compiled for the CPU in float32; batches of 32 sorted by length, pooled in NumPy.",
        command=in_process("peers.openvino", "{onnx}"),
        environment="openvino",
        packages=("openvino", "tokenizers"),
        is_server=False,
        baseline="quiver-engine",
    ),
)


def load(folder: str, _variant: str = "") -> Embed:
    """Compile the graph of a directory."""
    import openvino  # noqa: PLC0415  only in the environment that has it

    from peers.inside import padding  # noqa: PLC0415

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(Path(folder) / "model.onnx", "CPU", hints)
    tokenizer = padding.padded_tokenizer(Path(folder) / "tokenizer.json")
    names = [port.get_any_name() for port in model.inputs]

    def forward(texts: Sequence[str]) -> Any:
        given = padding.inputs_of(tokenizer, texts)
        hidden = model({name: given[name] for name in names})[0]  # (B, T, H)
        return padding.mean_of(hidden, given["attention_mask"])

    return padding.in_batches(forward)
