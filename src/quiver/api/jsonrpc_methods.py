"""Hero Embedder Provider's methods: embed and rerank by quality level, and what its operators look at.

Its document names the methods and their parameters; where it does not show a result, its shape is ours.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from quiver.api.call import Call, Dialect, Reply, Route
from quiver.api.jsonrpc import Method, answer, render_error
from quiver.api.openrpc import describe
from quiver.api.vectors import write_array, write_object
from quiver.engine import outputs
from quiver.errors import InvalidInput, NotReady, QuiverError, TooLong, TooManyInputs, UnknownModel, WrongKind
from quiver.service import Service
from quiver.types import Caller, EmbedRequest, ModelState, ModelStatus, RerankRequest

Quality = Literal[1, 2, 3, 4]
QUALITIES: Mapping[Quality, str] = {1: "bge-small-q1", 2: "bge-small-q2", 3: "bge-base-q3", 4: "bge-base-q4"}
"""The catalogue's entry of each level; those of 1 and 3 compute in int8 and give it."""

Count = Annotated[int, msgspec.Meta(ge=1)]


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """What a method takes that takes nothing."""


class EmbedParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `embed`."""

    texts: list[str]
    quality: Quality | None = None
    """1 and 2 are the small model, 3 and 4 the base one; the odd ones in int8, the even ones in float32."""
    model: str | None = None
    """Not its own: any model that is served, instead of a quality; with neither, the server's first."""
    dimensions: Count | None = None
    """Not its own: keep so many numbers of each vector."""
    truncate: bool | None = None
    """Not its own: cut a text that is too long, or refuse it; None does as the server is set."""


class Embedding(msgspec.Struct):
    """One vector."""

    values: list[float]
    """Integers from -127 to 127 where the precision is int8."""
    scale: float | msgspec.UnsetType = msgspec.UNSET
    """Of int8: a value times this is the number again."""


class EmbedResult(msgspec.Struct):
    """Result of `embed`: the vectors in the order of the texts."""

    embeddings: list[Embedding]
    precision: Literal["int8", "float32"]
    dimensions: int
    quality: Quality | None
    """None where the model belongs to no level."""
    model: str


class Doc(msgspec.Struct, forbid_unknown_fields=True):
    """One document to rank."""

    id: str | int
    text: str


class RerankParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `rerank`."""

    query: str
    docs: list[Doc]
    top_k: Count | None = None
    model: str | None = None
    """Not its own: a model that is served; without one, the first reranker, or else the first model."""


class Hit(msgspec.Struct):
    """One document's score, from 0 to 1."""

    id: str | int
    score: float


class HealthResult(msgspec.Struct):
    """Result of `health`."""

    status: Literal["ok", "starting", "stopping", "failed"]
    models_ready: bool


class Download(msgspec.Struct):
    """How far a file is."""

    file: str
    done_bytes: int
    total_bytes: int


class ModelProgress(msgspec.Struct):
    """What one model is doing, and how far its files are."""

    id: str
    state: str
    error: str
    downloads: list[Download]


class StatusResult(msgspec.Struct):
    """Result of `status`."""

    status: Literal["ok", "starting", "stopping", "failed"]
    models_ready: bool
    version: str
    models_root: str
    """The directory of this machine that models are fetched into."""
    models: list[ModelProgress]


class Model(msgspec.Struct):
    """One model that may be asked for."""

    id: str
    kind: str
    state: str
    dimensions: int
    max_tokens: int
    precision: str
    quality: Quality | None


class ModelSize(msgspec.Struct):
    """How large a model's weights are on the disk; 0 while that is not known."""

    id: str
    disk_bytes: int


class MemInfo(msgspec.Struct):
    """Result of `mem_info`."""

    rss_bytes: int
    limit_bytes: int
    """Beyond it, new work is refused, unless the setting `max_memory_bytes` says otherwise."""
    total_bytes: int
    available_bytes: int
    models: list[ModelSize]


class OrtInfo(msgspec.Struct):
    """Result of `ort_info`: the ONNX Runtime in use."""

    version: str
    path: str
    min_version: str
    is_supported: bool
    providers: list[str]


async def embed(service: Service, caller: Caller, params: EmbedParams) -> bytes:
    """Turn texts into vectors."""
    if params.quality and params.model:
        raise InvalidInput("quality and model both name a model: give one of them", param="quality")
    name = QUALITIES[params.quality] if params.quality else params.model
    request = EmbedRequest(inputs=params.texts, model=name, dimensions=params.dimensions, truncate=params.truncate)
    embeddings = await service.embed(request, caller)
    vectors, status = embeddings.vectors, service.model(embeddings.model)
    is_int8 = status.dtype == "int8" or (_quality(status) or 0) % 2 == 1
    if is_int8:
        integers, scales = outputs.to_int8(vectors)
        written = await write_array(list(integers), lambda i, row: {"values": row, "scale": scales[i]})
    else:
        written = await write_array(list(vectors), lambda _, row: {"values": row})
    return write_object(
        {
            "embeddings": written,
            "precision": "int8" if is_int8 else "float32",
            "dimensions": vectors.shape[1],
            "quality": _quality(status),
            "model": status.id,
        }
    )


def _quality(status: ModelStatus) -> Quality | None:
    return next((level for level, name in QUALITIES.items() if name in (status.id, *status.aliases)), None)


