"""Lanes that come free one after the other, so that who comes meanwhile waits for a part of a batch."""

import itertools

import pytest

from quiver.engine.phases import Phases

SECONDS = 0.02
"""What a whole batch takes."""


def ends(lanes: int, batches: int, *, staggered: bool) -> list[float]:
    """Let lanes begin together with whole batches, each of the same speed; returns when they ended, in order."""
    phases, free, done = Phases(lanes), [0.0] * lanes, []
    while len(done) < batches:
        lane = min(range(lanes), key=free.__getitem__)
        now = free[lane]
        phases.end(lane)
        half = staggered and phases.meet(now, SECONDS)
        free[lane] = now + (SECONDS / 2 if half else SECONDS)
        phases.begin(lane, free[lane])
        done.append(free[lane])
    return sorted(done)


def longest_wait(done: list[float]) -> float:
    """Return the longest time in which no lane came free, once they are at work."""
    later = done[len(done) // 2 :]
    return max(b - a for a, b in itertools.pairwise(later))


@pytest.mark.parametrize("lanes", [2, 4])
def test_lanes_that_begin_together_come_free_apart(lanes):
    """However they begin, nobody waits for a whole batch after a while; without it, everybody may."""
    assert longest_wait(ends(lanes, 200, staggered=True)) <= 0.51 * SECONDS
    assert longest_wait(ends(lanes, 200, staggered=False)) == pytest.approx(SECONDS)


def test_one_lane_never_halves_its_batches():
    """There is nobody to be apart from."""
    assert ends(1, 10, staggered=True) == ends(1, 10, staggered=False)


def test_a_lane_that_is_free_is_in_nobody_s_way():
    """Only batches that are at work count."""
    phases = Phases(2)
    phases.begin(0, 1.0)
    assert phases.meet(0.98, SECONDS)
    assert not phases.meet(0.99, SECONDS)
    phases.end(0)
    assert not phases.meet(0.98, SECONDS)
