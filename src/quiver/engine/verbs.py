"""What the layers above see of an engine, whether it computes in this process or somewhere else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from quiver.capacity import Activity, Limits, Queue
from quiver.engine.waiting import Expected
from quiver.errors import EngineError
from quiver.models.hub import Progress
from quiver.telemetry.observer import Figure
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


class Served(Protocol):
    """The models of an engine, and what waits for them."""

    @property
    def age(self) -> int:
        """How often a model has come or gone."""

    @property
    def statuses(self) -> Sequence[ModelStatus]:
        """What can be said of each model, the configured ones first."""

    @property
    def is_complete(self) -> bool:
        """Whether every configured model is loaded."""

    def queue(self, name: str | None) -> Queue:
        """Tell what waits for a model."""

    def shortest_queue(self, model: str | None = None) -> Queue:
        """Tell what waits for a model, by its id; where none is named, for the one for which the least does."""

    def activity(self, name: str) -> Activity:
        """Tell what waits for a model and what its lanes do; one that is not loaded has none."""

    def figures(self) -> Sequence[Figure]:
        """Count models by what they are doing, and tell what waits for them."""

    def expect(self, tokens: int, caller: Caller) -> Expected:
        """Estimate how long so many tokens would take with the model for which the least waits."""


class Verbs(Protocol):
    """Every verb for every model."""

    limits: Limits
    models_root: Path

    @property
    def replicas(self) -> Served:
        """The models."""

    async def load(self, progress: Progress) -> None:
        """Find, fetch and load every configured model. Raises `SetupError`."""

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors, in order."""

    async def embed_tokens(self, request: EmbedRequest, caller: Caller) -> TokenEmbeddings:
        """Turn each token of the inputs into a vector."""

    async def embed_sparse(self, request: EmbedRequest, caller: Caller) -> SparseEmbeddings:
        """Turn inputs into weights of the words that they are about."""

    async def classify(self, request: ClassifyRequest, caller: Caller) -> Classification:
        """Give each input a score for each label."""

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Put documents in the order of their relevance to a query."""

    async def compare(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Give the cosine of each text with the source."""

    async def measure(self, request: EmbedRequest, caller: Caller) -> Usage:
        """Let a model of any kind read texts, known or not, for the sake of the time that it takes."""

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """Cut texts into tokens."""

    async def decode(self, request: DecodeRequest) -> list[str]:
        """Turn token ids back into texts."""

    @property
    def died(self) -> EngineError | None:
        """Why it can compute no more, if so."""

    async def wait_for_fault(self) -> None:
        """Wait until it can compute no more, and raise why."""

    async def ping(self) -> None:
        """Compute one token with every loaded model; raises what stands in the way."""

    async def close(self) -> None:
        """Give back what it holds."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...
