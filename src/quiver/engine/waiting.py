"""Every ticket that waits for a lane: interactive before bulk, and each in its turn. One door to order and numbers."""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from quiver.engine.backlog import Backlog
from quiver.engine.packing import Budget
from quiver.engine.turns import PACE, Turns
from quiver.types import Encoding, Floats, Priority

MAX_PASSED_OVER = 8
"""How many tickets that do not fit a lane looks past for ones that do."""
BUSY_SECONDS = 0.25
"""Where what is due is later than this, as much comes as is computed."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One encoding waiting for its vector."""

    encoding: Encoding
    future: asyncio.Future[Floats]
    caller: str
    request: int
    priority: Priority
    stamp: float = 0.0
    """When it is due, by the monotonic clock."""
    is_waiting: bool = False
    taken_at: float = 0.0
    """When a lane took it, by the performance counter."""

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more: its client has gone, or its time has run out."""
        return self.future.done()


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much may wait."""

    tokens: int
    inputs: int = sys.maxsize


class Waiting:
    """Not thread-safe: the scheduler holds its lock."""

    def __init__(self, tokens_per_second: float) -> None:
        self.rate = tokens_per_second
        """Speed of all lanes together; whoever measures it keeps it true."""
        self.num_inputs = 0
        self._turns: dict[Priority, Turns[Ticket]] = {p: Turns(lambda ticket: ticket.abandoned) for p in Priority}
        self._backlogs: dict[Priority, Backlog] = {p: Backlog() for p in Priority}

    def __bool__(self) -> bool:
        return any(self._turns.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all tickets."""
        return sum([backlog.tokens for backlog in self._backlogs.values()])

    def seconds_until(self, tokens: int, caller: str, priority: Priority, now: float) -> float:
        """Estimate how long a new request of so many tokens would take; nothing where nothing waits."""
        if not self.num_inputs:
            return 0.0
        lag = self._turns[priority].lag(caller, now)
        before = self._backlogs[priority].before(caller, tokens + int(lag * self.rate / PACE))
        if priority is Priority.BULK:
            before += self._backlogs[Priority.INTERACTIVE].tokens
        spread = PACE * tokens / self.rate if lag > BUSY_SECONDS else 0.0  # others will come before its later inputs
        return (before + tokens) / self.rate + spread

    def has_room(self, inputs: int, tokens: int, capacity: Capacity) -> bool:
        """Tell whether so much more may wait; where nothing waits, any request may."""
        fits = self.num_tokens + tokens <= capacity.tokens and self.num_inputs + inputs <= capacity.inputs
        return fits or not self.num_inputs

    def push(self, tickets: Sequence[Ticket], now: float) -> None:
        """Queue a request's tickets, each due a little after the one before it."""
        tokens = 0
        for ticket in tickets:
            ticket.stamp = now + PACE * tokens / self.rate
            tokens += len(ticket.encoding)
            self._push(ticket)

    def _push(self, ticket: Ticket) -> None:
        self._turns[ticket.priority].push(ticket, ticket.caller, ticket.stamp)
        self._count(ticket, +1)

    def take_batch(self, budget: Budget, now: float) -> list[Ticket]:
        """Pop tickets in turn, to the budget; the first always fits. Drop abandoned ones.

        One that does not fit is passed over by the next few that do and keeps its turn, so that it leads the next
        batch: hardly any batch is left half empty, and nobody is passed over twice.
        """
        batch: list[Ticket] = []
        passed_over: list[Ticket] = []
        longest = total = 0
        while len(passed_over) < MAX_PASSED_OVER and not budget.is_full(len(batch), total):
            if (ticket := self._pop()) is None:
                break
            size = len(ticket.encoding)
            if batch and not budget.fits(len(batch) + 1, max(longest, size), total + size):
                passed_over.append(ticket)
                continue
            batch.append(ticket)
            longest, total = max(longest, size), total + size
            self._turns[ticket.priority].charge(ticket.caller, ticket.stamp, size / self.rate, now)
        for ticket in passed_over:
            self._push(ticket)
        return batch

    def _pop(self) -> Ticket | None:
        """Take the ticket that is due next."""
        for turns in self._turns.values():
            while ticket := turns.pop():
                self.forget(ticket)
                if not ticket.abandoned:
                    return ticket
        return None

    def forget(self, ticket: Ticket) -> None:
        """Count a ticket no longer that nobody waits for; a lane that comes upon it drops it."""
        if ticket.is_waiting:
            self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        ticket.is_waiting = sign > 0
        self.num_inputs += sign
        self._backlogs[ticket.priority].add(ticket.caller, ticket.request, sign * len(ticket.encoding))
