"""The yes or no at the door, before a request's body is read: is there time for it, a place, and memory?"""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext

from quiver.capacity import Load, Places
from quiver.config import ServerConfig
from quiver.engine.verbs import Verbs
from quiver.errors import Closed, Overloaded, QuiverError, Unavailable
from quiver.telemetry.observer import Figure
from quiver.types import Caller

BYTES_PER_TOKEN = 4
"""What a body holds of a token, roughly: the queue counts exactly, once it is read."""
MARGIN = 0.9
"""Stricter than the queue's own: what is let in here is hardly ever refused there, after it has cost an encoding."""
JITTER = 0.25
"""Part by which times to come back differ, so that not all come back at once."""
COARSE_SECONDS = 10
"""Longer times are whole seconds."""
MAX_REFUSALS = 256


class Admission:
    """Owns what is at work: places, bytes, and whether memory is short."""

    def __init__(self, config: ServerConfig, engine: Verbs, *, max_wait_seconds: float = 0.0) -> None:
        self._config = config
        self._max_wait_seconds = max_wait_seconds or math.inf
        self._engine = engine
        self._turns = asyncio.Semaphore(config.max_concurrent_requests)
        self.places = Places(config.max_concurrent_requests) if config.max_concurrent_requests else None
        """None where requests at work are not bounded."""
        self._num_bytes = 0
        self._refusals: dict[tuple[str, float], Overloaded] = {}
        self.memory_is_short = False
        self.fault: QuiverError | None = None
        """Why nothing is let in any more, if so."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the bodies at work."""
        return self._num_bytes

    def refusal(self, num_bytes: int, caller: Caller, *, is_queued: bool) -> QuiverError | None:
        """Tell why a request with a body of so many bytes cannot be let in now; takes microseconds.

        `is_queued` is one whose work waits in a queue of its own, however long that is.
        """
        if self.fault:
            return self.fault
        return self._no_room(num_bytes) or (None if is_queued else self._no_turn(num_bytes, caller))

    def _no_room(self, num_bytes: int) -> Unavailable | None:
        if self.memory_is_short:
            return self._later("memory is short", 2.0)
        if num_bytes and self._num_bytes + num_bytes > self._config.max_inflight_bytes:
            return self._later("as many bytes as may be are at work", 1.0)
        return None

    def _no_turn(self, num_bytes: int, caller: Caller) -> Unavailable | None:
        if self.places and not self._config.queue_seconds and self._turns.locked():
            return self._no_place()
        expected = self._engine.replicas.expect(num_bytes // BYTES_PER_TOKEN, caller)
        if expected.fits(min(caller.seconds_left(), self._max_wait_seconds), margin=MARGIN):
            return None
        return self._later("it would not be answered in time", expected.wait)

    def figures(self) -> Sequence[Figure]:
        """Tell what is at work, and whether there is memory for more."""
        return (
            Figure("quiver_work_bytes", "Bytes of the bodies of requests at work.", {"": self._num_bytes}),
            Figure("quiver_memory_short", "1 where new work is refused: memory is short.", {"": self.memory_is_short}),
        )

    def load(self, error: QuiverError) -> Load:
        """Tell how full the server is, as far as it matters to whoever meets an error."""
        model = error.model if isinstance(error, Unavailable) else None
        return Load(self._engine.replicas.shortest_queue(model), self.places)

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Count a body as at work; yields what to call with its size where that turns out to be larger."""
        held = num_bytes
        self._num_bytes += held

        def grow(size: int) -> None:
            nonlocal held
            self._num_bytes += max(0, size - held)
            held = max(held, size)

        try:
            yield grow
        finally:
            self._num_bytes -= held

    def place(self) -> AbstractAsyncContextManager[None]:
        """Hold one of the places of requests that are at work, where they are bounded. Raises `Overloaded`."""
        return self._one_of(self.places) if self.places else nullcontext()

    @asynccontextmanager
    async def _one_of(self, places: Places) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.queue_seconds):
                await self._turns.acquire()
        except TimeoutError as error:
            raise self._no_place() from error
        places.taken += 1
        try:
            yield
        finally:
            places.taken -= 1
            self._turns.release()

    def close(self) -> None:
        """Let nothing in any more."""
        self.fault = self.fault or Closed("the server is stopping")

    def _no_place(self) -> Unavailable:
        return Overloaded(
            f"{self._config.max_concurrent_requests} requests are at work already: send fewer at a time",
            retry_after_seconds=max(1.0, self._config.queue_seconds),
        )

    def _later(self, why: str, seconds: float) -> Overloaded:
        """Return a refusal with a time to come back, ready-made: at ten times the load, most answers are these."""
        seconds *= 1 + JITTER * random.random()  # noqa: S311  no secret
        seconds = round(seconds, 1) if seconds < COARSE_SECONDS else round(seconds)
        if (why, seconds) not in self._refusals:
            if len(self._refusals) >= MAX_REFUSALS:
                self._refusals.clear()
            message = f"{why}: come back in {seconds:g} s"
            self._refusals[why, seconds] = Overloaded(message, retry_after_seconds=seconds)
        return self._refusals[why, seconds]
