"""OpenAI's embeddings and models, and their Azure form.

https://platform.openai.com/docs/api-reference/embeddings
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Literal, cast

import msgspec

from quiver import types
from quiver.api.call import Call, Dialect, Reply, Route, decode_json, known_of
from quiver.api.openai_batches import BATCHES
from quiver.api.openai_files import FILES
from quiver.api.rate_headers import go_duration
from quiver.api.vectors import in_form, write_array, write_object
from quiver.capacity import Load, Places, Queue
from quiver.errors import EngineError, InsufficientQuota, InvalidInput, Overloaded, QuiverError, Unavailable
from quiver.service import Service
from quiver.types import Embeddings, EmbedRequest, Input, ModelStatus


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings: a text, texts, the token ids of a text, or the token ids of texts."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    truncate: bool | None = None
    """Not OpenAI's: cut an over-long input instead of refusing it."""
    prompt_name: str | None = None
    """Not OpenAI's: the model's own prompt of this name before each text."""
    input_type: str | None = None
    """Not OpenAI's: what the texts are for (query, document): the prompt for that, where the model has one."""
    token_encoding: Literal["native", "cl100k"] | None = None
    """Not OpenAI's: whose token ids the input has, the model's own or OpenAI's; None leaves it to the server."""


class Embedding(msgspec.Struct):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(msgspec.Struct):
    """What the request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int
    truncated_inputs: list[int] | msgspec.UnsetType = msgspec.UNSET
    """Not OpenAI's: the inputs that were cut, if any."""


class EmbeddingsReply(msgspec.Struct):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(msgspec.Struct):
    """One model; what stands behind `owned_by` is Quiver's own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    kind: str
    dimensions: int
    max_tokens: int
    prompts: list[str]
    backend: str
    dtype: str
    batch_invariant: bool


class ModelsReply(msgspec.Struct):
    """Reply of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Error(msgspec.Struct):
    """What went wrong: a sentence, the kind, the field, a stable word."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: Error


async def create_embeddings(service: Service, call: Call) -> Reply:
    """Embed."""
    body = decode_json(call, EmbeddingsBody)
    request = EmbedRequest(
        inputs=read_inputs(body.input),
        ids_of=body.token_encoding or "configured",
        model=body.model or call.params.get("deployment"),
        dimensions=body.dimensions,
        truncate=body.truncate,
        prompt_name=body.prompt_name,
        task=body.input_type,
    )
    embeddings = await service.embed(request, call.caller)
    timings = embeddings.usage.timings
    written = await render_embeddings(embeddings, as_base64=body.encoding_format == "base64")
    processing = {"openai-processing-ms": str(round(timings.total * 1000))}
    places = call.places and replace(call.places, taken=max(0, call.places.taken - 1))  # it gives its own place back
    headers = {**processing, **_rate_limits(service.queue(embeddings.model), places, timings.total)}
    return Reply(200, written, headers=headers, timings=timings, known=known_of(embeddings))


def refusal_headers(error: QuiverError, load: Load) -> Mapping[str, str]:
    """Say what is left when too much has come: of what the request was refused for, nothing."""
    if not isinstance(error, Overloaded):
        return {}
    queue, places, seconds = load.queue, load.places, error.retry_after_seconds
    if places is None or places.taken < places.limit:
        queue = replace(queue, tokens=queue.capacity_tokens, seconds=seconds)
    return _rate_limits(queue, places, seconds)


def _rate_limits(queue: Queue, places: Places | None, seconds: float) -> dict[str, str]:
    """Say what is left of what a client may send: tokens that may wait, and requests at work where they are bounded.

    `seconds` is how long it takes, at least, until those that are at work have ended.
    """
    headers = {
        "x-ratelimit-limit-tokens": str(queue.capacity_tokens),
        "x-ratelimit-remaining-tokens": str(max(0, queue.capacity_tokens - queue.tokens)),
        "x-ratelimit-reset-tokens": go_duration(queue.seconds),
    }
    if places:
        headers |= {
            "x-ratelimit-limit-requests": str(places.limit),
            "x-ratelimit-remaining-requests": str(places.limit - places.taken),
            "x-ratelimit-reset-requests": go_duration(max(queue.seconds, seconds) if places.taken else 0),
        }
    return headers


def read_inputs(given: str | list[str | int | list[int]]) -> Sequence[Input]:
    """Tell the four forms apart; a mixture is refused."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidInput("input mixes texts and token ids: send only one kind", param="input")
    return [cast(list[int], given)] if kinds == {int} else cast(list[Input], given)


async def render_embeddings(embeddings: Embeddings, *, as_base64: bool) -> bytes:
    """Write vectors; base64 is what the SDK asks for on every call."""
    vectors = in_form(embeddings.vectors, "base64" if as_base64 else "float")
    return write_object(
        {
            "object": "list",
            "data": await write_array(vectors, lambda i, v: {"object": "embedding", "index": i, "embedding": v}),
            "model": embeddings.model,
            "usage": msgspec.json.encode(_usage(embeddings.usage)),
        }
    )


def _usage(usage: types.Usage) -> Usage:
    truncated = list(usage.truncated) or msgspec.UNSET
    return Usage(usage.num_tokens, usage.num_tokens, truncated)


async def list_models(service: Service, call: Call) -> Reply:
    """List what is served here."""
    del call
    return Reply(200, msgspec.json.encode(ModelsReply("list", [_model(status) for status in service.models()])))


async def retrieve_model(service: Service, call: Call) -> Reply:
    """Show one model; its id may hold slashes, percent-encoded or not."""
    return Reply(200, msgspec.json.encode(_model(service.model(call.params["id"]))))


def _model(status: ModelStatus) -> Model:
    return Model(
        id=status.id,
        object="model",
        created=status.created,
        owned_by=status.id.partition("/")[0] if "/" in status.id else "local",
        state=status.state,
        kind=status.kind,
        dimensions=status.dimensions,
        max_tokens=status.max_tokens,
        prompts=list(status.prompts),
        backend=status.backend,
        dtype=status.dtype,
        batch_invariant=status.batch_invariant,
    )


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as OpenAI does: the SDK chooses its exception by status and shows the rest."""
    return msgspec.json.encode(ErrorReply(Error(error.message, _error_type(status, error), error.param, error.code)))


def _error_type(status: int, error: QuiverError) -> str:
    if isinstance(error, InsufficientQuota):
        return error.code
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if isinstance(error, Unavailable | EngineError) or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    return "invalid_request_error"


def _routes(base: str) -> list[Route]:
    return [
        Route(
            "POST",
            f"{base}/embeddings",
            create_embeddings,
            "Embed texts",
            EmbeddingsBody,
            EmbeddingsReply,
            is_repeatable=True,
        ),
        Route("GET", f"{base}/models", list_models, "List models", reply=ModelsReply),
        Route("GET", f"{base}/models/{{id:path}}", retrieve_model, "Show one model", reply=Model),
    ]


AZURE = Route(
    "POST",
    "/deployments/{deployment:path}/embeddings",
    create_embeddings,
    "Embed texts (Azure's form)",
    EmbeddingsBody,
    EmbeddingsReply,
)

OPENAI = Dialect(
    name="openai",
    routes=[*_routes("/v1"), *_routes(""), AZURE, *FILES, *BATCHES],
    render_error=render_error,
    error=ErrorReply,
    refusal_headers=refusal_headers,
)
