"""One peer while it runs, asked in the same way whether it is a server or a library."""

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from peers.cells import Cell, Texts
from peers.child import Child, PeerFailed, child
from peers.peer import Peer
from peers.places import Places, run
from quiver.bench.client import Address, HttpClient, RequestFailed
from quiver.bench.embeddings import EmbeddingsClient, EmbeddingsRequest
from quiver.bench.load import Closed, Recording, run_load
from quiver.bench.server import free_port

POLL_SECONDS = 0.02
REQUEST_SECONDS = 120.0
OK = 200
LINE_BYTES = 64 << 20


class Subject(Protocol):
    """A peer that is ready."""

    child: Child
    startup_seconds: float

    async def load(self, cell: Cell, texts: Texts, *, seconds: float, calls: int | None = None) -> Recording:
        """Load it with a cell for a time, or with so many requests."""
        ...

    async def vectors(self, groups: Sequence[Sequence[str]], clients: int) -> list[Any]:
        """Embed each group as one request, so many at a time: (n, D) each."""
        ...


class _Job(msgspec.Struct, frozen=True):
    request: EmbeddingsRequest
    tokens: int


@dataclass(slots=True)
class Server:
    """A peer behind HTTP."""

    child: Child
    startup_seconds: float
    http: HttpClient
    peer: Peer

    async def load(self, cell: Cell, texts: Texts, *, seconds: float, calls: int | None = None) -> Recording:
        """Send requests from as many clients as the cell says; tokens are counted by us, alike for all peers."""
        client = EmbeddingsClient(self.http, model=self.peer.model, encoding=cell.encoding)
        requests = itertools.islice(texts.requests(cell.batch), calls)
        jobs = (_Job(client.request(some), tokens) for some, tokens in requests)

        async def send(job: _Job) -> int:
            await client.send(job.request)
            return job.tokens

        recording = Recording()
        await run_load(jobs, send, Closed(cell.clients), recording, seconds=seconds)
        return recording

    async def vectors(self, groups: Sequence[Sequence[str]], clients: int) -> list[Any]:
        """Ask for vectors as lists of numbers."""
        found: dict[int, Any] = {}
        numbers = iter(range(len(groups)))

        async def ask() -> None:
            for number in numbers:
                found[number] = await self._vectors(groups[number])

        await asyncio.gather(*(ask() for _ in range(clients)))
        return [found[number] for number in range(len(groups))]

    async def _vectors(self, texts: Sequence[str]) -> Any:
        client = EmbeddingsClient(self.http, model=self.peer.model, encoding="float")
        try:
            reply = await self.http.exchange(client.request(texts).content)
        except RequestFailed as failure:
            raise PeerFailed(f"it does not answer: {failure}") from failure
        if reply.status != OK:
            raise PeerFailed(f"it answered {reply.status}: {reply.body[:200]!r}")
        data = msgspec.json.decode(reply.body)["data"]
        return np.array([item["embedding"] for item in data], np.float32)


@dataclass(slots=True)
class Library:
    """A peer in a process of its own, which keeps the time itself."""

    child: Child
    startup_seconds: float

    async def load(self, cell: Cell, texts: Texts, *, seconds: float, calls: int | None = None) -> Recording:
        """Let it call the library over and over."""
        most = calls or 1 << 30
        told = {"do": "measure", "texts": list(texts.texts), "batch": cell.batch, "calls": most, "seconds": seconds}
        reply = await self._ask(told)
        latencies = reply["latencies"]
        tokens = [tokens for _, tokens in itertools.islice(texts.requests(cell.batch), len(latencies))]
        return Recording(latencies=latencies, tokens=tokens, seconds=reply["seconds"])

    async def vectors(self, groups: Sequence[Sequence[str]], clients: int) -> list[Any]:
        """Call it with each group; there are no clients to ask at the same time."""
        del clients
        replies = [await self._ask({"do": "vectors", "texts": list(group)}) for group in groups]
        return [np.frombuffer(base64.b64decode(r["vectors"]), np.float32).reshape(r["shape"]) for r in replies]

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(_exchange, self.child, command)


