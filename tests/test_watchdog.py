"""Work that does not come back is told: of a lane, a tokenizer, or the event loop itself."""

import asyncio
import threading
import time

import pytest

from quiver.engine.encoders import Encoders
from quiver.engine.watchdog import TURN_SECONDS, Watchdog
from quiver.errors import EngineError, Stalled

SOON = 1.2


async def test_work_that_takes_too_long_is_told_once():
    """Its name is told within a second of its limit, and only once."""
    told = []
    async with Watchdog(stall_seconds=0.1) as watchdog:
        with watchdog.watching("a lane", told.append):
            await asyncio.sleep(0.1 + SOON)
    assert len(told) == 1
    assert "a lane has not come back" in told[0]


async def test_work_that_comes_back_in_time_is_not_told():
    """Much short work is no long work."""
    told = []
    async with Watchdog(stall_seconds=3 * TURN_SECONDS) as watchdog:
        for _ in range(6):
            with watchdog.watching("a lane", told.append):
                await asyncio.sleep(TURN_SECONDS / 2)
    assert told == []


async def test_a_loop_that_does_not_turn_is_told():
    """The loop is watched from outside; one that turns is left alone, and its lag is told."""
    told, lags = [], []
    async with Watchdog(stall_seconds=0.6, loop_stalled=told.append, loop_lag=lags.append):
        await asyncio.sleep(1)
        assert told == []
        time.sleep(0.6 + SOON)  # noqa: ASYNC251  the fault
        assert len(told) == 1
        await asyncio.sleep(TURN_SECONDS)
    assert max(lags) > 0.6


async def test_a_clock_that_jumps_is_no_stall():
    """The watchdog counts its own turns: a process that was stopped for long is not taken for dead."""
    told = []
    watchdog = Watchdog(stall_seconds=60)
    with watchdog.watching("a lane", told.append):
        (work,) = watchdog._works
        work.seconds = 59.0
        async with watchdog:
            await asyncio.sleep(2 * TURN_SECONDS)
        assert 59 < work.seconds < 59 + 8 * TURN_SECONDS
    assert told == []


async def test_a_stuck_tokenizer_is_told_to_everyone():
    """Those whose texts are with it and those who wait behind it are answered, newcomers refused."""
    released = threading.Event()
    async with Watchdog(stall_seconds=0.2) as watchdog:
        encoders = Encoders(1, watchdog)
        asked = [asyncio.ensure_future(encoders.run(lambda: released.wait(10))) for _ in range(3)]
        async with asyncio.timeout(0.2 + SOON):
            replies = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(reply) for reply in replies] == [Stalled] * 3
        with pytest.raises(Stalled):
            await encoders.run(lambda: 1)
        released.set()
        encoders.close()


async def test_much_work_is_not_stuck_because_it_takes_long():
    """The limit grows with the texts: one of a million characters may take longer than a short one."""
    async with Watchdog(stall_seconds=0.1) as watchdog:
        encoders = Encoders(1, watchdog)
        assert await encoders.run(lambda: time.sleep(1) or 7, size=1_000_000) == 7
        with pytest.raises(Stalled):
            await encoders.run(lambda: time.sleep(1), size=10)
        encoders.close()


async def test_whatever_ends_a_tokenizers_thread_is_an_error():
    """What would end a thread, or the loop, reaches the one who asked; the next text is encoded."""

    def die():
        raise SystemExit

    def fail():
        raise ValueError("no")

    encoders = Encoders(1, Watchdog(stall_seconds=10))
    with pytest.raises(EngineError, match="SystemExit"):
        await encoders.run(die)
    with pytest.raises(ValueError, match="no"):
        await encoders.run(fail)
    assert await encoders.run(lambda: 7) == 7
    encoders.close()
