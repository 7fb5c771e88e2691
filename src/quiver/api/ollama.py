"""Ollama's embeddings and list of models.

https://github.com/ollama/ollama/blob/main/docs/api.md
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from quiver.api.call import TEXT, Call, Dialect, Reply, Route, decode_json, explain
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import Overloaded, QuiverError, TooLong, UnknownModel
from quiver.service import Service
from quiver.types import Caller, EmbedRequest, ModelState, ModelStatus, TokenizeRequest

LATEST = ":latest"
"""The tag that a name without one has."""
FAR = "9999-12-31T23:59:59Z"
"""When a loaded model leaves: never."""
ARCHITECTURE = "quiver"
"""Ollama's clients look a model's facts up behind the name of its architecture."""

LIBRARY: Mapping[str, str] = {
    "all-minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:22m": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:33m": "sentence-transformers/all-MiniLM-L12-v2",
    "bge-large": "BAAI/bge-large-en-v1.5",
    "mxbai-embed-large": "mixedbread-ai/mxbai-embed-large-v1",
    "nomic-embed-text": "nomic-ai/nomic-embed-text-v1.5",
    "nomic-embed-text:v1.5": "nomic-ai/nomic-embed-text-v1.5",
    "paraphrase-multilingual": "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    "qwen3-embedding": "Qwen/Qwen3-Embedding-8B",
    "qwen3-embedding:0.6b": "Qwen/Qwen3-Embedding-0.6B",
    "qwen3-embedding:4b": "Qwen/Qwen3-Embedding-4B",
    "qwen3-embedding:8b": "Qwen/Qwen3-Embedding-8B",
    "snowflake-arctic-embed": "Snowflake/snowflake-arctic-embed-l",
    "snowflake-arctic-embed:22m": "Snowflake/snowflake-arctic-embed-xs",
    "snowflake-arctic-embed:33m": "Snowflake/snowflake-arctic-embed-s",
    "snowflake-arctic-embed:110m": "Snowflake/snowflake-arctic-embed-m",
    "snowflake-arctic-embed:137m": "Snowflake/snowflake-arctic-embed-m-long",
    "snowflake-arctic-embed:335m": "Snowflake/snowflake-arctic-embed-l",
}
"""What Ollama calls the models of the catalogue, where no model is served under that very name."""


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embed."""

    model: str | None = None
    input: str | list[str] | None = None
    truncate: bool | None = None
    """None means true: an over-long text is cut."""
    dimensions: int | None = None
    """0, or more than the model has, keeps them all."""
    options: Any = None
    """Not read: they are about Ollama's own runtime."""
    keep_alive: Any = None
    """Not read: a loaded model stays."""


class EmbedReply(msgspec.Struct, omit_defaults=True):
    """Reply of POST /api/embed; durations are nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    """Until the model was there."""
    prompt_eval_count: int = 0


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/embeddings, the older form."""

    model: str | None = None
    prompt: str | None = None
    options: Any = None
    keep_alive: Any = None


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /api/embeddings: the vector as the model computes it, of whatever length."""

    embedding: list[float]


class Details(msgspec.Struct, kw_only=True):
    """What a model is made of; what is not known stays empty."""

    parent_model: str = ""
    format: str
    family: str = ""
    families: list[str] = msgspec.field(default_factory=list)
    parameter_size: str = ""
    quantization_level: str
    context_length: int
    embedding_length: int


class Model(msgspec.Struct, kw_only=True):
    """One model of GET /api/tags; the digest is that of its id and revision."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str]


class ModelsReply(msgspec.Struct):
    """Reply of GET /api/tags."""

    models: list[Model]


class LoadedModel(msgspec.Struct, kw_only=True):
    """One model of GET /api/ps."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class LoadedModelsReply(msgspec.Struct):
    """Reply of GET /api/ps."""

    models: list[LoadedModel]


class ShowBody(msgspec.Struct):
    """Body of POST /api/show."""

    model: str | None = None
    name: str | None = None
    """What older clients call `model`."""


class ShowReply(msgspec.Struct, kw_only=True):
    """Reply of POST /api/show."""

    license: str = ""
    modelfile: str
    parameters: str = ""
    template: str = ""
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]
    modified_at: str


class VersionReply(msgspec.Struct):
    """Reply of GET /api/version: Quiver's own."""

    version: str


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str


async def embed(service: Service, call: Call) -> Reply:
    """Embed, to unit length; nothing to embed only sees to it that the model is loaded."""
    start = time.perf_counter()
    body = decode_json(call, EmbedBody, any_media_type=True)
    request = EmbedRequest(
        inputs=_inputs(body.input),
        model=_id(service, body.model),
        truncate=body.truncate is not False,
        dimensions=_dimensions(service, body),
        normalize=True,
    )
    with _asked_as(body.model):
        if not request.inputs:
            return await _load(service, request, call.caller, EmbedReply(body.model or service.model().id, []))
        embeddings = await service.embed(request, call.caller)
    written = await write_array(in_form(embeddings.vectors, "float"))
    total, timings = time.perf_counter() - start, embeddings.usage.timings
    fields = {
        "model": body.model or embeddings.model,
        "embeddings": written,
        "total_duration": _nanoseconds(total),
        "load_duration": _nanoseconds(total - timings.total),
        "prompt_eval_count": embeddings.usage.num_tokens,
    }
    return Reply(200, write_object(fields), timings=timings)


def _inputs(given: str | Sequence[str] | None) -> Sequence[str]:
    """An empty text alone is no input; in a list, it is one."""
    if isinstance(given, str):
        return [given] if given else []
    return given or []


