"""What a request is told of its wait is what it waits: callers in turn, their requests in turn."""

import asyncio
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fakes import encodings
from quiver.engine.backlog import Backlog, Shares
from quiver.engine.packing import Budget
from quiver.engine.waiting import Ticket, Waiting
from quiver.types import Priority

AMOUNTS = st.dictionaries(st.integers(0, 30), st.integers(1, 5000), max_size=20)
ONE_AT_A_TIME = Budget(1)


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


def computed_before(requests, new):
    """Push requests and a new one, each of inputs of one token; count what is computed before the new one's last."""
    loop, waiting = asyncio.new_event_loop(), Waiting()
    for number, (caller, inputs) in enumerate([*requests, new]):
        if number == len(requests):
            told = waiting.tokens_before(inputs, caller, Priority.INTERACTIVE)
        for encoding in encodings([1] * inputs):
            waiting.push(Ticket(encoding, loop.create_future(), caller, number, Priority.INTERACTIVE))
    order = []
    while batch := waiting.take_batch(ONE_AT_A_TIME):
        order += [ticket.request for ticket in batch]
    loop.close()
    last = max(i for i, request in enumerate(order) if request == len(requests))
    return told, last + 1 - new[1]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=8),
    st.tuples(st.sampled_from("abcd"), st.integers(1, 40)),
)
def test_the_wait_that_is_told_is_the_wait(requests, new):
    """Of what is computed before a request's last input, no less is told than a turn's worth, and at most twice as much."""
    told, true = computed_before(requests, new)
    assert true - len(requests) <= told <= 2 * true + len(requests)


def test_a_big_request_is_hardly_in_the_way_of_a_small_one():
    """Behind 2,048 inputs, one of another request is told a turn's wait; the next 2,048 are told all of it."""
    backlog = Backlog()
    backlog.add("a", 0, 2048)
    assert backlog.before("a", 1) == 1
    assert backlog.before("b", 1) == 1
    assert backlog.before("b", 2048) == 2048


def test_bulk_waits_for_everything_interactive():
    """What is interactive does not wait for bulk work at all, bulk work for all that is interactive."""
    loop, waiting = asyncio.new_event_loop(), Waiting()
    for priority, tokens in ((Priority.BULK, 50), (Priority.INTERACTIVE, 7)):
        (encoding,) = encodings([tokens])
        waiting.push(Ticket(encoding, loop.create_future(), "a", 0, priority))
    loop.close()
    assert waiting.tokens_before(5, "b", Priority.INTERACTIVE) == 5
    assert waiting.tokens_before(100, "b", Priority.BULK) == 57


def test_the_answer_costs_the_same_however_many_wait():
    """Ten thousand requests are summed over classes of sizes, not one by one."""
    sizes = np.random.default_rng(0).integers(1, 512, 10_000)
    shares = Shares()
    for key, size in enumerate(sizes.tolist()):
        shares.add(key, size)
    assert sum(1 for count in shares._counts if count) <= 9
    assert all(a <= b for a, b in pairwise(shares.up_to(n) for n in range(0, 600, 7)))
