"""Every accepted ticket is answered exactly once, whatever happens to its neighbours."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import HashBackend, encodings, fake_model, hash_model, hash_vector
from quiver.engine.packing import Budget
from quiver.engine.scheduler import MAX_DEATHS, Bounds, Scheduler, Speed
from quiver.engine.waiting import Capacity, Group, Ticket, Waiting
from quiver.engine.watchdog import Watchdog
from quiver.errors import (
    Closed,
    DeadlineExceeded,
    InferenceFailed,
    LaneDied,
    NotFinite,
    OutOfMemory,
    Overloaded,
    Stalled,
)
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Encoding, Priority

ALICE, BOB = Caller("alice"), Caller("bob")
POISON = 66
PLENTY = Capacity(1_000_000)


class Lanes:
    """A scheduler over the hash backend whose batches wait at a gate until the test opens it."""

    def __init__(
        self, *, lanes=1, budget=128, capacity=PLENTY, before=lambda _: None, rate=1000.0, watchdog=None, **bounds
    ):
        self.batches = []
        self.gate = threading.Event()
        self.busy = threading.Event()
        self._before = before
        model = hash_model(lanes=lanes, batch_tokens=budget, before=self._enter)
        self.scheduler = Scheduler(
            "test", model.compute, Bounds(Budget(budget, **bounds), lanes, capacity, rate),
            observer=Observer(), watchdog=watchdog or Watchdog(stall_seconds=5),
        )  # fmt: skip

    def _enter(self, batch):
        self.batches.append([batch.ids[s:e].tolist() for s, e in zip(batch.cu_seqlens, batch.cu_seqlens[1:])])  # noqa: B905
        self.busy.set()
        assert self.gate.wait(10)
        self._before(batch)

    def ask(self, inputs, *, caller=ALICE, priority=Priority.INTERACTIVE):
        """Start a request; returns its task."""
        return asyncio.ensure_future(self.scheduler.submit(inputs, caller=caller, priority=priority))

    async def ask_behind_a_running_batch(self, *requests, **kinds):
        """Occupy the lane with a first request, queue the others behind it, and return all their tasks."""
        first = self.ask(encodings([3], seed=99))
        await asyncio.to_thread(self.busy.wait)
        tasks = [self.ask(inputs, **kinds) for inputs in requests]
        await asyncio.sleep(0)
        return [first, *tasks]

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.gate.set()
        await asyncio.to_thread(self.scheduler.close)


def poisoned(batch):
    """Fail like a model does if the batch holds the poison token."""
    if POISON in batch.ids:
        raise RuntimeError("kernel refused")


def right(inputs, vectors):
    """Tell whether each input got its own vector, to the last bit."""
    return np.array_equal(vectors, np.stack([hash_vector(e.ids) for e in inputs]))


async def test_each_input_gets_its_own_vector():
    """Many requests of many inputs through two lanes: every row is the hash of its own input."""
    async with Lanes(lanes=2) as lanes:
        lanes.gate.set()
        requests = [encodings(np.random.default_rng(i).integers(1, 50, 9), seed=i) for i in range(60)]

        replies = await asyncio.gather(*(lanes.ask(inputs) for inputs in requests))

        assert all(right(inputs, vectors) for inputs, vectors in zip(requests, replies, strict=True))


async def test_a_batch_never_exceeds_the_budget_unless_one_input_does():
    """Lanes fill batches to the budget; an input longer than the budget runs alone."""
    async with Lanes(budget=40) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([10, 15, 20, 100, 5, 5, 39, 2]))
        lanes.gate.set()
        await asyncio.gather(*tasks)

    sizes = [[len(ids) for ids in batch] for batch in lanes.batches]
    assert sizes == [[3], [10, 15, 5, 5, 2], [20], [100], [39]]


async def test_a_batch_never_has_more_inputs_than_it_may():
    """Where their number is bounded, the next input leads the next batch, in order."""
    async with Lanes(budget=40, max_inputs=2) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([1, 2, 30, 30, 5]))
        lanes.gate.set()
        await asyncio.gather(*tasks)

    sizes = [[len(ids) for ids in batch] for batch in lanes.batches]
    assert sizes == [[3], [1, 2], [30, 5], [30]]


async def test_an_input_is_passed_over_by_one_batch_at_most():
    """One that does not fit lets smaller ones pass, and is then the first of the next batch, whatever arrives."""
    async with Lanes(budget=20) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([15, 19, 18, *[5] * 30]))
        lanes.gate.set()
        await asyncio.gather(*tasks)

    sizes = [[len(ids) for ids in batch] for batch in lanes.batches]
    assert sizes[1:4] == [[15, 5], [19], [18]]
    assert sum(sizes, []) == [3, 15, 5, 19, 18, *[5] * 29]  # noqa: RUF017  a handful


async def test_a_cancelled_neighbour_strands_nobody():
    """Of three requests in one batch, cancelling the middle one leaves the others their vectors."""
    async with Lanes() as lanes:
        inputs = [encodings([5], seed=i) for i in range(3)]
        tasks = await lanes.ask_behind_a_running_batch(*inputs)
        tasks[2].cancel()
        lanes.gate.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)

        assert right(inputs[0], replies[1])
        assert isinstance(replies[2], asyncio.CancelledError)
        assert right(inputs[2], replies[3])
    assert [len(batch) for batch in lanes.batches] == [1, 2], "the cancelled input was computed"


async def test_only_the_poisoned_input_fails():
    """A batch that raises is split until the culprit is alone; its neighbours and the next batch are healthy."""
    async with Lanes(before=poisoned) as lanes:
        healthy = [[Encoding(np.array([i, i + 1]))] for i in range(7)]
        tasks = await lanes.ask_behind_a_running_batch(*healthy[:4], [Encoding(np.array([POISON]))], *healthy[4:])
        lanes.gate.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)

        assert isinstance(replies[5], InferenceFailed)
        assert all(right(i, r) for i, r in zip(healthy, [*replies[1:5], *replies[6:]], strict=True))
        assert right(healthy[0], await lanes.ask(healthy[0]))


async def test_a_wrong_number_of_answers_is_an_error_for_all_inputs():
    """Another number of results than inputs reaches nobody as an answer."""
    scheduler = Scheduler(
        "test",
        lambda _: np.ones((4, 4), np.float32),
        Bounds(Budget(128), 1, Capacity(100)),
        observer=Observer(),
        watchdog=Watchdog(stall_seconds=5),
    )
    with pytest.raises(InferenceFailed):
        await scheduler.submit(encodings([2, 2, 2]), caller=ALICE, priority=Priority.INTERACTIVE)
    await asyncio.to_thread(scheduler.close)


async def test_what_nobody_waits_for_any_more_is_not_computed():
    """A request that is given up leaves the queue at once, in its numbers too, and no lane computes it."""
    async with Lanes() as lanes:
        first, second = await lanes.ask_behind_a_running_batch(encodings([5]))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert lanes.scheduler.queue.inputs == lanes.scheduler.waiting_tokens == 0
        lanes.gate.set()
        await first
    assert len(lanes.batches) == 1


def test_the_speed_is_tokens_by_time():
    """Of fast and slow batches, it is all tokens by all seconds, of late; one batch does not move it much."""
    speed = Speed(100.0)
    for _ in range(200):
        speed.note(10, 0.01)
        speed.note(10, 0.19)
    assert speed.rate == pytest.approx(100, rel=0.05)
    for _ in range(40):
        speed.note(10, 0.2)
    assert speed.rate == pytest.approx(50, rel=0.05)
    speed.note(10, 0.001)
    assert speed.rate < 60


async def test_what_cannot_be_done_in_time_any_more_is_told_instead_of_computed():
    """A request that came to wait longer than expected is answered when its turn comes, and costs nobody else's time."""
    async with Lanes(rate=1000.0) as lanes:
        hopeless = lanes.ask_behind_a_running_batch(encodings([400, 400]), caller=Caller("c", time.monotonic() + 1.0))
        first, late = await hopeless
        await asyncio.sleep(0.8)
        in_time = lanes.ask(encodings([30]))
        await asyncio.sleep(0)
        lanes.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await asyncio.gather(first, in_time)
    assert [[len(ids) for ids in batch] for batch in lanes.batches] == [[3], [30]]


