"""Late binding: a lane composes its batch at the moment it is free. No timer, no waiting window, no sleep.

    event loop:  submit ──> waiting ──┐                       ┌──> futures
                                      │ condition             │ call_soon_threadsafe
    lanes:                            └──> take ──> compute ──┘

Every accepted request is answered exactly once: with its vectors, with a typed error, or not at all once its future is
cancelled. A lane that dies is replaced; one that does not come back ends everything, and everyone is told.
"""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast

from quiver.capacity import Activity, Queue
from quiver.engine.attempts import Attempts, Compute, Outcome
from quiver.engine.packing import Budget
from quiver.engine.phases import Phases
from quiver.engine.threads import let_loop_go_first
from quiver.engine.waiting import Capacity, Expected, Group, Ticket, Waiting
from quiver.engine.watchdog import Watchdog
from quiver.errors import Closed, DeadlineExceeded, EngineError, LaneDied, Overloaded, QuiverError, Stalled
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Encoding, Floats, Priority

MEMORY_SECONDS = 60.0
"""How long batches stay small after one for which there was no memory."""
MAX_DEATHS, DEATHS_SECONDS = 3, 60.0
"""More lanes than that may not die in so short a time: what kills them would kill the next."""
LATELY_SECONDS = 2.0
"""How far back the measured speed looks, in time at work."""
SLOWEST = 10
"""How many times longer than expected a batch may take before its lane counts as stalled."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is computed and waits at a time."""

    budget: Budget
    lanes: int
    capacity: Capacity
    tokens_per_second: float = 1000.0
    """What one lane was measured to compute."""
    max_wait_seconds: float = math.inf
    """Longest that a request may be expected to take; its deadline bounds that, too."""


class Speed:
    """Tokens a second of one lane lately.

    Tokens and seconds are each summed up: a mean of many quotients would be too high, for slow batches take the time.
    """

    def __init__(self, rate: float) -> None:
        self._tokens, self._seconds = rate * LATELY_SECONDS, LATELY_SECONDS

    @property
    def rate(self) -> float:
        """Return what was measured; older batches weigh less."""
        return self._tokens / self._seconds

    def note(self, tokens: int, seconds: float) -> None:
        """Count a batch."""
        kept = math.exp(-seconds / LATELY_SECONDS)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds


