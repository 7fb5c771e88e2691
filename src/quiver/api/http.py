"""HTTP: ASGI, uvicorn and starlette; nothing behind this file and `connection.py` knows them."""

import asyncio
import contextlib
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast
from urllib.parse import parse_qsl

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quiver.api.call import Call, Reply
from quiver.api.connection import LINGER_SECONDS, Connection, Shared
from quiver.api.dispatch import Api
from quiver.api.edge import Edge, path_below
from quiver.config import ServerConfig
from quiver.errors import BodyTooLarge, ConfigError, Refused, WrongMediaType

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACE_PARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""W3C's trace context: version, trace, parent, flags; versions after 00 may have more behind these."""
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection (httpx: 5): who closes first must be the client, or a request that it
sends at that moment is lost in a reset."""
TICK_SECONDS = 0.02
"""How often a draining server looks whether it is done."""


class Disconnected(Exception):
    """The client has gone; nobody reads the reply."""


class HttpApp:
    """An ASGI application around an `Api`: reads bodies within the limit, and stops work that nobody waits for."""

    def __init__(self, api: Api, *, max_body_bytes: int, url_prefix: str = "") -> None:
        self._api = api
        self._max_body_bytes = max_body_bytes
        self._url_prefix = url_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        declared = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else 0
        with (
            contextlib.suppress(Disconnected),
            self._api.admission.holding(min(declared, self._max_body_bytes)) as grow,
        ):
            await self._answer(scope, headers, receive, send, grow)

    async def _answer(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send, grow: Callable[[int], None]
    ) -> None:
        path = path_below(self._url_prefix, scope["path"])
        try:
            _check_coding(headers)
            body = await self._read_body(headers, receive, grow)
        except Refused as error:
            await _send_and_close(self._api.refuse(path, error), _request_id(headers), receive, send)
            return
        peer = scope["client"][0] if scope.get("client") else "local"
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        call = Call(scope["method"], path, headers, body, query, peer)
        reply = await _unless_disconnected(self._api.receive(call), receive)
        await _send(reply, _request_id(headers), send)

    async def _read_body(self, headers: dict[str, str], receive: Receive, grow: Callable[[int], None]) -> bytes:
        """Read the body, and no more of it than the limit; a chunked one is counted as it comes."""
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        parts, size = [], 0
        async for part in _body_parts(receive):
            size += len(part)
            if size > self._max_body_bytes:
                raise self._too_large()
            grow(size)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._max_body_bytes} bytes: send fewer texts at a time")


def _check_coding(headers: Mapping[str, str]) -> None:
    """Refuse compressed bodies: a small one may hold any amount of text."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise WrongMediaType(f"the body is compressed ({coding}): send it as it is")


async def _body_parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _unless_disconnected(answer: Coroutine[Any, Any, Reply], receive: Receive) -> Reply:
    """Wait for an answer; cancel it once the client has gone."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Disconnected
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


def _request_id(headers: dict[str, str]) -> str:
    """Return the id that the client gave its request, or that of the trace which it belongs to, or a new one."""
    given = headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        return given
    trace = _TRACE_PARENT.fullmatch(headers.get("traceparent", ""))
    return trace[1] if trace else f"req_{uuid.uuid4().hex}"


async def _send_and_close(reply: Reply, request_id: str, receive: Receive, send: Send) -> None:
    """Answer a client that is still sending, and close: closed at once, its reply would be lost in a reset."""
    await _send(replace(reply, headers={**reply.headers, "connection": "close"}), request_id, send, last=False)
    with contextlib.suppress(TimeoutError, Disconnected):
        async with asyncio.timeout(LINGER_SECONDS):
            async for _ in _body_parts(receive):
                pass
    await send({"type": "http.response.body"})


async def _send(reply: Reply, request_id: str, send: Send, *, last: bool = True) -> None:
    headers = {
        "content-type": reply.media_type,
        "content-length": str(len(reply.body)),
        "x-request-id": request_id,
        **reply.headers,
    }
    start: Message = {
        "type": "http.response.start",
        "status": reply.status,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": reply.body, "more_body": not last})


class HttpServer(uvicorn.Server):
    """uvicorn on a socket that is bound at once, its signals left to the application."""

    def __init__(self, api: Api, edge: Edge, config: ServerConfig) -> None:
        app: ASGIApp = HttpApp(api, max_body_bytes=config.max_body_bytes, url_prefix=config.url_prefix)
        if config.cors_origins:
            app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
        self._shared = Shared(edge, config)
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[Connection], partial(Connection, shared=self._shared)),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._socket = _bind(config.host, config.port)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield

    async def run_until_stopped(self) -> None:
        """Serve until `stop` is called, then let running requests finish."""
        await self.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Begin to drain; a second call ends at once."""
        self._shared.is_draining = True
        for connection in self._connections:
            connection.close_when_done()
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests for a moment still, then none; return once the last one is answered.

        Who is connected by then is told to go elsewhere, on the connection that it has.
        """
        del sockets
        ends = time.monotonic() + self._shared.config.drain_delay_seconds
        await self._until(lambda: time.monotonic() >= ends)
        self._shared.edge.admission.close()
        await self._stop_listening()
        await self._until(lambda: not any(connection.is_busy for connection in self._connections))
        for connection in self._connections:
            connection.shutdown()
        await self._until(lambda: not self.server_state.connections)

    @property
    def _connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))

    async def _stop_listening(self) -> None:
        """Close the listener behind those who are connected but not accepted yet: closed with it, they would be cut."""
        loop, listener = asyncio.get_running_loop(), self._socket.dup()
        for server in self.servers:
            server.close()
        self._socket.close()
        with listener, contextlib.suppress(BlockingIOError):
            listener.setblocking(False)
            while True:
                accepted, _ = listener.accept()
                await loop.connect_accepted_socket(self._connect, accepted)

    def _connect(self) -> Connection:
        return Connection(shared=self._shared, config=self.config, server_state=self.server_state, app_state={})

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not (is_so() or self.force_exit):  # noqa: ASYNC110  uvicorn sets no event, either
            await asyncio.sleep(TICK_SECONDS)

    async def let_go(self) -> None:
        """Give requests that were cut short a moment to say so."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LINGER_SECONDS)


def _bind(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends at once only where the protocol says TCP
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener.listen(BACKLOG)
    return listener
