"""The verbs of the server, for one caller at a time. Every dialect and every transport arrives here."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from quiver import __version__, memory
from quiver.accounts import UsageTotal, User
from quiver.backends.runtime import onnx_runtime
from quiver.billing import Billing, check
from quiver.capacity import Activity, Limits, Memory, Queue, Runtime
from quiver.engine.verbs import Verbs
from quiver.errors import NotReady, QuiverError, UnknownAccount, UnknownModel
from quiver.jobs import Jobs
from quiver.siblings import Siblings
from quiver.telemetry.observer import Observer
from quiver.types import (
    Caller,
    Classification,
    ClassifyRequest,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
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


class _Result(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def usage(self) -> Usage: ...


Asked = TypeVar("Asked")
Found = TypeVar("Found", bound=_Result)


@dataclass(slots=True)
class Service:
    """What the server does, and whether it can.

    A caller with a key may do what the key's scopes hold (`Forbidden`) and pays for it by inputs (`InsufficientQuota`).
    """

    engine: Verbs
    observer: Observer
    billing: Billing
    jobs: Jobs
    """Work that outlasts a request; closed before the engine."""
    stopping: bool = False
    siblings: Siblings | None = None
    """The other processes of the server, where it has several."""

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors."""
        return await self._counted("embed", len(request.inputs), caller, self.engine.embed, request)

    async def embed_tokens(self, request: EmbedRequest, caller: Caller) -> TokenEmbeddings:
        """Turn each token of the inputs into a vector."""
        return await self._counted("embed", len(request.inputs), caller, self.engine.embed_tokens, request)

    async def embed_sparse(self, request: EmbedRequest, caller: Caller) -> SparseEmbeddings:
        """Turn inputs into weights of words."""
        return await self._counted("embed", len(request.inputs), caller, self.engine.embed_sparse, request)

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Put documents in the order of their relevance to a query; each counts as an input."""
        return await self._counted("rerank", len(request.documents), caller, self.engine.rerank, request)

    async def classify(self, request: ClassifyRequest, caller: Caller) -> Classification:
        """Give inputs a score for each label."""
        return await self._counted("classify", len(request.inputs), caller, self.engine.classify, request)

    async def compare(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Give the cosine of each text with a source."""
        return await self._counted("embed", 1 + len(request.texts), caller, self.engine.compare, request)

    async def tokenize(self, request: TokenizeRequest, caller: Caller, scope: str = "tokenize") -> Tokenization:
        """Cut texts into tokens; costs nothing of a quota. `scope` is what that is a part of."""
        check(caller, scope)
        return await self.engine.tokenize(request)

    async def decode(self, request: DecodeRequest, caller: Caller, scope: str = "tokenize") -> list[str]:
        """Turn token ids back into texts; costs nothing of a quota. `scope` is what that is a part of."""
        check(caller, scope)
        return await self.engine.decode(request)

    @asynccontextmanager
    async def together(self, caller: Caller) -> AsyncIterator[Caller]:
        """Yield a caller whose calls count as one request: all of them, or none if one fails."""
        if caller.key is None:
            yield caller
            return
        async with self.billing.tab(caller, caller.key) as tab:
            yield replace(caller, tab=tab)

    async def _counted(
        self,
        scope: str,
        inputs: int,
        caller: Caller,
        verb: Callable[[Asked, Caller], Awaitable[Found]],
        request: Asked,
    ) -> Found:
        """Do something for a caller that may, and note what it was worth."""
        if caller.key is None:
            return await verb(request, caller)
        check(caller, scope)
        async with self.billing.tab(caller, caller.key) as tab:
            await tab.hold(inputs)
            found = await verb(request, caller)
            tab.add(found.model, found.usage)
            return found

    async def used(self, caller: Caller, period: str) -> Sequence[UsageTotal]:
        """Tell what all keys of a caller's user used in a month (2026-07), by key and model; it is a second behind.

        Raises `UnknownAccount` for a caller without a key of an account, or `DatabaseDown`.
        """
        check(caller, "usage")
        return await self.billing.used(self.user(caller), period)

    def user(self, caller: Caller) -> User:
        """Tell whose key a caller has shown. Raises `UnknownAccount` where it is nobody's."""
        if caller.key is None:
            raise UnknownAccount("usage is counted for keys of accounts: make one with `quiver keys create`")
        return caller.key.user

    def queue(self, model: str | None = None) -> Queue:
        """Tell what waits for a model; nothing does for one that is not loaded."""
        return self.engine.replicas.queue(model)

    def activity(self, model: str) -> Activity:
        """Tell what waits for a model, how many lanes it has, and how many are computing."""
        return self.engine.replicas.activity(model)

    def limits(self) -> Limits:
        """Tell how much a request may bring, and how much may wait."""
        return self.engine.limits

    @property
    def version(self) -> str:
        """Quiver's own."""
        return __version__

    def models(self) -> Sequence[ModelStatus]:
        """List the models that may be asked for with their state, the configured ones first."""
        return self.engine.replicas.statuses

    def model(self, name: str | None = None) -> ModelStatus:
        """Return one model by id or alias, none meaning the first. Raises `UnknownModel`."""
        if not name:
            return self.models()[0]
        wanted = name.lower()
        for status in self.models():
            if wanted in (status.id.lower(), *(alias.lower() for alias in status.aliases)):
                return status
        raise UnknownModel(f"the model {name!r} is not served here", param="model")

    def is_loading(self) -> bool:
        """Tell whether a configured model is still on its way."""
        return not self.engine.replicas.is_complete

    async def check_ready(self) -> None:
        """Prove readiness by a real forward pass of every model; raises what stands in the way."""
        if self.stopping:
            raise NotReady("the server is stopping")
        if self.is_loading():
            raise NotReady("the models are still loading")
        if fault := self.fault():
            raise fault
        await self.engine.ping()

    def models_root(self, caller: Caller) -> Path:
        """Return the directory that models are fetched into; for operators, as those below."""
        check(caller, "metrics")
        return self.engine.models_root

    def memory(self, caller: Caller) -> Memory:
        """Tell what the process holds and the machine has."""
        check(caller, "metrics")
        return Memory(memory.resident_bytes(), memory.limit_bytes(), memory.total_bytes(), memory.available_bytes())

    def runtime(self, caller: Caller) -> Runtime:
        """Tell which ONNX Runtime is in use."""
        check(caller, "metrics")
        return onnx_runtime()

    async def metrics(self, caller: Caller) -> bytes:
        """Return every metric of all processes in Prometheus's text format; `caller` is anybody's without keys."""
        check(caller, "metrics")
        await self.jobs.look()
        return await self.siblings.exposition() if self.siblings else self.observer.exposition()

    def processes(self) -> tuple[int, int]:
        """Tell how many processes of this server are ready, and how many there should be."""
        if self.siblings:
            return self.siblings.num_ready, self.siblings.count
        return int(not self.is_loading()), 1

    def fault(self) -> QuiverError | None:
        """Why this process can serve no more, if so."""
        return self.engine.died
