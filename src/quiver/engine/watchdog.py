"""Who watches the threads: work that does not come back is told, instead of being waited for.

A thread says what it begins and when it is done; the watchdog counts, in its own thread. It counts its own turns and
not the clock's time, so a process that was stopped and goes on (a debugger, a paused container) is not taken for dead.
The event loop is watched like any other thread: at every turn it is asked for a sign of life.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

TURN_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class Work:
    """Something that a thread is doing."""

    name: str
    limit_seconds: float
    stalled: Callable[[str], None]
    """Told once, in the watchdog's thread, that it takes longer."""
    all_works: set["Work"]
    """Whatever is at work."""
    seconds: float = 0.0
    is_told: bool = False

    def __enter__(self) -> None:
        self.all_works.add(self)

    def __exit__(self, *_: object) -> None:
        self.all_works.discard(self)


class Watchdog:
    """Watches whatever is at work; entered on the event loop, which it watches too."""

    def __init__(
        self,
        *,
        stall_seconds: float,
        loop_stalled: Callable[[str], None] = lambda _: None,
        loop_lag: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.stall_seconds = stall_seconds
        self._loop_stalled = loop_stalled
        self._loop_lag = loop_lag
        self._works: set[Work] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def watching(self, name: str, stalled: Callable[[str], None], *, limit_seconds: float = 0.0) -> Work:
        """Watch what is done within its `with`; it may take `limit_seconds`, and `stall_seconds` in any case."""
        return Work(name, max(limit_seconds, self.stall_seconds), stalled, self._works)

    @property
    def is_watching(self) -> bool:
        """Whether it is still there; before the start, nothing is missed."""
        return self._thread.ident is None or self._thread.is_alive() or self._over.is_set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(TURN_SECONDS):
            now = time.monotonic()
            passed, before = min(now - before, 2 * TURN_SECONDS), now
            for work in tuple(self._works):
                work.seconds += passed
                if work.seconds > work.limit_seconds and not work.is_told:
                    work.is_told = True
                    work.stalled(f"{work.name} has not come back for {work.seconds:.1f} s")

    async def __aenter__(self) -> Self:
        self._loop_work = self.watching("the event loop", self._loop_stalled)
        self._works.add(self._loop_work)
        self._thread.start()
        self._beat(asyncio.get_running_loop(), expected=time.monotonic())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()

    def _beat(self, loop: asyncio.AbstractEventLoop, expected: float) -> None:
        """Give the loop's sign of life at every turn."""
        self._loop_work.seconds = 0.0
        self._loop_lag(max(0.0, time.monotonic() - expected))
        if not self._over.is_set():
            loop.call_later(TURN_SECONDS, self._beat, loop, time.monotonic() + TURN_SECONDS)
