"""The FastEmbed Query API: one short text, one vector, as soon as possible.

Its document shows the request and the reply of a success; the shapes of errors and health are ours.
"""

import msgspec

from quiver.api.call import Call, Dialect, Reply, Route, decode_json, explain, known_of
from quiver.api.vectors import write_object
from quiver.errors import QuiverError
from quiver.service import Service
from quiver.types import EmbedRequest


class EmbedBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embed."""

    text: str
    normalize: bool | None = True
    model: str | None = None
    """Not its own: its servers have one model."""
    truncate: bool | None = None
    """Not its own: cut an over-long text instead of refusing it."""


class EmbedReply(msgspec.Struct):
    """Reply of POST /v1/embed; the tokens are the text's own, without those that the model reads around it."""

    embedding: list[float]
    model: str
    tokens: int
    cached: bool
    latency_ms: float


class HealthReply(msgspec.Struct):
    """Reply of GET /health."""

    status: str
    model: str
    version: str


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str
    code: str


async def embed(service: Service, call: Call) -> Reply:
    """Embed one text; to unit length, unless told otherwise."""
    body = decode_json(call, EmbedBody)
    request = EmbedRequest(
        inputs=[body.text],
        model=body.model or None,
        truncate=body.truncate,
        normalize=body.normalize is not False,
    )
    embeddings = await service.embed(request, call.caller)
    usage, status = embeddings.usage, service.model(embeddings.model)
    fields = {
        "embedding": embeddings.vectors[0],
        "model": _bare(status.id),
        "tokens": usage.num_tokens - status.num_special_tokens,
        "cached": bool(usage.cached),
        "latency_ms": round(usage.timings.total * 1000, 3),
    }
    known = known_of(embeddings)
    return Reply(200, write_object(fields), timings=usage.timings, known=known, timed="latency_ms")


async def health(service: Service, call: Call) -> Reply:
    """Tell whether a request would be answered now."""
    del call
    try:
        await service.check_ready()
    except QuiverError:
        return _health(service, 503, "unhealthy")
    return _health(service, 200, "healthy")


def _health(service: Service, status: int, word: str) -> Reply:
    return Reply(status, msgspec.json.encode(HealthReply(word, _bare(service.model().id), service.version)))


def _bare(model: str) -> str:
    """Name a model without its owner, as this API does."""
    return model.rpartition("/")[2]


def render_error(status: int, error: QuiverError) -> bytes:
    """Say what is wrong, with a stable word for programs."""
    del status
    return msgspec.json.encode(ErrorReply(explain(error), error.code))


FASTEMBED_QUERY = Dialect(
    name="fastembed_query",
    routes=[
        Route("POST", "/v1/embed", embed, "Embed a text", EmbedBody, EmbedReply, is_repeatable=True),
        Route("GET", "/health", health, "Tell whether a request would be answered", reply=HealthReply, public=True),
    ],
    render_error=render_error,
    error=ErrorReply,
)
