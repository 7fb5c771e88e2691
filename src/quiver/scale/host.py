"""One replica of a model: an engine as a single server has it, asked by ingresses instead of dialects."""

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

from quiver import app, memory
from quiver.app import App
from quiver.capacity import Queue
from quiver.config import Config
from quiver.engine.verbs import Verbs
from quiver.errors import QuiverError
from quiver.scale.wire import Answer, Asked, Described, LoadStats, arrived
from quiver.types import ModelState

Load = Callable[[App], Awaitable[None]]
"""Has an engine load what it is configured to."""


async def load_configured(parts: App) -> None:
    """Find, fetch and load the model. Raises `SetupError`."""
    await parts.engine.load(lambda *_: None)


class Host:
    """An engine with one model; made, and used, on one event loop."""

    def __init__(self, parts: App, opened: AsyncExitStack) -> None:
        self._parts = parts
        self._opened = opened
        self._tokens = 0
        """Read since it was last asked how busy it is."""
        self._asked_at = time.monotonic()

    @classmethod
    async def open(cls, config: Config, load: Load = load_configured) -> Self:
        """Load the model. Raises `SetupError`."""
        memory.keep_small()
        parts = app.build(config)
        async with AsyncExitStack() as opening:
            for part in (parts.watchdog, parts.stores, parts.engine):
                await opening.enter_async_context(part)
            await load(parts)
            return cls(parts, opening.pop_all())

    async def close(self) -> None:
        """Give everything back."""
        await self._opened.aclose()

    @property
    def engine(self) -> Verbs:
        """What computes."""
        return self._parts.engine

    async def answer(self, asked: Asked) -> Answer:
        """Do what is asked; an error is an answer too."""
        try:
            found = await self._found(asked)
        except QuiverError as error:
            found = error.with_traceback(None)
        self._tokens += getattr(getattr(found, "usage", None), "num_tokens", 0)
        return Answer(found, self._queue)

    async def _found(self, asked: Asked) -> Any:
        match asked.verb:
            case "ping":
                return await self.engine.ping()
            case "tokenize" | "decode":
                return await getattr(self.engine, asked.verb)(asked.request)
            case _:
                return await getattr(self.engine, asked.verb)(asked.request, arrived(asked))

    def describe(self) -> Described:
        """Tell what the model is, once it is ready."""
        status = next(s for s in self.engine.replicas.statuses if s.state is ModelState.READY)
        return Described(status, self._queue)

    def check(self) -> None:
        """Raise why it can compute no more, if so."""
        if died := self.engine.died:
            raise died

    def load_stats(self) -> LoadStats:
        """Tell how busy it has been since it was last asked."""
        now = time.monotonic()
        seconds, self._asked_at = max(1e-3, now - self._asked_at), now
        tokens, self._tokens = self._tokens, 0
        queue = self._queue
        return LoadStats(
            float(queue.tokens), min(1.0, tokens / seconds / queue.tokens_per_second), queue.tokens_per_second
        )

    @property
    def _queue(self) -> Queue:
        return self.engine.replicas.queue(None)
