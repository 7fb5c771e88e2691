"""Load that tells the truth: every request that was sent is answered, cut, or known to hang.

Requests are ready as bytes, replies are read by two searches, and the open loop sends at the times that chance set
beforehand, whatever the server does, to the next tick. What it costs the cores that it shares with the server, it says.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
import orjson

CUT = 0
"""In the place of a status: the connection ended before the reply was whole."""
HANGS = -1
"""In the place of a status: nothing came within the patience."""
TICK_SECONDS = 0.002
STEP_SECONDS = 0.005
"""An open load sends what is due in such steps: waking for each request alone would take from the server what is measured."""
_LENGTH = b"\r\ncontent-length: "


class Answer(NamedTuple):
    """What came back for a request."""

    status: int
    seconds: float = 0.0
    body: bytes = b""
    head: bytes = b""

    @property
    def closes(self) -> bool:
        """Whether the server announced that the connection ends here."""
        return b"\r\nconnection: close" in self.head

    @property
    def retry_after(self) -> int:
        """The seconds that the server asks for, 0 if it does not."""
        _, _, rest = self.head.partition(b"\r\nretry-after: ")
        return int(rest.partition(b"\r")[0] or 0)

    def json(self) -> Any:
        """Decode the body."""
        return orjson.loads(self.body)


Done = Callable[[Answer], None]


def post(path: str, body: bytes, headers: Mapping[str, str] = {}) -> bytes:
    """Return the bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "host: quiver", "content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def embed(texts: Sequence[str], *, headers: Mapping[str, str] = {}, **body: object) -> bytes:
    """Return the bytes of a request for vectors."""
    return post("/v1/embeddings", orjson.dumps({"input": list(texts), **body}), headers)


def get(path: str) -> bytes:
    """Return the bytes of a request that only looks."""
    return f"GET {path} HTTP/1.1\r\nhost: quiver\r\n\r\n".encode("latin-1")


