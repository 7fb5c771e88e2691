"""Requests that come again, byte for byte, and the replies that they get again.

A reply whose results were all known before depends on nothing but the request and the models that are loaded. Whoever
sends the same bytes again gets the same reply: they are not even read as HTTP, nothing is looked up or written anew.

    the same bytes? ──> the same models? ──> who is it, is its rate kept? ──> is so much left of its quota? ──> its reply

Each of these is told without waiting, or the request takes the usual way. A key is a part of the bytes: what one key
got, no other gets from here.
"""

import hashlib
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from quiver.api import secure
from quiver.api.call import Dialect, Known, Reply, Route
from quiver.api.rate_headers import rate_lines
from quiver.billing import Billing
from quiver.errors import AuthUnavailable
from quiver.gate import KEY_HEADERS, Gate, Passage, Standing
from quiver.telemetry.observer import Exchange, Figure, Observer

MAX_BYTES = 16 << 10
"""Longer requests are not held back until they are whole, nor their replies kept."""
ENTRY_BYTES = 1024
"""What an entry holds beside its body, roughly."""
MAX_HEADS = 4096
"""Of which it is remembered how requests begin, and who sends them."""
_OF_ONE = frozenset({b"x-request-id", b"traceparent", b"origin", b"expect", b"transfer-encoding", b"idempotency-key"})
"""Headers by which a request's reply is its own."""
_OF_A_MOMENT = ("server-timing", "content-length", "x-ratelimit-", "ratelimit")
"""Headers that were true when a reply was first sent, or that are written anew."""
_DIGEST_BYTES = 20
_KEYS = tuple((name.encode(), name) for name in KEY_HEADERS)
_LINE, _END = b"\r\n", b"\r\n\r\n"

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Head:
    """All that came of a request before its body, as it came: there may be a key in it."""

    owner: tuple[Dialect, Route]
    data: bytes
    num_bytes: int
    """Of the whole request."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """A reply as it goes over the wire again, but for what is each reply's own, and what it counts as."""

    head: bytes
    body: bytes
    end: bytes
    """What stands in its body behind the milliseconds that it took; empty where it does not tell them."""
    known: Known
    exchange: Exchange
    age: int
    """Of the models when it was made: with others, it may be another."""
    begins: bytes
    """The digest of its request's head."""

    def wire(self, also: bytes, passage: Passage, seconds: float) -> bytes:
        """Write it with some more lines in its head; `seconds` is what it took to find it."""
        body = b"%b%.3f%b" % (self.body, 1e3 * seconds, self.end) if self.end else self.body
        own = b"content-length: %d\r\nx-request-id: req_%032x\r\nserver-timing: total;dur=%.3f\r\n" % (
            len(body),
            random.getrandbits(128),
            1e3 * seconds,
        )
        return b"%b%b%b%b\r\n%b" % (self.head, also, rate_lines(passage.verdict), own, body)


@dataclass(frozen=True, slots=True)
class Room:
    """How much is kept, and whether what one caller got is there for others; else it is one key's, or not kept."""

    max_entries: int
    max_bytes: int
    is_shared: bool = True


