"""Texts and documents to try a model with, and how fast it is: what a person looks at, not what a program needs."""

import asyncio
import random
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec
import numpy as np

from quiver.admin.office import Office, written
from quiver.api.call import Call, Reply, decode_json
from quiver.engine.pooling import normalise
from quiver.errors import QuiverError, Unavailable
from quiver.service import Service
from quiver.types import Caller, EmbedRequest, RerankRequest

MAX_TEXTS = 32
MAX_DOCUMENTS = 100
SHOWN_NUMBERS = 64
"""Of each vector."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=20_000)]


class EmbedBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/try/embed."""

    texts: Annotated[list[Text], msgspec.Meta(min_length=1, max_length=MAX_TEXTS)]
    model: str | None = None
    task: str | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None


class EmbedReply(msgspec.Struct, kw_only=True):
    """Reply of POST /api/try/embed: how alike the texts are, and the beginning of each vector."""

    model: str
    dimensions: int
    tokens: int
    cached: int
    truncated: list[int]
    seconds: float
    similarities: list[list[float]]
    vectors: list[list[float]]


class RerankBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/try/rerank."""

    query: Text
    documents: Annotated[list[Text], msgspec.Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = None


class Hit(msgspec.Struct):
    """One document's place, by its index."""

    index: int
    score: float


class RerankReply(msgspec.Struct, kw_only=True):
    """Reply of POST /api/try/rerank: the best first."""

    model: str
    scored_by: str
    tokens: int
    seconds: float
    hits: list[Hit]


class StepBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/try/benchmark: one step, at one number of requests at a time."""

    model: str | None = None
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    texts: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """In each request."""
    words: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    """In each text."""
    seconds: Annotated[float, msgspec.Meta(ge=0.1, le=20)] = 3.0


class Step(msgspec.Struct, kw_only=True):
    """Reply of POST /api/try/benchmark; latencies in seconds."""

    concurrency: int
    requests: int
    refused: int
    seconds: float
    texts_per_second: float
    tokens_per_second: float
    p50: float
    p95: float
    p99: float


async def embed(office: Office, service: Service, call: Call) -> Reply:
    """Compare texts by their vectors."""
    del office
    body, start = decode_json(call, EmbedBody), time.perf_counter()
    request = EmbedRequest(
        inputs=body.texts, model=body.model, task=body.task, dimensions=body.dimensions, truncate=True
    )
    found = await service.embed(request, call.caller)
    seconds = time.perf_counter() - start
    unit = normalise(found.vectors)  # (B, D)
    reply = EmbedReply(
        model=found.model,
        dimensions=found.vectors.shape[1],
        tokens=found.usage.num_tokens,
        cached=len(found.usage.cached),
        truncated=list(found.usage.truncated),
        seconds=seconds,
        similarities=np.round((unit @ unit.T).astype(np.float64), 4).tolist(),
        vectors=np.round(found.vectors[:, :SHOWN_NUMBERS].astype(np.float64), 5).tolist(),
    )
    return replace(written(reply), timings=found.usage.timings)


async def rerank(office: Office, service: Service, call: Call) -> Reply:
    """Put documents in the order of their relevance to a query."""
    del office
    body, start = decode_json(call, RerankBody), time.perf_counter()
    request = RerankRequest(query=body.query, documents=body.documents, model=body.model, truncate=True)
    found = await service.rerank(request, call.caller)
    reply = RerankReply(
        model=found.model,
        scored_by=found.scored_by,
        tokens=found.usage.num_tokens,
        seconds=time.perf_counter() - start,
        hits=[Hit(*pair) for pair in zip(found.order.tolist(), found.scores.tolist(), strict=True)],
    )
    return replace(written(reply), timings=found.usage.timings)


# Benchmark


_TEXT = (
    "the of and to in is that it was for on are with as they at be this from have or by one had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "river mountain engine library vector question answer market science music history language garden kitchen bridge"
)
WORDS = tuple(_TEXT.split())


@dataclass(slots=True)
class _Tally:
    latencies: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0


async def benchmark(office: Office, service: Service, call: Call) -> Reply:
    """Measure one step: texts that nobody has sent before, so many requests at a time, for so many seconds.

    It costs nothing of a quota. Whoever gives up waiting ends it.
    """
    del office
    body, tally = decode_json(call, StepBody), _Tally()
    await service.engine.measure(_request(body), call.caller)  # loads the model, or says why not
    start = time.perf_counter()
    end = start + body.seconds
    async with asyncio.TaskGroup() as clients:
        for number in range(body.concurrency):
            clients.create_task(_ask(service, body, Caller(f"benchmark {number}", call.caller.deadline), tally, end))
    seconds, latencies = time.perf_counter() - start, tally.latencies
    p50, p95, p99 = np.quantile(latencies, (0.5, 0.95, 0.99)).tolist() if latencies else (0.0, 0.0, 0.0)
    return written(
        Step(
            concurrency=body.concurrency,
            requests=len(latencies),
            refused=tally.refused,
            seconds=seconds,
            texts_per_second=body.texts * len(latencies) / seconds,
            tokens_per_second=tally.tokens / seconds,
            p50=p50,
            p95=p95,
            p99=p99,
        )
    )


async def _ask(service: Service, body: StepBody, caller: Caller, tally: _Tally, end: float) -> None:
    """Send one request after another, as one client does."""
    while (start := time.perf_counter()) < end:
        try:
            usage = await service.engine.measure(_request(body), caller)
        except Unavailable as error:
            tally.refused += 1
            await asyncio.sleep(min(error.retry_after_seconds, max(0.0, end - time.perf_counter())))
        except QuiverError:
            tally.refused += 1
            return
        else:
            tally.latencies.append(time.perf_counter() - start)
            tally.tokens += usage.num_tokens


def _request(body: StepBody) -> EmbedRequest:
    """Make texts of common words, so that each word is about a token."""
    texts = [" ".join(random.choices(WORDS, k=body.words)) for _ in range(body.texts)]  # noqa: S311  no secret
    return EmbedRequest(inputs=texts, model=body.model, truncate=True)
