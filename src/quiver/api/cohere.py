"""Cohere's embed and rerank of versions 1 and 2, and its tokens and models.

https://docs.cohere.com/reference/embed
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec

from quiver.api.call import Call, Dialect, Reply, Route, decode_json
from quiver.api.documents import Document, as_object, texts_of
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import InvalidInput, QuiverError
from quiver.service import Service
from quiver.types import DecodeRequest, Embeddings, EmbedRequest, ModelStatus, RerankRequest, TokenizeRequest, Usage

InputType = Literal["search_document", "search_query", "classification", "clustering", "image"]
EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
Count = Annotated[int, msgspec.Meta(ge=1)]

TASKS: Mapping[InputType, str] = {
    "search_document": "document",
    "search_query": "query",
    "classification": "classification",
    "clustering": "clustering",
}
ENDPOINTS: Mapping[str, list[str]] = {"embed": ["embed", "rerank"], "rerank": ["rerank"], "multi_vector": ["rerank"]}
"""What Cohere calls that which a kind of model can do."""
DOCUMENTS_PER_SEARCH = 100
"""Cohere bills a query with so many documents as one search."""
PAGE_SIZE = 20


class Part(msgspec.Struct):
    """A piece of an input; only texts are read here."""

    type: str
    text: str | None = None


class Content(msgspec.Struct):
    """One input, of pieces."""

    content: list[Part]


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embed and /v2/embed: `texts`, or `inputs`."""

    texts: list[str] | None = None
    inputs: list[Content] | None = None
    images: list[str] | None = None
    """Refused: no model here reads them."""
    model: str | None = None
    input_type: InputType | None = None
    embedding_types: list[EmbeddingType] | None = None
    """None: a list of floats in version 1, `float` alone in version 2."""
    output_dimension: Count | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    """The side from which an over-long text is cut (`END`), or not to cut it."""


class Version(msgspec.Struct):
    """Version of the API."""

    version: str


class BilledUnits(msgspec.Struct, omit_defaults=True):
    """What Cohere would bill."""

    input_tokens: int | None = None
    search_units: int | None = None


class Tokens(msgspec.Struct):
    """What the model read."""

    input_tokens: int


class Meta(msgspec.Struct, omit_defaults=True):
    """What there is to say about a request."""

    api_version: Version
    billed_units: BilledUnits | None = None
    tokens: Tokens | None = None
    warnings: list[str] | None = None


class EmbedReply(msgspec.Struct):
    """Reply of POST /v1/embed and /v2/embed: floats, or lists by their type."""

    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    id: str
    embeddings: list[list[float]] | dict[EmbeddingType, list[Any]]
    texts: list[str]
    meta: Meta


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank and /v2/rerank."""

    query: str
    documents: list[Document]
    model: str | None = None
    top_n: Count | None = None
    rank_fields: list[str] | None = None
    """Of documents that are objects: the fields that count; none: `text`."""
    return_documents: bool | None = None


class RankedDocument(msgspec.Struct):
    """One document in its place."""

    index: int
    relevance_score: float
    document: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class RerankReply(msgspec.Struct):
    """Reply of POST /v1/rerank and /v2/rerank, the best document first."""

    id: str
    results: list[RankedDocument]
    meta: Meta


class TokenizeBody(msgspec.Struct):
    """Body of POST /v1/tokenize."""

    text: str
    model: str | None = None


class TokenizeReply(msgspec.Struct):
    """Reply of POST /v1/tokenize, without special tokens."""

    tokens: list[int]
    token_strings: list[str]
    meta: Meta


class DetokenizeBody(msgspec.Struct):
    """Body of POST /v1/detokenize."""

    tokens: list[int]
    model: str | None = None


class DetokenizeReply(msgspec.Struct):
    """Reply of POST /v1/detokenize."""

    text: str
    meta: Meta


class Model(msgspec.Struct):
    """One model; with no `tokenizer_url`, Cohere's client asks /v1/tokenize."""

    name: str
    endpoints: list[str]
    finetuned: bool
    context_length: int
    tokenizer_url: str | None
    default_endpoints: list[str]
    is_deprecated: bool


