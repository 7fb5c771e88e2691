"""Who is next: interactive before bulk, then callers in turn, then each caller's requests in turn, each in order.

So no caller starves another, and a request of two thousand inputs lets another's single one go before its second.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from quiver.engine.backlog import Backlog
from quiver.engine.packing import Budget
from quiver.types import Encoding, Floats, Priority

T = TypeVar("T")

MAX_PASSED_OVER = 8
"""How many tickets that do not fit a lane looks past for ones that do."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One encoding waiting for its vector."""

    encoding: Encoding
    future: asyncio.Future[Floats]
    caller: str
    request: int
    priority: Priority
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


class Turns(Generic[T]):
    """Queues that take turns: one item from each, round and round. Give several keys for turns within turns."""

    def __init__(self) -> None:
        self._order: deque[Hashable] = deque()
        self._queues: dict[Hashable, Turns[T]] = {}
        self._items: deque[T] = deque()

    def __bool__(self) -> bool:
        return bool(self._order or self._items)

    def push(self, item: T, *keys: Hashable) -> None:
        """Queue an item behind the others of its keys."""
        if not keys:
            self._items.append(item)
            return
        key, *rest = keys
        if key not in self._queues:
            self._queues[key] = Turns()
            self._order.append(key)
        self._queues[key].push(item, *rest)

    def put_back(self, item: T, *keys: Hashable) -> None:
        """Queue an item before all others, as if its turn had not come."""
        if not keys:
            self._items.appendleft(item)
            return
        key, *rest = keys
        if key in self._queues:
            self._order.remove(key)
        else:
            self._queues[key] = Turns()
        self._order.appendleft(key)
        self._queues[key].put_back(item, *rest)

    def pop(self) -> T:
        """Take the item whose turn it is; its queue goes to the back."""
        if self._items:
            return self._items.popleft()
        key = self._order.popleft()
        item = self._queues[key].pop()
        if self._queues[key]:
            self._order.append(key)
        else:
            del self._queues[key]
        return item


class Waiting:
    """Every ticket that no lane has taken yet. Not thread-safe: the scheduler holds its lock."""

    def __init__(self) -> None:
        self.num_inputs = 0
        self._turns: dict[Priority, Turns[Ticket]] = {priority: Turns() for priority in Priority}
        self._backlogs: dict[Priority, Backlog] = {priority: Backlog() for priority in Priority}

    @property
    def num_tokens(self) -> int:
        """Tokens of all tickets."""
        return sum(backlog.tokens for backlog in self._backlogs.values())

    def tokens_before(self, tokens: int, caller: str, priority: Priority) -> int:
        """Return how many tokens will be computed before the last of a new request's `tokens`, its own left out."""
        backlog = self._backlogs[priority]
        first = self._backlogs[Priority.INTERACTIVE].tokens if priority is Priority.BULK else 0
        return first + backlog.before(caller, tokens)

    def push(self, ticket: Ticket) -> None:
        """Queue a ticket."""
        self._turns[ticket.priority].push(ticket, ticket.caller, ticket.request)
        self._count(ticket, +1)

    def has_room(self, inputs: int, tokens: int, capacity: Capacity) -> bool:
        """Tell whether so much more may wait; where nothing waits, any request may."""
        fits = self.num_tokens + tokens <= capacity.tokens and self.num_inputs + inputs <= capacity.inputs
        return fits or not self.num_inputs

    def take_batch(self, budget: Budget) -> list[Ticket]:
        """Pop tickets in turn, to the budget; the first always fits. Drop abandoned ones.

        One that does not fit is passed over by the next few that do and keeps its turn, so that it leads the next
        batch: hardly any batch is left half empty, and nobody is passed over twice.
        """
        batch: list[Ticket] = []
        passed_over: list[Ticket] = []
        longest = total = 0
        while self and len(passed_over) < MAX_PASSED_OVER and not budget.is_full(len(batch), total):
            ticket = self._next_turn().pop()
            self.forget(ticket)
            if ticket.abandoned:
                continue
            size = len(ticket.encoding)
            if batch and not budget.fits(len(batch) + 1, max(longest, size), total + size):
                passed_over.append(ticket)
                continue
            batch.append(ticket)
            longest, total = max(longest, size), total + size
        for ticket in reversed(passed_over):
            self._turns[ticket.priority].put_back(ticket, ticket.caller, ticket.request)
            self._count(ticket, +1)
        return batch

    def forget(self, ticket: Ticket) -> None:
        """Count a ticket no longer that nobody waits for; a lane that comes upon it drops it."""
        if ticket.is_waiting:
            self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        ticket.is_waiting = sign > 0
        self.num_inputs += sign
        self._backlogs[ticket.priority].add(ticket.caller, ticket.request, sign * len(ticket.encoding))

    def _next_turn(self) -> Turns[Ticket]:
        return next(turns for turns in self._turns.values() if turns)

    def __bool__(self) -> bool:
        return any(self._turns.values())
