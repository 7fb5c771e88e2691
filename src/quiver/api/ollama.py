"""Ollama's embeddings and list of models.

https://github.com/ollama/ollama/blob/main/docs/api.md
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from quiver.api.call import Call, Dialect, Reply, Route, decode_json, explain
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import Overloaded, QuiverError, UnknownModel
from quiver.service import Service
from quiver.types import EmbedRequest, ModelState, ModelStatus, TokenizeRequest

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


class EmbedReply(msgspec.Struct, kw_only=True, omit_defaults=True):
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
    families: list[str] = []
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
    """Embed, to unit length; nothing to embed only sees to it that the model is there."""
    start = time.perf_counter()
    body = decode_json(call, EmbedBody, any_media_type=True)
    inputs = [body.input] if isinstance(body.input, str) else body.input
    name = _name(service, body.model)
    with _asked_as(body.model):
        if not inputs or inputs == [""] == [body.input]:
            await service.tokenize(TokenizeRequest(texts=[""], model=name))
            return Reply(200, msgspec.json.encode(EmbedReply(model=body.model or name, embeddings=[])))
        request = EmbedRequest(
            inputs=inputs,
            model=name,
            truncate=body.truncate is not False,
            dimensions=_dimensions(service, name, body.dimensions),
            normalize=True,
        )
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
