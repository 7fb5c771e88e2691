"""Whatever dies or stalls, wherever: every client is answered, and the process serves on or ends. No zombies.

Each hop of a request has its fault: the encoder's thread, the lane's, the model, the event loop, the process.
"""

import asyncio
import contextlib
import time
from collections import Counter

import pytest

from faults.load import CUT, HANGS, Ledger, Pool, embed, get
from faults.servers import BASE64, careless, reply, stub

STALL_SECONDS = 1.0
AT_ONCE_SECONDS = 1.0
NOISE_SECONDS = 1.0
"""For a machine that does something else meanwhile."""
EXIT_SECONDS = 5.0
EX_SOFTWARE = 70
NEIGHBOURS = 40

IN_BATCH = {"latency_seconds": 0.02}


async def beside(pool, culprit, *, neighbours=NEIGHBOURS, patience=8.0, after=0.05):
    """Send requests before and after one that breaks something; returns the culprit's answer and the others' ledger."""
    ledger = Ledger()

    async def ask(i):
        ledger.sent += 1
        ledger.note(await pool.ask(embed([f"neighbour {i}"], **BASE64), patience=patience))

    others = [asyncio.create_task(ask(i)) for i in range(neighbours // 2)]
    await asyncio.sleep(after)
    asking = asyncio.create_task(pool.ask(culprit, patience=patience))
    others += [asyncio.create_task(ask(i)) for i in range(neighbours // 2, neighbours)]
    answer = await asking
    await asyncio.gather(*others)
    return answer, ledger


def slowest(ledger):
    """Return how long the slowest answer took."""
    return max(max(seconds) for seconds in ledger.seconds.values())


async def assert_serves_on(pool):
    """Check that the server lives, is ready and gives right vectors."""
    assert (await pool.ask(get("/health/live"))).status == 200
    assert (await pool.ask(get("/health/ready"))).status == 200
    assert (await pool.ask(embed(["after"]))).status == 200


def code_of(answer):
    """Return the word that a refusal is known by."""
    return answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def url():
    """Run a stub that no fault of a single input may end."""
    with stub(behave=IN_BATCH) as server:
        yield server.ready_url()


@pytest.mark.parametrize(
    ("mark", "status", "code"),
    [
        ("!raise", 500, "inference_error"),
        ("!few", 500, "inference_error"),
        ("!nan", 500, "non_finite_output"),
        ("!infinity", 500, "non_finite_output"),
        ("!memory", 503, None),
        ("!encode-raise", 500, None),
    ],
)
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_only_the_culprit_fails(url, mark, status, code, form):
    """An input that the model cannot compute is an error of its own kind, in every form, and its neighbours are served."""
    async with Pool(url) as pool:
        answer, ledger = await beside(pool, embed([mark], encoding_format=form))
        assert answer.status == status, answer
        assert code in {None, code_of(answer)}
        assert (answer.retry_after > 0) == (status == 503)
        assert ledger.statuses == {200: NEIGHBOURS}
        await assert_serves_on(pool)


@pytest.mark.parametrize("hop", ["batch_computed", "inputs_computed", "exchange"])
async def test_who_counts_may_fail(url, hop):
    """A fault of the observer, in the lane, on the loop or after the reply is made, is answered at once and stays alone."""
    async with Pool(url) as pool:
        answer, ledger = await beside(pool, embed([f"!observe {hop}"]))
        assert answer.status in {200, 500, 503}
        assert ledger.statuses.total() == NEIGHBOURS
        assert set(ledger.statuses) <= {200, 500, 503}
        assert ledger.statuses[200] >= NEIGHBOURS / 4
        assert (answer.status, ledger.statuses[200]) != (200, NEIGHBOURS)
        assert max(answer.seconds, slowest(ledger)) < AT_ONCE_SECONDS + NOISE_SECONDS
        await assert_serves_on(pool)


async def test_a_batch_that_does_not_fit_into_memory_is_halved(url):
    """Inputs that fail together for want of memory are computed apart, and nobody notices."""
    async with Pool(url) as pool:
        answer, ledger = await beside(pool, embed([f"!memory-unless-alone {i}" for i in range(16)]))
        assert answer.status == 200
        assert ledger.statuses == {200: NEIGHBOURS}
        await assert_serves_on(pool)


@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_lane_that_dies_is_replaced(lanes):
    """Its batch is told at once, what waits is served by the lane that follows it, and the server lives."""
    with stub(behave=IN_BATCH, lanes=lanes) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!die-once 1"]))
            assert answer.status == 503
            assert answer.seconds < AT_ONCE_SECONDS
            assert set(ledger.statuses) <= {200, 503}
            assert ledger.statuses[200] >= NEIGHBOURS / 4
            assert slowest(ledger) < AT_ONCE_SECONDS + NOISE_SECONDS
            await assert_serves_on(pool)


async def test_lanes_that_die_again_and_again_end_the_process():
    """Everyone is told, and the exit code says that it was the server's own fault: a supervisor starts another."""
    with stub(behave=IN_BATCH) as server:
        async with Pool(server.ready_url()) as pool:
            statuses = Counter()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20):
                    while server.process.poll() is None:
                        answers = await asyncio.gather(*(pool.ask(embed([f"!die {i}"]), patience=5) for i in range(4)))
                        statuses.update(answer.status for answer in answers)
        assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE
    assert statuses[503] >= 1
    assert statuses[HANGS] == 0
    assert set(statuses) <= {CUT, 503}


async def test_a_lane_that_stalls_is_not_waited_for():
    """With every lane stalled, whoever waits is told 503 within the bound, and the process ends with 70."""
    with stub(stall_seconds=STALL_SECONDS) as server:
        async with Pool(server.ready_url()) as pool:
            start = time.perf_counter()
            stalls = []
            for _ in range(2):  # one after the other: both would fit into one lane's batch
                stalls.append(asyncio.create_task(pool.ask(embed(["!stall 60"]))))
                await asyncio.sleep(0.1)
            answer, ledger = await beside(pool, embed(["!stall 60"]))
            statuses = {answer.status, *(stalled.status for stalled in await asyncio.gather(*stalls))}
            assert statuses == {503}
            assert ledger.statuses == {503: NEIGHBOURS}
            assert time.perf_counter() - start < STALL_SECONDS + AT_ONCE_SECONDS + NOISE_SECONDS
        assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE


async def test_one_stalled_lane_of_two_is_seen():
    """A lane that will never come back is as dead as one that ended: the process ends with 70, and nobody hangs."""
    with stub(stall_seconds=STALL_SECONDS) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!stall 60"]))
            assert answer.status == 503
            assert answer.seconds < STALL_SECONDS + AT_ONCE_SECONDS + NOISE_SECONDS
            assert ledger.hanging == 0
            assert set(ledger.statuses) <= {200, 503}
        assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE


async def test_a_slow_batch_is_not_a_stall():
    """What takes a while, but less than the bound, is answered with its vector."""
    with stub(stall_seconds=STALL_SECONDS) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!stall 0.6"]))
            assert answer.status == 200
            assert ledger.statuses == {200: NEIGHBOURS}
            await assert_serves_on(pool)


async def test_an_encoder_that_dies_is_told():
    """What no thread survives, in an encoder: its client is told, and the server serves on or ends with 70."""
    with stub(behave=IN_BATCH) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!encode-die"]))
            assert answer.status in {500, 503}
            assert answer.seconds < AT_ONCE_SECONDS
            assert ledger.hanging == 0
            assert set(ledger.statuses) <= {200, 503}
            if ledger.statuses[503] or server.process.poll() is not None:
                assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE
                return
            await assert_serves_on(pool)


async def test_an_encoder_that_stalls_is_not_waited_for():
    """With every encoder stalled, whoever waits is told 503 within the bound, and the process ends with 70."""
    with stub(stall_seconds=STALL_SECONDS) as server:
        async with Pool(server.ready_url()) as pool:
            stalls = [asyncio.create_task(pool.ask(embed([f"!encode-stall 60 {i}"]))) for i in range(8)]
            answer, ledger = await beside(pool, embed(["!encode-stall 60"]))
            assert {answer.status, *(stalled.status for stalled in await asyncio.gather(*stalls))} == {503}
            assert ledger.hanging == 0
            assert set(ledger.statuses) <= {200, 503}
            assert slowest(ledger) < STALL_SECONDS + AT_ONCE_SECONDS + NOISE_SECONDS
        assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE


async def test_an_event_loop_that_stalls_ends_the_process():
    """A loop that answers nobody cannot tell anyone: the connections are cut within the bound, with exit code 70."""
    with stub(stall_seconds=STALL_SECONDS) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!stall-loop 60"]))
            assert answer.status in {CUT, 200, 503}
            assert ledger.hanging == 0
            assert slowest(ledger) < STALL_SECONDS + EXIT_SECONDS
        assert server.ended(within_seconds=EXIT_SECONDS) == EX_SOFTWARE


async def test_a_process_that_dies_cuts_everyone_off():
    """No connection outlives it."""
    with stub(behave=IN_BATCH) as server:
        async with Pool(server.ready_url()) as pool:
            answer, ledger = await beside(pool, embed(["!exit"]))
            assert answer.status == CUT
            assert ledger.hanging == 0
        assert server.ended(within_seconds=EXIT_SECONDS) == 3


async def test_no_request_outlives_its_deadline():
    """A client that is in a hurry is told 504 at its own deadline, whatever the model does meanwhile."""
    with stub() as server:
        async with Pool(server.ready_url()) as pool:
            hurried = [embed([f"!stall 3 {i}"], headers={"x-request-timeout": "0.5"}) for i in range(6)]
            answers = await asyncio.gather(*(pool.ask(request) for request in hurried))
            assert {answer.status for answer in answers} == {504}
            assert max(answer.seconds for answer in answers) < 0.5 + AT_ONCE_SECONDS
            await asyncio.sleep(3.5)
            await assert_serves_on(pool)


async def test_a_server_that_forgets_a_request_is_found_out():
    """Negative control: one reply in ten that never comes is seen to hang, and a dead server's health is not taken for life."""

    async def forgetful(count):
        return None if count % 10 == 0 else reply()

    async with careless(forgetful) as url, Pool(url) as pool:
        _, ledger = await beside(pool, embed(["?"]), patience=0.5)
        assert ledger.hanging == (NEIGHBOURS + 1) // 10

    async def unwell(count):
        return reply(503 if count == 2 else 200)

    async with careless(unwell) as url, Pool(url) as pool:
        with pytest.raises(AssertionError):
            await assert_serves_on(pool)