async def rerank(service: Service, caller: Caller, params: RerankParams) -> bytes:
    """Put documents in the order of their relevance to a query."""
    request = RerankRequest(
        query=params.query,
        documents=[doc.text for doc in params.docs],
        model=params.model or _reranker(service),
        top_n=params.top_k,
        truncate=True,
    )
    ranking = await service.rerank(request, caller)
    hits = [
        Hit(params.docs[i].id, score) for i, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True)
    ]
    return msgspec.json.encode(hits)


def _reranker(service: Service) -> str | None:
    return next((status.id for status in service.models() if status.kind == "rerank"), None)


async def health(service: Service, caller: Caller, params: NoParams) -> bytes:
    """Tell the server's state in a word."""
    del caller, params
    word, is_ready = await _state(service)
    return msgspec.json.encode(HealthResult(word, is_ready))


async def _state(service: Service) -> tuple[Literal["ok", "starting", "stopping", "failed"], bool]:
    if service.fault():
        return "failed", False
    if service.stopping:
        return "stopping", False
    try:
        await service.check_ready()
    except NotReady:
        return "starting", False
    return "ok", True


async def status(service: Service, caller: Caller, params: NoParams) -> bytes:
    """Tell what each model is doing, and how far downloads are."""
    del params
    root = str(service.models_root(caller))
    word, is_ready = await _state(service)
    models = [_progress(each) for each in _named(service)]
    return msgspec.json.encode(StatusResult(word, is_ready, service.version, root, models))


def _named(service: Service) -> list[ModelStatus]:
    """List the models that are here or on their way; others may be asked for, too."""
    return [each for each in service.models() if each.state is not ModelState.AVAILABLE]


def _progress(status: ModelStatus) -> ModelProgress:
    downloads = [Download(each.file, each.done_bytes, each.total_bytes) for each in status.downloads]
    return ModelProgress(status.id, status.state, status.error, downloads)


async def list_models(service: Service, caller: Caller, params: NoParams) -> bytes:
    """List the models that may be asked for."""
    del caller, params
    return msgspec.json.encode([_model(each) for each in service.models()])


def _model(status: ModelStatus) -> Model:
    return Model(
        id=status.id,
        kind=status.kind,
        state=status.state,
        dimensions=status.dimensions,
        max_tokens=status.max_tokens,
        precision=status.dtype,
        quality=_quality(status),
    )


async def mem_info(service: Service, caller: Caller, params: NoParams) -> bytes:
    """Tell what memory the process holds, what the machine has, and how large each model is."""
    del params
    memory = service.memory(caller)
    sizes = [ModelSize(each.id, each.num_bytes) for each in _named(service)]
    return msgspec.json.encode(
        MemInfo(memory.resident_bytes, memory.limit_bytes, memory.total_bytes, memory.available_bytes, sizes)
    )


async def ort_info(service: Service, caller: Caller, params: NoParams) -> bytes:
    """Tell which ONNX Runtime is in use."""
    del params
    found = service.runtime(caller)
    return msgspec.json.encode(
        OrtInfo(found.version, str(found.path), found.min_version, found.is_supported, list(found.providers))
    )


async def discover(service: Service, caller: Caller, params: NoParams) -> bytes:
    """Return this description."""
    del service, caller, params
    return DOCUMENT


_MODELS: tuple[type[QuiverError], ...] = (UnknownModel, TooLong, TooManyInputs, WrongKind)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("health", "Tell the server's state in a word", NoParams, HealthResult, health),
        Method("status", "Tell how far models and downloads are", NoParams, StatusResult, status),
        Method("models.list", "List the models that may be asked for", NoParams, list[Model], list_models),
        Method("mem_info", "Tell about memory and the size of models", NoParams, MemInfo, mem_info),
        Method("ort_info", "Tell which ONNX Runtime is in use", NoParams, OrtInfo, ort_info),
        Method("embed", "Turn texts into vectors", EmbedParams, EmbedResult, embed, _MODELS),
        Method("rerank", "Put documents in the order of their relevance", RerankParams, list[Hit], rerank, _MODELS),
        Method("rpc.discover", "Return the OpenRPC document", NoParams, dict[str, Any], discover),
    )
}
DOCUMENT = msgspec.json.encode(describe(METHODS.values()))


class Request(msgspec.Struct, omit_defaults=True):
    """Body of POST /rpc, or an entry of a batch; without an id it is a notification."""

    jsonrpc: Literal["2.0"]
    method: str
    params: list[Any] | dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    id: str | int | float | msgspec.UnsetType | None = msgspec.UNSET


class Error(msgspec.Struct):
    """What went wrong."""

    code: int
    message: str
    data: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ErrorResponse(msgspec.Struct):
    """A request that failed."""

    jsonrpc: Literal["2.0"]
    error: Error
    id: str | int | float | None


class Response(msgspec.Struct):
    """A request that succeeded, or one that failed."""

    jsonrpc: Literal["2.0"]
    id: str | int | float | None
    result: Any | msgspec.UnsetType = msgspec.UNSET
    error: Error | msgspec.UnsetType = msgspec.UNSET


async def call_methods(service: Service, call: Call) -> Reply:
    """Do what one request, or a batch of them, asks for."""
    return await answer(METHODS, service, call)


JSONRPC = Dialect(
    name="jsonrpc",
    routes=[
        Route(
            "POST",
            "/rpc",
            call_methods,
            "Call methods by JSON-RPC 2.0",
            Request | list[Request],
            Response | list[Response],
            may_be_empty=True,
        )
    ],
    render_error=render_error,
    error=ErrorResponse,
)