class Line(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable = True
        self._done: Done | None = None
        self._sent = 0.0
        self._data = bytearray()
        self._end = self._head = 0

    def send(self, request: bytes, done: Done) -> None:
        """Send a request; `done` is called once, with what became of it."""
        self._sent = time.perf_counter()
        self._done = done
        if self.usable:
            self.transport.write(request)
        else:
            self._finish(Answer(CUT))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand over a whole reply."""
        self._data += data
        if not self._end and not self._read_head():
            return
        if len(self._data) < self._end:
            return
        head, body = bytes(self._data[: self._head]), bytes(self._data[self._head : self._end])
        del self._data[: self._end]
        self._end = 0
        answer = Answer(int(head[9:12]), time.perf_counter() - self._sent, body, head)
        if answer.closes:
            self.usable = False
        self._finish(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits that nothing will come."""
        del exc
        self.usable = False
        self._finish(Answer(CUT, time.perf_counter() - self._sent))

    def cut(self, *, reset: bool = False) -> None:
        """Leave, with FIN or with RST, in the middle of whatever it is."""
        self.usable = False
        if reset:
            self.transport.abort()
        else:
            self.transport.close()

    def _read_head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._data[:end] = self._data[:end].lower()
        at = self._data.find(_LENGTH, 0, end)
        length = int(self._data[at + len(_LENGTH) : self._data.find(b"\r", at + 1 + len(_LENGTH))]) if at >= 0 else 0
        self._head, self._end = end + 4, end + 4 + length
        return True

    def _finish(self, answer: Answer) -> None:
        done, self._done = self._done, None
        if done:
            done(answer)


class Pool:
    """Connections to one server: an idle one takes the next request, or a new one is opened."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.port = parts.port
        self._address = (parts.hostname, parts.port)
        self._idle: list[Line] = []
        self._lines: set[Line] = set()
        self._opening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._opening:
            task.cancel()
        for line in self._lines:
            line.cut(reset=True)
        await asyncio.sleep(TICK_SECONDS)

    def fire(self, request: bytes, done: Done) -> None:
        """Send a request now; `done` is called with what became of it."""
        while self._idle:
            line = self._idle.pop()
            if line.usable:
                self._send(line, request, done)
                return
            self._lines.discard(line)
        task = asyncio.ensure_future(self._open_and_send(request, done))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def ask(self, request: bytes, *, patience: float = 20.0) -> Answer:
        """Send a request and wait for what becomes of it."""
        start = time.perf_counter()
        waiting = asyncio.get_running_loop().create_future()
        self.fire(request, lambda answer: waiting.done() or waiting.set_result(answer))
        try:
            async with asyncio.timeout(patience):
                return await waiting
        except TimeoutError:
            return Answer(HANGS, time.perf_counter() - start)

    async def open(self) -> Line:
        """Open a connection of one's own."""
        _, line = await asyncio.get_running_loop().create_connection(Line, *self._address)
        self._lines.add(line)
        return line

    async def _open_and_send(self, request: bytes, done: Done) -> None:
        try:
            line = await self.open()
        except OSError:
            done(Answer(CUT))
            return
        self._send(line, request, done)

    def _send(self, line: Line, request: bytes, done: Done) -> None:
        def finished(answer: Answer) -> None:
            if line.usable:
                self._idle.append(line)
            else:
                self._lines.discard(line)
            done(answer)

        line.send(request, finished)


@dataclass(slots=True)
class Ledger:
    """What was sent, and what became of it."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def note(self, answer: Answer) -> None:
        """Take in an answer."""
        self.statuses[answer.status] += 1
        self.seconds.setdefault(answer.status, []).append(answer.seconds)

    @property
    def hanging(self) -> int:
        """Requests that nothing came for."""
        return self.sent - self.statuses.total() + self.statuses[HANGS]

    def goodput(self, within: float) -> float:
        """Return the tokens a second that were answered in time, between a deadline after the start and the end.

        What comes back later does not count, nor what did while the queue filled: both would flatter a short run.
        """
        back = self.due + self.late + self.seconds  # (N,)
        counted = self.good(within) & (back > within) & (back <= self.elapsed)
        return float(self.tokens[counted].sum() / (self.elapsed - within))

    def percentile(self, share: float, status: int = 200) -> float:
        """Return a latency in seconds."""
        return float(np.percentile(self.seconds.get(status) or [np.nan], share))

    def __str__(self) -> str:
        return f"{self.sent} sent, {dict(sorted(self.statuses.items()))}, {self.hanging} hanging"


class Shot(NamedTuple):
    """A request of an open load."""

    request: bytes
    tokens: int = 0


@dataclass(slots=True)
class OpenLoad:
    """What an open load saw, by request: when it was due and when it left, what came of it and how long it took."""

    due: np.ndarray  # (N,) seconds from the start
    tokens: np.ndarray  # (N,)
    status: np.ndarray  # (N,)
    seconds: np.ndarray  # (N,)
    late: np.ndarray  # (N,) seconds by which each left after it was due
    elapsed: float = 0.0
    cpu_seconds: float = 0.0

    def good(self, within: float) -> np.ndarray:
        """Tell which were answered with 200 within a time."""
        return (self.status == 200) & (self.seconds <= within)

    def goodput(self, within: float) -> float:
        """Return the tokens a second that were answered in time, between a deadline after the start and the end.

        What comes back later does not count, nor what did while the queue filled: both would flatter a short run.
        """
        back = self.due + self.late + self.seconds  # (N,)
        counted = self.good(within) & (back > within) & (back <= self.elapsed)
        return float(self.tokens[counted].sum() / (self.elapsed - within))

    def percentile(self, share: float, status: int = 200) -> float:
        """Return a latency in seconds, NaN where nothing had that status."""
        chosen = self.seconds[self.status == status]
        return float(np.percentile(chosen, share)) if len(chosen) else float("nan")

    def counts(self) -> dict[int, int]:
        """Return how many had each status."""
        return {int(s): int(n) for s, n in zip(*np.unique(self.status, return_counts=True), strict=True)}


async def open_load(
    pool: Pool, shots: Sequence[Shot], rate: float, seconds: float, *, patience: float = 10.0, seed: int = 0
) -> OpenLoad:
    """Send at random times (Poisson), in steps of 5 ms, whatever comes back; then wait, with patience, for what is out."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))  # (N,)
    count = len(due)
    tokens = np.array([shots[i % len(shots)].tokens for i in range(count)])
    seen = OpenLoad(due, tokens, np.full(count, HANGS), np.full(count, float(patience)), np.zeros(count))
    is_over = False
    out, start, cpu = count, time.perf_counter(), time.process_time()
    all_back = asyncio.Event()

    def shoot(i: int) -> None:
        def done(answer: Answer) -> None:
            nonlocal out
            if is_over:
                return
            seen.status[i] = answer.status
            seen.seconds[i] = answer.seconds
            out -= 1
            if not out:
                all_back.set()

        seen.late[i] = time.perf_counter() - start - due[i]
        pool.fire(shots[i % len(shots)].request, done)

    sent = 0
    while sent < count:
        now = time.perf_counter() - start
        while sent < count and due[sent] <= now:
            shoot(sent)
            sent += 1
        await asyncio.sleep(STEP_SECONDS)
    seen.elapsed = time.perf_counter() - start
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(all_back.wait(), patience)
    is_over = True
    seen.cpu_seconds = time.process_time() - cpu
    return seen


async def closed_load(pool: Pool, requests: Sequence[bytes], clients: int, until: asyncio.Event | float) -> Ledger:
    """Keep so many requests out at once, for some seconds or until an event; then wait for the last ones."""
    ledger, index = Ledger(), 0
    end = time.perf_counter() + until if isinstance(until, float) else float("inf")

    async def client() -> None:
        nonlocal index
        while time.perf_counter() < end and not (isinstance(until, asyncio.Event) and until.is_set()):
            request = requests[index % len(requests)]
            index += 1
            ledger.sent += 1
            ledger.note(await pool.ask(request))

    await asyncio.gather(*(client() for _ in range(clients)))
    return ledger
