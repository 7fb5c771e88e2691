"""Ollama: its server, where the path of the program is given; it converts the model's files by itself."""

from peers.peer import Peer

PEERS = (
    Peer(
        name="ollama",
        title="Ollama",
        about="The model made from the same files by `ollama create`; it computes in float16.",
        command=("{binary}", "serve"),
        variables={
            "OLLAMA_HOST": "127.0.0.1:{port}",
            "OLLAMA_MODELS": "{cache}/ollama",
            "OLLAMA_KEEP_ALIVE": "-1",
        },
        prepare=("{binary}", "create", "all-minilm-peer", "--file", "{cache}/Modelfile"),
        ready="/api/version",
        model="all-minilm-peer",
        binary="ollama",
    ),
)