def _dimensions(service: Service, body: EmbedBody) -> int | None:
    """Cut only what is longer, as Ollama does."""
    asked = body.dimensions or 0
    with suppress(UnknownModel):
        if 0 < service.model(_id(service, body.model)).dimensions <= asked:
            return None
    return asked if asked > 0 else None


async def embed_one(service: Service, call: Call) -> Reply:
    """Embed one text, without scaling its vector."""
    body = decode_json(call, EmbeddingsBody, any_media_type=True)
    request = EmbedRequest(inputs=_inputs(body.prompt), model=_id(service, body.model), truncate=True, normalize=False)
    with _asked_as(body.model):
        if not request.inputs:
            return await _load(service, request, call.caller, EmbeddingsReply([]))
        embeddings = await service.embed(request, call.caller)
    fields = {"embedding": embeddings.vectors[0]}
    return Reply(200, write_object(fields), timings=embeddings.usage.timings)


async def _load(service: Service, request: EmbedRequest, caller: Caller, reply: EmbedReply | EmbeddingsReply) -> Reply:
    """Answer a request that brings no text."""
    await service.tokenize(TokenizeRequest(texts=[""], model=request.model), caller, "embed")
    return Reply(200, msgspec.json.encode(reply))


async def list_models(service: Service, call: Call) -> Reply:
    """List the models that embed."""
    del call
    models = [
        Model(
            name=status.id + LATEST,
            model=status.id + LATEST,
            modified_at=_modified_at(status),
            size=status.num_bytes,
            digest=_digest(status),
            details=_details(status),
            capabilities=["embedding"],
        )
        for status in _embedders(service)
    ]
    return Reply(200, msgspec.json.encode(ModelsReply(models)))


async def list_loaded_models(service: Service, call: Call) -> Reply:
    """List the models that embed and are in memory."""
    del call
    models = [
        LoadedModel(
            name=status.id + LATEST,
            model=status.id + LATEST,
            size=status.num_bytes,
            digest=_digest(status),
            details=_details(status),
            expires_at=FAR,
            size_vram=status.num_bytes if "cuda" in status.backend else 0,
            context_length=status.max_tokens,
        )
        for status in _embedders(service)
        if status.state is ModelState.READY
    ]
    return Reply(200, msgspec.json.encode(LoadedModelsReply(models)))


async def show_model(service: Service, call: Call) -> Reply:
    """Show one model."""
    body = decode_json(call, ShowBody, any_media_type=True)
    asked = body.model or body.name
    with _asked_as(asked):
        status = service.model(_id(service, asked))
    reply = ShowReply(
        modelfile=f"FROM {status.id}\n",
        details=_details(status),
        model_info={
            "general.architecture": ARCHITECTURE,
            "general.basename": status.id,
            f"{ARCHITECTURE}.context_length": status.max_tokens,
            f"{ARCHITECTURE}.embedding_length": status.dimensions,
        },
        capabilities=["embedding"] if status.kind == "embed" else [],
        modified_at=_modified_at(status),
    )
    return Reply(200, msgspec.json.encode(reply))


async def show_version(service: Service, call: Call) -> Reply:
    """Say which Quiver this is."""
    del call
    return Reply(200, msgspec.json.encode(VersionReply(service.version)))


async def greet(service: Service, call: Call) -> Reply:
    """Say what Ollama's clients look for."""
    del service, call
    return Reply(200, b"Ollama is running", media_type=TEXT)


def _id(service: Service, name: str | None) -> str:
    """Return the id of the model that a name with or without a tag means; one that is unknown stays as it is."""
    bare = (name or "").removesuffix(LATEST)
    with suppress(UnknownModel):
        return service.model(bare).id
    return LIBRARY.get(bare.lower(), bare)


@contextmanager
def _asked_as(name: str | None) -> Iterator[None]:
    """Name the model in a refusal as the request did, in the words that Ollama's clients look for."""
    try:
        yield
    except UnknownModel as error:
        raise UnknownModel(f"model '{name}' not found: {error.message}", param="model") from error


def _embedders(service: Service) -> Sequence[ModelStatus]:
    return [status for status in service.models() if status.kind == "embed"]


def _details(status: ModelStatus) -> Details:
    return Details(
        format=status.backend,
        quantization_level=status.dtype,
        context_length=status.max_tokens,
        embedding_length=status.dimensions,
    )


def _digest(status: ModelStatus) -> str:
    return hashlib.sha256(f"{status.id}@{status.revision}".encode()).hexdigest()


def _modified_at(status: ModelStatus) -> str:
    return datetime.fromtimestamp(status.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as Ollama does, with the words that its clients look for."""
    del status
    text = explain(error)
    if isinstance(error, TooLong):
        text = f"the input length exceeds the context length: {text}"
    return msgspec.json.encode(ErrorReply(text))


OLLAMA = Dialect(
    name="ollama",
    routes=[
        Route("POST", "/api/embed", embed, "Embed texts", EmbedBody, EmbedReply),
        Route("POST", "/api/embeddings", embed_one, "Embed one text (older form)", EmbeddingsBody, EmbeddingsReply),
        Route("GET", "/api/tags", list_models, "List models", reply=ModelsReply),
        Route("GET", "/api/ps", list_loaded_models, "List models in memory", reply=LoadedModelsReply),
        Route("POST", "/api/show", show_model, "Show one model", ShowBody, ShowReply),
        Route("GET", "/api/version", show_version, "Show the version", reply=VersionReply, public=True),
        Route("GET", "/", greet, "Say “Ollama is running”", media_type=TEXT, public=True, at_root=False),
    ],
    render_error=render_error,
    statuses={Overloaded: 503},
    error=ErrorReply,
)
