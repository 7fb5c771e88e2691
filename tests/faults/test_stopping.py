"""A server that is told to stop loses nothing that it accepted, and one that is killed is soon replaced."""

import asyncio
import contextlib
import random
import signal
import statistics
import time
from dataclasses import dataclass, field

import pytest

from faults.load import CUT, HANGS, Answer, Pool, embed, get
from faults.servers import BASE64, careless, reply, stub
from quiver.bench.server import free_port

CLIENTS = 12
PARALLEL = 2
"""Servers that live at the same time: a start is mostly imports, on one core."""
BUSY = {"latency_seconds": 0.01}
GRACE_SECONDS = 2.0
RETURN_SECONDS = 2.0
"""How much longer than its own start a killed server may be away."""


@dataclass(slots=True)
class Accepted:
    """Requests that were sent before a moment and after it, and what came of them."""

    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    moment: float = float("inf")

    def note(self, sent: float, answer: Answer) -> None:
        """Take in an answer to a request that was sent at some time."""
        (self.before if sent < self.moment else self.after).append(answer)

    @property
    def lost(self) -> list[Answer]:
        """What was accepted and not answered with its vectors."""
        return [answer for answer in self.before if answer.status != 200]

    @property
    def odd(self) -> list[Answer]:
        """What was sent later, and got neither an answer nor a clean refusal."""
        refused = (a.status == 503 and a.closes for a in self.after)
        return [
            a
            for a, is_refused in zip(self.after, refused, strict=True)
            if a.status not in {200, CUT} and not is_refused
        ]


async def clients_until_gone(url, accepted, gone):
    """Send one request after the other on kept connections, until the server no longer takes them."""

    async def client(pool, number):
        rng = random.Random(number)  # noqa: S311  repeatable on purpose
        while not gone.is_set():
            sent = time.perf_counter()
            request = embed([f"{number} {i}" for i in range(rng.randint(1, 8))], **BASE64)
            answer = await pool.ask(request, patience=15)
            accepted.note(sent, answer)
            if answer.status in {CUT, HANGS}:
                return

    async with Pool(url) as pool:
        await asyncio.gather(*(client(pool, number) for number in range(CLIENTS)))


async def stop_once(seed, **settings):
    """Stop a server at a random moment of its load; returns the account, and how it ended after how long."""
    rng = random.Random(seed)  # noqa: S311  repeatable on purpose
    with stub(behave=BUSY, drain_seconds=10, **settings) as server:
        url = await asyncio.to_thread(server.ready_url)
        accepted, gone = Accepted(), asyncio.Event()
        load = asyncio.create_task(clients_until_gone(url, accepted, gone))
        await asyncio.sleep(rng.uniform(0.05, 0.4))
        accepted.moment = time.perf_counter()
        server.signal(signal.SIGTERM)
        code = await asyncio.to_thread(server.ended)
        seconds = time.perf_counter() - accepted.moment
        gone.set()
        await load
    return accepted, code, seconds


@pytest.mark.parametrize("cycles", [8, pytest.param(100, marks=pytest.mark.faults)])
async def test_nothing_that_was_accepted_is_lost(cycles, capsys):
    """However often a server is told to stop under load, each request sent before is answered with its vectors, and it exits with 0."""
    answered, places = 0, asyncio.Semaphore(PARALLEL)

    async def cycle(seed):
        nonlocal answered
        async with places:
            accepted, code, seconds = await stop_once(seed)
        answered += len(accepted.before)
        assert accepted.lost == []
        assert accepted.odd == []
        assert code == 0
        assert seconds < GRACE_SECONDS + 2

    await asyncio.gather(*(cycle(seed) for seed in range(cycles)))
    with capsys.disabled():
        print(f" ({cycles} stops, {answered} accepted, 0 lost) ", end="")  # noqa: T201  the figures
    assert answered > 10 * cycles


