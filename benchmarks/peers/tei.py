"""Text Embeddings Inference: its router, where the path of the program is given."""

from peers.peer import Peer

OPTIONS = ("--port", "{port}", "--hostname", "127.0.0.1", "--dtype", "float32", "--auto-truncate")

PEERS = (
    Peer(
        name="tei",
        title="Text Embeddings Inference",
        about="Its defaults, but for requests of up to 1,024 inputs.",
        command=(
            *("{binary}", "--model-id", "{model}", *OPTIONS),
            *("--max-client-batch-size", "1024", "--payload-limit", "100000000"),
        ),
        base64=True,
        rerank=("{binary}", "--model-id", "{reranker}", *OPTIONS),
        rerank_key="texts",
        binary="tei",
    ),
)
