"""Threads beside the event loop: what blocks must not hold it up, nor the end of the process."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from quiver.errors import EngineError

T = TypeVar("T")

NICE = 5
"""How much a computing thread gives way to others of the machine."""
SWITCH_SECONDS = 0.0005
"""How long a thread that runs Python may make others wait; Python's own 5 ms is as long as a short batch."""


def let_loop_go_first() -> None:
    """Let the calling thread give way to the event loop: a refusal, or the next request, takes microseconds of work.

    On two busy cores, with ten times the load, the slowest of a hundred refusals then takes 7 ms instead of 19.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    if sys.platform == "linux":  # elsewhere it would slow down the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


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
