"""Late binding: a lane composes its batch at the moment it is free. No timer, no waiting window, no sleep.

    event loop:  submit ──> waiting ──┐                       ┌──> futures
                                      │ condition             │ call_soon_threadsafe
    lanes:                            └──> take ──> compute ──┘

Every accepted ticket is answered exactly once: with its vector, with a typed error, or not at all once its future is
cancelled. A batch that fails is split until only the culprit fails.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence

from quiver.engine.packing import Budget
from quiver.engine.waiting import Capacity, Ticket, Waiting
from quiver.errors import Closed, DeadlineExceeded, EngineError, InferenceFailed, LaneDied, Overloaded, QuiverError
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Encoding, Floats, Priority, Queue, Results

Compute = Callable[[Sequence[Encoding]], Results]
"""Encodings -> B results, one for each, in order; blocks."""
Outcome = Floats | QuiverError

_FIRST_RATE = 1000.0
"""Tokens per second assumed before the first batch is measured."""


class Scheduler:
    """Owns the waiting tickets and the lanes of one model; made and used on one event loop."""

    def __init__(
        self, name: str, compute: Compute, *, budget: Budget, lanes: int, capacity: Capacity, observer: Observer
    ) -> None:
        self._name = name
        self._compute = compute
        self.budget = budget
        self._capacity = capacity
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._request_ids = itertools.count()
        self.fault: asyncio.Future[EngineError] = self._loop.create_future()
        """Done once the lanes can compute no more."""

        # Shared with the lanes, under the condition.
        self._changed = threading.Condition()
        self._waiting = Waiting()
        self._tokens_per_second = _FIRST_RATE * lanes
        self._closed = False
        self._died: EngineError | None = None

        self._lanes = [threading.Thread(target=self._lane, name=f"{name}-lane-{i}", daemon=True) for i in range(lanes)]
        for lane in self._lanes:
            lane.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no lane has taken yet."""
        return self._waiting.num_tokens

    @property
    def queue(self) -> Queue:
        """What waits, and for how long."""
        waiting = self._waiting
        seconds = waiting.num_tokens / self._tokens_per_second
        return Queue(waiting.num_inputs, waiting.num_tokens, self._capacity.tokens, seconds)

    @property
    def died(self) -> EngineError | None:
        """Why the lanes can compute no more, if so."""
        return self._died

    async def submit(
        self,
        encodings: Sequence[Encoding],
        *,
        caller: Caller,
        priority: Priority,
        timeout_seconds: float,
        note_wait: Callable[[float], None] = lambda _: None,
    ) -> Sequence[Floats]:
        """Return a result for each, in order; the whole request gets in or none. Raises `Unavailable` or `EngineError`.

        `note_wait` is told the seconds until a lane was free, on average over the inputs.
        """
        start, request = time.perf_counter(), next(self._request_ids)
        tickets = [Ticket(e, self._loop.create_future(), caller.id, request, priority) for e in encodings]
        self._admit(tickets)
        try:
            async with asyncio.timeout(timeout_seconds):
                results = await asyncio.gather(*(ticket.future for ticket in tickets))
        except TimeoutError as error:
            raise DeadlineExceeded(f"not answered within {timeout_seconds:g} s") from error
        finally:
            for ticket in tickets:
                ticket.future.cancel()  # does nothing to one that is answered
        note_wait(sum(ticket.taken_at - start for ticket in tickets) / max(1, len(tickets)))
        return results

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        with self._changed:
            if self._died:
                raise self._died
            if self._closed:
                raise Closed("the server is stopping")
            waiting, asked = self._waiting.num_tokens, sum(len(ticket.encoding) for ticket in tickets)
            if not self._waiting.has_room(len(tickets), asked, self._capacity):
                seconds = waiting / self._tokens_per_second
                raise Overloaded(
                    f"{waiting} tokens are waiting already; come back in {seconds:.1f} s", retry_after_seconds=seconds
                )
            for ticket in tickets:
                self._waiting.push(ticket)
            self._changed.notify(len(tickets))

    def close(self) -> None:
        """Tell everyone who waits that it is over, and end the lanes; blocks until their last batch is done."""
        self._stop(Closed("the server is stopping"))
        for lane in self._lanes:
            lane.join()

    def _stop(self, error: QuiverError) -> None:
        with self._changed:
            self._closed = True
            left: list[Ticket] = []
            while self._waiting:
                left += self._waiting.take_batch(self.budget)
            self._changed.notify_all()
        self._answer(left, [error] * len(left))

    def _lane(self) -> None:
        batch: list[Ticket] = []
        try:
            while batch := self._next_batch():
                self._answer(batch, self._attempt(batch))
        except BaseException as error:  # noqa: BLE001  whatever it is, nobody may be left waiting
            self._died = LaneDied(f"a lane ended with {type(error).__name__}: {error}")
            self._answer(batch, [self._died] * len(batch))
            self._stop(self._died)
            self._loop.call_soon_threadsafe(_announce, self.fault, self._died)

    def _next_batch(self) -> list[Ticket]:
        """Wait for work and take what fits the budget; nothing means that it is over."""
        with self._changed:
            while True:
                if batch := self._waiting.take_batch(self.budget):
                    now = time.perf_counter()
                    for ticket in batch:
                        ticket.taken_at = now
                    return batch
                if self._closed:
                    return []
                self._changed.wait()

    def _attempt(self, batch: Sequence[Ticket]) -> list[Outcome]:
        """Compute a batch; if it fails, its halves, so that only the culprit is answered with an error."""
        try:
            return list(self._computed([ticket.encoding for ticket in batch]))
        except Exception as error:  # noqa: BLE001  a model may raise anything
            if len(batch) == 1:
                self._observer.input_failed(self._name)
                return [InferenceFailed(f"the model cannot compute this input ({type(error).__name__})")]
            half = len(batch) // 2
            return self._attempt(batch[:half]) + self._attempt(batch[half:])

    def _computed(self, encodings: Sequence[Encoding]) -> Results:
        start, tokens = time.perf_counter(), sum(map(len, encodings))
        results = self._compute(encodings)
        if len(results) != len(encodings):
            raise ValueError(f"{len(encodings)} inputs gave {len(results)} results")
        seconds = time.perf_counter() - start
        self._observer.batch_computed(self._name, tokens, seconds)
        self._tokens_per_second += 0.05 * (len(self._lanes) * tokens / seconds - self._tokens_per_second)
        return results

    def _answer(self, batch: Sequence[Ticket], outcomes: Sequence[Outcome]) -> None:
        self._loop.call_soon_threadsafe(_resolve, batch, outcomes)


def _announce(fault: asyncio.Future[EngineError], error: EngineError) -> None:
    if not fault.done():
        fault.set_result(error)


def _resolve(batch: Sequence[Ticket], outcomes: Sequence[Outcome]) -> None:
    for ticket, outcome in zip(batch, outcomes, strict=True):
        if ticket.future.done():  # cancelled: its client has gone
            continue
        if isinstance(outcome, QuiverError):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)
