"""What RunPod's worker for embeddings reads and writes: a job's input, and its output.

https://github.com/runpod-workers/worker-infinity-embedding
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Literal

import msgspec

from quiver.api.call import Call, decode_json, status_of
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import InvalidInput, QuiverError, Refused
from quiver.service import Service
from quiver.types import EmbedRequest, ModelStatus, Priority, RerankRequest, Usage


class EmbedInput(msgspec.Struct, kw_only=True):
    """Texts to embed; they are cut to what the model reads."""

    input: str | list[str] | None = None
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None


class JobInput(EmbedInput, kw_only=True):
    """What a job does: ranks `docs`, or embeds `input`, or follows `openai_route`."""

    query: str | None = None
    docs: list[str] | None = None
    return_docs: bool | None = None
    openai_route: str | None = None
    openai_input: EmbedInput | None = None


class WorkerError(msgspec.Struct):
    """The output of a job that has failed, as the worker writes it."""

    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int


async def work(service: Service, call: Call, priority: Priority) -> bytes:
    """Do what a job's input says; gives its output."""
    job = decode_json(call, JobInput)
    match job.openai_route:
        case None if job.query:
            return await _rank(service, call, priority, job)
        case None:
            return await _embed(service, call, priority, job)
        case "/v1/models":
            return _list(service.models())
        case "/v1/embeddings":
            return b"[%b]" % await _embed(service, call, priority, job.openai_input or EmbedInput())
        case route:
            message = f"Invalid OpenAI Route: {route}; openai_route is /v1/models or /v1/embeddings"
            raise InvalidInput(message, param="openai_route")


async def _embed(service: Service, call: Call, priority: Priority, given: EmbedInput) -> bytes:
    if given.input is None:
        raise InvalidInput("Invalid input: give texts as `input`, or `query` and `docs`, or an `openai_route`")
    request = EmbedRequest(
        inputs=[given.input] if isinstance(given.input, str) else given.input,
        model=given.model,
        dimensions=given.dimensions or None,
        truncate=True,
        priority=priority,
    )
    embeddings = await service.embed(request, call.caller)
    vectors = in_form(embeddings.vectors, given.encoding_format or "float")
    return write_object(
        {
            "object": "list",
            "data": await write_array(vectors, lambda i, v: {"object": "embedding", "embedding": v, "index": i}),
            "model": embeddings.model,
            "usage": _usage(embeddings.usage),
        }
    )


async def _rank(service: Service, call: Call, priority: Priority, job: JobInput) -> bytes:
    documents = job.docs
    if documents is None:
        raise InvalidInput("give the documents to rank as `docs`", param="docs")
    request = RerankRequest(
        query=job.query or "", documents=documents, model=job.model, truncate=True, priority=priority
    )
    ranking = await service.rerank(request, call.caller)
    pairs = zip(ranking.order.tolist(), ranking.scores, strict=True)
    results = [
        {"relevance_score": score, "index": i} | ({"document": documents[i]} if job.return_docs else {})
        for i, score in pairs
    ]
    return write_object({"model": ranking.model, "results": await write_array(results), "usage": _usage(ranking.usage)})


def _usage(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.num_tokens, "total_tokens": usage.num_tokens}


def _list(models: Sequence[ModelStatus]) -> bytes:
    data = [
        {
            "id": model.id,
            "stats": {},
            "object": "model",
            "owned_by": "infinity",
            "created": model.created,
            "backend": model.backend,
        }
        for model in models
    ]
    return write_object({"data": data, "object": "list"})


def error_object(error: QuiverError) -> WorkerError:
    """The SDK hands out nothing but a job's output, so the reason stands there as well."""
    if isinstance(error, Refused):
        return WorkerError("error", error.message, "BadRequestError", error.param, HTTPStatus.BAD_REQUEST)
    return WorkerError("error", error.message, "InternalServerError", error.param, status_of(error))