class ModelsReply(msgspec.Struct):
    """Reply of GET /v1/models."""

    models: list[Model]
    next_page_token: str | msgspec.UnsetType = msgspec.UNSET


class KeyReply(msgspec.Struct):
    """Reply of POST /v1/check-api-key; a wrong key is 401."""

    valid: bool
    organization_id: str
    owner_id: str


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    message: str
    id: str


async def embed_v1(service: Service, call: Call) -> Reply:
    """Embed; without `embedding_types`, the reply holds nothing but floats."""
    body = decode_json(call, EmbedBody)
    return await _embed(service, call, body, version="1", types=body.embedding_types or ())


async def embed_v2(service: Service, call: Call) -> Reply:
    """Embed; the reply is always by type."""
    body = decode_json(call, EmbedBody)
    return await _embed(service, call, body, version="2", types=body.embedding_types or ("float",))


async def _embed(
    service: Service, call: Call, body: EmbedBody, *, version: str, types: Sequence[EmbeddingType]
) -> Reply:
    request = EmbedRequest(
        inputs=_texts(body),
        model=body.model or None,
        dimensions=body.output_dimension,
        task=TASKS.get(body.input_type) if body.input_type else None,
        truncate=body.truncate != "NONE",
        truncate_side="left" if body.truncate == "START" else "right",
    )
    embeddings = await service.embed(request, call.caller)
    fields = {
        "response_type": "embeddings_by_type" if types else "embeddings_floats",
        "id": str(uuid4()),
        "embeddings": await _render(embeddings, types),
        "texts": body.texts or [],
        "meta": msgspec.json.encode(_embed_meta(embeddings.usage, version)),
    }
    return Reply(200, write_object(fields), timings=embeddings.usage.timings)


def _texts(body: EmbedBody) -> Sequence[str]:
    """Return the one list of inputs that was sent."""
    if body.images or body.input_type == "image":
        raise InvalidInput("images are not read here: send texts", param="images" if body.images else "input_type")
    if (body.texts is None) == (body.inputs is None):
        raise InvalidInput("send either texts or inputs", param="texts")
    if body.inputs is None:
        return body.texts or []
    return [_joined(content, f"inputs[{i}]") for i, content in enumerate(body.inputs)]


def _joined(content: Content, field: str) -> str:
    """Lay the pieces of an input one under another."""
    texts = [part.text for part in content.content if part.type == "text" and part.text is not None]
    if not texts or len(texts) < len(content.content):
        raise InvalidInput(f"{field} holds something other than texts: only those are read here", param=field)
    return "\n".join(texts)


async def _render(embeddings: Embeddings, types: Sequence[EmbeddingType]) -> bytes:
    if not types:
        return await write_array(in_form(embeddings.vectors, "float"))
    return write_object({form: await write_array(in_form(embeddings.vectors, form)) for form in types})


def _embed_meta(usage: Usage, version: str) -> Meta:
    cut = ", ".join(map(str, usage.truncated))
    warnings = [f"longer than the model reads, and cut: the texts at {cut}"] if cut else None
    return Meta(Version(version), BilledUnits(input_tokens=usage.num_tokens), Tokens(usage.num_tokens), warnings)


async def rerank_v1(service: Service, call: Call) -> Reply:
    """Rerank, version 1."""
    return await _rerank(service, call, "1")


async def rerank_v2(service: Service, call: Call) -> Reply:
    """Rerank, version 2; what it no longer names, its clients still send."""
    return await _rerank(service, call, "2")


