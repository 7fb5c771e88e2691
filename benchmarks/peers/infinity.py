"""Infinity: a server with dynamic batches of 32 inputs, on torch or on ONNX Runtime through optimum."""

from typing import Any

from peers.peer import Peer

COMMON: dict[str, Any] = {
    "environment": "infinity",
    "variables": {"INFINITY_ANONYMOUS_USAGE_STATS": "0"},
    "prefix": "/v1",
    "base64": True,
}
OPTIONS = ("--port", "{port}", "--host", "127.0.0.1", "--url-prefix", "/v1", "--device", "cpu", "--log-level", "error")
RUN = ("{bin}/infinity_emb", "v2")

PEERS = (
    Peer(
        name="infinity-onnx",
        title="Infinity, ONNX",
        about="`--engine optimum --pooling-method mean`, and its defaults.",
        command=(*RUN, "--model-id", "{onnx}", "--engine", "optimum", "--pooling-method", "mean", *OPTIONS),
        packages=("infinity-emb", "optimum", "onnxruntime", "transformers"),
        **COMMON,
    ),
    Peer(
        name="infinity-torch",
        title="Infinity, torch",
        about="`--engine torch`, and its defaults.",
        command=(*RUN, "--model-id", "{model}", "--engine", "torch", *OPTIONS),
        packages=("infinity-emb", "torch", "sentence-transformers", "transformers"),
        rerank_path="/v1/rerank",
        rerank=(*RUN, "--model-id", "{reranker}", "--engine", "torch", *OPTIONS),
        **COMMON,
    ),
)
