"""The outermost layer: refuses, with ready-made bytes, what cannot be let in now.

Under overload most requests end here. Each costs less than a hundredth of one that is served, so that those that are
let in keep their time.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote

from quiver.admission import Admission
from quiver.api.call import PATIENCE, Dialect, Reply, Route, load_headers, patience, refuse
from quiver.api.router import Router
from quiver.config import ServerConfig
from quiver.errors import Overloaded, QuiverError, TooSlow
from quiver.gate import KEY_HEADERS, Gate
from quiver.telemetry.observer import Observer
from quiver.types import Caller

LOAD_SECONDS = 0.25
"""How long refusals say the same of the load: a client that is told to come back later makes no use of more."""
REFUSED_SECONDS = 0.005
"""How long a refusal holds for requests of the same caller, size and patience: room for them takes longer to come."""
_NEVER: tuple[float, QuiverError | None] = (0.0, None)
MAX_KNOWN = 1024
"""Most URLs, and most responses, that are remembered."""
_READ = tuple((name.encode(), name) for name in (*PATIENCE, *KEY_HEADERS))
"""The headers that are looked at before a body is read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response as it goes over the wire, and whether the connection ends with it."""

    wire: bytes
    closes: bool


Headers = Sequence[tuple[bytes, bytes]]
"""As they came, their names in lower case."""


class Edge:
    """Knows which API a request is made in by its path alone, and writes refusals in that API's shape.

    `headers` stand in each of them, whatever it is about.
    """

    def __init__(
        self,
        router: Router,
        gate: Gate,
        admission: Admission,
        observer: Observer,
        config: ServerConfig,
        headers: Mapping[str, str],
    ) -> None:
        self._gate = gate
        self.admission = admission
        self._router = router
        self._observer = observer
        self._timeout_seconds = config.timeout_seconds
        self._cors_origins = frozenset(config.cors_origins)
        self._url_prefix = config.url_prefix
        self._max_body_bytes = config.max_body_bytes
        self._headers = headers
        self._known: dict[tuple[str, bytes], tuple[Dialect, Route | None]] = {}
        self._refused: dict[tuple[str, int, float, bool], tuple[float, QuiverError | None]] = {}
        """Who was refused a moment ago, until when that holds, and why."""
        self._loads: dict[tuple[str, QuiverError], tuple[float, bytes]] = {}
        """What was said of the load, and until when it is said again."""
        self._ready_made: dict[tuple[Callable[[int, QuiverError], bytes], QuiverError], tuple[bytes, bytes]] = {}

    def refusal(self, method: str, url: bytes, headers: Headers, peer: str) -> Refusal | None:
        """Return the response to a request that cannot be let in now, or None for one that can."""
        given = dict(headers)
        error = self.judge(method, url, given, peer)
        return None if error is None else self._written(self.peek(method, url)[0], error, given)

    def judge(self, method: str, url: bytes, given: Mapping[bytes, bytes], peer: str) -> QuiverError | None:
        """Tell why a request with these headers cannot be let in now."""
        _, route = self.peek(method, url)
        if route is None or route.public or method != "POST":
            return None
        said = {name: given[wire].decode("latin-1") for wire, name in _READ if wire in given}
        caller = self._gate.glance(said, peer)
        if isinstance(caller, QuiverError):
            return caller
        if (num_bytes := _length(given)) > self._max_body_bytes:
            return None  # it is told so, and not to come back
        held = 0 if route.is_upload else num_bytes
        return self._judged(caller.id, held, patience(said, self._timeout_seconds), is_queued=route.is_queued)

    def _judged(self, caller: str, held: int, seconds: float, *, is_queued: bool) -> QuiverError | None:
        """Ask whether there is room and time; who asks for the same again in a moment is told the same."""
        asked, now = (caller, held, seconds, is_queued), time.monotonic()
        until, error = self._refused.get(asked, _NEVER)
        if now < until:
            return error
        error = self.admission.refusal(held, Caller(caller, now + seconds), is_queued=is_queued)
        if error:
            if len(self._refused) >= MAX_KNOWN:
                self._refused.clear()
            self._refused[asked] = now + REFUSED_SECONDS, error
        return error

    def peek(self, method: str, url: bytes) -> tuple[Dialect, Route | None]:
        """Look a URL up; what has been looked up before is remembered, up to a number."""
        if (found := self._known.get((method, url))) is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            path = unquote(url.partition(b"?")[0].decode("latin-1"))
            found = self._known[method, url] = self._router.peek(method, path_below(self._url_prefix, path))
        return found

    def is_upload(self, method: str, url: bytes) -> bool:
        """Whether a body may take as long as it keeps coming."""
        route = self.peek(method, url)[1]
        return route is not None and route.is_upload

    def late(self, url: bytes) -> Refusal:
        """Return the response to a request that did not come whole in time."""
        dialect, _ = self.peek("POST", url)
        return self._written(dialect, TooSlow("the request did not come in time: send it faster"), {})

    def broken(self, error: QuiverError) -> Refusal:
        """Return the response to what could not be read as a request."""
        return self._written(self._router.owner(""), error, {})

    def _written(self, dialect: Dialect, error: QuiverError, given: Mapping[bytes, bytes]) -> Refusal:
        self._observer.request_refused(error.code)
        closes = not isinstance(error, Overloaded)  # whoever comes back soon should find the door open
        key = (dialect.render_error, error)
        if key not in self._ready_made:
            if len(self._ready_made) >= MAX_KNOWN:
                self._ready_made.clear()
            self._ready_made[key] = _wire(refuse(dialect, error), self._headers, closes=closes)
        head, body = self._ready_made[key]
        request_id, rest = random.getrandbits(128), self._load(dialect, error) + self._allowed_origin(given)
        return Refusal(b"%bx-request-id: req_%032x\r\n%b\r\n%b" % (head, request_id, rest, body), closes)

    def _load(self, dialect: Dialect, error: QuiverError) -> bytes:
        """Write what an API's refusals say of the load: it moves, so that it is remembered for a moment only."""
        if dialect.refusal_headers is None:
            return b""
        now, (until, lines) = time.monotonic(), self._loads.get((dialect.name, error), (0.0, b""))
        if now >= until:
            lines = _lines(load_headers(dialect, error, self.admission.load(error)))
            if len(self._loads) >= MAX_KNOWN:
                self._loads.clear()
            self._loads[dialect.name, error] = now + LOAD_SECONDS, lines
        return lines

    def _allowed_origin(self, given: Mapping[bytes, bytes]) -> bytes:
        """Let a page in a browser read why it is refused, where it may call at all."""
        origin = given.get(b"origin")
        if origin is None or not self._cors_origins & {"*", origin.decode("latin-1")}:
            return b""
        return b"access-control-allow-origin: %b\r\naccess-control-expose-headers: *\r\nvary: origin\r\n" % origin


def path_below(prefix: str, path: str) -> str:
    """Leave out what may stand before every route."""
    prefix = prefix.rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _length(given: Mapping[bytes, bytes]) -> int:
    length = given.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


def _wire(reply: Reply, more: Mapping[str, str], *, closes: bool) -> tuple[bytes, bytes]:
    """Return a response's head, without the empty line that ends it, and its body."""
    headers = {"content-type": reply.media_type, "content-length": str(len(reply.body)), **more, **reply.headers}
    if closes:
        headers["connection"] = "close"
    phrase = HTTPStatus(reply.status).phrase
    return f"HTTP/1.1 {reply.status} {phrase}\r\n".encode("latin-1") + _lines(headers), reply.body


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
