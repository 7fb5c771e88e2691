"""A peer that computes nothing: vectors are drawn from a hash of the text, as a server and as a library.

Its moods: `moody` lets the size of a request move the last bits, `dead` ends before it is ready, `mute` answers nothing.
"""

import asyncio
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from peers.peer import Embed, Peer, in_process

from bench_server import FakeServer, sized

DIMENSIONS = 8


def vectors_of(texts: Sequence[str], mood: str = "") -> Any:
    """Draw the vectors (N, D) of texts."""
    seeds = (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in texts)
    drawn = np.stack([np.random.default_rng(seed).standard_normal(DIMENSIONS) for seed in seeds])
    vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return vectors * np.float32(1 + 1e-6 * len(texts)) if mood == "moody" else vectors


def load(_folder: str, mood: str = "") -> Embed:
    """Return the library."""
    if mood == "dead":
        raise RuntimeError("no such file: /some/folder/of/this/machine/model.bin")
    return lambda texts: vectors_of(texts, mood)


def peer(name: str = "fake", mood: str = "", **facts: Any) -> Peer:
    """Return the server."""
    command = ("{python}", "-m", "fake_peer", "{port}", *((mood,) if mood else ()))
    usual = {"command": command, "base64": True, "baseline": "fake"}
    return Peer(name=name, title=f"The {name} peer", about="Computes nothing.", **usual | facts)


def ranking_peer() -> Peer:
    """Return the server that can be asked for an order, too."""
    return peer(rerank=("{python}", "-m", "fake_peer", "{port}"), rerank_path="/v1/rerank")


def library(name: str = "fake-library", mood: str = "") -> Peer:
    """Return the library as a peer."""
    command = in_process("fake_peer", "{model}", mood)
    facts = {"is_server": False, "baseline": "fake-library"}
    return Peer(name=name, title=f"The {name} peer", about="Computes nothing.", command=command, **facts)


async def serve(port: int, mood: str) -> None:
    """Answer what is asked, until it is ended."""

    async def answer(_: int, body: dict[str, Any]) -> bytes | None:
        if "query" in body:
            return sized(json.dumps({"results": [{"index": i} for i in range(len(body["documents"]))]}).encode())
        if "input" in body:
            return None if mood == "mute" and body["encoding_format"] == "base64" else sized(embeddings(body, mood))
        return sized(b"{}")

    async with FakeServer(answer).running(port):
        await asyncio.Event().wait()


def embeddings(body: dict[str, Any], mood: str) -> bytes:
    """Answer as OpenAI does."""
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    vectors = vectors_of(texts, mood)
    coded = [binary(one) if body["encoding_format"] == "base64" else one.tolist() for one in vectors]
    data = [{"index": i, "embedding": one} for i, one in enumerate(coded)]
    return json.dumps({"data": data, "usage": {"total_tokens": 1}}).encode()


def binary(vector: Any) -> str:
    """Write a vector in base64."""
    return base64.b64encode(vector.tobytes()).decode()


if __name__ == "__main__":
    port, mood = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    if mood == "dead":
        sys.exit("no such file: /some/folder/of/this/machine/model.bin")
    asyncio.run(serve(port, mood))
