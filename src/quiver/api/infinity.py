"""Infinity's embeddings, rerank, classify and models, for text.

https://github.com/michaelfeil/infinity
"""

import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

import msgspec
from msgspec import Meta

from quiver import errors, types
from quiver.api.call import Call, Dialect, Reply, Route, decode_json
from quiver.api.vectors import write_array, write_object
from quiver.engine import outputs
from quiver.errors import InvalidInput, InvalidJson, QuiverError, TooManyInputs, UnknownModel, WrongMediaType
from quiver.service import Service
from quiver.types import ClassifyRequest, EmbedRequest, ModelStatus, RerankRequest, Results

NO_MODEL = "default/not-specified"
"""What its own client sends when no model is asked for."""

Text = Annotated[str, Meta(max_length=8192 * 15)]
Texts = Annotated[list[Text], Meta(min_length=1)]
T = TypeVar("T")


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /embeddings; texts are cut to what the model reads."""

    input: Text | Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    """0 keeps them all."""
    output_dimension: int | None = None
    """What LiteLLM calls `dimensions`."""
    modality: Literal["text"] | None = None
    user: str | None = None


class RerankBody(msgspec.Struct, kw_only=True):
    """Body of POST /rerank."""

    query: Text
    documents: Texts
    model: str | None = None
    top_n: Annotated[int, Meta(gt=0)] | None = None
    return_documents: bool | None = None
    raw_scores: bool | None = None


class ClassifyBody(msgspec.Struct, kw_only=True):
    """Body of POST /classify."""

    input: Texts
    model: str | None = None
    raw_scores: bool | None = None


class Usage(msgspec.Struct):
    """What the request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    """One vector, or one for each token: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    embedding: list[float | list[float]] | str
    index: int


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    id: str
    created: int


class Ranked(msgspec.Struct):
    """One document's score; the text itself where that was asked for."""

    relevance_score: float
    index: int
    document: str | None


class RerankReply(msgspec.Struct):
    """Reply of POST /rerank, the best document first."""

    object: Literal["rerank"]
    results: list[Ranked]
    model: str
    usage: Usage
    id: str
    created: int


class LabelScore(msgspec.Struct):
    """The score of one label."""

    score: float
    label: str


class ClassifyReply(msgspec.Struct):
    """Reply of POST /classify: every label of each input, the likeliest first."""

    object: Literal["classify"]
    data: list[list[LabelScore]]
    model: str
    usage: Usage
    id: str
    created: int


class Stats(msgspec.Struct):
    """What waits for a model, and the most tokens of one forward pass."""

    queue_fraction: float
    queue_absolute: int
    results_pending: int
    batch_size: int


class Model(msgspec.Struct):
    """One model."""

    id: str
    stats: Stats
    object: Literal["model"]
    owned_by: Literal["infinity"]
    created: int
    backend: str
    capabilities: list[str]


class ModelsReply(msgspec.Struct):
    """Reply of GET /models."""

    object: Literal["list"]
    data: list[Model]


class Health(msgspec.Struct):
    """Reply of GET /health: the time, in seconds."""

    unix: float


class Detail(msgspec.Struct):
    """One fault of a body: what, where, and in words."""

    type: str
    loc: list[str | int]
    msg: str


class Error(msgspec.Struct):
    """Why a request that could be read is not answered."""

    message: str
    type: None
    param: None
    code: int


class ErrorReply(msgspec.Struct, omit_defaults=True):
    """Body of every reply that is not a success: `detail` about the body's form, `error` about all else."""

    error: Error | None = None
    detail: list[Detail] | str | None = None


class Unprocessable(InvalidInput):
    """The body has not the form that is asked for; what is well-formed but impossible is another status."""


CAPABILITIES = {
    "embed": ["embed"],
    "multi_vector": ["embed"],
    "rerank": ["rerank"],
    "classify": ["classify"],
    "sparse": [],
}
"""What a model is for, by its kind."""


async def create_embeddings(service: Service, call: Call) -> Reply:
    """Embed; a model of token vectors gives those."""
    body = _decode(call, EmbeddingsBody)
    request = EmbedRequest(
        inputs=_stripped([body.input] if isinstance(body.input, str) else body.input),
        model=_name(service, body.model),
        dimensions=body.dimensions or body.output_dimension or None,
        truncate=True,
    )
    if _status(service, request.model).kind == "multi_vector":
        if request.dimensions:
            raise InvalidInput("this model's vectors cannot be cut: leave dimensions out", param="dimensions")
        embeddings: types.Embeddings | types.TokenEmbeddings = await service.embed_tokens(request, call.caller)
    else:
        embeddings = await service.embed(request, call.caller)
    data = await _write_vectors(embeddings.vectors, as_base64=body.encoding_format == "base64")
    return _reply("list", "data", data, embeddings)


async def _write_vectors(vectors: Results, *, as_base64: bool) -> bytes:
    given: Sequence[Any] = [outputs.to_base64(vector) for vector in vectors] if as_base64 else list(vectors)
    return await write_array(given, lambda i, v: {"object": "embedding", "embedding": v, "index": i})


