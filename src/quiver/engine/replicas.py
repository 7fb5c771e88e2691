"""The loaded models: fetched and loaded at the start or on first use, lent to requests, unloaded when they must give way.

A model that loads never keeps requests for another one waiting: files are fetched and sessions built in threads.
"""

import asyncio
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self

from quiver.backends.sessions import cores
from quiver.capacity import Activity, Queue
from quiver.config import ANY, EngineConfig, ModelsConfig, ModelSettings
from quiver.engine import model as models
from quiver.engine import statuses
from quiver.engine.model import Model, WarmUp
from quiver.engine.packing import Budget
from quiver.engine.scheduler import Bounds, Scheduler
from quiver.engine.threads import in_daemon_thread, let_loop_go_first
from quiver.engine.waiting import Capacity, Expected
from quiver.engine.watchdog import Watchdog
from quiver.errors import (
    ConfigError,
    EngineError,
    LoadError,
    LoadFailed,
    NotReady,
    Overloaded,
    QuiverError,
    UnknownModel,
)
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.models.hub import Found, Progress, resolve
from quiver.models.spec import with_pooling
from quiver.telemetry.observer import Figure, Observer
from quiver.types import Caller, FileProgress, Kind, ModelState, ModelStatus

RETRY_LOAD_SECONDS = 30.0
"""A model that could not be loaded is not tried again sooner."""


@dataclass(slots=True, eq=False)
class Replica:
    """A loaded model, the lanes that run it, and who uses it: within a `with`, it is not unloaded."""

    model: Model
    scheduler: Scheduler
    settings: ModelSettings
    num_bytes: int
    pinned: bool
    """It was configured, so it never gives way."""
    fingerprint: str = ""
    """Of what it computes."""
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    num_users: int = 0
    last_used: float = 0.0

    def __enter__(self) -> Self:
        self.num_users += 1
        self.unused.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.num_users -= 1
        self.last_used = time.monotonic()
        if not self.num_users:
            self.unused.set()


