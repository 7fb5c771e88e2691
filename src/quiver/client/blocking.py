"""The blocking client: runs plans, those that go together in threads of a pool."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from quiver.client import batches, verbs
from quiver.client.base import Client
from quiver.client.core import Core, Verify, shown_as
from quiver.client.steps import Pause, Plan, Send, Step
from quiver.client.wire import Wire

P = ParamSpec("P")
T = TypeVar("T")


class GivenUp(Exception):
    """Another part of the same call has failed; nobody waits for this one."""


class Runner:
    """Runs plans by waiting."""

    def __init__(self, core: Core, verify: Verify) -> None:
        self.core = core
        self._wire = Wire(core.settings, verify)
        self._pool = ThreadPoolExecutor(core.settings.max_concurrency, "quiver-client")

    def run(self, plan: Plan[T], given_up: threading.Event | None = None) -> T:
        """Do what a plan says, step by step, and return its result."""
        given_up = given_up or threading.Event()
        try:
            step = next(plan)
            while True:
                step = plan.send(self._do(step, given_up))
        except StopIteration as done:
            result: T = done.value
            return result

    def _do(self, step: Step, given_up: threading.Event) -> Any:
        if isinstance(step, Send):
            return self._wire.send(step)
        if isinstance(step, Pause):
            if given_up.wait(step.seconds):
                raise GivenUp
            return None
        return self._run_together(step.plans)

    def _run_together(self, plans: Any) -> list[Any]:
        given_up = threading.Event()
        running: list[Future[Any]] = [self._pool.submit(self.run, plan, given_up) for plan in plans]
        try:
            done, _ = wait_for(running, return_when=FIRST_EXCEPTION)
            for failed in (each for each in done if each.exception()):
                failed.result()
            return [each.result() for each in running]
        finally:
            given_up.set()
            for each in running:
                each.cancel()  # does nothing to one that is done

    def close(self) -> None:
        """Let what runs end, and close every connection."""
        self._pool.shutdown(cancel_futures=True)
        self._wire.close()


class Runs:
    """What runs plans by a runner: the client, and each group of its verbs."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner


def blocking(plan: Callable[Concatenate[Core, P], Plan[T]]) -> Callable[Concatenate[Runs, P], T]:
    """Make the method that runs a plan and waits for its result."""

    def method(self: Runs, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._runner.run(plan(self._runner.core, *args, **kwargs))

    shown_as(method, plan)
    return method


class Batches(Runs):
    """Texts that are embedded in the background."""

    create = blocking(batches.create)
    get = blocking(batches.get)
    list = blocking(batches.list_)
    wait = blocking(batches.wait)
    results = blocking(batches.results)
    cancel = blocking(batches.cancel)


class Quiver(Client, Runs):
    """A blocking client of one server; threads may share it.

        with Quiver("http://localhost:8000") as quiver:
            vectors = quiver.embed(["a", "b"])  # (2, D) float32

    The settings are those of `Client`. Raises `ConfigError` or `MissingExtra`.
    """

    def _start(self, core: Core, verify: Verify) -> None:
        self._runner = Runner(core, verify)
        self.batches = Batches(self._runner)

    embed = blocking(verbs.embed)
    rerank = blocking(verbs.rerank)
    classify = blocking(verbs.classify)
    tokenize = blocking(verbs.tokenize)
    models = blocking(verbs.models)
    model = blocking(verbs.model)
    health = blocking(verbs.health)
    usage = blocking(verbs.usage)

    def close(self) -> None:
        """Close every connection; calls in other threads end first."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
