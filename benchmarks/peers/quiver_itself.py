"""Quiver: its server and its engine, in both arithmetics. Caches are off, as those of all others."""

import asyncio
from collections.abc import Sequence
from typing import Any

from peers.peer import Embed, Peer, in_process

SERVE = ("{python}", "-m", "quiver", "serve", "--port", "{port}", "--cache-entries", "0")
COMMON: dict[str, Any] = {"packages": ("quiver", "onnxruntime", "tokenizers", "uvicorn")}
HTTP: dict[str, Any] = {"ready": "/health/ready", "base64": True}

PEERS = (
    Peer(
        name="quiver",
        title="Quiver, float32",
        about="The defaults, without the cache.",
        command=(*SERVE, "--dtype", "float32"),
        rerank=(*SERVE, "--model", "{reranker}"),
        rerank_path="/infinity/rerank",
        **COMMON,
        **HTTP,
    ),
    Peer(
        name="quiver-int8",
        title="Quiver, int8",
        about="The same with `--dtype int8`.",
        command=(*SERVE, "--dtype", "int8"),
        **COMMON,
        **HTTP,
    ),
    Peer(
        name="quiver-engine",
        title="Quiver's engine, float32",
        about="Called in its own process, without HTTP.",
        command=in_process("peers.quiver_itself", "default", "float32"),
        is_server=False,
        baseline="quiver-engine",
        **COMMON,
    ),
    Peer(
        name="quiver-engine-int8",
        title="Quiver's engine, int8",
        about="The same in 8 bits.",
        command=in_process("peers.quiver_itself", "default", "int8"),
        is_server=False,
        baseline="quiver-engine",
        **COMMON,
    ),
)


def load(_folder: str, dtype: str) -> Embed:
    """Open the engine on the default model, as the server does; it ends with its process."""
    from quiver import app, config  # noqa: PLC0415  only in the environment that has it
    from quiver.types import Caller, EmbedRequest  # noqa: PLC0415

    async def opened() -> Any:
        engine = app.build(config.load(env={}, flags={"dtype": [dtype], "cache_entries": 0})).engine
        await engine.load(lambda *_: None)
        return engine

    # asyncio's Runner writes out each result as text, to compare signal handlers: 3 ms for a vector.
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(opened())

    def embed(texts: Sequence[str]) -> Any:
        return loop.run_until_complete(engine.embed(EmbedRequest(inputs=texts), Caller("peers"))).vectors

    return embed