class Replicas:
    """Owns every loaded model and what is known of the others; made and used on one event loop."""

    def __init__(
        self,
        models_config: ModelsConfig,
        config: EngineConfig,
        catalogue: Catalogue,
        observer: Observer,
        watchdog: Watchdog,
    ) -> None:
        self._watchdog = watchdog
        self._models_config = models_config
        self._config = config
        self._catalogue = catalogue
        self._observer = observer
        self._replicas: dict[str, Replica] = {}
        self.age = 0
        """How often a model has come or gone."""
        self._loading: dict[str, asyncio.Task[Replica]] = {}
        self._failed: dict[str, tuple[float, LoadFailed]] = {}
        self._one_at_a_time = asyncio.Lock()
        self.fault: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()
        """Done once a model can compute no more."""
        self._names: dict[str, str] = {}
        """What callers may say, in lower case -> what the model is called here."""
        self._statuses: dict[str, ModelStatus] = {}
        for name in models_config.model:
            if not self._offer(name):
                raise ConfigError(f"{name} is served already under another name: name each model once")
        for name in self._allowed():
            self._offer(name)

    def _allowed(self) -> Iterator[str]:
        for name in self._models_config.allow_models:
            yield from (spec.id for spec in self._catalogue if not self._is_excluded(spec)) if name == ANY else (name,)

    def _is_excluded(self, spec: ModelSpec) -> bool:
        names = [name.lower() for name in (spec.id, spec.onnx_file) if name]
        return any(
            fnmatchcase(name, pattern.lower()) for name in names for pattern in self._models_config.exclude_models
        )

    def _offer(self, name: str) -> bool:
        """Let a model be asked for by its name, and by what the catalogue calls it; tell whether it is a new one."""
        spec, chosen = self._catalogue.find(name), self._models_config.settings_of(name).served_name
        status = statuses.known(spec) if spec else statuses.unknown(name)
        if chosen:
            status = replace(status, id=chosen, aliases=(*status.aliases, status.id))
        if status.id in (known.id for known in self._statuses.values()):
            return False
        self._statuses[name] = status
        for alias in (name, status.id, *status.aliases):
            self._names.setdefault(alias.lower(), name)
        return True

    @property
    def statuses(self) -> Sequence[ModelStatus]:
        """What can be said of each model, the configured ones first."""
        return tuple(self._statuses.values())

    @property
    def loaded(self) -> Sequence[Replica]:
        """Every loaded model."""
        return tuple(self._replicas.values())

    def queue(self, name: str | None) -> Queue:
        """Tell what waits for a model."""
        replica = self._replicas.get(self._key_of(name))
        return replica.scheduler.queue if replica else Queue(0, 0, self._config.max_waiting_tokens, 0.0)

    def activity(self, name: str) -> Activity:
        """Tell what waits for a model and what its lanes do; one that is not loaded has none."""
        replica = self._replicas.get(self._key_of(name))
        return replica.scheduler.activity if replica else Activity()

    def shortest_queue(self, model: str | None = None) -> Queue:
        """Tell what waits for a model, by its id; where none is named, for the one for which the least does."""
        queues = [r.scheduler.queue for r in self.loaded if model in (None, r.model.spec.id)]
        return min(queues, key=lambda queue: queue.seconds, default=Queue(0, 0, self._config.max_waiting_tokens, 0.0))

    def figures(self) -> Sequence[Figure]:
        """Tell what models are doing."""
        return statuses.figures(self.statuses, {r.model.spec.id: r.scheduler.activity for r in self.loaded})

    @property
    def is_complete(self) -> bool:
        """Whether every configured model is loaded."""
        return all(name in self._replicas for name in self._models_config.model)

    @property
    def died(self) -> EngineError | None:
        """Why a model can compute no more, if so."""
        return next((r.scheduler.died for r in self.loaded if r.scheduler.died), None)

    async def preload(self, progress: Progress) -> None:
        """Fetch and load every configured model, one after another. Raises `SetupError`."""
        for name in self._models_config.model:
            await self._load(name, progress, pinned=True)

    def expect(self, tokens: int, caller: Caller) -> Expected:
        """Estimate how long so many tokens would take with the model for which the least waits."""
        return min((r.scheduler.expect(tokens, caller) for r in self.loaded), default=Expected(0.0, 0.0))

    async def find(self, name: str | None, kinds: Sequence[Kind] = ()) -> Replica:
        """Return the model that answers to a name, to be used in a `with`.

        No name means the first configured model of the first of the `kinds` that there is.
        One that may be loaded on first use is. Raises `UnknownModel`, `NotReady`, `LoadFailed`.
        """
        key = self._key_of(name, kinds)
        return self._replicas.get(key) or await self._load_on_use(key)

    def _key_of(self, name: str | None, kinds: Sequence[Kind] = ()) -> str:
        if name and (key := self._names.get(name.lower())):
            return key
        if not name or self._models_config.any_model_name:
            return self._default(kinds)
        if not self.is_complete:
            raise NotReady("the models are still loading")
        known = ", ".join(status.id for status in self.statuses[:20])
        raise UnknownModel(f"the model {name!r} is not served here; served are: {known}", param="model")

    def _default(self, kinds: Sequence[Kind]) -> str:
        names = self._models_config.model
        for wanted in kinds:
            for name in names:
                if (replica := self._replicas.get(name)) and replica.model.spec.kind == wanted:
                    return name
        return names[0]

    async def _load_on_use(self, key: str) -> Replica:
        if key in self._models_config.model:
            raise NotReady("the models are still loading")
        since, error = self._failed.get(key, (0.0, None))
        if error and time.monotonic() - since < RETRY_LOAD_SECONDS:
            raise error
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._try_load(key))
        return await asyncio.shield(self._loading[key])  # it goes on for whoever asks next

    async def _try_load(self, key: str) -> Replica:
        try:
            return await self._load(key, lambda *_: None, pinned=False)
        except QuiverError as error:
            failed = error if isinstance(error, Overloaded) else LoadFailed(error.message)
            if isinstance(failed, LoadFailed):
                self._failed[key] = (time.monotonic(), failed)
            raise failed from error
        finally:
            del self._loading[key]

    async def _load(self, name: str, progress: Progress, *, pinned: bool) -> Replica:
        try:
            found = await self._fetch(name, progress)
            async with self._one_at_a_time:  # or two would take the same room
                await self._make_room(found, pinned=pinned)
                self._mark(name, state=ModelState.LOADING)
                return await self._start(name, found, pinned=pinned)
        except Overloaded:
            self._mark(name, state=ModelState.AVAILABLE)
            raise
        except QuiverError as error:
            self._mark(name, state=ModelState.FAILED, error=error.message)
            raise

    async def _fetch(self, name: str, progress: Progress) -> Found:
        self._mark(name, state=ModelState.DOWNLOADING, error="")
        loop, settings = asyncio.get_running_loop(), self._models_config.settings_of(name)

        def note(file: str, done_bytes: int, total_bytes: int) -> None:
            progress(file, done_bytes, total_bytes)
            loop.call_soon_threadsafe(self._note, name, FileProgress(file, done_bytes, total_bytes))

        spec = self._catalogue.find(name)
        fetch = partial(resolve, name, spec, self._models_config, note, settings.onnx_file)
        found = await in_daemon_thread(fetch, name="resolve")
        served = with_pooling(found.spec, found.files, settings.pooling)
        if settings.served_name:
            served = replace(served, id=settings.served_name, aliases=(*served.aliases, served.id))
        found = replace(found, spec=served)
        if any(replica.model.spec.id == found.spec.id for replica in self.loaded):
            raise ConfigError(f"{name} is {found.spec.id}, which is served already: name each model once")
        return found

    def _note(self, name: str, progress: FileProgress) -> None:
        others = (p for p in self._statuses[name].downloads if p.file != progress.file)
        self._mark(name, downloads=(*others, progress))
        self._observer.download_progressed(name, progress)

    async def _make_room(self, found: Found, *, pinned: bool) -> None:
        """Unload what was used longest ago until the model fits. Raises `Overloaded` or `LoadError`."""
        limit = self._models_config.max_model_bytes
        needed = found.files.num_bytes(found.spec.onnx_file)
        if not limit or pinned:
            return
        if needed + sum(replica.num_bytes for replica in self.loaded if replica.pinned) > limit:
            raise LoadError(f"{found.spec.id} has {needed} bytes, more than max_model_bytes leaves for it")
        while needed + sum(replica.num_bytes for replica in self.loaded) > limit:
            # One that nobody has used yet was loaded for a request that is about to.
            unused = {key: r for key, r in self._replicas.items() if not r.pinned and not r.num_users}
            idle = [(r.last_used, key) for key, r in unused.items() if r.last_used]
            if not idle:
                raise Overloaded(
                    "the models in memory are all in use, and one more does not fit", retry_after_seconds=5
                )
            await self.remove(min(idle)[1])

    async def _start(self, name: str, found: Found, *, pinned: bool) -> Replica:
        def load() -> tuple[Model, WarmUp]:
            let_loop_go_first()  # and so do the threads that the model starts
            config, lanes = self._models_config, self._config.lanes or cores()
            model = models.load(found.spec, found.files, config.settings_of(name), lanes=lanes)
            if config.self_test:
                model.check_golden()
            return model, model.warm_up()

        model, warm_up = await in_daemon_thread(load, name="load")
        num_bytes = found.files.num_bytes(found.spec.onnx_file)
        return self.add(name, model, warm_up, num_bytes=num_bytes, pinned=pinned)

    def add(self, name: str, model: Model, warm_up: WarmUp, *, num_bytes: int = 0, pinned: bool = True) -> Replica:
        """Serve a loaded model from now on; `name` is what the configuration calls it."""
        spec, settings = model.spec, self._models_config.settings_of(name)
        scheduler = Scheduler(
            spec.id,
            model.compute,
            self._bounds(model, warm_up, settings),
            observer=self._observer,
            watchdog=self._watchdog,
        )
        scheduler.fault.add_done_callback(self._on_fault)
        replica = Replica(model, scheduler, settings, num_bytes, pinned, warm_up.fingerprint)
        replica.unused.set()
        self._replicas[name] = replica
        self.age += 1
        for alias in (name, spec.id, *spec.aliases):
            self._names.setdefault(alias.lower(), name)
        self._statuses[name] = statuses.loaded(
            model,
            batch_tokens=scheduler.budget.max_tokens,
            num_bytes=num_bytes,
            batch_invariant=warm_up.batch_invariant,
        )
        return replica

    def _bounds(self, model: Model, warm_up: WarmUp, settings: ModelSettings) -> Bounds:
        backend, config = model.backend, self._config
        tokens = min(config.batch_tokens or backend.batch_tokens, backend.batch_tokens)
        return Bounds(
            # Where this CPU's kernels let the company of an input show in its bits, each input runs alone.
            Budget(
                tokens if warm_up.batch_invariant or not backend.exact else 1,
                padded=backend.padded,
                max_inputs=settings.batch_inputs or sys.maxsize,
            ),
            lanes=backend.lanes,
            capacity=Capacity(config.max_waiting_tokens, config.max_waiting_inputs or sys.maxsize),
            tokens_per_second=warm_up.tokens_per_second,
            max_wait_seconds=config.max_wait_seconds or math.inf,
        )

    async def remove(self, name: str) -> None:
        """Unload a model: new requests no longer find it, those that run are answered first."""
        replica = self._replicas.pop(name)
        self.age += 1
        if name in self._models_config.model or name in self._allowed():
            self._mark(name, state=ModelState.AVAILABLE, created=0)
        else:
            del self._statuses[name]
            self._names = {alias: key for alias, key in self._names.items() if key != name}
        await replica.unused.wait()
        await self._close(replica)

    async def _close(self, replica: Replica) -> None:
        await asyncio.to_thread(replica.scheduler.close)
        replica.model.backend.close()

    async def close(self) -> None:
        """End the lanes and give back every model's memory."""
        for task in tuple(self._loading.values()):
            task.cancel()
        for replica in self.loaded:
            await self._close(replica)
        self._replicas.clear()

    def _mark(self, name: str, **changes: Any) -> None:
        self._statuses[name] = replace(self._statuses[name], **changes)

    def _on_fault(self, fault: "asyncio.Future[EngineError]") -> None:
        if not self.fault.done() and not fault.cancelled():
            self.fault.set_result(fault.result())
