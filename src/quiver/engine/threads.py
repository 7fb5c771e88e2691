"""Blocking work in a thread that the end of the process does not wait for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from quiver.errors import EngineError

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T], *, name: str) -> T:
    """Run blocking work as `asyncio.to_thread` does; who stops the server has no use for what may take minutes."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # from now on only the thread settles it

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # noqa: BLE001  whoever awaits gets it
            outcome.set_exception(error)
        except BaseException as error:  # noqa: BLE001  it would end the event loop
            outcome.set_exception(EngineError(f"a thread ended with {type(error).__name__}"))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(outcome)
