"""Every ticket that waits for a lane: interactive before bulk, and each in its turn. One door to order and numbers."""

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quiver.engine.backlog import Backlog
from quiver.engine.packing import Budget
from quiver.engine.turns import PACE, Turns
from quiver.types import Encoding, Floats, Priority

MAX_PASSED_OVER = 8
"""How many tickets that do not fit a lane looks past for ones that do."""
MAX_WAIT, IN_TIME = 0.5, 0.8
"""Parts of the time until its deadline that a request may be expected to wait, and to take in all."""
BUSY_SECONDS = 0.25
"""Where what is due is later than this, as much comes as is computed."""


class Expected(NamedTuple):
    """How long a request would wait for its turn, and then take, in seconds."""

    wait: float
    work: float

    def fits(self, seconds: float, *, margin: float = 1.0) -> bool:
        """Tell whether a request may be let in that is of use for so long.

        Waiting may fill half of that: small requests alone would fill all of it, and leave no room for larger ones.
        """
        return self.wait <= margin * MAX_WAIT * seconds and self.wait + self.work <= margin * IN_TIME * seconds


@dataclass(slots=True, eq=False)
class Group:
    """The tickets of one request."""

    caller: str
    number: int
    answer: asyncio.Future[None]
    """Done once each of them has its result, or one of them none."""
    priority: Priority = Priority.INTERACTIVE
    deadline: float = math.inf
    """When it is of no use any more, by the monotonic clock."""
    is_late: bool = False
    """It cannot be done by then, and is given up as a whole."""
    num_left: int = 0
    """Tickets without a result."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One encoding waiting for its vector."""

    encoding: Encoding
    group: Group
    result: Floats | None = None
    stamp: float = 0.0
    """When it is due, by the monotonic clock."""
    is_waiting: bool = False
    taken_at: float = 0.0
    """When a lane took it, by the performance counter."""

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more: its client has gone, or its request is given up."""
        return self.group.is_late or self.group.answer.done()


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

    @property
    def num_tokens(self) -> int:
        """Tokens of all tickets."""
        return sum([backlog.tokens for backlog in self._backlogs.values()])

    @property
    def are_all_bulk(self) -> bool:
        """Whether nobody waits at the other end for any of it."""
        return not self._backlogs[Priority.INTERACTIVE].tokens

    def expect(self, tokens: int, caller: str, priority: Priority, now: float) -> Expected:
        """Estimate how long a new request of so many tokens would take; nothing where nothing waits."""
        if not self.num_inputs:
            return Expected(0.0, 0.0)
        lag = self._turns[priority].lag(caller, now)
        before = self._backlogs[priority].before(caller, tokens + int(lag * self.rate / PACE))
        if priority is Priority.BULK:
            before += self._backlogs[Priority.INTERACTIVE].tokens
        # Where as much comes as is computed, others will come before its later inputs.
        pace = 1 + PACE if lag > BUSY_SECONDS else 1
        return Expected(before / self.rate, pace * tokens / self.rate)

    def overdue(self, now: float) -> float:
        """Return for how long the ticket that is due first has been due, in seconds; it came then, or a little before."""
        stamps = [stamp for turns in self._turns.values() if (stamp := turns.first_stamp()) is not None]
        return max(0.0, now - min(stamps, default=now))

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
        self._turns[ticket.group.priority].push(ticket, ticket.group.caller, ticket.stamp)
        self._count(ticket, +1)

    def take_batch(self, budget: Budget, now: float) -> tuple[list[Ticket], list[Ticket]]:
        """Pop tickets in turn, to the budget; the first always fits. Drop abandoned ones.

        Returns the batch, and those whose request cannot be done in time any more: to compute them would only make
        others late.

        One that does not fit is passed over by the next few that do and keeps its turn, so that it leads the next
        batch: hardly any batch is left half empty, and nobody is passed over twice. But a batch of interactive tickets
        is not filled up with bulk ones: who asks for one text beside them waits for one of their batches, not for two.
        """
        batch: list[Ticket] = []
        passed_over: list[Ticket] = []
        late: list[Ticket] = []
        longest = total = 0
        while len(passed_over) < MAX_PASSED_OVER and not budget.is_full(len(batch), total):
            if (ticket := self._pop(batch[0].group.priority if batch else None)) is None:
                break
            size = len(ticket.encoding)
            if self._is_late(ticket, now):
                late.append(ticket)
                continue
            if batch and not budget.fits(len(batch) + 1, max(longest, size), total + size):
                passed_over.append(ticket)
                continue
            batch.append(ticket)
            longest, total = max(longest, size), total + size
            group = ticket.group
            self._turns[group.priority].charge(group.caller, ticket.stamp, size / self.rate, now)
        for ticket in passed_over:
            self._push(ticket)
        return batch, late

    def _is_late(self, ticket: Ticket, now: float) -> bool:
        """Tell whether what is left of a ticket's request cannot be done in time, not even at twice the speed.

        It is given up then, for the sake of others; if there are none, it may as well be tried.
        """
        group, backlog = ticket.group, self._backlogs[ticket.group.priority]
        left = backlog.of(group.caller, group.number)
        others = self.num_tokens - left
        group.is_late = others > 0 and now + (len(ticket.encoding) + left) / (2 * self.rate) > group.deadline
        return group.is_late

    def _pop(self, beside: Priority | None = None) -> Ticket | None:
        """Take the ticket that is due next, and that may go beside those of a priority."""
        for priority, turns in self._turns.items():
            if beside is Priority.INTERACTIVE and priority is Priority.BULK:
                break
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
        group = ticket.group
        self._backlogs[group.priority].add(group.caller, group.number, sign * len(ticket.encoding))
