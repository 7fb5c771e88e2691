"""Who is next: first come, first served, as far as nobody takes more than a share."""

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import encodings
from quiver.engine.packing import Budget
from quiver.engine.turns import Turns
from quiver.engine.waiting import Group, Ticket, Waiting
from quiver.types import Priority

RATE = 1000.0
"""Tokens a second."""
TOKENS = 10
"""Of each input: a hundred are computed in a second."""


class Model:
    """A queue that is computed at a steady speed, in batches of one input, by a clock of its own."""

    def __init__(self):
        self.waiting = Waiting(RATE)
        self.now = 0.0
        self.done = {}
        """When the last input of each request was computed."""
        self.computed = Counter()
        """Inputs of each caller."""
        self.left = Counter()
        """Inputs of each request that wait."""
        self._loop = asyncio.new_event_loop()
        self._input = encodings([TOKENS])[0]

    def ask(self, request, *, caller="a", inputs=1, priority=Priority.INTERACTIVE):
        """Let a request come now; returns how long it is told that it will take."""
        told = self.waiting.expect(TOKENS * inputs, caller, priority, self.now)
        self.left[request] += inputs
        group = Group(caller, request, self._loop.create_future(), priority)
        tickets = [Ticket(self._input, group) for _ in range(inputs)]
        self.waiting.push(tickets, self.now)
        return told

    def compute(self):
        """Compute the next input."""
        for ticket in self.waiting.take_batch(Budget(1), self.now)[0]:
            self.now += TOKENS / RATE
            self.done[ticket.group.number] = self.now
            self.computed[ticket.group.caller] += 1
            self.left[ticket.group.number] -= 1

    def close(self):
        """Forget the futures."""
        self._loop.close()


@pytest.fixture
def model():
    """Return an empty queue."""
    model = Model()
    yield model
    model.close()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5), st.integers(0, 3)), max_size=40))
def test_turns_lose_nothing(pushed):
    """Whatever is pushed comes out once, except what is gone; each caller's by its stamps."""
    turns = Turns(lambda item: item[3] == 0)
    for number, (caller, stamp, kind) in enumerate(pushed):
        turns.push((number, caller, stamp, kind), caller, stamp)
    popped = []
    while item := turns.pop():
        popped.append(item)
        turns.charge(item[1], item[2], 0.5, now=2.0)
    popped = [item for item in popped if item[3]]
    assert sorted(item[0] for item in popped) == [n for n, (_, _, kind) in enumerate(pushed) if kind]
    for caller in "abc":
        mine = [item[2] for item in popped if item[1] == caller]
        assert mine == sorted(mine)
    assert not turns


def test_who_comes_first_is_served_first(model):
    """Requests of the usual size are answered in the order in which they came, whoever sent them."""
    for request in range(50):
        model.ask(request, caller="abcde"[request % 5], inputs=1 + request % 2)
        model.now += 0.02
    while model.waiting.num_inputs:
        model.compute()
    order = sorted(model.done, key=model.done.get)
    assert np.abs(np.array(order) - np.arange(50)).max() <= 4


def test_a_big_request_lets_later_ones_pass(model):
    """Beside one of two thousand inputs, each later query is the very next, or the one after; it takes no longer."""
    model.ask("big", inputs=2048)
    for query in range(50):
        for _ in range(10):
            model.compute()
        came = model.now
        model.ask(query)
        while query not in model.done:
            model.compute()
        assert model.done[query] - came <= 2 * TOKENS / RATE + 1e-9


def test_a_big_request_is_not_starved_by_a_stream_of_others(model):
    """With as many queries as there is time for, one of two hundred inputs has its half of the speed."""
    model.ask("big", inputs=200)
    queries = 0
    while model.left["big"] and model.now < 60:
        model.ask(queries := queries + 1, caller="b")
        model.compute()
    assert model.done["big"] <= 200 * TOKENS / RATE * 2 * 1.3
    assert model.computed["b"] > 150


def test_a_caller_with_ten_times_the_load_is_in_its_own_way(model):
    """Another caller's requests are answered as if it were alone, or nearly so; the greedy one has the rest."""
    waits, rng = [], np.random.default_rng(0)
    for step in range(3000):
        if model.waiting.num_tokens < 300 * TOKENS:
            for i in range(3):
                model.ask(("greedy", step, i), caller="greedy")
        if rng.random() < 0.4:
            came, request = model.now, ("modest", step)
            model.ask(request, caller="modest")
            waits.append((request, came))
        model.compute()
    late = [model.done[request] - came for request, came in waits if request in model.done]
    assert len(late) >= len(waits) - 3
    assert np.percentile(late, 99) <= 10 * TOKENS / RATE
    assert model.computed["greedy"] > 0.5 * 3000


def test_two_greedy_callers_share(model):
    """Of two callers who both want everything, each has half, whichever came first."""
    for i in range(500):
        model.ask(("first", i), caller="first")
    model.now += 1
    for i in range(500):
        model.ask(("second", i), caller="second")
    before = model.computed.copy()
    for _ in range(400):
        model.compute()
    had = model.computed - before
    assert 0.3 <= had["second"] / 400 <= 0.7


@pytest.mark.parametrize("load", [2, 5, 10])
def test_what_is_let_in_under_overload_is_done_in_time(model, load):
    """Whatever comes, of what is told to be in time nearly all is, and the model never idles."""
    rng, deadline, let_in = np.random.default_rng(load), 2.0, []
    asked, taken = Counter(), Counter()
    per_input, coming = TOKENS / RATE, 0.0
    for request in range(4000 * load // 2):
        inputs = int(rng.choice([1, 1, 1, 1, 2, 4, 8]))
        coming += rng.exponential(inputs * per_input / load)
        while model.now < coming and model.waiting.num_inputs:
            model.compute()
        model.now = max(model.now, coming)
        expected = model.waiting.expect(TOKENS * inputs, "a", Priority.INTERACTIVE, coming)
        asked[inputs] += 1
        if expected.fits(deadline):
            taken[inputs] += 1
            model.ask(request, inputs=inputs)
            let_in.append((request, model.now, inputs))
    while model.waiting.num_inputs:
        model.compute()
    late = [inputs for request, came, inputs in let_in if model.done[request] - came > deadline]
    assert sum(late) <= 0.01 * sum(inputs for _, _, inputs in let_in)
    assert sum(inputs for _, _, inputs in let_in) * per_input >= 0.98 * model.now
    assert taken[8] / asked[8] > 0.5 * taken[1] / asked[1], "small requests leave no room for larger ones"
