"""Both of Quiver's clients behind one face, so that one test holds for the two."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from quiver.client import AsyncQuiver, Quiver
from quiver.client.blocking import Batches


class InThread:
    """A blocking client whose calls are awaited: each runs in a thread, as its user's would."""

    def __init__(self, client: Quiver | Batches) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        """Return what the client has, a method as a coroutine function."""
        found = getattr(self._client, name)
        if isinstance(found, Batches):
            return InThread(found)
        return _awaited(found) if callable(found) else found


def _awaited(method: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*args: object, **options: object) -> Any:
        return await asyncio.to_thread(method, *args, **options)

    return call


@contextlib.asynccontextmanager
async def blocking(url: str, **options: Any) -> AsyncIterator[Any]:
    """Open the blocking client."""
    with Quiver(url, **options) as client:
        yield InThread(client)


@contextlib.asynccontextmanager
async def asynchronous(url: str, **options: Any) -> AsyncIterator[Any]:
    """Open the asynchronous client."""
    async with AsyncQuiver(url, **options) as client:
        yield client


BOTH = (blocking, asynchronous)
