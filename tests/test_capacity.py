"""The capacity model: its arithmetic against its simulation, and the simulation against queues that are known."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

MODEL = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "capacity.py"), run_name="capacity")
Facts, capacity, play_open, play_closed = (MODEL[name] for name in ("Facts", "capacity", "play_open", "play_closed"))


def works(mean: float, count: int = 60_000) -> np.ndarray:
    """Return exponential times of work."""
    return np.random.default_rng(1).exponential(mean, count)


@pytest.mark.parametrize("full", [0.5, 0.8])
def test_one_replica_waits_as_the_known_queue_does(full):
    """Of M/M/1 the mean wait is known: the part that is full over the part that is free, times the work."""
    played = play_open(full / 0.01, works(0.01), 1)
    assert played.waits.mean() == pytest.approx(0.01 * full / (1 - full), rel=0.1)


def test_the_arithmetic_gives_the_wait_of_a_shared_queue():
    """With four cores and work of exponential length, 99 of 100 wait what the approximation says."""
    played = play_open(0.8 * 4 / 0.01, works(0.01), 4, shared=True)
    assert played.p99 == pytest.approx(MODEL["slowest_wait"](0.8, 4, 0.01), rel=0.2)


def test_two_choices_wait_longer_than_one_queue():
    """Negative control: who chooses between two of eight replicas may choose a busy one."""
    rate, times = 0.9 * 8 / 0.01, works(0.01)
    assert play_open(rate, times, 8).p99 > 1.2 * play_open(rate, times, 8, shared=True).p99


def test_a_second_replica_doubles_a_full_one():
    """Clients enough to keep both busy get twice as much; one client alone gets nothing of the second."""
    times = works(0.01, 20_000)
    for clients, ratio in ((16, 2.0), (1, 1.0)):
        one, two = (play_closed(clients, times, n).requests_per_second for n in (1, 2))
        assert two / one == pytest.approx(ratio, rel=0.08)


def test_the_number_of_replicas_keeps_the_wait():
    """Played with two choices as Ray has them, 99 of 100 wait no longer than was allowed."""
    for row in MODEL["check_arithmetic"](Facts()):
        assert row["two_choices_ms"] <= row["allowed_ms"], row


def test_more_of_everything_for_a_million():
    """From ten requests a second to a million, what a load takes grows as the load does, and its price per text falls."""
    small, large = (capacity(rate, Facts()) for rate in (1_000, 1_000_000))
    assert large.replicas == pytest.approx(1000 * small.replicas, rel=0.1)
    assert large.postgres_rows_per_second == 1_000_000
    assert (
        large.price_per_million_texts <= small.price_per_million_texts < capacity(10, Facts()).price_per_million_texts
    )
    assert capacity(1_000_000, replace(Facts(), shared_rates=False)).redis_calls_per_second == 0


def test_known_results_cost_no_core():
    """Half of the texts known is half of the computing, and a little less than half of the replicas: work is shorter, too."""
    cold, warm = (capacity(10_000, replace(Facts(replica_ms=0), hit_rate=rate)) for rate in (0.0, 0.5))
    assert 0.35 * cold.replicas < warm.replicas <= 0.5 * cold.replicas + 1
    assert warm.tokens_per_second == cold.tokens_per_second / 2