async def test_what_would_come_too_late_is_refused_at_once():
    """A deadline before the end of what waits is a refusal with a time to come back; where nothing waits it is none."""
    async with Lanes(rate=100.0) as lanes:
        await lanes.ask_behind_a_running_batch(encodings([100]))
        in_time = lanes.ask(encodings([10]), caller=Caller("c", time.monotonic() + 2))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refusal:
            await lanes.ask(encodings([40]), caller=Caller("d", time.monotonic() + 0.5))
        assert 0.5 < refusal.value.retry_after_seconds < 2
        lanes.gate.set()
        await in_time
        hurried = encodings([60])
        assert right(hurried, await lanes.ask(hurried, caller=Caller("d", time.monotonic() + 0.5)))


async def test_overload_is_refused_at_once_and_whole():
    """A request that does not fit behind those that wait gets a time to come back; none of its inputs is taken."""
    async with Lanes(capacity=Capacity(100)) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([60]))
        with pytest.raises(Overloaded) as refusal:
            await lanes.ask(encodings([20, 30]))
        assert refusal.value.retry_after_seconds > 0
        assert lanes.scheduler.waiting_tokens == 60
        lanes.gate.set()
        await asyncio.gather(*tasks)
        assert lanes.scheduler.waiting_tokens == 0


async def test_the_inputs_that_wait_may_be_bounded_too():
    """Short inputs are refused by their number where their tokens would fit, and taken where nothing waits."""
    async with Lanes(capacity=Capacity(100, inputs=2)) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([1, 1, 1]))
        with pytest.raises(Overloaded):
            await lanes.ask(encodings([1]))
        lanes.gate.set()
        await asyncio.gather(*tasks)


