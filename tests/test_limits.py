"""Token buckets: the arithmetic against a model, in memory, in a real Redis, and before one that fails."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from fakes import FakeClock
from fault_proxy import FAULTS, Fault, FaultProxy
from quiver import limits, remote
from quiver.accounts import Rate
from quiver.errors import ConfigError, InvalidInput, MissingExtra
from quiver.limits import Buckets, Limiter
from quiver.remote import Remote, RemoteDown
from stores import REDIS, added, redis_prefix

SIXTEENTHS = st.integers(0, 64).map(lambda n: n / 16)
RATES = st.builds(Rate, st.sampled_from([0.25, 0.5, 1, 2, 8]), st.integers(1, 6))
HTTP_RATE = Rate(80, 50)


class Model:
    """A bucket as a textbook has it, in exact numbers: so many tokens, which time brings back."""

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self.tokens, self.now = rate, Fraction(rate.burst), Fraction(now)

    def take(self, now: float, cost: float) -> bool:
        """Take tokens if there are enough."""
        gained = (Fraction(now) - self.now) * Fraction(self.rate.per_second)
        self.tokens, self.now = min(Fraction(self.rate.burst), self.tokens + gained), Fraction(now)
        allowed = self.tokens >= min(Fraction(cost), Fraction(self.rate.burst))
        if allowed:
            self.tokens -= min(Fraction(cost), Fraction(self.rate.burst))
        return allowed


@pytest.fixture
async def prefix() -> AsyncIterator[str]:
    """Name keys of this test's own in Redis."""
    async with redis_prefix() as prefix:
        yield prefix


# The arithmetic


@given(RATES, st.lists(st.tuples(SIXTEENTHS, st.sampled_from([1, 1, 1, 0.5, 3])), max_size=60))
def test_a_bucket_is_the_model(rate, steps):
    """Whatever comes when, the same is let through as by exact arithmetic, and as much is left."""
    clock = FakeClock()
    buckets, model = Buckets(clock), Model(rate, clock())
    for pause, cost in steps:
        clock.pass_by(pause)
        verdict = buckets.take("a", rate, cost)
        assert verdict.allowed == model.take(clock(), cost)
        assert verdict.remaining == int(model.tokens)
        assert verdict.reset_seconds == pytest.approx(float((rate.burst - model.tokens) / Fraction(rate.per_second)))


@given(RATES, st.lists(SIXTEENTHS, min_size=1, max_size=80))
def test_no_stretch_of_time_lets_too_many_through(rate, pauses):
    """In any stretch at most a burst and what the rate gives in it."""
    clock, passed = FakeClock(), []
    buckets = Buckets(clock)
    for pause in pauses:
        clock.pass_by(pause)
        if buckets.take("a", rate).allowed:
            passed.append(clock())
    for i, start in enumerate(passed):
        for j, end in enumerate(passed[i:], 1):
            assert j <= rate.burst + rate.per_second * (end - start) + 1e-3


@given(RATES, st.integers(0, 10))
def test_who_comes_back_when_told_gets_in(rate, num_before):
    """And a little earlier not."""
    clock = FakeClock()
    buckets = Buckets(clock)
    for _ in range(num_before):
        buckets.take("a", rate)
    verdict = buckets.take("a", rate)
    if not verdict.allowed:
        clock.pass_by(verdict.retry_after_seconds - 0.001)
        assert not buckets.take("a", rate).allowed
        clock.pass_by(0.001)
        assert buckets.take("a", rate).allowed


def test_the_first_seed_s_governor():
    """50 at once, then 80 a second."""
    clock = FakeClock()
    buckets = Buckets(clock)
    at_once = [buckets.take("a", HTTP_RATE).allowed for _ in range(60)]
    clock.pass_by(0.25)
    later = [buckets.take("a", HTTP_RATE).allowed for _ in range(30)]
    assert (sum(at_once), sum(later)) == (50, 20)


