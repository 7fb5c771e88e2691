"""An engine that computes elsewhere: the same verbs, sent to the deployment of the model that is asked for."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from quiver.backends.sessions import cores
from quiver.capacity import Activity, Limits, Queue
from quiver.config import Config
from quiver.engine import statuses
from quiver.engine.waiting import Expected
from quiver.errors import DeadlineExceeded, EngineError, NotReady, Unavailable, UnknownModel
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Progress
from quiver.scale.wire import Answer, Asked, Described, Verb, asked, unwrapped
from quiver.telemetry.observer import Figure, Observer, Work
from quiver.types import (
    Caller,
    Classification,
    ClassifyRequest,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
    Kind,
    ModelRequest,
    ModelStatus,
    Ranking,
    RerankRequest,
    Similarities,
    SimilarityRequest,
    SparseEmbeddings,
    TokenEmbeddings,
    Tokenization,
    TokenizeRequest,
    Usage,
)

FRESH_SECONDS = 2.0
"""What a model said of its queue longer ago tells nothing."""
RETRY_AFTER_SECONDS = 2.0
INTERNAL = Caller("ingress")
DEFAULTS: Mapping[Verb, tuple[Kind, ...]] = {
    "embed": ("embed",),
    "embed_tokens": ("embed", "multi_vector"),
    "embed_sparse": ("sparse",),
    "classify": ("classify", "rerank"),
    "rerank": ("rerank", "multi_vector", "embed"),
    "compare": ("embed",),
}
"""What kind of model answers a verb where none is named."""


class Lost(Exception):
    """Whoever was asked died before there was an answer."""


class Crowded(Exception):
    """Nobody can be asked now; what was asked has not begun."""


class Wire(Protocol):
    """How a model's deployment is asked. Raises `Lost` or `Crowded`."""

    async def ask(self, asked: Asked) -> Answer:
        """Have a request answered; cancelled, it is not worked on any more."""

    async def describe(self) -> Described:
        """Ask what the model is, waiting until there is one."""


@dataclass(slots=True)
class _Model:
    wire: Wire
    status: ModelStatus
    is_configured: bool = True
    queue: Queue = field(default_factory=lambda: Queue(0, 0, 0, 0.0))
    heard_at: float = 0.0

    def hear(self, queue: Queue) -> None:
        self.queue, self.heard_at = queue, time.monotonic()

    def expect(self, tokens: int) -> Expected:
        """Estimate by what a replica said last: of several, which one is next to be asked is not known."""
        if not self.queue.tokens or time.monotonic() - self.heard_at > FRESH_SECONDS:
            return Expected(0.0, 0.0)
        return Expected(self.queue.seconds, tokens / max(1.0, self.queue.tokens_per_second))


class RemoteModels:
    """The models of a cluster, as far as one ingress has heard of them."""

    def __init__(self, config: Config, wires: Mapping[str, Wire]) -> None:
        """`wires` lead to each configured model, and then to each of a pool."""
        self._config = config
        self._models = {name: _Model(wire, _status(name), name in config.models.model) for name, wire in wires.items()}
        self._names: dict[str, str] = {}
        self.age = 0
        for name in self._models:
            self._name(name)

    def _name(self, key: str) -> None:
        status = self._models[key].status
        for alias in (key, status.id, *status.aliases):
            self._names.setdefault(alias.lower(), key)

    async def load(self) -> None:
        """Wait until every configured model is ready."""
        for key, model in self._models.items():
            if model.is_configured:
                described = await model.wire.describe()
                model.status = described.status
                model.hear(described.queue)
                self._name(key)
        self.age += 1

    @property
    def statuses(self) -> Sequence[ModelStatus]:
        """What can be said of each model, the configured ones first."""
        return [model.status for model in self._models.values()]

    @property
    def is_complete(self) -> bool:
        """Whether every configured model is loaded."""
        return self.age > 0

    @property
    def configured(self) -> Sequence[_Model]:
        """Those that are always loaded."""
        return [model for model in self._models.values() if model.is_configured]

    def queue(self, name: str | None) -> Queue:
        """Tell what waited for a model when it was last heard of."""
        return self.find(name, ()).queue

    def shortest_queue(self, model: str | None = None) -> Queue:
        """Tell what waits for a model, by its id; where none is named, for the one for which the least does."""
        queues = [m.queue for m in self._models.values() if m.heard_at and model in (None, m.status.id)]
        empty = Queue(0, 0, self._config.engine.max_waiting_tokens, 0.0)
        return min(queues, key=lambda queue: queue.seconds, default=empty)

    def activity(self, name: str) -> Activity:
        """Tell what waited for a model when it was last heard of; its lanes are elsewhere."""
        queue = self.queue(name)
        return Activity(waiting_inputs=queue.inputs, waiting_tokens=queue.tokens)

    def figures(self) -> Sequence[Figure]:
        """Count models by what they are doing; the rest, replicas tell themselves."""
        return statuses.figures(self.statuses, {})

    def expect(self, tokens: int, caller: Caller) -> Expected:
        """Estimate how long so many tokens would take with the model for which the least waits."""
        del caller  # whose turn it is, only the replica knows
        return min((model.expect(tokens) for model in self.configured), default=Expected(0.0, 0.0))

    def find(self, name: str | None, kinds: Sequence[Kind]) -> _Model:
        """Return the model that answers to a name. Raises `UnknownModel` or `NotReady`."""
        if name and (key := self._names.get(name.lower())):
            return self._models[key]
        if name and not self._config.models.any_model_name:
            if not self.is_complete:
                raise NotReady("the models are still loading")
            known = ", ".join(status.id for status in self.statuses[:20])
            raise UnknownModel(f"the model {name!r} is not served here; served are: {known}", param="model")
        first = self.configured[0]
        return next((m for kind in kinds for m in self.configured if m.status.kind == kind), first)