class Scheduler:
    """Owns the waiting tickets and the lanes of one model; made and used on one event loop."""

    def __init__(self, name: str, compute: Compute, bounds: Bounds, *, observer: Observer, watchdog: Watchdog) -> None:
        self._name = name
        self._bounds = bounds
        self._observer = observer
        self._watchdog = watchdog
        self._attempts = Attempts(compute, self._on_computed, self._on_failed, self._on_too_large)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self.fault: asyncio.Future[EngineError] = self._loop.create_future()
        """Done once the lanes can compute no more."""

        # Shared with the lanes, under the condition.
        self._changed = threading.Condition()
        self._speed = Speed(bounds.tokens_per_second)
        self._waiting = Waiting(bounds.tokens_per_second * bounds.lanes)
        self._running: dict[int, list[Ticket]] = {}
        """What each lane is computing."""
        self._phases = Phases(bounds.lanes)
        self._small: tuple[Budget, float] | None = None
        """A smaller budget, and until when it holds."""
        self._deaths: list[float] = []
        self._closed = False
        self._died: EngineError | None = None

        self._lanes: dict[int, threading.Thread] = {}
        for number in range(bounds.lanes):
            self._start_lane(number)

    @property
    def budget(self) -> Budget:
        """How much goes into a batch now."""
        if self._small and time.monotonic() < self._small[1]:
            return self._small[0]
        return self._bounds.budget

    @property
    def queue(self) -> Queue:
        """What waits, and for how long."""
        waiting, capacity = self._waiting, self._bounds.capacity.tokens
        seconds = waiting.num_tokens / waiting.rate
        return Queue(waiting.num_inputs, waiting.num_tokens, capacity, seconds, waiting.rate)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no lane has taken yet."""
        return self._waiting.num_tokens

    @property
    def activity(self) -> Activity:
        """What waits and runs at this moment, for the metrics."""
        with self._changed:
            waiting, now = self._waiting, time.monotonic()
            return Activity(
                waiting.num_inputs, waiting.num_tokens, waiting.overdue(now), self._bounds.lanes, len(self._running)
            )

    @property
    def died(self) -> EngineError | None:
        """Why the lanes can compute no more, if so."""
        return self._died

    def expect(self, tokens: int, caller: Caller, priority: Priority = Priority.INTERACTIVE) -> Expected:
        """Estimate how long a new request of so many tokens would take; nothing where nothing waits."""
        with self._changed:
            return self._waiting.expect(tokens, caller.id, priority, time.monotonic())

    async def submit(
        self,
        encodings: Sequence[Encoding],
        *,
        caller: Caller,
        priority: Priority,
        note_waits: Callable[[Sequence[float]], None] = lambda _: None,
    ) -> Sequence[Floats]:
        """Return a result for each, in order; the whole request gets in or none. Raises `Unavailable` or `EngineError`.

        `note_waits` is told the seconds until a lane was free, for each of the inputs.
        """
        if not encodings:
            return []
        start, answer = time.perf_counter(), self._loop.create_future()
        group = Group(caller.id, next(self._numbers), answer, priority, caller.deadline, num_left=len(encodings))
        tickets = [Ticket(encoding, group) for encoding in encodings]
        self._admit(tickets, caller, priority)
        try:
            await answer
        finally:
            self._abandon(group, tickets)
        note_waits([ticket.taken_at - start for ticket in tickets])
        return [cast(Floats, ticket.result) for ticket in tickets]

    def _admit(self, tickets: Sequence[Ticket], caller: Caller, priority: Priority) -> None:
        asked, now = sum(len(ticket.encoding) for ticket in tickets), time.monotonic()
        with self._changed:
            if self._died:
                raise _like(self._died)
            if self._closed:
                raise Closed("the server is stopping")
            waiting = self._waiting
            expected = waiting.expect(asked, caller.id, priority, now)
            has_room = waiting.has_room(len(tickets), asked, self._bounds.capacity)
            if not has_room or not expected.fits(min(caller.seconds_left(), self._bounds.max_wait_seconds)):
                raise overloaded(self._name, waiting.num_tokens, waiting.num_tokens / waiting.rate)
            waiting.push(tickets, now)
            self._changed.notify(len(tickets))

    def _abandon(self, group: Group, tickets: Sequence[Ticket]) -> None:
        """Let go of what is not answered yet: its client has gone, or its time has run out."""
        if not group.num_left:
            return
        group.answer.cancel()  # does nothing to one that is answered
        if left := [ticket for ticket in tickets if ticket.is_waiting]:
            with self._changed:
                for ticket in left:
                    self._waiting.forget(ticket)

    def close(self) -> None:
        """Tell everyone who waits that it is over, and end the lanes; blocks until their last batch is done.

        A lane that does not come back is left behind.
        """
        self._stop(Closed("the server is stopping"))
        for lane in tuple(self._lanes.values()):
            lane.join(0 if self._died else self._watchdog.stall_seconds)

    def _stop(self, error: QuiverError, *, running: bool = False) -> None:
        """Take nothing more, and answer those who wait; where no lane will, those whose batch is running too."""
        with self._changed:
            self._closed = True
            left = [ticket for batch in self._running.values() for ticket in batch] if running else []
            while any(taken := self._waiting.take_batch(self._bounds.budget, time.monotonic())):
                left += itertools.chain(*taken)
            self._changed.notify_all()
        self._answer(left, [_like(error) for _ in left])

    # In the lanes

    def _start_lane(self, number: int) -> None:
        self._lanes[number] = threading.Thread(
            target=self._lane, args=(number,), name=f"{self._name}-lane-{number}", daemon=True
        )
        self._lanes[number].start()

    def _lane(self, number: int) -> None:
        let_loop_go_first()
        try:
            while batch := self._next_batch(number):
                start = time.monotonic()
                with self._watchdog.watching(
                    f"a lane of {self._name}", self._on_stalled, limit_seconds=self._slowest(batch)
                ):
                    outcomes = self._attempts.outcomes([ticket.encoding for ticket in batch])
                self._answer(batch, outcomes)
                self._note_speed(batch, time.monotonic() - start)
        except BaseException as error:  # noqa: BLE001  whatever it is, nobody may be left waiting
            self._on_death(number, error)

    def _note_speed(self, batch: Sequence[Ticket], seconds: float) -> None:
        """Learn how fast batches go, all that is done for them included."""
        with self._changed:
            self._speed.note(_tokens(batch), seconds)
            self._waiting.rate = self._bounds.lanes * self._speed.rate

    def _next_batch(self, number: int) -> list[Ticket]:
        """Wait for work and take what fits the budget; nothing means that it is over."""
        with self._changed:
            self._running.pop(number, None)
            self._phases.end(number)
            while True:
                now = time.monotonic()
                batch, late = self._waiting.take_batch(self._budget_at(now), now)
                if late:
                    self._answer(late, [DeadlineExceeded("not to be done within its time any more") for _ in late])
                if batch:
                    self._running[number] = batch
                    self._phases.begin(number, now + _tokens(batch) / self._speed.rate)
                    break
                if self._closed:
                    return []
                if not late:
                    self._changed.wait()
        taken_at = time.perf_counter()
        for ticket in batch:
            ticket.taken_at = taken_at
        return batch

    def _budget_at(self, now: float) -> Budget:
        """Return how much a lane takes that is free now: half of it where two lanes of bulk work would end at once."""
        budget = self.budget
        if self._waiting.are_all_bulk and self._phases.meet(now, budget.max_tokens / self._speed.rate):
            return replace(budget, max_tokens=max(1, budget.max_tokens // 2))
        return budget

    def _slowest(self, batch: Sequence[Ticket]) -> float:
        return SLOWEST * self._bounds.lanes * _tokens(batch) / self._waiting.rate

    def _on_death(self, number: int, error: BaseException) -> None:
        """Answer the dying lane's batch and put another in its place, unless that has been of no use."""
        now, why = time.monotonic(), f"a lane ended with {type(error).__name__}: {error}"
        with self._changed:
            batch = self._running.pop(number, [])
            self._phases.end(number)
            self._deaths = [death for death in self._deaths if now - death < DEATHS_SECONDS] + [now]
            is_over = self._closed or len(self._deaths) > MAX_DEATHS
        self._observer.lane_died(self._name, why)
        self._answer(batch, [LaneDied(why) for _ in batch])
        if is_over:
            self._end(LaneDied(why))
        else:
            self._start_lane(number)

    def _on_stalled(self, why: str) -> None:
        self._end(Stalled(why))

    def _end(self, error: EngineError) -> None:
        self._died = error
        self._stop(error, running=True)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_announce, self.fault, error)

    def _on_computed(self, inputs: int, tokens: int, seconds: float) -> None:
        self._observer.batch_computed(self._name, inputs, tokens, seconds)

    def _on_failed(self, error: QuiverError) -> None:
        self._observer.input_failed(self._name, error.code)

    def _on_too_large(self, tokens: int) -> None:
        small = replace(self._bounds.budget, max_tokens=max(1, min(tokens, self.budget.max_tokens) // 2))
        self._small = small, time.monotonic() + MEMORY_SECONDS

    def _answer(self, batch: Sequence[Ticket], outcomes: Sequence[Outcome]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_resolve, batch, outcomes)


def _tokens(batch: Sequence[Ticket]) -> int:
    return sum(len(ticket.encoding) for ticket in batch)


def overloaded(model: str, waiting: int, seconds: float) -> Overloaded:
    """Say that too much waits already, and when to come back."""
    message = f"{waiting} tokens are waiting already; come back in {seconds:.1f} s"
    return Overloaded(message, retry_after_seconds=seconds, model=model)


def _like(error: QuiverError) -> QuiverError:
    """Return an error of its own for each task that raises it: one for all would gather all their tracebacks."""
    return type(error)(error.message)


def _announce(fault: asyncio.Future[EngineError], error: EngineError) -> None:
    if not fault.done():
        fault.set_result(error)


def _resolve(batch: Sequence[Ticket], outcomes: Sequence[Outcome]) -> None:
    for ticket, outcome in zip(batch, outcomes, strict=True):
        group = ticket.group
        if group.answer.done():  # cancelled: its client has gone; or another of its inputs has failed
            continue
        if isinstance(outcome, QuiverError):
            group.answer.set_exception(outcome)
            continue
        ticket.result = outcome
        group.num_left -= 1
        if not group.num_left:
            group.answer.set_result(None)
