"""The verbs of the server, for one caller at a time. Every dialect and every transport arrives here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quiver import __version__
from quiver.capacity import Limits, Queue
from quiver.engine.engine import Engine
from quiver.errors import NotReady, QuiverError, UnknownModel
from quiver.jobs import Jobs
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
)


@dataclass(slots=True)
class Service:
    """What the server does, and whether it can."""

    engine: Engine
    observer: Observer
    jobs: Jobs = field(default_factory=Jobs)
    """Work in the background; closed before the engine."""
    stopping: bool = False

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors."""
        return await self.engine.embed(request, caller)

    async def embed_tokens(self, request: EmbedRequest, caller: Caller) -> TokenEmbeddings:
        """Turn each token of the inputs into a vector."""
        return await self.engine.embed_tokens(request, caller)

    async def embed_sparse(self, request: EmbedRequest, caller: Caller) -> SparseEmbeddings:
        """Turn inputs into weights of words."""
        return await self.engine.embed_sparse(request, caller)

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Put documents in the order of their relevance to a query."""
        return await self.engine.rerank(request, caller)

    async def classify(self, request: ClassifyRequest, caller: Caller) -> Classification:
        """Give inputs a score for each label."""
        return await self.engine.classify(request, caller)

    async def compare(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Give the cosine of each text with a source."""
        return await self.engine.compare(request, caller)

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """Cut texts into tokens."""
        return await self.engine.tokenize(request)

    async def decode(self, request: DecodeRequest) -> list[str]:
        """Turn token ids back into texts."""
        return await self.engine.decode(request)

    def queue(self, model: str | None = None) -> Queue:
        """Tell what waits for a model; nothing does for one that is not loaded."""
        return self.engine.replicas.queue(model)

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

    def metrics(self) -> bytes:
        """Return every metric in Prometheus's text format."""
        return self.observer.exposition()

    def fault(self) -> QuiverError | None:
        """Why this process can serve no more, if so."""
        return self.engine.died