async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    """The limit bounds waiting, not the size of one request."""
    async with Lanes(capacity=Capacity(10)) as lanes:
        lanes.gate.set()
        inputs = encodings([60])
        assert right(inputs, await lanes.ask(inputs))


async def test_closing_tells_everyone():
    """Closing answers those who wait with `Closed`, finishes the running batch, and refuses newcomers."""
    lanes = Lanes()
    first, second = await lanes.ask_behind_a_running_batch(encodings([5]))
    closing = asyncio.ensure_future(asyncio.to_thread(lanes.scheduler.close))
    with pytest.raises(Closed):
        await second
    lanes.gate.set()
    await asyncio.gather(first, closing)
    with pytest.raises(Closed):
        await lanes.ask(encodings([5]))


async def test_a_dying_lane_is_told_at_once_and_replaced():
    """When a lane's thread ends, its batch is answered within a second; another lane computes what waits."""
    deaths = iter([SystemExit])

    def die_once(_):
        for death in deaths:
            raise death

    async with Lanes(before=die_once) as lanes:
        waiting = encodings([500])
        first, second = await lanes.ask_behind_a_running_batch(waiting)
        lanes.gate.set()
        async with asyncio.timeout(1):
            with pytest.raises(LaneDied):
                await first
            assert right(waiting, await second)
        assert not lanes.scheduler.fault.done()


async def test_lanes_that_keep_dying_are_told_to_everyone():
    """After some deaths no lane is replaced: the running and the waiting are answered, newcomers refused."""

    def die(_):
        raise SystemExit

    lanes = Lanes(before=die)
    tasks = await lanes.ask_behind_a_running_batch(*[encodings([500])] * (MAX_DEATHS + 2))
    lanes.gate.set()
    async with asyncio.timeout(1):
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        fault = await lanes.scheduler.fault
    assert [type(reply) for reply in replies] == [LaneDied] * len(tasks)
    assert isinstance(fault, LaneDied)
    with pytest.raises(LaneDied):
        await lanes.ask(encodings([5]))
    await asyncio.to_thread(lanes.scheduler.close)


async def test_a_lane_that_does_not_come_back_is_told_to_everyone():
    """A batch that takes much longer than it may: whoever waits for it, or behind it, is answered within a second."""
    async with Watchdog(stall_seconds=0.2) as watchdog, Lanes(watchdog=watchdog, rate=1e6) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([5]))
        async with asyncio.timeout(1.2):
            replies = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(await lanes.scheduler.fault, Stalled)
        assert [type(reply) for reply in replies] == [Stalled] * 2


async def test_a_batch_that_takes_as_long_as_expected_is_not_stalled():
    """The limit grows with the batch: slow is not stuck."""
    async with Watchdog(stall_seconds=0.1) as watchdog, Lanes(watchdog=watchdog, rate=1.0) as lanes:
        (first,) = await lanes.ask_behind_a_running_batch()
        await asyncio.sleep(1)
        lanes.gate.set()
        assert len(await first) == 1


async def test_without_memory_batches_become_smaller():
    """A batch for which there is no memory is halved, and the next ones stay small; what does not fit alone is told."""

    def allocate(batch):
        if len(batch.ids) > 30:
            raise MemoryError

    async with Lanes(before=allocate, budget=80) as lanes:
        fitting, too_long = [encodings([20], seed=i) for i in range(4)], encodings([40])
        tasks = await lanes.ask_behind_a_running_batch(*fitting, too_long)
        lanes.gate.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(right(i, r) for i, r in zip(fitting, replies[1:5], strict=True))
        assert isinstance(replies[5], OutOfMemory)
        assert lanes.scheduler.budget.max_tokens < 40


