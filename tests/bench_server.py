"""A server that speaks just enough HTTP and OpenAI to be measured, and misbehaves when told to."""

import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np

DIMENSIONS = 6
TOKENS_PER_INPUT = 7

Answer = Callable[[int, dict[str, Any]], Awaitable[bytes | None]]
"""From a request's number and body to the bytes of its reply; None cuts the connection."""


def embeddings_body(body: dict[str, Any], *, dimensions: int = DIMENSIONS, extra: int = 0) -> bytes:
    """Answer as the OpenAI API does, with one vector for each input and `extra` ones."""
    inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
    vectors = np.random.default_rng(0).standard_normal((len(inputs) + extra, dimensions)).astype(np.float32)
    is_text = body["encoding_format"] == "base64"
    coded = [base64.b64encode(vector.tobytes()).decode() if is_text else vector.tolist() for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(coded)]
    tokens = TOKENS_PER_INPUT * len(inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": body["model"], "usage": usage}).encode()


def sized(content: bytes, status: str = "200 OK", *, missing: int = 0) -> bytes:
    """Put a body behind a head with its length, or less of it than the head says."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content) + missing}\r\n\r\n".encode() + content


def in_chunks(content: bytes, size: int) -> bytes:
    """Put a body into chunks, with everything that may stand around them."""
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    chunks = b"".join(b"%X;note=1\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Trailer: 1\r\n\r\n"


async def well(_: int, body: dict[str, Any]) -> bytes:
    """Answer every request as it should be."""
    return sized(embeddings_body(body))


class FakeServer:
    """Speaks just enough HTTP to be asked for embeddings, and remembers what it was asked."""

    def __init__(self, answer: Answer = well) -> None:
        self._answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0

    @property
    def inputs(self) -> list[str]:
        """All inputs, in the order in which they came."""
        asked = (body["input"] for body in self.bodies)
        return [text for one in asked for text in ([one] if isinstance(one, str) else one)]

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[str]:
        """Listen on a port, or a free one, and yield the URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/some/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._serve_one(reader, writer):
                pass
        writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
        body = json.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
        self.heads.append(head)
        self.bodies.append(body)
        reply = await self._answer(len(self.bodies), body)
        if reply is None:
            return False
        writer.write(reply)
        await writer.drain()
        return True


@contextlib.contextmanager
def in_a_thread(server: FakeServer) -> Iterator[str]:
    """Run a fake beside code that has an event loop of its own, and yield the URL."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    urls, stop = [], asyncio.Event()

    async def serve() -> None:
        async with server.running() as url:
            urls.append(url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(5)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        loop.close()
