"""The API of Semantic Explorer's embedding-inference-api: as its code has it, and as its document has it.

https://github.com/FishySoftware/semantic-explorer
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from quiver.api.call import Call, Dialect, Reply, Route, decode_json, explain
from quiver.api.vectors import in_form, write_array, write_object
from quiver.capacity import Load, Queue
from quiver.errors import (
    DeadlineExceeded,
    Forbidden,
    InferenceFailed,
    InsufficientQuota,
    InvalidInput,
    LoadFailed,
    Overloaded,
    QuiverError,
    RateLimited,
    Refused,
    Unauthorized,
    Unavailable,
    UnknownModel,
    WrongKind,
)
from quiver.service import Service
from quiver.types import EmbedRequest, ModelState, RerankRequest

Count = Annotated[int, msgspec.Meta(ge=1)]
Id = str | int


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embed: `text` as the code has it, or `input` as the document has it."""

    text: str | None = None
    input: str | list[str] | None = None
    model: str | None = None


class EmbedBatchBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embed/batch: `texts`, or `input` as at /api/embed."""

    texts: list[str] | None = None
    input: str | list[str] | None = None
    model: str | None = None


class EmbedReply(msgspec.Struct):
    """Reply of POST /api/embed and /api/embed/batch."""

    embeddings: list[list[float]]
    model: str
    count: int
    dimensions: int


class Document(msgspec.Struct):
    """A text, and what its sender calls it."""

    text: str
    id: Id | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/rerank: objects and `top_k` as the code has it, texts and `top_n` as the document has it."""

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_k: Count | None = None
    top_n: Count | None = None
    return_scores: bool | None = None
    """None means true."""


class RankedDocument(msgspec.Struct):
    """One document in its place; a cross-encoder's score is its logit."""

    index: int
    id: Id | msgspec.UnsetType = msgspec.UNSET
    text: str = ""
    score: float | msgspec.UnsetType = msgspec.UNSET


class RerankReply(msgspec.Struct):
    """Reply of POST /api/rerank, the best document first."""

    results: list[RankedDocument]
    model: str


class ModelInfo(msgspec.Struct):
    """One model that may be asked for; only one that embeds has dimensions."""

    id: str
    name: str
    description: str
    model_type: str
    dimensions: int | msgspec.UnsetType = msgspec.UNSET


class LiveReply(msgspec.Struct):
    """Reply of GET /health/live."""

    status: str


class ReadyReply(msgspec.Struct):
    """Reply of GET /health/ready: whether requests are answered, and which kinds of model are in memory."""

    status: str
    embedding: bool
    reranker: bool


class StatusReply(msgspec.Struct):
    """Reply of GET /health/status; the queue's depth is in tokens, a GPU's memory is not looked at."""

    status: str
    embedding_ready: bool
    reranker_ready: bool
    total_queue_depth: int
    gpu_vram_pressure: bool


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str
    code: str


class RerankFailed(InferenceFailed):
    """The model cannot score these documents."""


async def embed(service: Service, call: Call) -> Reply:
    """Embed one text, or several."""
    body = decode_json(call, EmbedBody)
    return await _embed(service, call, _texts(body.text, body.input, "text"), body.model)


async def embed_batch(service: Service, call: Call) -> Reply:
    """Embed several texts."""
    body = decode_json(call, EmbedBatchBody)
    return await _embed(service, call, _texts(body.texts, body.input, "texts"), body.model)


def _texts(given: str | Sequence[str] | None, as_documented: str | Sequence[str] | None, field: str) -> Sequence[str]:
    texts = as_documented if given is None else given
    if texts is None:
        raise InvalidInput(f"there is nothing to embed: send {field}", param=field)
    return [texts] if isinstance(texts, str) else texts


async def _embed(service: Service, call: Call, texts: Sequence[str], model: str | None) -> Reply:
    if not texts:
        return Reply(200, msgspec.json.encode(EmbedReply([], model or service.model().id, 0, 0)))
    request = EmbedRequest(inputs=texts, model=model or None, truncate=True)
    embeddings = await service.embed(request, call.caller)
    count, dimensions = embeddings.vectors.shape
    fields = {
        "embeddings": await write_array(in_form(embeddings.vectors, "float")),
        "model": model or embeddings.model,
        "count": count,
        "dimensions": dimensions,
    }
    return Reply(
        200,
        write_object(fields),
        headers=_backpressure(service, embeddings.model),
        timings=embeddings.usage.timings,
    )


async def rerank(service: Service, call: Call) -> Reply:
    """Put documents in the order of their relevance."""
    body = decode_json(call, RerankBody)
    if not body.documents:
        return Reply(200, msgspec.json.encode(RerankReply([], body.model or service.model().id)))
    documents = [Document(given) if isinstance(given, str) else given for given in body.documents]
    request = RerankRequest(
        query=body.query,
        documents=[document.text for document in documents],
        model=body.model or None,
        top_n=body.top_k or body.top_n,
        raw_scores=True,
        truncate=True,
    )
    try:
        ranking = await service.rerank(request, call.caller)
    except InferenceFailed as error:
        raise RerankFailed(error.message) from error
    ranked = list(zip(ranking.order.tolist(), ranking.scores, strict=True))
    scored = body.return_scores is not False
    fields = {
        "results": await write_array(ranked, lambda _, pair: _ranked(documents, *pair, scored=scored)),
        "model": body.model or ranking.model,
    }
    return Reply(
        200,
        write_object(fields),
        headers=_backpressure(service, ranking.model),
        timings=ranking.usage.timings,
    )