async def _rerank(service: Service, call: Call, version: str) -> Reply:
    body = decode_json(call, RerankBody)
    request = RerankRequest(
        query=body.query,
        documents=texts_of(body.documents, "documents", body.rank_fields),
        model=body.model or None,
        top_n=body.top_n,
        truncate=True,
    )
    ranking = await service.rerank(request, call.caller)
    results = [
        RankedDocument(index, score, as_object(body.documents[index]) if body.return_documents else msgspec.UNSET)
        for index, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True)
    ]
    searches = -(-len(body.documents) // DOCUMENTS_PER_SEARCH)
    tokens = Tokens(ranking.usage.num_tokens)
    reply = RerankReply(str(uuid4()), results, Meta(Version(version), BilledUnits(search_units=searches), tokens))
    return Reply(200, msgspec.json.encode(reply), timings=ranking.usage.timings)


async def tokenize(service: Service, call: Call) -> Reply:
    """Cut a text into tokens."""
    body = decode_json(call, TokenizeBody)
    request = TokenizeRequest(texts=[body.text], model=body.model or None, special_tokens=False)
    (tokens,) = (await service.tokenize(request, call.caller)).tokens
    reply = TokenizeReply([token.id for token in tokens], [token.text for token in tokens], Meta(Version("1")))
    return Reply(200, msgspec.json.encode(reply))


async def detokenize(service: Service, call: Call) -> Reply:
    """Turn tokens back into a text."""
    body = decode_json(call, DetokenizeBody)
    (text,) = await service.decode(DecodeRequest(ids=[body.tokens], model=body.model or None), call.caller)
    return Reply(200, msgspec.json.encode(DetokenizeReply(text, Meta(Version("1")))))


async def list_models(service: Service, call: Call) -> Reply:
    """List what is served here, page by page."""
    wanted, default_only = call.query.get("endpoint"), call.query.get("default_only") in ("true", "True")
    models = [model for model in map(_model, service.models()) if not wanted or wanted in model.endpoints]
    start = _number(call, "page_token", default=0, least=0)
    end = start + _number(call, "page_size", default=PAGE_SIZE, least=1)
    shown = models[:1] if default_only else models[start:end]
    more = end < len(models) and not default_only
    return Reply(200, msgspec.json.encode(ModelsReply(shown, str(end) if more else msgspec.UNSET)))


def _number(call: Call, name: str, *, default: int, least: int) -> int:
    text = call.query.get(name, "")
    if text and not (text.isdecimal() and int(text) >= least):
        raise InvalidInput(f"{name} is {text!r}: send a number from {least} up", param=name)
    return int(text) if text else default


async def retrieve_model(service: Service, call: Call) -> Reply:
    """Show one model; its id may hold slashes."""
    return Reply(200, msgspec.json.encode(_model(service.model(call.params["id"]))))


def _model(status: ModelStatus) -> Model:
    return Model(
        name=status.id,
        endpoints=ENDPOINTS.get(status.kind, []),
        finetuned=False,
        context_length=status.max_tokens,
        tokenizer_url=None,
        default_endpoints=[],
        is_deprecated=False,
    )


async def check_key(service: Service, call: Call) -> Reply:
    """Say that the key, which has been looked at before, is the right one."""
    del service, call
    return Reply(200, msgspec.json.encode(KeyReply(valid=True, organization_id="local", owner_id="local")))


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Cohere does."""
    del status
    return msgspec.json.encode(ErrorReply(error.message, str(uuid4())))


COHERE = Dialect(
    name="cohere",
    routes=[
        Route("POST", "/v1/embed", embed_v1, "Embed texts", EmbedBody, EmbedReply),
        Route("POST", "/v2/embed", embed_v2, "Embed texts", EmbedBody, EmbedReply),
        Route("POST", "/v1/rerank", rerank_v1, "Order documents by relevance", RerankBody, RerankReply),
        Route("POST", "/v2/rerank", rerank_v2, "Order documents by relevance", RerankBody, RerankReply),
        Route("POST", "/v1/tokenize", tokenize, "Cut a text into tokens", TokenizeBody, TokenizeReply),
        Route("POST", "/v1/detokenize", detokenize, "Join tokens to a text", DetokenizeBody, DetokenizeReply),
        Route("GET", "/v1/models", list_models, "List models", reply=ModelsReply),
        Route("GET", "/v1/models/{id:path}", retrieve_model, "Show one model", reply=Model),
        Route("POST", "/v1/check-api-key", check_key, "Check the key", reply=KeyReply),
    ],
    render_error=render_error,
    error=ErrorReply,
)