async def rerank(service: Service, call: Call) -> Reply:
    """Put documents in the order of their relevance."""
    body = _decode(call, RerankBody)
    documents = _stripped(body.documents)
    request = RerankRequest(
        query=body.query.strip(),
        documents=documents,
        model=_name(service, body.model),
        top_n=body.top_n,
        raw_scores=bool(body.raw_scores),
        truncate=True,
    )
    ranking = await service.rerank(request, call.caller)
    results = [
        {"relevance_score": score, "index": i, "document": documents[i] if body.return_documents else None}
        for i, score in zip(ranking.order.tolist(), ranking.scores, strict=True)
    ]
    return _reply("rerank", "results", await write_array(results), ranking)


async def classify(service: Service, call: Call) -> Reply:
    """Give each text a score for each label."""
    body = _decode(call, ClassifyBody)
    name = _name(service, body.model)
    status = _status(service, name)
    if status.kind == "rerank":
        raise InvalidInput(f"{status.id} has no labels, it scores pairs of texts: rerank with it", param="model")
    request = ClassifyRequest(inputs=_stripped(body.input), model=name, raw_scores=bool(body.raw_scores), truncate=True)
    given = await service.classify(request, call.caller)
    orders = (-given.scores).argsort(axis=1, kind="stable").tolist()
    data = await write_array(
        list(given.scores),
        lambda row, scores: [{"score": scores[i], "label": given.labels[i]} for i in orders[row]],
    )
    return _reply("classify", "data", data, given)


def _reply(
    kind: str,
    field: str,
    data: bytes,
    given: types.Embeddings | types.TokenEmbeddings | types.Ranking | types.Classification,
) -> Reply:
    tokens = given.usage.num_tokens
    body = {
        "object": kind,
        field: data,
        "model": given.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "id": f"infinity-{uuid4()}",
        "created": int(time.time()),
    }
    return Reply(200, write_object(body), timings=given.usage.timings)


async def list_models(service: Service, call: Call) -> Reply:
    """List the models, and what waits for each."""
    del call
    models = [_model(service, status) for status in service.models()]
    return Reply(200, msgspec.json.encode(ModelsReply("list", models)))


def _model(service: Service, status: ModelStatus) -> Model:
    queue = service.queue(status.id)
    return Model(
        id=status.id,
        stats=Stats(queue.tokens / queue.capacity_tokens, queue.inputs, 0, status.batch_tokens),
        object="model",
        owned_by="infinity",
        created=status.created,
        backend=status.backend,
        capabilities=CAPABILITIES[status.kind],
    )


async def health(service: Service, call: Call) -> Reply:
    """Tell the time once every model computes."""
    del call
    await service.check_ready()
    return Reply(200, msgspec.json.encode(Health(time.time())))


def _decode(call: Call, kind: type[T]) -> T:
    """Decode a body; a wrong form is another thing here than a value that a model cannot do."""
    try:
        return decode_json(call, kind)
    except InvalidJson:
        raise
    except InvalidInput as error:
        raise Unprocessable(error.message, param=error.param) from error


def _name(service: Service, model: str | None) -> str | None:
    """Return the model that is meant; where there is but one, every name is its, as with Infinity."""
    return None if model == NO_MODEL or len(service.models()) == 1 else model


def _status(service: Service, name: str | None) -> ModelStatus:
    """Find what is known of a model; one that is unknown is for the engine to refuse, or to answer with the first."""
    try:
        return service.model(name)
    except UnknownModel:
        return service.model()


def _stripped(texts: Sequence[str]) -> list[str]:
    """Take the white space off the ends, as Infinity does."""
    return [text.strip() for text in texts]


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Infinity does: its framework's list about a body, OpenAI's shape about the rest."""
    match error:
        case errors.Unauthorized():
            reply = ErrorReply(detail="Unauthorized")
        case Unprocessable() | InvalidJson() | TooManyInputs() | WrongMediaType():
            reply = ErrorReply(detail=[_detail(error)])
        case _:
            reply = ErrorReply(error=Error(error.message, None, None, status))
    return msgspec.json.encode(reply)


def _detail(error: QuiverError) -> Detail:
    """Say where: `input[3]` -> body, input, 3."""
    missing = re.search(r"missing required field `(\w+)`", error.message)
    path = [*re.findall(r"\w+", error.param or ""), *(missing.groups() if missing else ())]
    place: list[str | int] = [int(part) if part.isdigit() else part for part in path]
    kind = "json_invalid" if isinstance(error, InvalidJson) else "missing" if missing else "value_error"
    return Detail(kind, ["body", *place], error.message)


def _routes(base: str) -> list[Route]:
    return [
        Route("POST", f"{base}/embeddings", create_embeddings, "Embed texts", EmbeddingsBody, EmbeddingsReply),
        Route("POST", f"{base}/rerank", rerank, "Rank documents by relevance", RerankBody, RerankReply),
        Route("POST", f"{base}/classify", classify, "Score texts for each label", ClassifyBody, ClassifyReply),
        Route("GET", f"{base}/models", list_models, "List models and what waits for them", reply=ModelsReply),
    ]


INFINITY = Dialect(
    name="infinity",
    routes=[
        *_routes(""),
        *_routes("/v1"),  # where most of its users put it, by --url-prefix
        Route("GET", "/health", health, "Tell the time once every model computes", reply=Health, public=True),
    ],
    render_error=render_error,
    statuses={
        Unprocessable: 422,
        InvalidJson: 422,
        TooManyInputs: 422,
        WrongMediaType: 422,
        UnknownModel: 400,
    },
    error=ErrorReply,
)
