"""Everyone who is compared, in the order of the page."""

from peers import (
    ctranslate2,
    fastembed,
    infinity,
    ollama,
    onnxruntime,
    openvino,
    quiver_itself,
    sentence_transformers,
    tei,
)
from peers.peer import Peer

PEERS: tuple[Peer, ...] = (
    *quiver_itself.PEERS,
    *infinity.PEERS,
    *tei.PEERS,
    *ollama.PEERS,
    *sentence_transformers.PEERS,
    *fastembed.PEERS,
    *ctranslate2.PEERS,
    *openvino.PEERS,
    *onnxruntime.PEERS,
)
