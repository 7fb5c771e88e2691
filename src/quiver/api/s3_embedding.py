"""The API of AI Embedding Inference Server, known by its telemetry as s3-embedding: a fork of Hugging Face's TEI.

Its inputs, options and words for errors are TEI's, its reply is its own.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from quiver.api.call import Call, Dialect, Reply, Route, decode_json, explain
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import (
    DeadlineExceeded,
    Forbidden,
    InsufficientQuota,
    InvalidInput,
    InvalidJson,
    LaneDied,
    Overloaded,
    QuiverError,
    RateLimited,
    Refused,
    TooManyInputs,
    Unauthorized,
    Unavailable,
)
from quiver.service import Service
from quiver.types import EmbedRequest, Timings

ErrorType = Literal["backend", "empty", "overloaded", "unauthorized", "unhealthy", "validation"]


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /api/v1/embed."""

    inputs: str | list[str]
    model: str | None = None
    """Not its own: its servers have one model."""
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    """The end that is cut; None means the right one."""
    prompt_name: str | None = None
    normalize: bool | None = True
    dimensions: int | None = None


class Embedding(msgspec.Struct):
    """One vector, and which of the inputs it is of."""

    embedding: list[float]
    index: int


class Usage(msgspec.Struct):
    """What the request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class Stages(msgspec.Struct):
    """Where the time went, each with its unit."""

    tokenization: str
    queue: str
    inference: str


class EmbedReply(msgspec.Struct):
    """Reply of POST /api/v1/embed."""

    data: list[Embedding]
    usage: Usage
    timings: Stages


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str
    error_type: ErrorType


class Empty(InvalidInput):
    """There is nothing to compute."""


async def embed(service: Service, call: Call) -> Reply:
    """Embed; to unit length, unless told otherwise."""
    body = decode_json(call, EmbedBody)
    request = EmbedRequest(
        inputs=_inputs(body.inputs),
        model=body.model or None,
        truncate=body.truncate,
        truncate_side="left" if (body.truncation_direction or "").lower() == "left" else "right",
        prompt_name=body.prompt_name or None,
        normalize=body.normalize is not False,
        dimensions=body.dimensions,
    )
    embeddings = await service.embed(request, call.caller)
    usage, vectors = embeddings.usage, in_form(embeddings.vectors, "float")
    fields = {
        "data": await write_array(vectors, lambda i, v: {"embedding": v, "index": i}),
        "usage": msgspec.json.encode(Usage(usage.num_tokens, usage.num_tokens)),
        "timings": msgspec.json.encode(_stages(usage.timings)),
    }
    return Reply(200, write_object(fields), timings=usage.timings)


def _inputs(given: str | Sequence[str]) -> Sequence[str]:
    inputs = [given] if isinstance(given, str) else given
    empty = next((f"inputs[{i}]" for i, text in enumerate(inputs) if not text), None if inputs else "inputs")
    if empty:
        raise Empty("there is nothing to embed: send a text", param=empty)
    return inputs


def _stages(timings: Timings) -> Stages:
    inference = timings.compute - timings.queue
    return Stages(with_unit(timings.encode), with_unit(timings.queue), with_unit(inference))


def with_unit(seconds: float) -> str:
    """Write a duration in the largest unit that makes it 1 or more, as Rust does: `35ms`, `120µs`, `1.25s`."""
    nanoseconds = max(0, round(seconds * 1e9))
    units = {"s": 10**9, "ms": 10**6, "µs": 10**3, "ns": 1}
    unit = next((unit for unit, size in units.items() if nanoseconds >= size), "ns")
    return f"{round(nanoseconds / units[unit], 3):g}{unit}"


STATUSES: Mapping[type[QuiverError], int] = {
    InvalidInput: 422,
    InvalidJson: 400,
    Empty: 400,
    TooManyInputs: 413,
}
ERROR_TYPES: Mapping[type[QuiverError], ErrorType] = {
    Empty: "empty",
    Unauthorized: "unauthorized",
    Refused: "validation",
    Forbidden: "unauthorized",
    Overloaded: "overloaded",
    RateLimited: "overloaded",
    InsufficientQuota: "overloaded",
    DeadlineExceeded: "overloaded",
    Unavailable: "unhealthy",
    LaneDied: "unhealthy",
    QuiverError: "backend",
}
"""The nearest ancestor counts."""


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as this API does."""
    del status
    kind = next(ERROR_TYPES[cls] for cls in type(error).__mro__ if cls in ERROR_TYPES)
    return msgspec.json.encode(ErrorReply(explain(error), kind))


S3_EMBEDDING = Dialect(
    name="s3_embedding",
    routes=[Route("POST", "/api/v1/embed", embed, "Embed texts", EmbedBody, EmbedReply)],
    render_error=render_error,
    statuses=STATUSES,
    error=ErrorReply,
)