async def test_a_stopping_server_says_so():
    """While it drains it is live and not ready, answers what it accepted with `connection: close`, and refuses what comes later."""
    with stub(drain_seconds=10, drain_delay_seconds=0.5) as server:
        async with Pool(server.ready_url()) as pool:
            kept = [await pool.open() for _ in range(3)]
            running = asyncio.create_task(pool.ask(embed(["!stall 1.5"])))
            await asyncio.sleep(0.1)
            server.signal(signal.SIGTERM)
            await asyncio.sleep(0.15)
            for path, status in (("/health/ready", 503), ("/health/live", 200)):
                assert (await pool.ask(get(path))).status == status
            early = await _ask_on(kept[0], embed(["still accepted"]))
            assert (early.status, early.closes) == (200, True)
            await asyncio.sleep(0.6)
            late = await _ask_on(kept[1], embed(["too late"]))
            assert (late.status, late.closes) == (503, True)
            assert late.retry_after >= 1
            answer = await running
            assert (answer.status, answer.closes) == (200, True)
        assert await asyncio.to_thread(server.ended) == 0


async def _ask_on(line, request):
    """Ask on a connection of one's own."""
    back = asyncio.get_running_loop().create_future()
    line.send(request, back.set_result)
    return await asyncio.wait_for(back, 5)


async def test_a_second_signal_ends_it_at_once():
    """Whoever waits is told, and the exit is clean."""
    with stub(behave={"latency_seconds": 0.5}, drain_seconds=30) as server:
        async with Pool(server.ready_url()) as pool:
            waiting = [asyncio.create_task(pool.ask(embed([f"{i} " + "x" * 400]))) for i in range(40)]
            await asyncio.sleep(0.2)
            server.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            server.signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.ended) == 0
            statuses = {answer.status for answer in await asyncio.gather(*waiting)}
        assert statuses <= {200, 503}
        assert 503 in statuses


async def test_a_server_that_loses_an_accepted_request_is_found_out():
    """Negative control: one that cuts its clients off when it is told to stop has lost what it accepted."""
    accepted, gone = Accepted(), asyncio.Event()

    async def rude(count):
        await asyncio.sleep(0.01)
        if count > 40:
            accepted.moment = min(accepted.moment, time.perf_counter())
            gone.set()
            raise ConnectionError
        return reply()

    async with careless(rude) as url:
        await clients_until_gone(url, accepted, gone)
    assert accepted.lost


# kill -9


async def first_answer(url, *, within_seconds):
    """Return after how many seconds a server answers with a vector."""
    start = time.perf_counter()
    async with Pool(url) as pool:
        while time.perf_counter() - start < within_seconds:
            if (await pool.ask(embed(["now"]), patience=1)).status == 200:
                return time.perf_counter() - start
            await asyncio.sleep(0.02)
    raise AssertionError(f"no answer within {within_seconds} s")


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.faults)])
async def test_a_killed_server_is_soon_back(kills, capsys):
    """With a supervisor, a server that is killed under load serves again within its own start and two seconds; nobody hangs."""
    port, rng = free_port(), random.Random(0)  # noqa: S311  repeatable on purpose
    url, away = f"http://127.0.0.1:{port}", []
    for kill in range(kills + 1):
        with stub(behave=BUSY, port=port) as server:
            away.append(await first_answer(url, within_seconds=15))
            accepted, gone = Accepted(), asyncio.Event()
            load = asyncio.create_task(clients_until_gone(url, accepted, gone))
            await asyncio.sleep(rng.uniform(0.02, 0.2))
            server.signal(signal.SIGKILL)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(load, 5)
            assert await asyncio.to_thread(server.ended) == -signal.SIGKILL
            assert {answer.status for answer in accepted.before} <= {200, CUT}, f"kill {kill}"
    with capsys.disabled():
        print(f" ({kills} kills, away {statistics.median(away):.2f} s, at most {max(away):.2f}) ", end="")  # noqa: T201
    assert max(away) < statistics.median(away) + RETURN_SECONDS
