"""Results that were computed before: in memory, and in a Redis that several servers share.

    key ──> memory ──> in flight? join ──> Redis ──> compute ──> memory, and behind everyone's back Redis

What is kept is the result in full precision, before anything is cut, scaled or rounded for a caller, so that it has the
bits that computing it again would give. A key names all that a result depends on, under a secret: who reads or writes
Redis learns no text from it, and can put no vector in another's place, for a value carries a tag made with the same
secret. What is damaged, or not for this key, is a miss.
"""

import asyncio
import hashlib
import hmac
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from quiver.errors import DeadlineExceeded
from quiver.remote import CALL_SECONDS, Client, Remote, RemoteDown
from quiver.telemetry.observer import Figure
from quiver.types import Encoding, Floats

Compute = Callable[[Sequence[int]], Awaitable[Sequence[Floats]]]
"""Places of inputs -> a result for each, in order."""

TTL_SECONDS = 24 * 3600
MAX_ENTRIES = 10_000
MAX_BYTES = 256 << 20
MAX_UNWRITTEN = 4096
"""Results that may wait to be written to Redis; more are dropped, for they can be computed again."""
MAX_ORIGINS = 1024
"""Most origins that are kept at hand: models, times the users that ask for them."""
_TOGETHER = 64
"""Results in one call."""
_WRITE_SECONDS = 1.0
_KEY_BYTES = 24
_TAG_BYTES = 16
_MAGIC = b"Qv1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """All that a result depends on beside the tokens of its input."""

    scope: str
    """Who shares it: a user, or, as "", everybody."""
    model: str
    revision: str
    backend: str
    dtype: str
    pooling: str
    kind: str
    prompt: str = ""


class Keys:
    """Makes keys under a secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = hashlib.blake2b(secret).digest()
        self._start_at_hand = lru_cache(MAX_ORIGINS)(self._start)

    def of(self, origin: Origin, encodings: Sequence[Encoding]) -> list[bytes]:
        """Return the key of each result; whatever differs in anything has another."""
        start = self._start_at_hand(origin)
        return [self._of_one(start.copy(), encoding) for encoding in encodings]

    def _start(self, origin: Origin) -> "hashlib.blake2b":
        fields = [getattr(origin, name).encode("utf-8", "surrogatepass") for name in Origin.__slots__]
        prefix = b"".join(struct.pack("<Q", len(field)) + field for field in fields)
        return hashlib.blake2b(prefix, key=self._secret, digest_size=_KEY_BYTES)

    def _of_one(self, digest: "hashlib.blake2b", encoding: Encoding) -> bytes:
        has_types = encoding.type_ids is not None
        flags = (encoding.truncated, encoding.per_token, encoding.unscaled, has_types)
        digest.update(struct.pack("<Q4?", len(encoding), *flags))
        digest.update(np.ascontiguousarray(encoding.ids, np.int64).tobytes())
        if encoding.type_ids is not None:
            digest.update(np.ascontiguousarray(encoding.type_ids, np.int64).tobytes())
        return digest.digest()

    def pack(self, key: bytes, result: Floats) -> bytes:
        """Write a result as Redis keeps it: shape, numbers, and a tag over both and the key."""
        head = _MAGIC + struct.pack(f"<B{result.ndim}I", result.ndim, *result.shape)
        body = head + np.ascontiguousarray(result, "<f4").tobytes()
        return self._tag(key, body) + body

    def unpack(self, key: bytes, value: bytes | None) -> Floats | None:
        """Read a value; None is what was not written for this key, or is damaged."""
        if value is None or not hmac.compare_digest(self._tag(key, value[_TAG_BYTES:]), value[:_TAG_BYTES]):
            return None
        at = _TAG_BYTES + len(_MAGIC)
        num_axes = value[at]
        shape = struct.unpack_from(f"<{num_axes}I", value, at + 1)
        return np.frombuffer(value, "<f4", offset=at + 1 + 4 * num_axes).reshape(shape)

    def _tag(self, key: bytes, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._secret, digest_size=_TAG_BYTES, salt=key[:16], person=key[16:]).digest()


