"""One HTTP connection: how slowly and how much it may send and read, and the door at which a request may be refused.

    READY ──> HEAD ──────────────> BODY ────────────> WORK ──> READY
              header_seconds,      body_seconds       write_seconds, while the client takes nothing of its reply
              max_header_bytes

uvicorn has no limit on the time that a request takes to come, none on its head, and none on a reply that nobody reads.
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quiver.api.edge import Edge, Refusal
from quiver.config import ServerConfig
from quiver.errors import HeadersTooLarge, InvalidHttp

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
    config: ServerConfig
    is_draining: bool = False
    """Replies say that the connection ends with them."""


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
        self._refusal: Refusal | None = None
        """Why the request is not read any further."""

    @property
    def is_busy(self) -> bool:
        """Whether a request is on its way or at work."""
        return self._phase is Phase.BODY or self._working is not None

    @property
    def _working(self) -> RequestResponseCycle | None:
        """The request that is not answered yet."""
        cycle: RequestResponseCycle | None = self.cycle
        return None if cycle is None or cycle.response_complete else cycle

    def close_when_done(self) -> None:
        """Let the reply that is at work say that the connection ends with it."""
        if working := self._working:
            working.keep_alive = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._start_timer(Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        for timer in (self._timer, self._write_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, within the limits; what comes whole needs no timer."""
        if self._phase is Phase.HEAD:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._phase is Phase.HEAD and self._head_bytes > self._shared.config.max_header_bytes:
            self._end(self._shared.edge.broken(_large_head()))
        if self._phase in (Phase.HEAD, Phase.BODY):
            if self._timed is not self._phase:
                self._start_timer(self._phase)
        elif self._timer:
            self._timer.cancel()
            self._timer = self._timed = None

    # What httptools finds in the data

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._phase, self._head_bytes, self._num_chunks, self._refusal = Phase.HEAD, 0, 0, None

    def on_headers_complete(self) -> None:
        """Refuse at the door, or begin to work."""
        self._phase, self._timed = Phase.BODY, None
        size = len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])
        if size > self._shared.config.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._end(self._shared.edge.broken(_large_head()))
        elif refusal := self._refused():
            self._refuse(refusal)
        else:
            super().on_headers_complete()
            if self._shared.is_draining:
                self.cycle.keep_alive = False

    def _refused(self) -> Refusal | None:
        if self._working:
            return None  # pipelined: a reply must not overtake the one before it
        method, peer = self.parser.get_method().decode("ascii"), self.client[0] if self.client else "local"
        return self._shared.edge.refusal(method, self.url, self.headers, peer)

    def on_chunk_header(self) -> None:
        """Count chunks: each costs more than the bytes in it."""
        self._num_chunks += 1
        if self._num_chunks == MAX_CHUNKS:
            self._end(self._shared.edge.broken(InvalidHttp("the body comes in too many chunks: send larger ones")))

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body on."""
        if not self._refusal:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Hand the end of the body on."""
        self._phase = Phase.WORK
        if not self._refusal:
            super().on_message_complete()
        elif self._refusal.closes:
            self.transport.close()
        else:
            self._get_ready()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Wait for the next request."""
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
        self.transport.write(refusal.wire)
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
            working.disconnected = True
            working.message_event.set()
        self.transport.close()
        self._watch_writing()

    def _start_timer(self, phase: Phase) -> None:
        if self._timer:
            self._timer.cancel()
        config = self._shared.config
        seconds = config.header_seconds if phase is Phase.HEAD else config.body_seconds
        self._timed, self._timer = phase, self.loop.call_later(seconds, self._on_late)

    def _on_late(self) -> None:
        if self._phase is Phase.READY or self._refusal:
            self.transport.close()  # nothing came, or it has its answer
        else:
            self._end(self._shared.edge.late(self.url))

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
