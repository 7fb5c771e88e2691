"""Voyage's embeddings, contextualised embeddings and rerank.

https://docs.voyageai.com/reference/embeddings-api
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from quiver import types
from quiver.api.call import Call, Dialect, Reply, Route, decode_json
from quiver.api.vectors import as_numbers, in_base64, write_array, write_object
from quiver.errors import InvalidInput, QuiverError, TooManyInputs, UnknownModel, WrongMediaType
from quiver.service import Service
from quiver.types import EmbedRequest, Floats, RerankRequest

T = TypeVar("T")
InputType = Literal["query", "document"]
Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Count = Annotated[int, msgspec.Meta(ge=1)]
MAX_DOCUMENTS = 1000
"""Voyage's own limit of documents whose chunks come in one request."""


class Options(msgspec.Struct, kw_only=True):
    """What both kinds of embeddings take."""

    model: str | None = None
    input_type: InputType | None = None
    output_dimension: Count | None = None
    output_dtype: Dtype | None = None
    encoding_format: Literal["base64", "float"] | None = None
    """base64 holds numbers of the `output_dtype`, or bytes of its bits; `float`, as OpenAI's clients say, is None."""


class EmbeddingsBody(Options, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: str | list[str]
    truncation: bool | None = None
    """Cut an over-long text instead of refusing it; None means true."""


class Embedding(msgspec.Struct):
    """One vector: numbers, or base64."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class Usage(msgspec.Struct):
    """What the request cost, in tokens; `prompt_tokens` is for OpenAI's client, which may send `input_type` too."""

    total_tokens: int
    prompt_tokens: int


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ContextualizedBody(Options, kw_only=True):
    """Body of POST /v1/contextualizedembeddings."""

    inputs: list[list[str]]
    """Of each document, its chunks; or queries, each in a list of its own."""
    enable_auto_chunking: bool | None = None
    """Refused: documents come in chunks."""


class ChunkEmbeddings(msgspec.Struct):
    """The vectors of one document's chunks."""

    object: Literal["list"]
    data: list[Embedding]
    index: int


class ContextualizedReply(msgspec.Struct):
    """Reply of POST /v1/contextualizedembeddings."""

    object: Literal["list"]
    data: list[ChunkEmbeddings]
    model: str
    usage: Usage


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank."""

    query: str
    documents: list[str]
    model: str | None = None
    top_k: Count | None = None
    return_documents: bool | None = None
    truncation: bool | None = None
    """Cut an over-long document instead of refusing it; None means true."""


class RankedDocument(msgspec.Struct):
    """One document in its place."""

    relevance_score: float
    index: int
    document: str | msgspec.UnsetType = msgspec.UNSET


class RerankReply(msgspec.Struct):
    """Reply of POST /v1/rerank, the best document first."""

    object: Literal["list"]
    data: list[RankedDocument]
    model: str
    usage: Usage


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success; without `detail`, Voyage's client would retry nothing."""

    detail: str


async def create_embeddings(service: Service, call: Call) -> Reply:
    """Embed."""
    body = decode_json(call, EmbeddingsBody)
    request = EmbedRequest(
        inputs=[body.input] if isinstance(body.input, str) else body.input,
        model=body.model or None,
        dimensions=body.output_dimension,
        task=body.input_type,
        truncate=body.truncation is not False,
    )
    embeddings = await service.embed(request, call.caller)
    return await _reply(_items(embeddings.vectors, body), embeddings.model, embeddings.usage)


async def create_contextualized(service: Service, call: Call) -> Reply:
    """Embed the chunks of documents, each chunk with its document in view."""
    body = decode_json(call, ContextualizedBody)
    _check(body)
    requests = [
        EmbedRequest(
            inputs=chunks,
            model=body.model or None,
            dimensions=body.output_dimension,
            task=body.input_type,
            truncate=False,
            late_chunking=True,
        )
        for chunks in body.inputs
    ]
    async with service.together(call.caller) as caller:
        documents = await _all(service.embed(request, caller) for request in requests)
    data = [
        {"object": "list", "data": _items(document.vectors, body), "index": i} for i, document in enumerate(documents)
    ]
    return await _reply(data, documents[0].model, _together([document.usage for document in documents]))


def _check(body: ContextualizedBody) -> None:
    if body.enable_auto_chunking:
        raise InvalidInput("documents are not cut here: send the chunks of each", param="enable_auto_chunking")
    if not body.inputs:
        raise InvalidInput("inputs is empty: send the chunks of at least one document", param="inputs")
    if len(body.inputs) > MAX_DOCUMENTS:
        raise TooManyInputs(f"{len(body.inputs)} documents are more than the {MAX_DOCUMENTS} of one request")


async def _all(works: Iterable[Awaitable[T]]) -> Sequence[T]:
    """Await all of them at once; if one fails, the others are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _together(usages: Sequence[types.Usage]) -> types.Usage:
    """Add up what parts of a request, computed side by side, were worth."""
    longest = max((usage.timings for usage in usages), key=lambda timings: timings.total)
    return types.Usage(sum(usage.num_tokens for usage in usages), timings=longest)


def _items(vectors: Floats, options: Options) -> Sequence[dict[str, Any]]:
    numbers = as_numbers(vectors, options.output_dtype or "float")
    forms = in_base64(numbers) if options.encoding_format == "base64" else numbers
    return [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(forms)]


async def _reply(data: Sequence[Any], model: str, usage: types.Usage) -> Reply:
    fields = {
        "object": "list",
        "data": await write_array(data),
        "model": model,
        "usage": msgspec.json.encode(_usage(usage)),
    }
    return Reply(200, write_object(fields), timings=usage.timings)


def _usage(usage: types.Usage) -> Usage:
    return Usage(usage.num_tokens, usage.num_tokens)


async def rerank(service: Service, call: Call) -> Reply:
    """Rerank."""
    body = decode_json(call, RerankBody)
    request = RerankRequest(
        query=body.query,
        documents=body.documents,
        model=body.model or None,
        top_n=body.top_k,
        truncate=body.truncation is not False,
    )
    ranking = await service.rerank(request, call.caller)
    data = [
        RankedDocument(score, index, body.documents[index] if body.return_documents else msgspec.UNSET)
        for index, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True)
    ]
    reply = RerankReply("list", data, ranking.model, _usage(ranking.usage))
    return Reply(200, msgspec.json.encode(reply), timings=ranking.usage.timings)


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Voyage does."""
    del status
    return msgspec.json.encode(ErrorReply(error.message))


VOYAGE = Dialect(
    name="voyage",
    routes=[
        Route("POST", "/v1/embeddings", create_embeddings, "Embed texts", EmbeddingsBody, EmbeddingsReply),
        Route(
            "POST",
            "/v1/contextualizedembeddings",
            create_contextualized,
            "Embed the chunks of documents",
            ContextualizedBody,
            ContextualizedReply,
        ),
        Route("POST", "/v1/rerank", rerank, "Order documents by relevance", RerankBody, RerankReply),
    ],
    render_error=render_error,
    statuses={UnknownModel: 400, WrongMediaType: 400},
    error=ErrorReply,
)
