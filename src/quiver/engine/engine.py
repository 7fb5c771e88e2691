"""Texts to vectors for every loaded model. Knows callers by their turn alone, and no API."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np

from quiver.backends.onnx import cores
from quiver.config import EngineConfig, ModelsConfig
from quiver.engine import model as models
from quiver.engine.model import Model
from quiver.engine.outputs import cut
from quiver.engine.packing import Budget
from quiver.engine.scheduler import Scheduler
from quiver.errors import ConfigError, EngineError, InvalidInput, NotReady, QuiverError, TooManyInputs, UnknownModel
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.models.hub import Progress, resolve
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Embeddings, EmbedRequest, Encoding, ModelState, ModelStatus, Timings, Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """A loaded model and the lanes that run it."""

    model: Model
    scheduler: Scheduler


class Engine:
    """Owns the loaded models. Made on the event loop; `load` it, then ask; `close` it at the end."""

    def __init__(
        self, models_config: ModelsConfig, config: EngineConfig, catalogue: Catalogue, observer: Observer
    ) -> None:
        self._models_config = models_config
        self._config = config
        self._catalogue = catalogue
        self._observer = observer
        self._encoders = ThreadPoolExecutor(cores(), thread_name_prefix="encode")
        self._replicas: dict[str, Replica] = {}
        self._statuses = {name: ModelStatus(id=name, state=ModelState.AVAILABLE) for name in models_config.model}

    @property
    def statuses(self) -> Sequence[ModelStatus]:
        """What can be said of each configured model, in order."""
        return tuple(self._statuses.values())

    @property
    def died(self) -> EngineError | None:
        """Why a model can compute no more, if so."""
        return next((r.scheduler.died for r in self._replicas.values() if r.scheduler.died), None)

    async def load(self, progress: Progress) -> None:
        """Find, fetch and load every configured model, one after another. Raises `LoadError`."""
        for name in self._models_config.model:
            try:
                await self._load(name, progress)
            except QuiverError as error:
                self._mark(name, state=ModelState.FAILED, error=error.message)
                raise

    async def _load(self, name: str, progress: Progress) -> None:
        self._mark(name, state=ModelState.DOWNLOADING)
        found = await _abandonable(partial(resolve, name, self._catalogue.find(name), self._models_config, progress))
        if found.spec.id.lower() in self._replicas:
            raise ConfigError(f"{name} is {found.spec.id}, which is served already: name each model once")
        self._mark(name, state=ModelState.LOADING)
        lanes, dtype = self._config.lanes or cores(), self._models_config.dtype
        model = await asyncio.to_thread(models.load, found.spec, found.files, dtype=dtype, lanes=lanes)
        self.add(name, model, batch_invariant=await asyncio.to_thread(model.is_batch_invariant))

    def add(self, name: str, model: Model, *, batch_invariant: bool) -> None:
        """Serve a loaded model; `name` is what the configuration calls it."""
        spec, tokens = model.spec, self._config.batch_tokens or model.backend.batch_tokens
        scheduler = Scheduler(
            spec.id,
            model.compute,
            # Where this CPU's kernels let the company of an input show in its bits, each input runs alone.
            budget=Budget(tokens if batch_invariant else 1, padded=model.backend.padded),
            lanes=model.backend.lanes,
            max_waiting_tokens=self._config.max_waiting_tokens,
            observer=self._observer,
        )
        replica = Replica(model, scheduler)
        for alias in (spec.id, *spec.aliases):
            self._replicas.setdefault(alias.lower(), replica)
        self._observer.model_loaded(
            spec.id, batch_invariant=batch_invariant, waiting_tokens=lambda: scheduler.waiting_tokens
        )
        self._mark(
            name,
            id=spec.id,
            state=ModelState.READY,
            aliases=spec.aliases,
            created=int(time.time()),
            dimensions=spec.dimensions,
            max_tokens=spec.max_tokens,
            dtype=model.dtype,
            batch_invariant=batch_invariant,
        )

    def _mark(self, name: str, **changes: Any) -> None:
        self._statuses[name] = replace(self._statuses[name], **changes)

    def find(self, name: str | None) -> Replica:
        """Return the model that answers to a name; none means the first. Raises `UnknownModel` or `NotReady`."""
        wanted = name or self.statuses[0].id
        if replica := self._replicas.get(wanted.lower()):
            return replica
        if any(status.state is not ModelState.READY for status in self.statuses):
            raise NotReady("the models are still loading")
        known = ", ".join(status.id for status in self.statuses)
        raise UnknownModel(f"the model {name!r} is not served here; served are: {known}", param="model")

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors, in order."""
        start = time.perf_counter()
        replica = self.find(request.model)
        encodings = await self._encode(replica.model, request)
        encoded = time.perf_counter()
        results = await replica.scheduler.submit(
            encodings, caller=caller, priority=request.priority, timeout_seconds=self._timeout(request)
        )
        computed = time.perf_counter()
        vectors = cut(np.stack(results), request.dimensions, unit_length=replica.model.spec.normalize)
        timings = Timings(encode=encoded - start, compute=computed - encoded, total=time.perf_counter() - start)
        num_tokens = sum(map(len, encodings))
        self._observer.inputs_embedded(replica.model.spec.id, len(encodings), num_tokens, timings)
        return Embeddings(replica.model.spec.id, vectors, Usage(num_tokens, (), timings))

    async def _encode(self, model: Model, request: EmbedRequest) -> list[Encoding]:
        """Encode off the event loop: a long text takes milliseconds."""
        self._check(request, model.spec)
        truncate = self._config.truncate if request.truncate is None else request.truncate
        encode = partial(model.tokenizer.encode, request.inputs, truncate=truncate)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, encode)

    def _check(self, request: EmbedRequest, spec: ModelSpec) -> None:
        """Refuse before any work what could only fail after it."""
        if not request.inputs:
            raise InvalidInput("input is empty: send at least one text", param="input")
        if len(request.inputs) > self._config.max_client_batch_size:
            raise TooManyInputs(
                f"{len(request.inputs)} inputs are more than the {self._config.max_client_batch_size} of one request",
                param="input",
            )
        if request.dimensions is not None and not 1 <= request.dimensions <= spec.dimensions:
            raise InvalidInput(
                f"dimensions is {request.dimensions}, but {spec.id} gives 1 to {spec.dimensions}", param="dimensions"
            )

    def _timeout(self, request: EmbedRequest) -> float:
        return min(request.timeout_seconds or self._config.timeout_seconds, self._config.timeout_seconds)

    async def ping(self) -> None:
        """Compute one input with every model; raises what stands in the way."""
        if not self._replicas:
            raise NotReady("the models are still loading")
        for status in self.statuses:
            await self.embed(EmbedRequest(inputs=["ping"], model=status.id), Caller("health"))

    async def wait_for_fault(self) -> None:
        """Wait until a model can compute no more, and raise why."""
        faults = {replica.scheduler.fault for replica in self._replicas.values()}
        done, _ = await asyncio.wait(faults, return_when=asyncio.FIRST_COMPLETED)
        raise done.pop().result()

    async def close(self) -> None:
        """End the lanes and give back every model's memory."""
        for replica in set(self._replicas.values()):  # a model stands there under each of its names
            await asyncio.to_thread(replica.scheduler.close)
            replica.model.backend.close()
        self._encoders.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _abandonable(work: Callable[[], T]) -> T:
    """Run blocking work as `asyncio.to_thread` does, in a thread that the end of the process does not wait for.

    A download may stall for minutes; who stops the server meanwhile has no use for it.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # from now on only the thread settles it

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  whoever awaits gets it
            outcome.set_exception(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return await asyncio.wrap_future(outcome)
