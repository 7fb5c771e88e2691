"""What outlives a request, put together from the settings: known results, rates, accounts, and what servers share."""

import os
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Self

from quiver.config import CacheConfig, Config
from quiver.engine.cache import Cache, Keys, Memory, load_secret
from quiver.limits import Limiter
from quiver.register import Register
from quiver.remote import Remote, RemoteDown


class Stores:
    """Opened before the first request and closed after the last. Raises `ConfigError`, `MissingExtra` or `DatabaseError`."""

    def __init__(self, config: Config) -> None:
        shared, data_dir = config.cache, config.models.data_dir
        self.remote = Remote(shared.redis_url.reveal()) if shared.redis_url else None
        self.cache = _cache(shared, data_dir, self.remote)
        self.limiter = Limiter(self.remote, prefix=shared.redis_prefix, processes=config.server.processes)
        self.register = Register(config.accounts, data_dir)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:  # what was opened before one that fails is closed
            for store in (self.remote, self.cache, self.register):
                if store:
                    await opening.enter_async_context(store)
            if self.remote:
                with suppress(RemoteDown):
                    await self.remote.warm_up()
            self._open = opening.pop_all()
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
