"""How replies tell what is left of how often a caller may ask: as OpenAI's do, and as the IETF's draft has it.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/
"""

import math
from functools import lru_cache

from quiver.accounts import Rate
from quiver.limits import Verdict

MINUTE_MS = 60_000
POLICY = "requests"
"""huggingface_hub reads names of letters only, and `t` right behind `r`."""
_QUOTED = f'"{POLICY}"'.encode()


def rate_headers(verdict: Verdict | None) -> dict[str, str]:
    """Say what is left; nothing where nothing bounds it."""
    if verdict is None:
        return {}
    seconds = verdict.reset_seconds if verdict.allowed else verdict.retry_after_seconds
    return {
        "x-ratelimit-limit-requests": str(int(verdict.rate.burst)),
        "x-ratelimit-remaining-requests": str(verdict.remaining),
        "x-ratelimit-reset-requests": go_duration(verdict.reset_seconds),
        "ratelimit-policy": _policy(verdict.rate),
        "ratelimit": f'"{POLICY}";r={verdict.remaining};t={math.ceil(seconds)}',
    }


def rate_lines(verdict: Verdict | None) -> bytes:
    """Write what `rate_headers` says of someone who may ask as it goes over the wire: in a microsecond."""
    if verdict is None:
        return b""
    reset, left = verdict.reset_seconds, verdict.remaining
    return b"%bx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\nratelimit: %b;r=%d;t=%d\r\n" % (
        _limit_lines(verdict.rate), left, go_duration(reset).encode(), _QUOTED, left, math.ceil(reset)
    )  # fmt: skip


@lru_cache(64)
def _limit_lines(rate: Rate) -> bytes:
    return f"x-ratelimit-limit-requests: {int(rate.burst)}\r\nratelimit-policy: {_policy(rate)}\r\n".encode()


@lru_cache(64)
def _policy(rate: Rate) -> str:
    window = max(1, math.ceil(rate.burst / rate.per_second))  # whole seconds
    return f'"{POLICY}";q={max(int(rate.burst), int(rate.per_second * window))};w={window}'


def go_duration(seconds: float) -> str:
    """Write a duration as OpenAI's servers do: `0s`, `12ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < MINUTE_MS // 60:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, MINUTE_MS)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