def test_one_caller_takes_nothing_of_another_s():
    """Each has a bucket."""
    buckets = Buckets(FakeClock())
    assert [buckets.take(who, Rate(1, 1)).allowed for who in "aabb"] == [True, False, True, False]


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_a_clock_that_jumps_locks_nobody_out(seconds):
    """After it, at most one bucket's time has to pass."""
    clock = FakeClock(10_000)
    buckets = Buckets(clock)
    for _ in range(60):
        buckets.take("a", HTTP_RATE)
    clock.pass_by(seconds)
    assert buckets.take("a", HTTP_RATE).retry_after_seconds <= 1 / HTTP_RATE.per_second
    clock.pass_by(1 / HTTP_RATE.per_second)
    assert buckets.take("a", HTTP_RATE).allowed


def test_idle_buckets_are_forgotten():
    """Those who come no more cost no memory; those who are over their rate stay."""
    clock = FakeClock()
    buckets = Buckets(clock)
    for i in range(1000):
        buckets.take(f"once {i}", HTTP_RATE)
    clock.pass_by(limits.CLEAN_SECONDS)
    for _ in range(2):
        buckets.take("slow", Rate(0.001, 1))
    clock.pass_by(limits.CLEAN_SECONDS)
    assert not buckets.take("slow", Rate(0.001, 1)).allowed
    assert len(buckets) == 1


@pytest.mark.parametrize(("per_second", "burst"), [(0, 1), (-1, 1), (1, 0), (1, 0.5), (float("nan"), 1)])
def test_a_rate_that_lets_nobody_through_is_none(per_second, burst):
    """It would be a mistake of whoever set it."""
    with pytest.raises(InvalidInput, match="lets nobody through"):
        Rate(per_second, burst)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_who_is_told_at_once_takes_from_the_same_bucket(processes):
    """What needs no waiting is counted like anything else: of several processes each lets through its part."""
    limiter, rate = Limiter(processes=processes, clock=FakeClock()), Rate(1, 8)
    verdicts = [limiter.take_here("a", rate) for _ in range(10)]
    assert sum(verdict.allowed for verdict in verdicts) == 8 / processes


# Redis


async def test_servers_share_a_bucket(prefix):
    """Two servers that ask at the same time let through what one would, and keep nothing once it is full again."""
    rate = Rate(20, 8)
    async with Remote(REDIS, call_seconds=1.0) as one, Remote(REDIS, call_seconds=1.0) as other:
        servers = [Limiter(one, prefix=prefix), Limiter(other, prefix=prefix)]
        start = time.perf_counter()
        verdicts = await asyncio.gather(*(servers[i % 2].take("a", rate) for i in range(60)))
        most = rate.burst + rate.per_second * (time.perf_counter() - start)
        assert rate.burst <= sum(verdict.allowed for verdict in verdicts) <= most
        refused = await servers[0].take("a", rate)
        assert 0 < refused.retry_after_seconds <= 1 / rate.per_second
        await asyncio.sleep(refused.reset_seconds + 0.05)
        assert await one.call(lambda client: client.exists(f"{prefix}rate:a")) == 0


async def test_a_shared_bucket_is_the_same_arithmetic(prefix):
    """Redis and memory give the same verdicts to requests that come at the same times."""
    rate, buckets = Rate(30, 4), Buckets()
    async with Remote(REDIS, call_seconds=1.0) as shared:
        limiter = Limiter(shared, prefix=prefix)
        for pause in (0, 0, 0, 0, 0, 0.07, 0, 0, 0.2, 0, 0, 0):
            await asyncio.sleep(pause)
            there, here = await limiter.take("a", rate), buckets.take("a", rate)
            assert (there.allowed, there.rate) == (here.allowed, here.rate)
            assert there.reset_seconds == pytest.approx(here.reset_seconds, abs=0.02)