def _exchange(one: Child, command: dict[str, Any] | None) -> dict[str, Any]:
    """Write a line, if there is one, and read the reply; raises `PeerFailed`."""
    streams = one.process.stdin, one.process.stdout
    assert streams[0], "a library was started without pipes. This is a bug."
    assert streams[1], "a library was started without pipes. This is a bug."
    with contextlib.suppress(BrokenPipeError):
        if command is not None:
            streams[0].write(msgspec.json.encode(command).decode() + "\n")
            streams[0].flush()
    line = streams[1].readline()
    if not line:
        raise PeerFailed(f"it ended; its last words were: {one.last_words()}")
    reply: dict[str, Any] = msgspec.json.decode(line)
    return reply


@contextlib.asynccontextmanager
async def running(
    peer: Peer, places: Places, *, ready_seconds: float, command: tuple[str, ...] = ()
) -> AsyncIterator[Server | Library]:
    """Start a peer, wait until it is ready, and end it; `command` takes the place of its own. Raises `PeerFailed`."""
    port = free_port()
    words = places.filled(peer, command or peer.command, port)
    places.cache.mkdir(parents=True, exist_ok=True)
    with child(words, places.variables(peer, port), places.cache, talks=not peer.is_server) as one:
        if not peer.is_server:
            await _within(ready_seconds, asyncio.to_thread(_exchange, one, None), one)
            yield Library(one, time.perf_counter() - one.started)
            return
        address = Address("127.0.0.1", port, peer.prefix)
        await _within(ready_seconds, _wait_ready(one, address._replace(prefix=""), peer.ready), one)
        startup_seconds = time.perf_counter() - one.started
        if peer.prepare:
            prepare = places.filled(peer, peer.prepare, port)
            await asyncio.to_thread(run, prepare, "it could not be prepared", variables=places.variables(peer, port))
        async with HttpClient(address, timeout_seconds=REQUEST_SECONDS) as http:
            yield Server(one, startup_seconds, http, peer)


async def _within(seconds: float, waiting: Any, one: Child) -> None:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        one.stop()  # whoever reads its words in a thread comes back now
        raise PeerFailed(f"it was not ready after {seconds:g} seconds; {one.last_words()}") from None


async def _wait_ready(one: Child, address: Address, path: str) -> None:
    """Ask until it answers 200; raises `PeerFailed` when it has ended."""
    request = address.request("GET", path)
    async with HttpClient(address, timeout_seconds=REQUEST_SECONDS) as client:
        while not one.is_gone:
            with contextlib.suppress(RequestFailed):
                if (await client.exchange(request)).status == OK:
                    return
            await asyncio.sleep(POLL_SECONDS)
    raise PeerFailed(f"it ended with status {one.process.returncode}: {one.last_words()}")


async def rerank_load(server: Server, texts: Texts, cell: Cell, *, seconds: float) -> Recording:
    """Ask for the order of some documents, over and over; a token stands for a document here."""
    requests = (_rerank_request(server, some) for some, _ in texts.requests(cell.batch + 1))

    async def send(request: bytes) -> int:
        reply = await server.http.exchange(request)
        if reply.status != OK or reply.body.count(b'"index":') != cell.batch:
            raise RequestFailed(f"http_{reply.status}", reply.body[:200].decode("utf-8", "replace"))
        return cell.batch

    recording = Recording()
    await run_load(requests, send, Closed(cell.clients), recording, seconds=seconds)
    return recording


def _rerank_request(server: Server, texts: Sequence[str]) -> bytes:
    query, *documents = texts
    body = {"model": "reranker", "query": query, server.peer.rerank_key: documents}
    address = server.http.address._replace(prefix="")
    return address.request("POST", server.peer.rerank_path, msgspec.json.encode(body))
