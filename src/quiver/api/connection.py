"""One HTTP connection: how slowly and how much it may send and read, and the door at which a request may be refused.

    READY ──> HEAD ──────────────> BODY ────────────> WORK ──> READY
              header_seconds,      body_seconds       write_seconds, while the client takes nothing of its reply
              max_header_bytes

uvicorn has no limit on the time that a request takes to come, none on its head, and none on a reply that nobody reads.
"""

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quiver.api.edge import Edge, Refusal
from quiver.api.joined import JoinedTransport
from quiver.api.replies import Replies
from quiver.config import ServerConfig
from quiver.errors import HeadersTooLarge, InvalidHttp

ANSWERING = "quiver.answering"
"""In the scope of a request whose body has come: the task that answers it."""
HEAD = "quiver.head"
"""In the scope of a request that may come again: its head."""
MAX_HEADERS = 100
MAX_CHUNKS = 65_536
MIN_BYTES_PER_SECOND = 1000
"""A client that takes less of its reply is not reading."""
LINGER_SECONDS = 1.0
"""How long a refused body is read and thrown away, so that its sender can read why."""


class Phase(Enum):
    """What a connection waits for."""

    READY = auto()
    HEAD = auto()
    BODY = auto()
    WORK = auto()


@dataclass(slots=True)
class Shared:
    """What all connections of a server have in common."""

    edge: Edge
    replies: Replies
    config: ServerConfig
    is_draining: bool = False
    """Replies say that the connection ends with them."""
    newcomers: set["Connection"] = field(default_factory=set)
    """Who is connected and has not asked for anything yet; over TLS, from before the handshake."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits."""

    def __init__(self, *, shared: Shared, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._shared = shared
        self._phase = Phase.READY
        self._timed: Phase | None = None
        """The phase that the timer is for."""
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._num_chunks = 0
        self._body_bytes = 0
        """Of the body, since the timer was started."""
        self._refusal: Refusal | None = None
        """Why the request is not read any further."""
        self._came = b""
        """What came at once, with a request's first byte first."""
        self._held = b""
        """What has come of a request that is not read before it is whole."""
        self._shared.newcomers.add(self)
        self._welcome: asyncio.TimerHandle | None = self.loop.call_later(
            shared.config.header_seconds, self._end_welcome
        )
        """Nobody tells of a handshake that failed."""

    @property
    def is_busy(self) -> bool:
        """Whether a request is on its way or at work."""
        return self._phase is Phase.BODY or self._working is not None

    @property
    def has_said_all(self) -> bool:
        """Whether all is written, and only the other side's goodbye is waited for, as TLS does."""
        return self.scheme == "https" and self.transport.get_write_buffer_size() == 0

    @property
    def _working(self) -> RequestResponseCycle | None:
        """The request that is not answered yet."""
        cycle: RequestResponseCycle | None = self.cycle
        return None if cycle is None or cycle.response_complete else cycle

    def _end_welcome(self) -> None:
        if self._welcome:
            self._welcome.cancel()
            self._welcome = None
            self._shared.newcomers.discard(self)

    def close_when_done(self) -> None:
        """Let the reply that is at work say that the connection ends with it."""
        if working := self._working:
            working.keep_alive = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        self._joined = JoinedTransport(transport, self.loop)
        super().connection_made(self._joined)
        self._start_timer(Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._end_welcome()
        for timer in (self._timer, self._write_timer):
            if timer:
                timer.cancel()
        self._stop_answering()
        super().connection_lost(exc)

    def _stop_answering(self) -> None:
        """Do no more for a client that has gone."""
        if working := self._working:
            scope: dict[str, Any] = cast(dict[str, Any], working.scope)
            if task := scope.pop(ANSWERING, None):
                task.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer what came before, byte for byte, and read all else, within the limits; what comes whole needs no timer."""
        if self._phase is not Phase.READY and not self._held:
            self._read(data)
        elif self._may_repeat:
            self._answer_or_read(self._held + data)
        else:
            self._read_from_start(self._held + data)
        if self._phase in (Phase.HEAD, Phase.BODY):
            if self._timed is not self._phase:
                self._start_timer(self._phase)
        elif self._timer:
            self._timer.cancel()
            self._timer = self._timed = None

    @property
    def _may_repeat(self) -> bool:
        """Whether a reply may go out ahead of all else; where it drains, replies say that the connection ends."""
        shared = self._shared
        return not (self._working or shared.is_draining or shared.edge.admission.fault or self.flow.write_paused)

    def _answer_or_read(self, data: bytes) -> None:
        """Give a request the reply that the same one got before, or wait until it is whole, or read it."""
        replies = self._shared.replies
        if known := replies.repeat(data, self._peer, self.server_state.default_headers):
            self._end_welcome()
            self._joined.write_now(known)
            self._held, self._phase = b"", Phase.READY
            self._wait_for_next()
        elif replies.is_begun(data):
            self._held, self._phase = data, Phase.BODY
            self._unset_keepalive_if_required()
        else:
            self._read_from_start(data)

    def _read_from_start(self, data: bytes) -> None:
        self._held, self._came, self._phase = b"", data, Phase.READY
        self._read(data)

    def _read(self, data: bytes) -> None:
        if self._phase is Phase.HEAD:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._phase is Phase.HEAD and self._head_bytes > self._shared.config.max_header_bytes:
            self._end(self._shared.edge.broken(_large_head()))

    # What httptools finds in the data

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._phase, self._head_bytes, self._num_chunks, self._refusal = Phase.HEAD, 0, 0, None

    def on_headers_complete(self) -> None:
        """Refuse at the door, or begin to work."""
        self._end_welcome()
        self._phase, self._timed = Phase.BODY, None
        came, self._came = self._came, b""  # what is behind it in them is another request
        size = len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])
        if size > self._shared.config.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._end(self._shared.edge.broken(_large_head()))
        elif self._working:
            self._begin()  # pipelined: no reply may overtake the one before it
        elif refusal := self._shared.edge.refusal(self._method, self.url, self.headers, self._peer):
            self._refuse(refusal)
        else:
            self._begin(came)

    @property
    def _method(self) -> str:
        return str(self.parser.get_method().decode("ascii"))

    @property
    def _peer(self) -> str:
        return self.client[0] if self.client else "local"

    def _begin(self, came: bytes = b"") -> None:
        """Let the application have the request; its first bytes, where they `came` first, tell it when it comes again."""
        super().on_headers_complete()
        if self._shared.is_draining:
            self.cycle.keep_alive = False
        owner = self._shared.edge.peek(self._method, self.url)
        if self.parser.should_keep_alive() and (head := self._shared.replies.head(owner, self.headers, came)):
            cast(dict[str, Any], self.scope)[HEAD] = head

    def on_chunk_header(self) -> None:
        """Count chunks: each costs more than the bytes in it."""
        self._num_chunks += 1
        if self._num_chunks == MAX_CHUNKS and not self._is_upload():
            self._end(self._shared.edge.broken(InvalidHttp("the body comes in too many chunks: send larger ones")))

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body on."""
        self._body_bytes += len(body)
        if not self._refusal:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Hand the end of the body on, or answer what came before."""
        self._phase = Phase.WORK
        if not self._refusal:
            super().on_message_complete()
        elif self._refusal.closes:
            self.transport.close()
        else:
            self._get_ready()
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        """Be as after any other reply."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        """Send the reply before anything else is done, and wait for the next request."""
        self._joined.flush()
        self._get_ready()
        super().on_response_complete()

    def _get_ready(self) -> None:
        if self._phase is Phase.WORK:
            self._phase = Phase.READY

    # Ends

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._end(self._shared.edge.broken(InvalidHttp(f"{msg.rstrip('.')}: is this an HTTP client?")))

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what its client does not read is lost."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, and read past the body."""
        self._refusal = refusal
        self._joined.write_now(refusal.wire)
        if self.expect_100_continue:
            self.transport.close()  # the body that it asks about will not come
        elif refusal.closes:
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _end(self, refusal: Refusal) -> None:
        """Answer what cannot be read any further, and close."""
        if self.transport.is_closing():
            return
        self._refusal = refusal
        working = self._working
        if working is None or not working.response_started:
            self.transport.write(refusal.wire)
        if working:
            self._stop_answering()
            working.disconnected = True
            working.message_event.set()
        self.transport.close()
        self._watch_writing()

    def _start_timer(self, phase: Phase) -> None:
        if self._timer:
            self._timer.cancel()
        self._body_bytes, config = 0, self._shared.config
        seconds = config.header_seconds if phase is Phase.HEAD else config.body_seconds
        self._timed, self._timer = phase, self.loop.call_later(seconds, self._on_late)

    def _on_late(self) -> None:
        if self._held:
            self._read_from_start(self._held)
        if self._phase is Phase.READY or self._refusal:
            self.transport.close()  # nothing came, or it has its answer
        elif self._is_upload() and self._body_bytes > MIN_BYTES_PER_SECOND * self._shared.config.body_seconds:
            self._start_timer(self._phase)
        else:
            self._end(self._shared.edge.late(self.url))

    def _is_upload(self) -> bool:
        return self._phase is Phase.BODY and self._shared.edge.is_upload(
            self.parser.get_method().decode("ascii"), self.url
        )

    # A client that does not read

    def pause_writing(self) -> None:
        """Watch a client that is slower than its reply."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """Let it be again."""
        super().resume_writing()
        if self._write_timer and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_writing(self) -> None:
        if self._write_timer is None and (left := self.transport.get_write_buffer_size()):
            self._write_timer = self.loop.call_later(self._shared.config.write_seconds, self._on_unread, left)

    def _on_unread(self, before: int) -> None:
        """Cut the connection, unless its client has read something worth the time."""
        self._write_timer = None
        if before - self.transport.get_write_buffer_size() < MIN_BYTES_PER_SECOND * self._shared.config.write_seconds:
            self.transport.abort()
        else:
            self._watch_writing()


def _large_head() -> HeadersTooLarge:
    return HeadersTooLarge("the head of the request is too large: send fewer and shorter headers")