class RemoteEngine:
    """Every verb for every model of a cluster."""

    def __init__(self, config: Config, observer: Observer, wires: Mapping[str, Wire]) -> None:
        self._observer = observer
        self.replicas = RemoteModels(config, wires)
        self.models_root: Path = config.models.data_dir / "models"
        self.limits = Limits(
            client_batch_size=config.engine.max_client_batch_size,
            waiting_tokens=config.engine.max_waiting_tokens,
            truncate=config.engine.truncate,
            encoders=config.engine.encoders or cores(),
        )

    async def load(self, progress: Progress) -> None:
        """Wait until every model's deployment is ready; the files are fetched there."""
        del progress
        await self.replicas.load()

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors, in order."""
        found: Embeddings = await self._ask("embed", request, caller, len(request.inputs))
        return found

    async def embed_tokens(self, request: EmbedRequest, caller: Caller) -> TokenEmbeddings:
        """Turn each token of the inputs into a vector."""
        found: TokenEmbeddings = await self._ask("embed_tokens", request, caller, len(request.inputs))
        return found

    async def embed_sparse(self, request: EmbedRequest, caller: Caller) -> SparseEmbeddings:
        """Turn inputs into weights of the words that they are about."""
        found: SparseEmbeddings = await self._ask("embed_sparse", request, caller, len(request.inputs))
        return found

    async def classify(self, request: ClassifyRequest, caller: Caller) -> Classification:
        """Give each input a score for each label."""
        found: Classification = await self._ask("classify", request, caller, len(request.inputs))
        return found

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Put documents in the order of their relevance to a query."""
        found: Ranking = await self._ask("rerank", request, caller, len(request.documents))
        return found

    async def compare(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Give the cosine of each text with the source."""
        found: Similarities = await self._ask("compare", request, caller, 1 + len(request.texts))
        return found

    async def measure(self, request: EmbedRequest, caller: Caller) -> Usage:
        """Let a model read texts for the sake of the time that it takes."""
        return (await self.embed(request, caller)).usage

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """Cut texts into tokens."""
        found: Tokenization = await self._ask("tokenize", request, INTERNAL)
        return found

    async def decode(self, request: DecodeRequest) -> list[str]:
        """Turn token ids back into texts."""
        found: list[str] = await self._ask("decode", request, INTERNAL)
        return found

    async def _ask(self, verb: Verb, request: ModelRequest, caller: Caller, num_inputs: int = 0) -> Any:
        """Ask the model's deployment. Raises what it answers, or `Unavailable` where nobody answers."""
        model, start = self.replicas.find(request.model, DEFAULTS.get(verb, ())), time.perf_counter()
        answer = await _answered(model.wire, partial(asked, verb, request, caller), caller)
        model.hear(answer.queue)
        found = unwrapped(answer)
        if usage := getattr(found, "usage", None):
            found = replace(found, usage=self._noted(found.model, usage, num_inputs, start))
        return found

    def _noted(self, model: str, usage: Usage, num_inputs: int, start: float) -> Usage:
        """Count what was computed; when it began is told by this process's clock."""
        usage = replace(usage, timings=replace(usage.timings, start=start))
        each = range(usage.num_tokens // max(1, num_inputs))  # which input had how many tokens is not told
        kind = self.replicas.find(model, ()).status.kind
        work = Work(model, kind, [each] * num_inputs, usage.num_tokens, usage.timings)
        self._observer.inputs_computed(work)
        return usage

    @property
    def died(self) -> EngineError | None:
        """Nothing: a replica that can compute no more is replaced without this process."""
        return None

    async def wait_for_fault(self) -> None:
        """Wait for ever, as `died` has it."""
        await asyncio.get_running_loop().create_future()

    async def ping(self) -> None:
        """Have one replica of each model compute one token; raises what stands in the way."""
        ping = asked("ping", ModelRequest(), INTERNAL)
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(_answered(m.wire, lambda: ping, INTERNAL)) for m in self.replicas.configured]
        for task in asking:
            unwrapped(task.result())

    async def close(self) -> None:
        """Do nothing: the cluster holds the models."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _answered(wire: Wire, make: Callable[[], Asked], caller: Caller) -> Answer:
    """Ask, and once more where the replica died: it computes and changes nothing, so that twice is no harm."""
    for _ in range(2):
        if caller.seconds_left() <= 0:
            raise DeadlineExceeded("the answer would come too late")
        try:
            return await wire.ask(make())
        except Lost:
            continue
        except Crowded as error:
            raise _unavailable("no replica of the model can be asked now") from error
    raise _unavailable("two replicas of the model died at this request")


def _unavailable(why: str) -> Unavailable:
    error = Unavailable(f"{why}: come back in {RETRY_AFTER_SECONDS:g} s")
    error.retry_after_seconds = RETRY_AFTER_SECONDS
    return error


def _status(name: str) -> ModelStatus:
    spec = Catalogue.load().find(name)
    return statuses.known(spec) if spec else statuses.unknown(name)
