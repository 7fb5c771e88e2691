"""The outermost layer: refuses, with ready-made bytes, what cannot be let in now.

Under overload most requests end here. Each costs less than a hundredth of one that is served, so that those that are
let in keep their time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from uuid import uuid4

from quiver.admission import Admission
from quiver.api.call import PATIENCE, Dialect, Reply, patience, refuse
from quiver.api.router import Router
from quiver.errors import Overloaded, QuiverError, TooSlow
from quiver.telemetry.observer import Observer
from quiver.types import Caller

MAX_READY_MADE = 1024
_PATIENCE = {name.encode(): name for name in PATIENCE}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response as it goes over the wire, and whether the connection ends with it."""

    wire: bytes
    closes: bool


Headers = Sequence[tuple[bytes, bytes]]
"""As they came, their names in lower case."""


class Edge:
    """Knows which API a request is made in by its path alone, and writes refusals in that API's shape."""

    def __init__(
        self,
        router: Router,
        admission: Admission,
        observer: Observer,
        *,
        timeout_seconds: float,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self.admission = admission
        self._router = router
        self._observer = observer
        self._timeout_seconds = timeout_seconds
        self._cors_origins = frozenset(cors_origins)
        self._ready_made: dict[tuple[str, str, str], tuple[bytes, bytes]] = {}

    def refusal(self, method: str, path: str, headers: Headers, peer: str) -> Refusal | None:
        """Return the response to a request that cannot be let in now, or None for one that can."""
        dialect, route = self._router.peek(method, path)
        if route is None or route.public or method != "POST":
            return None
        given = dict(headers)
        said = {name: given[wire].decode("latin-1") for wire, name in _PATIENCE.items() if wire in given}
        deadline = time.monotonic() + patience(said, self._timeout_seconds)
        error = self.admission.refusal(_length(given), Caller(peer, deadline), is_queued=route.is_queued)
        return None if error is None else self._written(dialect, error, given)

    def late(self, path: str) -> Refusal:
        """Return the response to a request that did not come whole in time."""
        dialect, _ = self._router.peek("POST", path)
        return self._written(dialect, TooSlow("the request did not come in time: send it faster"), {})

    def broken(self, error: QuiverError) -> Refusal:
        """Return the response to what could not be read as a request."""
        return self._written(self._router.owner(""), error, {})

    def _written(self, dialect: Dialect, error: QuiverError, given: Mapping[bytes, bytes]) -> Refusal:
        self._observer.request_refused(error.code)
        closes = not isinstance(error, Overloaded)  # whoever comes back soon should find the door open
        key = (dialect.name, error.code, error.message)
        if key not in self._ready_made:
            if len(self._ready_made) >= MAX_READY_MADE:
                self._ready_made.clear()
            self._ready_made[key] = _wire(refuse(dialect, error), closes=closes)
        head, body = self._ready_made[key]
        request_id, origin = uuid4().hex.encode(), self._allowed_origin(given)
        return Refusal(b"%bx-request-id: req_%b\r\n%b\r\n%b" % (head, request_id, origin, body), closes)

    def _allowed_origin(self, given: Mapping[bytes, bytes]) -> bytes:
        """Let a page in a browser read why it is refused, where it may call at all."""
        origin = given.get(b"origin")
        if origin is None or not self._cors_origins & {"*", origin.decode("latin-1")}:
            return b""
        return b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origin


def _length(given: Mapping[bytes, bytes]) -> int:
    length = given.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


def _wire(reply: Reply, *, closes: bool) -> tuple[bytes, bytes]:
    """Return a response's head, without the empty line that ends it, and its body."""
    headers = {"content-type": reply.media_type, "content-length": str(len(reply.body)), **reply.headers}
    if closes:
        headers["connection"] = "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    phrase = HTTPStatus(reply.status).phrase
    return f"HTTP/1.1 {reply.status} {phrase}\r\n{lines}".encode("latin-1"), reply.body