async def test_only_the_input_that_gives_nan_fails():
    """A vector that is not finite is nobody's answer, and its neighbours have theirs."""
    backend = HashBackend()
    spoil = fake_model(backend)

    def compute(inputs):
        if any(POISON in e.ids for e in inputs):
            raise NotFinite("the model makes NaN or infinity of this input")
        return spoil.compute(inputs)

    scheduler = Scheduler(
        "test", compute, Bounds(Budget(128), 1, PLENTY), observer=Observer(), watchdog=Watchdog(stall_seconds=5)
    )
    asked = [
        scheduler.submit([Encoding(np.array([i]))], caller=ALICE, priority=Priority.INTERACTIVE) for i in (1, POISON, 2)
    ]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    await asyncio.to_thread(scheduler.close)
    assert [getattr(reply, "code", "vector") for reply in replies] == ["vector", "non_finite_output", "vector"]


async def test_a_single_query_waits_for_at_most_one_batch_of_a_big_request():
    """Behind a request of 2,048 inputs, another caller's query is in the very next batch; so is one of the same caller."""
    async with Lanes() as lanes:
        big = lanes.ask(encodings([60] * 2048))
        await asyncio.to_thread(lanes.busy.wait)
        query = encodings([7], seed=1)
        other, same = lanes.ask(query, caller=BOB), lanes.ask(encodings([9], seed=2))
        await asyncio.sleep(0)
        lanes.gate.set()
        assert right(query, await other)
        await same
        big.cancel()
        await asyncio.gather(big, return_exceptions=True)
    early = [len(ids) for batch in lanes.batches[1:3] for ids in batch]
    assert {7, 9} <= set(early)


async def test_interactive_inputs_go_before_bulk_ones():
    """A bulk request that came first is computed after an interactive one."""
    async with Lanes(budget=10) as lanes:
        tasks = await lanes.ask_behind_a_running_batch(encodings([10] * 3), priority=Priority.BULK)
        tasks.append(lanes.ask(encodings([8])))
        await asyncio.sleep(0)
        lanes.gate.set()
        await asyncio.gather(*tasks)
    assert [len(ids) for batch in lanes.batches for ids in batch] == [3, 8, 10, 10, 10]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100), st.booleans())
def test_batches_of_waiting_tickets_respect_the_budget(lengths, budget, padded):
    """Batches hold every ticket once, each within the budget unless it is alone, each led by the oldest that waits."""
    loop = asyncio.new_event_loop()
    waiting, cost = Waiting(1000.0), Budget(budget, padded=padded)
    tickets = [Ticket(e, Group("a", 0, loop.create_future())) for e in encodings(lengths)]
    waiting.push(tickets, 0.0)
    assert waiting.num_tokens == sum(lengths)
    taken = []
    while batch := waiting.take_batch(cost, 0.0)[0]:
        sizes = [len(ticket.encoding) for ticket in batch]
        assert len(sizes) == 1 or cost.fits(len(sizes), max(sizes), sum(sizes))
        assert batch[0] is next(ticket for ticket in tickets if ticket not in taken), "the head was passed over twice"
        taken += batch
    loop.close()

    assert sorted(map(id, taken)) == sorted(map(id, tickets))
    assert waiting.num_tokens == 0


def test_a_batch_of_interactive_inputs_takes_no_bulk_ones():
    """Who asks for one text beside a bulk job waits for the batch at the lane, and not for another one with the own."""
    loop, waiting = asyncio.new_event_loop(), Waiting(1000.0)
    priorities = (Priority.BULK, Priority.INTERACTIVE)
    groups = [Group("a", number, loop.create_future(), priority) for number, priority in enumerate(priorities)]
    tickets = [Ticket(encoding, groups[i // 3]) for i, encoding in enumerate(encodings([10] * 6))]
    waiting.push(tickets[:3], 0.0)
    waiting.push(tickets[3:], 0.0)
    taken = [waiting.take_batch(Budget(50), 0.0)[0] for _ in range(3)]
    loop.close()
    assert taken == [tickets[3:], tickets[:3], []]


def test_hash_backends_count_their_lanes():
    """The fake keeps the contract's facts where the scheduler reads them."""
    backend = HashBackend(lanes=3, batch_tokens=64)
    assert (backend.lanes, backend.batch_tokens, backend.padded) == (3, 64, False)
