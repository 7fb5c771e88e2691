"""Jina's embeddings and rerank; at the root, vLLM's rerank and Cohere's without its client come here too.

https://api.jina.ai/redoc
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec

from quiver import types
from quiver.api.call import Call, Dialect, Reply, Route, decode_json
from quiver.api.documents import Document, as_object, text_of, texts_of
from quiver.api.vectors import in_forms, write_array, write_object
from quiver.errors import (
    DeadlineExceeded,
    EngineError,
    InsufficientQuota,
    InvalidInput,
    Overloaded,
    QuiverError,
    RateLimited,
    TooLong,
    Unauthorized,
    Unavailable,
    UnknownModel,
)
from quiver.service import Service
from quiver.types import EmbedRequest, RerankRequest

EmbeddingType = Literal["float", "base64", "binary", "ubinary"]
Count = Annotated[int, msgspec.Meta(ge=1)]

TASKS: Mapping[str, str] = {
    "query": "query",
    "passage": "document",
    "text-matching": "similarity",
    "classification": "classification",
    "separation": "clustering",
    "clustering": "clustering",
}
"""By the last part of Jina's name: who searches in texts (`retrieval.query`) or in code (`nl2code.query`) has a query."""

CODES: Mapping[type[QuiverError], str] = {
    UnknownModel: "INPUT_MODEL_NOT_FOUND",
    TooLong: "INPUT_TOKEN_LIMIT_EXCEEDED",
    Unauthorized: "AUTH_INVALID_API_KEY",
    Overloaded: "RATE_CONCURRENCY_LIMIT_EXCEEDED",
    RateLimited: RateLimited.code,
    InsufficientQuota: InsufficientQuota.code,
    DeadlineExceeded: "SERVICE_TIMEOUT",
    Unavailable: "SERVICE_UNAVAILABLE",
    EngineError: "INTERNAL_ERROR",
}
"""Jina's words; an error that has none keeps our own."""


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: Document | list[Document]
    """Texts, or objects with `text`."""
    model: str | None = None
    task: str | None = None
    embedding_type: EmbeddingType | list[EmbeddingType] | None = None
    encoding_format: EmbeddingType | list[EmbeddingType] | None = None
    """What OpenAI's client calls `embedding_type`."""
    dimensions: Count | None = None
    normalized: bool | None = None
    """Scale vectors to unit length, or not; None does as the model's own pipeline."""
    late_chunking: bool | None = None
    """Read all inputs as one text; each still gets a vector of its own."""
    truncate: bool | None = None
    """Cut an over-long input instead of refusing it."""
    return_multivector: bool | None = None
    """A vector for each token."""


class Embedding(msgspec.Struct, omit_defaults=True):
    """One input: a vector in its form, or an object with each form that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str | dict[EmbeddingType, Any] | None = None
    embeddings: list[Any] | dict[EmbeddingType, Any] | None = None
    """With `return_multivector`: the vectors of its tokens."""


class Usage(msgspec.Struct):
    """What the request cost, in tokens."""

    total_tokens: int
    prompt_tokens: int


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /v1/embeddings."""

    model: str
    object: Literal["list"]
    usage: Usage
    data: list[Embedding]


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank."""

    query: Document
    documents: list[Document]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """0 means all, as vLLM has it."""
    return_documents: bool | None = None
    """None means true."""


class RankedDocument(msgspec.Struct):
    """One document in its place."""

    index: int
    relevance_score: float
    document: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class RerankReply(msgspec.Struct):
    """Reply of POST /v1/rerank, the best document first; the `id` is for clients of vLLM and Cohere."""

    id: str
    model: str
    object: Literal["list"]
    usage: Usage
    results: list[RankedDocument]


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success: what Jina's clients show is `detail`."""

    detail: str
    code: str


async def create_embeddings(service: Service, call: Call) -> Reply:
    """Embed."""
    body = decode_json(call, EmbeddingsBody)
    request = EmbedRequest(
        inputs=texts_of(body.input if isinstance(body.input, list) else [body.input], "input"),
        model=body.model or None,
        task=_task(body.task),
        dimensions=body.dimensions,
        normalize=body.normalized,
        late_chunking=bool(body.late_chunking),
        truncate=bool(body.truncate),
    )
    forms = body.embedding_type or body.encoding_format or "float"
    if body.return_multivector:
        return await _embed_tokens(service, call, request, forms)
    embeddings = await service.embed(request, call.caller)
    vectors = in_forms(embeddings.vectors, forms)
    data = await write_array(vectors, lambda i, v: {"object": "embedding", "index": i, "embedding": v})
    return _reply(embeddings.model, embeddings.usage, data)


async def _embed_tokens(
    service: Service, call: Call, request: EmbedRequest, forms: EmbeddingType | list[EmbeddingType]
) -> Reply:
    if request.dimensions or request.late_chunking:
        raise InvalidInput(
            "return_multivector goes with neither dimensions nor late_chunking: leave them out",
            param="return_multivector",
        )
    tokens = await service.embed_tokens(request, call.caller)
    data = await write_array(
        tokens.vectors, lambda i, v: {"object": "embedding", "index": i, "embeddings": in_forms(v, forms)}
    )
    return _reply(tokens.model, tokens.usage, data)


def _task(name: str | None) -> str | None:
    if not name:
        return None
    task = TASKS.get(name.rpartition(".")[2])
    if task is None:
        known = "retrieval.query, retrieval.passage, text-matching, classification, separation, clustering"
        raise InvalidInput(f"there is no task {name!r}; there are: {known}", param="task")
    return task


def _reply(model: str, usage: types.Usage, data: bytes) -> Reply:
    fields = {"model": model, "object": "list", "usage": msgspec.json.encode(_usage(usage)), "data": data}
    return Reply(200, write_object(fields), timings=usage.timings)


def _usage(usage: types.Usage) -> Usage:
    return Usage(usage.num_tokens, usage.num_tokens)


async def rerank(service: Service, call: Call) -> Reply:
    """Rerank."""
    body = decode_json(call, RerankBody)
    request = RerankRequest(
        query=text_of(body.query, "query"),
        documents=texts_of(body.documents, "documents"),
        model=body.model or None,
        top_n=body.top_n or None,
        truncate=True,
    )
    ranking = await service.rerank(request, call.caller)
    shown = body.return_documents is not False
    results = [
        RankedDocument(index, score, as_object(body.documents[index]) if shown else msgspec.UNSET)
        for index, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True)
    ]
    reply = RerankReply(str(uuid4()), ranking.model, "list", _usage(ranking.usage), results)
    return Reply(200, msgspec.json.encode(reply), timings=ranking.usage.timings)


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Jina does."""
    del status
    code = next((CODES[cls] for cls in type(error).__mro__ if cls in CODES), error.code)
    return msgspec.json.encode(ErrorReply(error.message, code))


JINA = Dialect(
    name="jina",
    routes=[
        Route("POST", "/v1/embeddings", create_embeddings, "Embed texts", EmbeddingsBody, EmbeddingsReply),
        Route("POST", "/v1/rerank", rerank, "Order documents by relevance", RerankBody, RerankReply),
    ],
    render_error=render_error,
    statuses={InvalidInput: 422, TooLong: 400, UnknownModel: 400},
    error=ErrorReply,
)
