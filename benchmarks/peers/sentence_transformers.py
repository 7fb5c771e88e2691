"""sentence-transformers on torch: padded batches of 32, sorted by length."""

from collections.abc import Callable, Sequence
from typing import Any

from peers.peer import Embed, Peer, in_process, minimal_server

MODULE = "peers.sentence_transformers"
COMMON: dict[str, Any] = {
    "environment": "torch",
    "packages": ("sentence-transformers", "torch", "transformers"),
}

PEERS = (
    Peer(
        name="sentence-transformers-server",
        title="sentence-transformers behind a minimal server",
        about="One request at a time through `encode`, all cores for each; Starlette, uvicorn, orjson.",
        command=minimal_server(MODULE, "{model}"),
        rerank_path="/v1/rerank",
        rerank=minimal_server(MODULE, "{reranker}", "rerank"),
        **COMMON,
    ),
    Peer(
        name="sentence-transformers",
        title="sentence-transformers",
        about="`encode` of `SentenceTransformer` on the CPU, its defaults.",
        command=in_process(MODULE, "{model}"),
        is_server=False,
        baseline="quiver-engine",
        **COMMON,
    ),
)


def load(folder: str, _variant: str = "") -> Embed:
    """Load the model of a directory."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  only in the environment that has it

    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def load_reranker(folder: str) -> Callable[[str, Sequence[str]], Sequence[float]]:
    """Load the cross-encoder of a directory: a query and documents to scores."""
    from sentence_transformers import CrossEncoder  # noqa: PLC0415

    model = CrossEncoder(folder, device="cpu")
    return lambda query, texts: model.predict([(query, text) for text in texts], show_progress_bar=False).tolist()