class Replies:
    """Replies in memory, within a number of entries and of bytes: what was used longest ago goes."""

    def __init__(
        self,
        gate: Gate,
        billing: Billing,
        observer: Observer,
        room: Room,
        age: Callable[[], int],
    ) -> None:
        """`age` changes with the models that are loaded."""
        self._gate = gate
        self._billing = billing
        self._observer = observer
        self._room = room
        self._age = age
        self._pepper = secrets.token_bytes(16)
        self._replies: OrderedDict[bytes, Repeated] = OrderedDict()
        """By a digest of the whole request."""
        self._begun: dict[bytes, int] = {}
        """How long the requests are whose heads have a digest."""
        self._standings: dict[tuple[bytes, str], Standing] = {}
        """Who sends requests that begin so, from an address."""
        self._also: tuple[Headers, bytes] = ((), b"")
        self._num_bytes = 0
        self._num_inputs = 0

    def head(self, owner: tuple[Dialect, Route | None], headers: Headers, data: bytes) -> Head | None:
        """Return the head of a request that may come again, which begins with `data`; None of one that may not."""
        dialect, route = owner
        if not (route and route.is_repeatable and self._are_kept and data.startswith(b"POST ")):
            return None
        given, came = dict(headers), data[: data.find(_END) + len(_END)]
        if not _OF_ONE.isdisjoint(given) or came.count(_LINE) != len(headers) + 2:  # the first line, and an empty one
            return None
        length = given.get(b"content-length", b"")
        num_bytes = len(came) + (int(length) if length.isdigit() else 0)
        return Head((dialect, route), came, num_bytes) if len(came) < num_bytes <= MAX_BYTES else None

    @property
    def _are_kept(self) -> bool:
        return self._room.max_entries > 0 and (self._room.is_shared or self._gate.tells_users_apart)

    def repeat(self, data: bytes, peer: str, also: Headers) -> bytes | None:
        """Return what the same request got before, with some more headers, as it goes over the wire."""
        start = time.perf_counter()
        if not self._replies or len(data) > MAX_BYTES or (found := self._find(data)) is None:
            return None
        known = found.known
        if (passage := self._admit(found, data, peer)) is None:
            return None
        self._num_inputs += known.inputs
        seconds = time.perf_counter() - start
        self._observer.request_repeated(found.exchange, known.model, known.inputs, seconds)
        return found.wire(self._lines(also), passage, seconds)

    def is_begun(self, data: bytes) -> bool:
        """Tell whether this is not all of a request that may have a reply here: then it is worth waiting for the rest."""
        return len(data) < self._begun.get(self._digest(data[: data.find(_END) + len(_END)]), 0)

    def _find(self, data: bytes) -> Repeated | None:
        name = self._digest(data)
        if (found := self._replies.get(name)) is None:
            return None
        if found.age != self._age():
            self._drop(name)
            return None
        self._replies.move_to_end(name)
        return found

    def _admit(self, found: Repeated, data: bytes, peer: str) -> Passage | None:
        """Let a caller in who may have the reply, and charge for it; None where that cannot be told at once."""
        standing = self._standing(found.begins, data, peer)
        if standing is None or (passage := self._gate.admit_now(standing)) is None:
            return None
        if (key := passage.caller.key) is None:
            return passage
        known = found.known
        with suppress(AuthUnavailable):
            if self._billing.charge_now(key, known.inputs, model=known.model, tokens=known.tokens):
                return passage
        return None

    def _standing(self, begins: bytes, data: bytes, peer: str) -> Standing | None:
        """Remember who sends requests that begin so, as long as that holds."""
        standing = self._standings.get((begins, peer))
        if standing is None or standing.until <= time.monotonic():
            standing = self._gate.standing(_shown(data), peer)
            if standing is None or (standing.caller.key and "embed" not in standing.caller.key.scopes):
                return None
            if len(self._standings) >= MAX_HEADS:
                self._standings.clear()
            self._standings[begins, peer] = standing
        return standing

    def keep(self, head: Head, body: bytes, reply: Reply) -> None:
        """Keep the reply to a request, if all its results were known."""
        if reply.known and self._are_kept:
            name, begins = self._digest(head.data + body), self._digest(head.data)
            self._drop(name)
            self._replies[name] = found = _kept(head, reply, reply.known, self._age(), begins)
            self._num_bytes += _size(found)
            if len(self._begun) >= MAX_HEADS:
                self._begun.clear()
            self._begun[begins] = head.num_bytes
        while len(self._replies) > self._room.max_entries or self._num_bytes > self._room.max_bytes:
            self._drop(next(iter(self._replies)))

    def figures(self) -> Sequence[Figure]:
        """Tell how often replies were given again, and how much is kept."""
        return (
            Figure("quiver_repeated_inputs", "Inputs of repeated replies.", {"": self._num_inputs}, counted=True),
            Figure("quiver_repeated_replies", "Replies in memory.", {"": len(self._replies)}),
            Figure("quiver_repeated_bytes", "Bytes of replies in memory.", {"": self._num_bytes}),
        )

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._pepper, digest_size=_DIGEST_BYTES).digest()

    def _drop(self, name: bytes) -> None:
        if (found := self._replies.pop(name, None)) is not None:
            self._num_bytes -= _size(found)

    def _lines(self, also: Headers) -> bytes:
        """Write headers that are the same for a while."""
        if also is not self._also[0]:
            self._also = also, b"".join([b"%b: %b\r\n" % header for header in also])
        return self._also[1]


def _shown(data: bytes) -> Mapping[str, str]:
    """Read the headers that may hold a key, of a request that was read before."""
    lines = data[: data.find(_END)].split(_LINE)[1:]
    given = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    return {name: given[wire].decode("latin-1") for wire, name in _KEYS if wire in given}


def _kept(head: Head, reply: Reply, known: Known, age: int, begins: bytes) -> Repeated:
    own = {"content-type": reply.media_type, **secure.NOT_KEPT}
    all_headers = own | dict(reply.headers)
    lines = [f"{name}: {value}" for name, value in all_headers.items() if not name.startswith(_OF_A_MOMENT)]
    wire = "\r\n".join((f"HTTP/1.1 {reply.status} OK", *lines, "")).encode("latin-1")
    body, end = (reply.body, b"") if not reply.timed else _around_time(reply.body, reply.timed)
    dialect, route = head.owner
    exchange = Exchange(route.method, dialect=dialect.name, route=route.path, status=reply.status)
    return Repeated(wire, body, end, known, exchange, age, begins)


def _around_time(body: bytes, field: str) -> tuple[bytes, bytes]:
    """Return what stands before and behind the value of the last field, a number."""
    before, name, after = body.rpartition(b'"%b":' % field.encode())
    return before + name, after.lstrip(b"-+.0123456789eE")


def _size(found: Repeated) -> int:
    return ENTRY_BYTES + len(found.body)