class Memory:
    """Results in memory, within a number of entries and of bytes: what was used longest ago goes."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._results: OrderedDict[bytes, Floats] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: bytes) -> Floats | None:
        """Return a result, which nobody may write to."""
        if (result := self._results.get(key)) is not None:
            self._results.move_to_end(key)
        return result

    def put(self, key: bytes, result: Floats) -> Floats:
        """Keep a copy, lest a small result hold the batch that it is a row of; returns what is kept."""
        kept = np.array(result, np.float32)
        kept.flags.writeable = False
        if kept.nbytes > self._max_bytes or self._max_entries < 1:
            return kept
        self._drop(key)
        self._results[key] = kept
        self.num_bytes += kept.nbytes
        while len(self._results) > self._max_entries or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._results)))
        return kept

    def _drop(self, key: bytes) -> None:
        if (old := self._results.pop(key, None)) is not None:
            self.num_bytes -= old.nbytes


@dataclass(slots=True)
class CacheCounts:
    """What became of the inputs that were looked up."""

    memory_hits: int = 0
    remote_hits: int = 0
    joined: int = 0
    """Computed at that moment for someone else, or for the same request."""
    misses: int = 0
    damaged: int = 0
    """Values in Redis that were not what they should be; they are misses, too."""
    dropped: int = 0
    """Results that could not be written to Redis."""


@dataclass(frozen=True, slots=True)
class Found:
    """Results of one request's inputs, in order."""

    results: Sequence[Floats]
    cached: Sequence[bool]
    """Which of them were in memory or in Redis."""


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A result that someone is getting; None once they could not."""

    result: asyncio.Future[Floats | None]
    urgent: bool


@dataclass(slots=True, eq=False)
class _Search:
    """One request's inputs, as far as they are found."""

    keys: Sequence[bytes]
    compute: Compute
    urgent: bool
    found: list[Floats | None]
    cached: list[bool]

    @property
    def missing(self) -> list[int]:
        return [i for i, result in enumerate(self.found) if result is None]


