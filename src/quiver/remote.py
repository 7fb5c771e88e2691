"""A Redis that several servers share and none depends on: the only file that knows the package.

Nothing waits for it longer than a call's time. After `FAILURES` failed calls in a row it is left alone: calls fail at
once, and in the background it is asked once a second whether it is back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit

from quiver.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from redis.asyncio import Redis

Client: TypeAlias = "Redis"
T = TypeVar("T")

CALL_SECONDS = 0.02
CONNECT_SECONDS = 0.1
FAILURES = 5
PROBE_SECONDS = 1.0
_CONNECTIONS = 8
"""A call takes a fraction of a millisecond, a connection more: few are enough, and a burst waits for them."""
_EXAMPLE = "the Redis URL is none: it is like redis://:password@host:6379/0"
_SCHEMES = ("redis", "rediss", "unix")


class RemoteDown(Exception):
    """Redis did not answer, or nothing that makes sense: do without it."""


class Remote:
    """Calls to one Redis; used on one event loop."""

    def __init__(
        self, url: str, *, call_seconds: float = CALL_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = _without_secrets(url)
        """What it may be called in an error or a log line."""
        self._client = _client(url, call_seconds)
        self._call_seconds = call_seconds
        self._clock = clock
        self._num_failures = 0
        self._probe_at = 0.0
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether it is left alone for now."""
        return self._num_failures >= FAILURES

    async def call(self, work: Callable[[Client], Awaitable[T]], *, seconds: float | None = None) -> T:
        """Talk with Redis; an answer that `work` cannot read is a failure, too. Raises `RemoteDown`."""
        if self.is_down:
            self._look_after_it()
            raise RemoteDown(f"{self.name} is down")
        return await self._attempt(work, seconds or self._call_seconds)

    async def warm_up(self) -> None:
        """Connect, so that the first call need not. Raises `RemoteDown`."""
        await self._attempt(lambda client: client.ping(), CONNECT_SECONDS)

    async def close(self) -> None:
        """Give back the connections."""
        if self._probe:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _attempt(self, work: Callable[[Client], Awaitable[T]], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds):
                answer = await work(self._client)
        except Exception as error:
            self._failed()
            raise RemoteDown(f"{self.name} failed: {type(error).__name__}") from error
        self._num_failures = 0
        return answer

    def _failed(self) -> None:
        self._num_failures += 1
        self._probe_at = self._clock() + PROBE_SECONDS

    def _look_after_it(self) -> None:
        if self._clock() >= self._probe_at and (self._probe is None or self._probe.done()):
            self._probe_at = self._clock() + PROBE_SECONDS
            self._probe = asyncio.create_task(self._ask_whether_it_is_back())

    async def _ask_whether_it_is_back(self) -> None:
        with suppress(RemoteDown):
            await self.warm_up()


def _client(url: str, call_seconds: float) -> Client:
    try:
        from redis.asyncio import BlockingConnectionPool, Redis  # noqa: PLC0415  an extra
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtra("redis", "a Redis that servers share") from error
    options: dict[str, Any] = {
        "max_connections": _CONNECTIONS,
        "timeout": call_seconds,
        "socket_connect_timeout": max(CONNECT_SECONDS, call_seconds),
        "retry": Retry(NoBackoff(), 0),  # a second attempt would double what a caller waits
        "protocol": 2,
    }
    try:
        return Redis.from_pool(BlockingConnectionPool.from_url(url, **options))
    except ValueError as error:
        raise ConfigError(_EXAMPLE) from error


def _without_secrets(url: str) -> str:
    """Leave out user, password and query. Raises `ConfigError` for what is no URL of a Redis."""
    try:
        parts = urlsplit(url)
        where = f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        parts, where = None, ""
    if parts is None or parts.scheme not in _SCHEMES or not (where or parts.path):
        raise ConfigError(_EXAMPLE)
    return f"{parts.scheme}://{where}{parts.path}"
