"""The threads that turn texts into tokens. One that does not come back takes nobody else down with it unseen."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from quiver.engine.watchdog import Watchdog
from quiver.errors import EngineError, Stalled

T = TypeVar("T")

SLOWEST = 20_000
"""Characters a second that even a slow tokenizer on a busy machine turns into tokens."""


class Encoders:
    """A pool of watched threads; made and used on one event loop. The end of the process does not wait for them."""

    def __init__(self, threads: int, watchdog: Watchdog) -> None:
        self.num_threads = threads
        self._loop = asyncio.get_running_loop()
        self._watchdog = watchdog
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: set[asyncio.Future[Any]] = set()
        self.fault: asyncio.Future[EngineError] = self._loop.create_future()
        """Done once a thread is stuck."""
        for i in range(threads):
            threading.Thread(target=self._serve, name=f"encode-{i}", daemon=True).start()

    async def run(self, work: Callable[[], T], *, size: int = 0) -> T:
        """Do what would hold up the event loop (a long text takes milliseconds). Raises `Stalled`.

        `size` is how much it is, in characters or tokens: much work is not stuck because it takes long.
        """
        if self.fault.done():
            raise Stalled(self.fault.result().message)
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.add(future)
        try:
            self._works.put(lambda: self._do(work, future, size / SLOWEST))
            return await future
        finally:
            self._waiting.discard(future)

    def _serve(self) -> None:
        while work := self._works.get():
            work()

    def _do(self, work: Callable[[], T], future: asyncio.Future[T], limit_seconds: float) -> None:
        if future.cancelled():
            return  # its client has gone
        try:
            with self._watchdog.watching("a tokenizer", self._on_stalled, limit_seconds=limit_seconds):
                result = work()
        except Exception as error:  # noqa: BLE001  whoever waits for it gets it
            self._settle(future, None, error)
        except BaseException as error:  # noqa: BLE001  what would end a thread, or the loop, is an error like another
            self._settle(future, None, EngineError(f"a tokenizer's thread ended with {type(error).__name__}"))
        else:
            self._settle(future, result, None)

    def _settle(self, future: asyncio.Future[T], result: T | None, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_resolve, future, result, error)

    def _on_stalled(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, Stalled(why))

    def _fail(self, error: Stalled) -> None:
        if not self.fault.done():
            self.fault.set_result(error)
        for future in self._waiting:
            _resolve(future, None, Stalled(error.message))

    def close(self) -> None:
        """End the threads; one that is stuck is left behind."""
        for _ in range(self.num_threads):
            self._works.put(None)


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)
