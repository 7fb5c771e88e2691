"""What outlives a request, put together from the settings: results that were computed before, and the Redis they share."""

import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from quiver.config import CacheConfig
from quiver.engine.cache import Cache, Keys, Memory, load_secret
from quiver.remote import Remote


class Stores:
    """Opened before the first request and closed after the last. Raises `ConfigError` or `MissingExtra`."""

    def __init__(self, config: CacheConfig, data_dir: Path) -> None:
        self.remote = Remote(config.redis_url.reveal()) if config.redis_url else None
        self.cache = _cache(config, data_dir, self.remote)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self.remote:
            await self._open.enter_async_context(self.remote)
        if self.cache:
            await self._open.enter_async_context(self.cache)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()


def _cache(config: CacheConfig, data_dir: Path, remote: Remote | None) -> Cache | None:
    """Return both tiers, as far as they are configured."""
    if not (config.cache_entries or remote):
        return None
    if config.cache_secret:
        secret = config.cache_secret.reveal().encode()
    else:
        secret = load_secret(data_dir / "cache.secret") if remote else os.urandom(32)
    memory = Memory(max_entries=config.cache_entries, max_bytes=config.cache_bytes)
    return Cache(Keys(secret), memory, remote, prefix=config.redis_prefix, ttl_seconds=config.cache_ttl_seconds)