class Cache:
    """Both tiers and what is in flight; used on one event loop."""

    def __init__(
        self,
        keys: Keys,
        memory: Memory,
        remote: Remote | None = None,
        *,
        prefix: str = "quiver:",
        ttl_seconds: float = TTL_SECONDS,
    ) -> None:
        self.keys = keys
        self.memory = memory
        self.counts = CacheCounts()
        self._remote = remote
        self._prefix = prefix.encode()
        self._ttl_ms = max(1, round(ttl_seconds * 1000))
        self._flights: dict[bytes, _Flight] = {}
        self._unwritten: dict[bytes, Floats] = {}
        self._writer: asyncio.Task[None] | None = None

    async def look_up(
        self, keys: Sequence[bytes], compute: Compute, *, urgent: bool = True, timeout_seconds: float | None = None
    ) -> Found:
        """Return the result under each key, computing what is nowhere. Raises what `compute` raises.

        Who is urgent joins no flight of one who is not: that may wait long for its turn.
        """
        found = [self.memory.get(key) for key in keys]
        search = _Search(keys, compute, urgent, found, [result is not None for result in found])
        self.counts.memory_hits += sum(search.cached)
        if search.missing:
            try:
                async with asyncio.timeout(timeout_seconds):
                    while missing := search.missing:
                        await self._fill(search, missing)
            except TimeoutError as error:
                raise DeadlineExceeded(f"not answered within {timeout_seconds:g} s") from error
        return Found([result for result in search.found if result is not None], search.cached)

    def figures(self) -> Sequence[Figure]:
        """Tell what became of the inputs that were looked up, and how much is kept."""
        counts = self.counts
        hits = {"memory": counts.memory_hits, "redis": counts.remote_hits, "flight": counts.joined}
        lost = {"damaged": counts.damaged, "dropped": counts.dropped}
        return (
            Figure("quiver_cache_hits", "Inputs whose results were known.", hits, "where", counted=True),
            Figure("quiver_cache_misses", "Inputs that were computed.", {"": counts.misses}, counted=True),
            Figure("quiver_cache_lost", "Results that Redis has damaged or not taken.", lost, "how", counted=True),
            Figure("quiver_cache_entries", "Results in memory.", {"": len(self.memory)}),
            Figure("quiver_cache_bytes", "Bytes of results in memory.", {"": self.memory.num_bytes}),
        )

    async def close(self) -> None:
        """Write what is left, if that is soon done."""
        if self._writer:
            await asyncio.wait({self._writer}, timeout=_WRITE_SECONDS)
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _fill(self, search: _Search, missing: Sequence[int]) -> None:
        """Get what nobody else is getting, then wait for the others; who could not leaves it to the next round."""
        mine: dict[int, _Flight] = {}
        joined: dict[int, _Flight] = {}
        for i in missing:
            flight = self._flights.get(search.keys[i])
            if flight and (flight.urgent or not search.urgent):
                joined[i] = flight
            else:
                mine[i] = self._flights[search.keys[i]] = _Flight(
                    asyncio.get_running_loop().create_future(), search.urgent
                )
        self.counts.joined += len(joined)
        try:
            await self._get(search, mine)
        finally:
            for i, flight in mine.items():
                self._land(search.keys[i], flight, None)
        if joined:
            await asyncio.wait({flight.result for flight in joined.values()})
        for i, flight in joined.items():
            result = flight.result.result()
            search.found[i] = self.memory.get(search.keys[i]) if result is None else result

    async def _get(self, search: _Search, mine: dict[int, _Flight]) -> None:
        """Ask Redis, and compute what it does not have."""
        for i, result in (await self._read(search.keys, tuple(mine))).items():
            self.counts.remote_hits += 1
            search.found[i], search.cached[i] = self.memory.put(search.keys[i], result), True
            self._land(search.keys[i], mine[i], search.found[i])
        if not (left := [i for i in mine if search.found[i] is None]):
            return
        self.counts.misses += len(left)
        for i, result in zip(left, await search.compute(left), strict=True):
            kept = search.found[i] = self.memory.put(search.keys[i], result)
            self._land(search.keys[i], mine[i], kept)
            self._write_later(search.keys[i], kept)

    def _land(self, key: bytes, flight: _Flight, result: Floats | None) -> None:
        if not flight.result.done():
            flight.result.set_result(result)
            if self._flights.get(key) is flight:
                del self._flights[key]

    async def _read(self, keys: Sequence[bytes], places: Sequence[int]) -> dict[int, Floats]:
        """Ask Redis for some of the keys, for a moment: whatever it does, nobody waits much longer."""
        found: dict[int, Floats] = {}
        if self._remote is None:
            return found
        end = time.perf_counter() + CALL_SECONDS
        with suppress(RemoteDown):
            for some in _chunks(places):
                values = await self._remote.call(partial(_values, names=[self._name(keys[i]) for i in some]))
                for i, value in zip(some, values, strict=True):
                    if (result := self.keys.unpack(keys[i], value)) is not None:
                        found[i] = result
                    elif value is not None:
                        self.counts.damaged += 1
                if time.perf_counter() >= end:
                    break
        return found

    def _write_later(self, key: bytes, result: Floats) -> None:
        if self._remote is None:
            return
        if len(self._unwritten) >= MAX_UNWRITTEN or self._remote.is_down:
            self.counts.dropped += 1
            return
        self._unwritten[key] = result
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(self._remote))

    async def _write(self, remote: Remote) -> None:
        while self._unwritten:
            some = [self._unwritten.popitem() for _ in range(min(_TOGETHER, len(self._unwritten)))]
            try:
                await remote.call(partial(self._send, results=some), seconds=_WRITE_SECONDS)
            except RemoteDown:
                self.counts.dropped += len(some) + len(self._unwritten)
                self._unwritten.clear()

    async def _send(self, client: Client, results: Sequence[tuple[bytes, Floats]]) -> None:
        async with client.pipeline(transaction=False) as pipeline:
            for key, result in results:
                pipeline.set(self._name(key), self.keys.pack(key, result), px=self._ttl_ms)
            await pipeline.execute()

    def _name(self, key: bytes) -> bytes:
        return self._prefix + b"result:" + key.hex().encode()


async def _values(client: Client, names: Sequence[bytes]) -> Sequence[bytes | None]:
    values: Sequence[Any] = await client.mget(names)
    if len(values) != len(names):
        raise ValueError(f"{len(names)} names gave {len(values)} values")
    return values


def _chunks(places: Sequence[int]) -> Iterator[Sequence[int]]:
    return (places[i : i + _TOGETHER] for i in range(0, len(places), _TOGETHER))


def load_secret(path: Path) -> bytes:
    """Return the secret of a data directory, making it first where there is none; only its owner can read it."""
    if path.exists():
        return path.read_bytes()
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"{path.name}.{os.urandom(4).hex()}")  # servers in containers all have the same pid
        made.touch(mode=0o600)
        made.write_bytes(os.urandom(32))
        try:
            os.link(made, path)  # whole or not at all, and never over another server's
        finally:
            made.unlink()
    return path.read_bytes()
