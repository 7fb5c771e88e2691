"""What a request is told of its wait is what it waits: callers in turn, their requests in turn."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import encodings
from quiver.engine.backlog import Backlog, Shares
from quiver.engine.waiting import Group, Ticket, Waiting
from quiver.types import Priority

AMOUNTS = st.dictionaries(st.integers(0, 30), st.integers(1, 5000), max_size=20)


@given(AMOUNTS, st.integers(1, 6000))
def test_shares_are_summed_up_to_a_bound(amounts, bound):
    """The sum is never too small, and too large by no more than what those of the bound's own size have above it."""
    shares = Shares()
    for key, amount in amounts.items():
        shares.add(key, amount)
    true = sum(min(amount, bound) for amount in amounts.values())
    near = [amount for amount in amounts.values() if amount.bit_length() == bound.bit_length()]
    assert true <= shares.up_to(bound) <= true + sum(max(0, bound - amount) + max(0, amount - bound) for amount in near)
    assert shares.total == sum(amounts.values())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(1, 99)), max_size=30))
def test_what_comes_and_goes_leaves_nothing(inputs):
    """However inputs come and go, an empty queue counts nothing."""
    backlog = Backlog()
    for caller, request, tokens in inputs:
        backlog.add(caller, request, tokens)
    assert backlog.tokens == sum(tokens for *_, tokens in inputs)
    for caller, request, tokens in reversed(inputs):
        backlog.add(caller, request, -tokens)
    assert backlog.tokens == 0
    assert backlog.before("a", 100) == 0


def test_a_big_request_is_hardly_in_the_way_of_a_small_one():
    """Behind 2,048 inputs, one of another request is told a turn's wait; the next 2,048 are told all of it."""
    backlog = Backlog()
    backlog.add("a", 0, 2048)
    assert backlog.before("a", 1) == 1
    assert backlog.before("b", 1) == 1
    assert backlog.before("b", 2048) == 2048


def test_who_has_little_counts_whole():
    """Of two hundred callers with one input each, all come before a new one once they are due; half of a big one does."""
    backlog = Backlog()
    for caller in range(200):
        backlog.add(str(caller), caller, 60)
    backlog.add("big", 999, 4000)
    assert backlog.before("new", 2000) == 200 * 60 + 2000


def test_bulk_waits_for_everything_interactive():
    """What is interactive does not wait for bulk work at all, bulk work for all that is interactive."""
    loop, waiting = asyncio.new_event_loop(), Waiting(10.0)
    for priority, tokens in ((Priority.BULK, 50), (Priority.INTERACTIVE, 7)):
        group = Group("a", 0, loop.create_future(), priority)
        waiting.push([Ticket(e, group) for e in encodings([tokens])], 0.0)
    loop.close()
    assert waiting.expect(7, "b", Priority.INTERACTIVE, 0.0) == pytest.approx((0.7, 0.7))
    assert waiting.expect(100, "b", Priority.BULK, 0.0) == pytest.approx((5.7, 10.0))


def test_the_answer_costs_the_same_however_many_wait():
    """Ten thousand requests are summed over classes of sizes, not one by one."""
    sizes = np.random.default_rng(0).integers(1, 512, 10_000)
    shares = Shares()
    for key, size in enumerate(sizes.tolist()):
        shares.add(key, size)
    assert len(shares._classes) <= 9
    assert all(a <= b for a, b in pairwise(shares.up_to(n) for n in range(0, 600, 7)))
