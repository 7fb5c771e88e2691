"""Settings of results that were computed before."""

from dataclasses import dataclass
from typing import Literal

from quiver.config.setting import Secret, setting

Scope = Literal["auto", "caller", "shared"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What is kept of results, where, how long, and for whom."""

    cache_entries: int = setting(10_000, "Most results that are kept in memory; 0: none.")
    cache_bytes: int = setting(256 << 20, "Most bytes of results that are kept in memory.")
    cache_ttl_seconds: float = setting(24 * 3600.0, "How long results are kept in Redis, in seconds.")
    cache_scope: Scope = setting(
        "auto",
        "Who shares results: shared, everybody; caller, nobody but the keys of one user; auto: caller for calls with "
        "a key of an account, shared for others. Who shares a result can tell by its time that it was asked for before.",
    )
    cache_secret: Secret = setting(
        Secret(""),
        "What keys and values in Redis are signed with: servers that share results have the same; empty: one is made "
        "and kept in `data_dir`.",
    )
    redis_url: Secret = setting(
        Secret(""),
        "Redis for results and rate limits that several servers share: redis://:PASSWORD@HOST:6379/0 (extra `redis`); "
        "empty: each server has its own, in memory.",
        also=("REDIS_URL",),
    )
    redis_prefix: str = setting("quiver:", "How the names of keys in Redis begin.")
