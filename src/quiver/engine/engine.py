"""The verbs over all models: texts to vectors, scores and tokens. Knows callers by their turn alone, and no API."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from quiver.config import EngineConfig, ModelsConfig
from quiver.engine.openai_ids import OpenAIIds
from quiver.engine.outputs import cut
from quiver.engine.pooling import normalise
from quiver.engine.probe import Probe
from quiver.engine.prompts import choose_prompt
from quiver.engine.ranking import score
from quiver.engine.replicas import Replica, Replicas
from quiver.engine.runner import Form, Known, Runner
from quiver.engine.scoring import best, cosines, probabilities
from quiver.engine.watchdog import Watchdog
from quiver.errors import EngineError, InvalidInput, NotReady, Stalled, WrongKind
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.models.hub import Progress
from quiver.telemetry.observer import Observer
from quiver.types import (
    Caller,
    Classification,
    ClassifyRequest,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
    Floats,
    Input,
    Kind,
    ModelRequest,
    Ranking,
    RerankRequest,
    Similarities,
    SimilarityRequest,
    SparseEmbeddings,
    SparseVector,
    TokenEmbeddings,
    Tokenization,
    TokenizeRequest,
    Usage,
)

_INSTEAD: dict[Kind, str] = {
    "embed": "it gives vectors: embed with it",
    "rerank": "it scores pairs of texts: rerank with it",
    "classify": "it scores labels: classify with it",
    "sparse": "it gives sparse vectors: ask for those",
    "multi_vector": "it gives a vector for each token: ask for those, or rerank with it",
}
"""What to do with a model that was asked for something else."""


@dataclass(frozen=True, slots=True)
class Aids:
    """What may stand beside the models."""

    openai_ids: OpenAIIds = field(default_factory=OpenAIIds)
    known: Known | None = None
    """Results that were computed before."""


class Engine:
    """Every verb for every model. Made on the event loop; `load` it, then ask; `close` it at the end."""

    def __init__(
        self,
        models_config: ModelsConfig,
        config: EngineConfig,
        catalogue: Catalogue,
        observer: Observer,
        watchdog: Watchdog,
        aids: Aids | None = None,
    ) -> None:
        aids = aids or Aids()
        self._default_prompt = models_config.default_prompt
        self.models_root = models_config.data_dir / "models"
        self._openai_ids = aids.openai_ids
        self._watchdog = watchdog
        self._runner = Runner(config, observer, watchdog, aids.known)
        self.replicas = Replicas(models_config, config, catalogue, observer, watchdog)
        self._probe = Probe()
        self.limits = self._runner.limits

    async def load(self, progress: Progress) -> None:
        """Find, fetch and load every configured model. Raises `SetupError`."""
        await self.replicas.preload(progress)

    async def embed(self, request: EmbedRequest, caller: Caller) -> Embeddings:
        """Turn inputs into vectors, in order."""
        with await self._find(request, "embed") as replica:
            spec = _require(replica, "embed")
            self._runner.check_count(len(request.inputs), "input")
            _check_dimensions(request.dimensions, spec)
            if request.late_chunking:
                _require_token_vectors(replica)
            unit_length = spec.normalize if request.normalize is None else request.normalize
            form = Form(self._prompt(request, replica), unscaled=unit_length != spec.normalize)
            inputs = await self._inputs(request)
            if request.late_chunking:
                vectors, usage = await self._runner.run_together(replica, request, inputs, caller, form)
            else:
                computed = await self._runner.run(replica, request, inputs, caller, form)
                vectors, usage = np.stack(computed.results), computed.usage
            if unit_length and (form.unscaled or request.late_chunking):
                vectors = normalise(vectors)
            vectors = cut(vectors, request.dimensions, unit_length=unit_length, layer_norm=spec.layer_norm_before_cut)
            return Embeddings(spec.id, vectors, usage)

    async def embed_tokens(self, request: EmbedRequest, caller: Caller) -> TokenEmbeddings:
        """Turn each token of the inputs into a vector: of an embedding model, its hidden state as it is."""
        with await self._find(request, "embed", "multi_vector") as replica:
            spec = _require(replica, "embed", "multi_vector")
            _require_token_vectors(replica)
            self._runner.check_count(len(request.inputs), "input")
            form = Form(self._prompt(request, replica), per_token=True)
            computed = await self._runner.run(replica, request, request.inputs, caller, form)
            return TokenEmbeddings(spec.id, computed.results, computed.usage)

    async def embed_sparse(self, request: EmbedRequest, caller: Caller) -> SparseEmbeddings:
        """Turn inputs into weights of the words that they are about."""
        with await self._find(request, "sparse") as replica:
            spec = _require(replica, "sparse")
            self._runner.check_count(len(request.inputs), "input")
            form = Form(self._prompt(request, replica))
            computed = await self._runner.run(replica, request, request.inputs, caller, form)
            return SparseEmbeddings(spec.id, [_sparse(weights) for weights in computed.results], computed.usage)

    async def classify(self, request: ClassifyRequest, caller: Caller) -> Classification:
        """Give each input a score for each label."""
        with await self._find(request, "classify", "rerank") as replica:
            spec = _require(replica, "classify", "rerank")
            self._runner.check_count(len(request.inputs), "input")
            computed = await self._runner.run(replica, request, request.inputs, caller)
            logits = np.stack(computed.results)  # (B, L)
            activation = request.activation or ("sigmoid" if spec.multi_label else None)
            scores = logits if request.raw_scores else probabilities(logits, activation)
            labels = spec.labels or tuple(f"LABEL_{i}" for i in range(logits.shape[1]))
            return Classification(spec.id, labels, scores, computed.usage)

    async def rerank(self, request: RerankRequest, caller: Caller) -> Ranking:
        """Put documents in the order of their relevance to a query."""
        with await self._find(request, "rerank", "multi_vector", "embed") as replica:
            spec = _require(replica, "rerank", "multi_vector", "embed")
            self._runner.check_count(len(request.documents), "documents")
            if request.top_n is not None and request.top_n < 1:
                raise InvalidInput(f"top_n is {request.top_n}, but at least 1 is asked for", param="top_n")
            scored = await score(self._runner, replica, request, caller)
            order = best(scored.scores, request.top_n)
            return Ranking(spec.id, scored.scored_by, order, scored.scores[order], scored.usage)

    async def compare(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Give the cosine of each text with the source."""
        with await self._find(request, "embed") as replica:
            spec = _require(replica, "embed")
            self._runner.check_count(len(request.texts), "texts")
            form = Form(choose_prompt(spec.prompts, name=request.prompt_name))
            computed = await self._runner.run(replica, request, [request.source, *request.texts], caller, form)
            source, *texts = computed.results
            return Similarities(spec.id, cosines(source, np.stack(texts)), computed.usage)

    async def tokenize(self, request: TokenizeRequest) -> Tokenization:
        """Cut texts into tokens."""
        with await self._find(request) as replica:
            self._runner.check_count(len(request.texts), "input")
            spec, tokenizer = replica.model.spec, replica.model.tokenizer
            prompt, special = choose_prompt(spec.prompts, name=request.prompt_name), request.special_tokens
            texts = [prompt + text for text in request.texts]
            tokens = await self._runner.encoders.run(
                lambda: [tokenizer.tokens(text, special_tokens=special) for text in texts], size=sum(map(len, texts))
            )
            return Tokenization(spec.id, tokens, texts)

    async def decode(self, request: DecodeRequest) -> list[str]:
        """Turn token ids back into texts."""
        with await self._find(request) as replica:
            self._runner.check_count(len(request.ids), "ids")
            tokenizer, special = replica.model.tokenizer, request.special_tokens
            return await self._runner.encoders.run(
                lambda: [tokenizer.decode(ids, special_tokens=special) for ids in request.ids],
                size=sum(map(len, request.ids)),
            )

    async def measure(self, request: EmbedRequest, caller: Caller) -> Usage:
        """Let a model of any kind read texts, known or not, for the sake of the time that it takes."""
        with await self._find(request) as replica:
            self._runner.check_count(len(request.inputs), "input")
            return (await self._runner.run(replica, request, request.inputs, caller, Form(is_fresh=True))).usage

    async def _find(self, request: ModelRequest, *kinds: Kind) -> Replica:
        return await self.replicas.find(request.model, kinds)

    async def _inputs(self, request: EmbedRequest) -> Sequence[Input]:
        """Return the inputs with texts in the place of ids that are not the model's own."""
        if all(isinstance(given, str) for given in request.inputs):
            return request.inputs
        return await self._runner.encoders.run(lambda: self._openai_ids.read(request.inputs, request.ids_of))

    def _prompt(self, request: EmbedRequest, replica: Replica) -> str:
        """Return what stands before each text: what the request says, else what is configured."""
        prompts, configured = replica.model.spec.prompts, replica.settings.prompt_name
        if request.prompt is not None:
            return request.prompt
        if request.prompt_name or request.task:
            return choose_prompt(prompts, name=request.prompt_name, task=request.task)
        return choose_prompt(prompts, task=configured) if configured else self._default_prompt

    @property
    def died(self) -> EngineError | None:
        """Why it can compute no more, if so."""
        if self._runner.encoders.fault.done():
            return self._runner.encoders.fault.result()
        return self.replicas.died if self._watchdog.is_watching else Stalled("the watchdog's thread has ended")

    async def wait_for_fault(self) -> None:
        """Wait until it can compute no more, and raise why."""
        faults = (self._runner.encoders.fault, self.replicas.fault)
        (fault, *_), _ = await asyncio.wait(faults, return_when=asyncio.FIRST_COMPLETED)
        raise fault.result()

    async def ping(self) -> None:
        """Compute one token with every loaded model, beside what waits; raises what stands in the way."""
        if not self.replicas.loaded:
            raise NotReady("the models are still loading")
        await self._probe.check([replica.model for replica in self.replicas.loaded])

    async def close(self) -> None:
        """End the lanes and give back every model's memory."""
        await self.replicas.close()
        self._runner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _require(replica: Replica, *kinds: Kind) -> ModelSpec:
    """Return a model's spec; raises `WrongKind`."""
    spec = replica.model.spec
    if spec.kind not in kinds:
        raise WrongKind(f"{spec.id} cannot do that: {_INSTEAD[spec.kind]}", param="model")
    return spec


def _require_token_vectors(replica: Replica) -> None:
    if replica.model.backend.pooled:
        name = replica.model.spec.id
        raise WrongKind(f"{name} gives one vector for each input, and none for its tokens", param="model")


def _check_dimensions(dimensions: int | None, spec: ModelSpec) -> None:
    if dimensions is not None and not 1 <= dimensions <= spec.dimensions:
        raise InvalidInput(
            f"dimensions is {dimensions}, but {spec.id} gives 1 to {spec.dimensions}", param="dimensions"
        )


def _sparse(weights: Floats) -> SparseVector:
    indices = np.flatnonzero(weights)
    return SparseVector(indices, weights[indices])
