"""How often someone may ask: token buckets as arithmetic, in memory, and in a Redis that several servers share.

A bucket is one number, the seconds until it is full again (`ahead`): what was taken pushes it up, time brings it down,
and what would push it over `burst / per_second` is refused. A bucket that is full need not be kept.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from quiver.accounts import Rate
from quiver.remote import Client, Remote, RemoteDown

CLEAN_SECONDS = 60.0
_ROUNDING = 1e-6
"""Seconds: what adding to a large clock loses."""


class Verdict(NamedTuple):
    """Whether someone may ask now, and how much is left."""

    allowed: bool
    rate: Rate
    remaining: int
    """Requests that may follow at once."""
    retry_after_seconds: float
    """When this one would be let through; 0 where it is."""
    reset_seconds: float
    """When the bucket is full again."""


def take(ahead: float, rate: Rate, cost: float = 1.0) -> tuple[float, Verdict]:
    """Take from a bucket -> how far ahead it is then, and the verdict. Who asks for more than fits takes it whole."""
    most = rate.burst / rate.per_second
    ahead = min(max(ahead, 0.0), most)  # a clock that jumped must not lock anyone out
    after = ahead + min(cost, rate.burst) / rate.per_second
    if after <= most + _ROUNDING:
        return after, _verdict(after, rate, retry_after_seconds=0.0)
    return ahead, _verdict(ahead, rate, retry_after_seconds=after - most)


def _verdict(ahead: float, rate: Rate, *, retry_after_seconds: float) -> Verdict:
    left = rate.burst - (ahead - _ROUNDING) * rate.per_second
    return Verdict(not retry_after_seconds, rate, max(0, int(left)), retry_after_seconds, max(0.0, ahead))


def part_of(rate: Rate, processes: int) -> Rate:
    """Return what each of several processes may let through, so that all together let through no more."""
    return Rate(rate.per_second / processes, max(1.0, rate.burst // processes)) if processes > 1 else rate


class Buckets:
    """Buckets of one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._clean_at = clock() + CLEAN_SECONDS

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, who: str, rate: Rate, cost: float = 1.0) -> Verdict:
        """Take from someone's bucket."""
        now = self._clock()
        self._clean(now)
        ahead, verdict = take(self._full_at.get(who, now) - now, rate, cost)
        self._full_at[who] = now + ahead
        return verdict

    def _clean(self, now: float) -> None:
        """Forget the full buckets, now and then."""
        if now >= self._clean_at:
            self._full_at = {who: full_at for who, full_at in self._full_at.items() if full_at > now}
            self._clean_at = now + CLEAN_SECONDS


_SHARED_TAKE = """
local per_second, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local most = burst / per_second
local before = (tonumber(redis.call('GET', KEYS[1]) or now) or now) - now
before = math.min(math.max(before == before and before or 0, 0), most)
local after = before + math.min(cost, burst) / per_second
if after <= most + 0.000001 then
  redis.call('SET', KEYS[1], string.format('%.6f', now + after), 'PX', math.ceil(after * 1000) + 1)
end
return string.format('%.6f', before)
"""
"""The same arithmetic where the bucket is, in one step that no other server comes between; gives how far it was ahead.
Time is Redis's own, so that servers need not agree on theirs."""


class Limiter:
    """Counts each request of those who ask, for all servers together as long as their Redis answers.

    Without it each server counts for itself: nobody is ever unlimited. Of several processes of one server each then
    counts its part.
    """

    def __init__(
        self,
        remote: Remote | None = None,
        *,
        prefix: str = "quiver:",
        processes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self._prefix = prefix
        self._processes = processes
        self._buckets = Buckets(clock)

    def take_here(self, who: str, rate: Rate) -> Verdict | None:
        """Take from someone's bucket if it is in this process; None where it is shared."""
        return None if self._remote else self._buckets.take(who, part_of(rate, self._processes))

    async def take(self, who: str, rate: Rate, cost: float = 1.0) -> Verdict:
        """Take from someone's bucket."""
        if self._remote:
            with suppress(RemoteDown):
                before = await self._remote.call(lambda client: self._ahead(client, who, rate, cost))
                return take(before, rate, cost)[1]
        return self._buckets.take(who, part_of(rate, self._processes), cost)

    async def _ahead(self, client: Client, who: str, rate: Rate, cost: float) -> float:
        script = client.register_script(_SHARED_TAKE)
        arguments = [repr(rate.per_second), repr(rate.burst), repr(cost)]
        ahead = float(await script(keys=[f"{self._prefix}rate:{who}"], args=arguments))
        if not math.isfinite(ahead):
            raise ValueError(f"a bucket is {ahead} seconds ahead")
        return ahead
