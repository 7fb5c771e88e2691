"""Mixedbread's embeddings and reranking.

https://www.mixedbread.com/api-reference
"""

from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec

from quiver import __version__, types
from quiver.api.call import Call, Dialect, Reply, Route, decode_json
from quiver.api.documents import Document, texts_of
from quiver.api.vectors import Form, in_forms, write_array, write_object
from quiver.errors import InvalidInput, QuiverError
from quiver.service import Service
from quiver.types import Embeddings, EmbedRequest, RerankRequest

Count = Annotated[int, msgspec.Meta(ge=1)]
TOP_K = 10


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: str | list[str]
    model: str | None = None
    dimensions: Count | None = None
    prompt: str | None = None
    """Stands before each text, with a colon between if it brings no space."""
    normalized: bool | None = None
    """Scale vectors to unit length; None means true."""
    encoding_format: Form | list[Form] | None = None
    """One form, or several at once."""


class Embedding(msgspec.Struct):
    """One vector in its form, or an object with each form that was asked for."""

    object: Literal["embedding", "embedding_dict"]
    index: int
    embedding: list[float] | str | dict[Form, Any]


class Usage(msgspec.Struct):
    """What the request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage
    normalized: bool
    encoding_format: Form | list[Form]
    dimensions: int


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/reranking."""

    query: str
    input: list[Document]
    model: str | None = None
    rank_fields: list[str] | None = None
    """Of documents that are objects: the fields that count; none: `text`."""
    top_k: Count | None = None
    """None means 10."""
    return_input: bool | None = None


class RankResult(msgspec.Struct):
    """One document in its place."""

    object: Literal["rank_result"]
    index: int
    score: float
    input: Document | None


class RerankReply(msgspec.Struct):
    """Reply of POST /v1/reranking, the best document first."""

    object: Literal["list"]
    model: str
    data: list[RankResult]
    usage: Usage
    top_k: int
    return_input: bool


class Info(msgspec.Struct):
    """Reply of GET /."""

    name: str
    version: str


class Error(msgspec.Struct):
    """What went wrong: a sentence, the kind, the field, a stable word."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: Error


async def create_embeddings(service: Service, call: Call) -> Reply:
    """Embed."""
    body = decode_json(call, EmbeddingsBody)
    request = EmbedRequest(
        inputs=[body.input] if isinstance(body.input, str) else body.input,
        model=body.model or None,
        dimensions=body.dimensions,
        prompt=_prefix(body.prompt) if body.prompt else None,
        normalize=body.normalized is not False,
        truncate=True,
    )
    embeddings = await service.embed(request, call.caller)
    return Reply(200, await _render(embeddings, body), timings=embeddings.usage.timings)


def _prefix(prompt: str) -> str:
    """`Represent this sentence` -> `Represent this sentence: `: callers leave out what stands between."""
    return prompt if prompt[-1].isspace() else f"{prompt.removesuffix(':')}: "


async def _render(embeddings: Embeddings, body: EmbeddingsBody) -> bytes:
    form = body.encoding_format or "float"
    kind = "embedding" if isinstance(form, str) else "embedding_dict"
    vectors = in_forms(embeddings.vectors, form)
    return write_object(
        {
            "object": "list",
            "model": embeddings.model,
            "data": await write_array(vectors, lambda i, v: {"object": kind, "index": i, "embedding": v}),
            "usage": msgspec.json.encode(_usage(embeddings.usage)),
            "normalized": body.normalized is not False,
            "encoding_format": form,
            "dimensions": embeddings.vectors.shape[1],
        }
    )


def _usage(usage: types.Usage) -> Usage:
    return Usage(usage.num_tokens, usage.num_tokens)


async def rerank(service: Service, call: Call) -> Reply:
    """Rerank."""
    body = decode_json(call, RerankBody)
    top_k, shown = body.top_k or TOP_K, bool(body.return_input)
    if not body.input:
        raise InvalidInput("input is empty: send at least one text", param="input")
    request = RerankRequest(
        query=body.query,
        documents=texts_of(body.input, "input", body.rank_fields),
        model=body.model or None,
        top_n=top_k,
        truncate=True,
    )
    ranking = await service.rerank(request, call.caller)
    data = [
        RankResult("rank_result", index, score, body.input[index] if shown else None)
        for index, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True)
    ]
    reply = RerankReply("list", ranking.model, data, _usage(ranking.usage), top_k, shown)
    return Reply(200, msgspec.json.encode(reply), timings=ranking.usage.timings)


async def info(service: Service, call: Call) -> Reply:
    """Say who is there."""
    del service, call
    return Reply(200, msgspec.json.encode(Info("quiver", __version__)))


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Mixedbread does, whose API is a superset of OpenAI's."""
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return msgspec.json.encode(ErrorReply(Error(error.message, kind, error.param, error.code)))


MIXEDBREAD = Dialect(
    name="mixedbread",
    routes=[
        Route("POST", "/v1/embeddings", create_embeddings, "Embed texts", EmbeddingsBody, EmbeddingsReply),
        Route("POST", "/v1/reranking", rerank, "Order documents by relevance", RerankBody, RerankReply),
        Route("GET", "/", info, "Name and version", reply=Info, at_root=False),
    ],
    render_error=render_error,
    error=ErrorReply,
)