def _ranked(documents: Sequence[Document], index: int, score: np.float32, *, scored: bool) -> dict[str, Any]:
    document = documents[index]
    name = {} if document.id is None else {"id": document.id}
    return {"index": index, **name, "text": document.text, **({"score": score} if scored else {})}


def _backpressure(service: Service, model: str) -> Mapping[str, str]:
    """Let callers pace themselves: what waits and what may wait, in tokens, and how long a new request would wait."""
    queue = service.queue(model)
    return _queue_headers(queue, queue.seconds)


def refusal_headers(error: QuiverError, load: Load) -> Mapping[str, str]:
    """Say the same where a request is refused for its wait, which is no shorter than `retry-after` has it."""
    if not isinstance(error, Overloaded | DeadlineExceeded):
        return {}
    return _queue_headers(load.queue, max(load.queue.seconds, error.retry_after_seconds))


def _queue_headers(queue: Queue, seconds: float) -> Mapping[str, str]:
    return {
        "x-queue-depth": str(queue.tokens),
        "x-queue-capacity": str(queue.capacity_tokens),
        "x-estimated-wait-ms": str(round(seconds * 1000)),
    }


async def list_embedders(service: Service, call: Call) -> Reply:
    """List the models that embed, by name."""
    del call
    models = [
        ModelInfo(status.id, status.id, status.description, "embedding", status.dimensions)
        for status in service.models()
        if status.kind == "embed"
    ]
    return _list(models)


async def list_rerankers(service: Service, call: Call) -> Reply:
    """List the models that rerank, by name."""
    del call
    models = [
        ModelInfo(status.id, status.id, status.description, "reranker")
        for status in service.models()
        if status.kind == "rerank"
    ]
    return _list(models)


def _list(models: Sequence[ModelInfo]) -> Reply:
    return Reply(200, msgspec.json.encode(sorted(models, key=lambda model: model.name)))


async def live(service: Service, call: Call) -> Reply:
    """Tell whether the process can still serve."""
    del call
    if fault := service.fault():
        raise fault
    return Reply(200, msgspec.json.encode(LiveReply("ok")))


async def ready(service: Service, call: Call) -> Reply:
    """Tell whether a request would be answered now."""
    del call
    try:
        await service.check_ready()
        is_ready = True
    except QuiverError:
        is_ready = False
    reply = ReadyReply(_word(is_ready=is_ready), _has(service, "embed"), _has(service, "rerank"))
    return Reply(200 if is_ready else 503, msgspec.json.encode(reply))


async def show_status(service: Service, call: Call) -> Reply:
    """Tell at once, without a forward pass and with 200 in any case, how the server is and how much waits."""
    del call
    word = _word(is_ready=not (service.stopping or service.is_loading() or service.fault()))
    depth = sum(service.queue(status.id).tokens for status in service.models())
    reply = StatusReply(
        word, _has(service, "embed"), _has(service, "rerank"), total_queue_depth=depth, gpu_vram_pressure=False
    )
    return Reply(200, msgspec.json.encode(reply))


def _word(*, is_ready: bool) -> str:
    return "ok" if is_ready else "not_ready"


def _has(service: Service, kind: str) -> bool:
    return any(status.kind == kind and status.state is ModelState.READY for status in service.models())


ERRORS: Mapping[type[QuiverError], tuple[str, str]] = {
    UnknownModel: ("UNSUPPORTED_MODEL", "Unsupported model"),
    WrongKind: ("UNSUPPORTED_MODEL", "Unsupported model"),
    Unauthorized: ("UNAUTHORIZED", "Unauthorized"),
    Forbidden: ("FORBIDDEN", "Forbidden"),
    RateLimited: ("RATE_LIMIT_EXCEEDED", "Rate limit exceeded"),
    InsufficientQuota: ("INSUFFICIENT_QUOTA", "Insufficient quota"),
    Refused: ("BAD_REQUEST", "Bad request"),
    LoadFailed: ("MODEL_LOAD_ERROR", "Failed to load model"),
    Unavailable: ("SERVICE_UNAVAILABLE", "Service unavailable"),
    RerankFailed: ("RERANK_ERROR", "Reranking failed"),
    InferenceFailed: ("EMBEDDING_ERROR", "Embedding generation failed"),
    QuiverError: ("INTERNAL_ERROR", "Internal error"),
}
"""Code and first words of a message; the nearest ancestor counts."""


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as this API does, and as JSON where its own framework would write plain text."""
    del status
    code, words = next(ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS)
    return msgspec.json.encode(ErrorReply(f"{words}: {explain(error)}", code))


INFERENCE_API = Dialect(
    name="inference_api",
    routes=[
        Route("POST", "/api/embed", embed, "Embed a text", EmbedBody, EmbedReply),
        Route("POST", "/api/embed/batch", embed_batch, "Embed texts", EmbedBatchBody, EmbedReply),
        Route("POST", "/api/rerank", rerank, "Order documents by relevance", RerankBody, RerankReply),
        Route("GET", "/api/embedders", list_embedders, "List the models that embed", reply=list[ModelInfo]),
        Route("GET", "/api/rerankers", list_rerankers, "List the models that rerank", reply=list[ModelInfo]),
        Route("GET", "/health/live", live, "Liveness", reply=LiveReply, public=True),
        Route("GET", "/health/ready", ready, "Readiness", reply=ReadyReply, public=True),
        Route("GET", "/health/status", show_status, "Readiness and load", reply=StatusReply, public=True),
    ],
    render_error=render_error,
    statuses={UnknownModel: 400, Overloaded: 503, DeadlineExceeded: 503},
    error=ErrorReply,
    refusal_headers=refusal_headers,
)
