"""FastEmbed: ONNX Runtime over padded batches, in the order in which texts come."""

from typing import Any

from peers.peer import Embed, Peer, in_process, minimal_server

MODULE = "peers.fastembed"
MAX_TOKENS = 256
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
COMMON: dict[str, Any] = {"environment": "fastembed", "packages": ("fastembed", "onnxruntime", "tokenizers")}

PEERS = (
    Peer(
        name="fastembed-server",
        title="FastEmbed behind a minimal server",
        about="One request at a time through `embed`, all cores for each; Starlette, uvicorn, orjson.",
        command=minimal_server(MODULE, "{onnx}"),
        **COMMON,
    ),
    Peer(
        name="fastembed",
        title="FastEmbed",
        about="`embed` of `TextEmbedding`, batches of 32 as all others, one process.",
        command=in_process(MODULE, "{onnx}"),
        is_server=False,
        baseline="quiver-engine",
        **COMMON,
    ),
)


def load(folder: str, _variant: str = "") -> Embed:
    """Load the graph of a directory under the name that tells the library how to pool."""
    import numpy as np  # noqa: PLC0415  only in the environment that has it
    from fastembed import TextEmbedding  # noqa: PLC0415

    model = TextEmbedding(MODEL, specific_model_path=folder, providers=["CPUExecutionProvider"])
    # As shipped it cuts texts at 128 tokens, which the others read whole: its vectors would be others, and cheaper.
    model.model.tokenizer.enable_truncation(max_length=MAX_TOKENS)
    return lambda texts: np.stack(list(model.embed(list(texts), batch_size=32)))
