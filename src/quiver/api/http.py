"""HTTP: ASGI, uvicorn and starlette; nothing behind this file and `connection.py` knows them."""

import asyncio
import contextlib
import re
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import parse_qsl

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quiver.api import secure
from quiver.api.call import Call, Reply
from quiver.api.connection import ANSWERING, HEAD, LINGER_SECONDS
from quiver.api.dispatch import Api
from quiver.api.edge import Edge, path_below
from quiver.api.replies import Replies
from quiver.errors import BodyTooLarge, InvalidHttp, QuiverError, Refused, WrongMediaType
from quiver.telemetry import logs

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACE_PARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""W3C's trace context: version, trace, parent, flags; versions after 00 may have more behind these."""
T = TypeVar("T")
PIECE_BYTES = 64 << 10
"""Of a reply over TLS. asyncio encrypts what it is given at once, and would hold any amount of it for a client that
does not read, without telling: in pieces, the connection is told after the first few."""
ONE_PIECE = sys.maxsize


class Disconnected(Exception):
    """The client has gone; nobody reads the reply."""


class HttpApp:
    """An ASGI application around an `Api`: reads bodies within the limit, and stops work that nobody waits for.

    It asks the `edge` itself where no connection of ours does.
    """

    def __init__(
        self, api: Api, replies: Replies, *, max_body_bytes: int, url_prefix: str = "", edge: Edge | None = None
    ) -> None:
        self._api = api
        self._replies = replies
        self._edge = edge
        self._max_body_bytes = max_body_bytes
        self._url_prefix = url_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        headers["x-request-id"] = request_id = _request_id(headers)
        logs.about_request(request_id)
        declared = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else 0
        if self._edge and (error := _judged(self._edge, scope)):
            reply = self._api.refuse(path_below(self._url_prefix, scope["path"]), error)
            await _send(reply, request_id, send)
            return
        if self._is_upload(scope, headers):
            await self._take_upload(scope, headers, receive, send)
            return
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
            await _send_and_close(self._api.refuse(path, error), headers["x-request-id"], receive, send)
            return
        reply = await _unless_disconnected(self._api.receive(_call(scope, path, headers, body)), scope)
        if head := scope.get(HEAD):
            self._replies.keep(head, body, reply)
        piece = PIECE_BYTES if scope["scheme"] == "https" else ONE_PIECE
        sending = _send(reply, headers["x-request-id"], send, piece=piece)
        await (_unless_disconnected(sending, scope) if reply.parts else sending)

    def _is_upload(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        path = path_below(self._url_prefix, scope["path"])
        return headers.get("content-type", "").startswith("multipart/") and self._api.is_upload(scope["method"], path)

    async def _take_upload(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Answer a request whose body is read by its route, as it comes."""
        upload = _Upload(receive)
        call = _call(scope, path_below(self._url_prefix, scope["path"]), headers, b"")
        reply = await self._api.receive(replace(call, parts=upload.parts()))
        if upload.is_whole:
            await _send(reply, headers["x-request-id"], send)
            return
        with contextlib.suppress(Disconnected):
            await _send_and_close(reply, headers["x-request-id"], receive, send)

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


def _judged(edge: Edge, scope: Scope) -> QuiverError | None:
    """Ask an edge as a connection does."""
    url = scope.get("raw_path") or scope["path"].encode()
    return edge.judge(scope["method"], url, dict(scope["headers"]), _peer(scope))


def _peer(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else "local"


class _Upload:
    """A body that is read as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_whole = False

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield what comes. Raises `InvalidHttp` where the client leaves before its end."""
        try:
            async for part in _body_parts(self._receive):
                yield part
        except Disconnected as error:
            raise InvalidHttp("the upload ended before it was whole: send it again") from error
        self.is_whole = True


def _call(scope: Scope, path: str, headers: Mapping[str, str], body: bytes) -> Call:
    query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
    return Call(scope["method"], path, headers, body, query, _peer(scope))


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


async def _unless_disconnected(answer: Awaitable[T], scope: Scope) -> T:
    """Wait for an answer, at which the connection may see to it that nobody works once the client has gone."""
    task = scope[ANSWERING] = asyncio.current_task()
    try:
        return await answer
    except asyncio.CancelledError as error:
        if ANSWERING in scope or task is None:
            raise  # it was not the connection
        task.uncancel()
        raise Disconnected from error
    finally:
        scope.pop(ANSWERING, None)


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


async def _send(reply: Reply, request_id: str, send: Send, *, last: bool = True, piece: int = ONE_PIECE) -> None:
    headers = {
        "content-type": reply.media_type,
        "content-length": str(len(reply.body)),
        "x-request-id": request_id,
        **secure.NOT_KEPT,
        **reply.headers,
    }
    if reply.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        del headers["content-type"], headers["content-length"]  # RFC 9110: there is none, or it is another reply's
    start: Message = {
        "type": "http.response.start",
        "status": reply.status,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
    }
    await send(start)
    await _send_body(reply.body, send, last=last and reply.parts is None, piece=piece)
    if reply.parts is not None:
        async for part in reply.parts:
            await _send_body(part, send, last=False, piece=piece)
        await send({"type": "http.response.body", "more_body": not last})


async def _send_body(body: bytes, send: Send, *, last: bool, piece: int) -> None:
    for begin in range(0, len(body) or 1, piece):
        end = begin + piece
        more = end < len(body) or not last
        await send({"type": "http.response.body", "body": body[begin:end], "more_body": more})


def application(app: ASGIApp, origins: Sequence[str] = ()) -> ASGIApp:
    """Let pages of some origins call."""
    if not origins:
        return app
    return CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