async def test_a_bucket_that_someone_spoilt_is_full(prefix):
    """A value that is no number, or one of another century, neither fails nor locks anyone out."""
    async with Remote(REDIS, call_seconds=1.0) as shared:
        limiter = Limiter(shared, prefix=prefix)
        for value in ("noise", "1e300", "nan"):
            await shared.call(lambda client, v=value: client.set(f"{prefix}rate:a", v))
            verdict = await limiter.take("a", Rate(10, 2))
            assert verdict.retry_after_seconds < 0.101


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_redis_costs_little_and_limits_all_the_same(fault, prefix):
    """Whatever is wrong with it nobody is unlimited, few wait for it, and it is used again once it is well."""
    rate, url = Rate(0.5, 30), make_url(REDIS)
    async with FaultProxy(url.host, url.port or 6379) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with Remote(through) as shared:
            limiter = Limiter(shared, prefix=prefix)
            await shared.warm_up()
            before = [await taken(limiter, "before", rate) for _ in range(600)]
            await proxy.break_down(fault)
            during = [await taken(limiter, "during", rate) for _ in range(600)]
            assert rate.burst <= sum(allowed for allowed, _ in during) <= rate.burst + 2
            assert shared.is_down
            assert added([seconds for _, seconds in before], [seconds for _, seconds in during]) < 0.025
            await proxy.break_down(Fault.NONE)
            await back(shared)
            assert (await limiter.take("b", rate)).allowed
            assert await shared.call(lambda client: client.exists(f"{prefix}rate:b"), seconds=1.0)


async def taken(limiter: Limiter, who: str, rate: Rate) -> tuple[bool, float]:
    """Take from a bucket; returns whether that was allowed, and the seconds that it took."""
    start = time.perf_counter()
    allowed = (await limiter.take(who, rate)).allowed
    return allowed, time.perf_counter() - start


async def back(shared: Remote) -> None:
    """Wait until Redis is used again."""
    async with asyncio.timeout(10):
        while True:
            try:
                await shared.call(lambda client: client.ping())
            except RemoteDown:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_redis_that_is_down_is_asked_once_a_second():
    """After five failures calls fail at once, without a connection each."""
    clock = FakeClock()
    async with (
        FaultProxy("127.0.0.1", 1) as proxy,
        Remote(f"redis://127.0.0.1:{proxy.listens_at}/0", clock=clock) as shared,
    ):
        for _ in range(100):
            with pytest.raises(RemoteDown):
                await shared.call(lambda client: client.ping())
        assert proxy.num_connections == remote.FAILURES
        for _ in range(30):
            clock.pass_by(remote.PROBE_SECONDS / 3)
            with pytest.raises(RemoteDown):
                await shared.call(lambda client: client.ping())
            await asyncio.sleep(0.01)
        assert remote.FAILURES + 5 <= proxy.num_connections <= remote.FAILURES + 11


async def test_an_answer_that_makes_no_sense_is_a_failure():
    """What reads it may raise anything, and the caller does without."""
    async with Remote(REDIS, call_seconds=1.0) as shared:

        async def read(client):
            return int(await client.echo("noise"))

        with pytest.raises(RemoteDown, match="ValueError"):
            await shared.call(read)


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://host", "redis://", "redis://host:port", "redis://["])
def test_a_url_that_means_nothing_is_refused(url):
    """What cannot be a Redis is said at the start."""
    with pytest.raises(ConfigError, match="the Redis URL is none"):
        Remote(url)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    """Redis is an extra, missed only by who uses it."""
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(MissingExtra, match=r"pip install 'quiver\[redis\]'"):
        Remote("redis://host")


async def test_a_redis_is_named_without_its_password():
    """No error shows it."""
    async with Remote("redis://quiver:s3cret@127.0.0.1:1/3?password=s3cret") as shared:
        with pytest.raises(RemoteDown) as caught:
            await shared.call(lambda client: client.ping())
        assert shared.name == "redis://127.0.0.1:1/3"
    assert "s3cret" not in f"{caught.value}"
