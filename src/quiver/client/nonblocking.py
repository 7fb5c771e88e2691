"""The asynchronous client: runs plans, those that go together as tasks."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from quiver.client import batches, verbs
from quiver.client.base import Client
from quiver.client.core import Core, Verify, shown_as
from quiver.client.steps import Pause, Plan, Send, Step
from quiver.client.wire import AsyncWire

P = ParamSpec("P")
T = TypeVar("T")


class Runner:
    """Runs plans on the event loop."""

    def __init__(self, core: Core, verify: Verify) -> None:
        self.core = core
        self._wire = AsyncWire(core.settings, verify)
        self._places = asyncio.Semaphore(core.settings.max_concurrency)

    async def run(self, plan: Plan[T]) -> T:
        """Do what a plan says, step by step, and return its result."""
        try:
            step = next(plan)
            while True:
                step = plan.send(await self._do(step))
        except StopIteration as done:
            result: T = done.value
            return result

    async def _do(self, step: Step) -> Any:
        if isinstance(step, Send):
            return await self._wire.send(step)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await self._run_together(step.plans)

    async def _run_together(self, plans: Sequence[Plan[Any]]) -> list[Any]:
        running = [asyncio.create_task(self._run_in_turn(plan)) for plan in plans]
        try:
            return await asyncio.gather(*running)
        finally:
            for each in running:
                each.cancel()  # does nothing to one that is done
            await asyncio.gather(*running, return_exceptions=True)

    async def _run_in_turn(self, plan: Plan[T]) -> T:
        async with self._places:
            return await self.run(plan)

    async def close(self) -> None:
        """Close every connection."""
        await self._wire.close()


class Runs:
    """What runs plans by a runner: the client, and each group of its verbs."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner


def awaiting(plan: Callable[Concatenate[Core, P], Plan[T]]) -> Callable[Concatenate[Runs, P], Coroutine[Any, Any, T]]:
    """Make the coroutine method that runs a plan."""

    async def method(self: Runs, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._runner.run(plan(self._runner.core, *args, **kwargs))

    shown_as(method, plan)
    return method


class AsyncBatches(Runs):
    """Texts that are embedded in the background."""

    create = awaiting(batches.create)
    get = awaiting(batches.get)
    list = awaiting(batches.list_)
    wait = awaiting(batches.wait)
    results = awaiting(batches.results)
    cancel = awaiting(batches.cancel)


class AsyncQuiver(Client, Runs):
    """An asynchronous client of one server, for one event loop.

        async with AsyncQuiver("http://localhost:8000") as quiver:
            vectors = await quiver.embed(["a", "b"])  # (2, D) float32

    The settings are those of `Client`; a call that is cancelled is given up at once, by the server too.
    """

    def _start(self, core: Core, verify: Verify) -> None:
        self._runner = Runner(core, verify)
        self.batches = AsyncBatches(self._runner)

    embed = awaiting(verbs.embed)
    rerank = awaiting(verbs.rerank)
    classify = awaiting(verbs.classify)
    tokenize = awaiting(verbs.tokenize)
    models = awaiting(verbs.models)
    model = awaiting(verbs.model)
    health = awaiting(verbs.health)
    usage = awaiting(verbs.usage)

    async def close(self) -> None:
        """Close every connection."""
        await self._runner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
