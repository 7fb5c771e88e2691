"""Documents by their relevance to a query, with whatever a model can: reading both texts, or comparing vectors."""

import asyncio
from dataclasses import dataclass

import numpy as np

from quiver.engine.prompts import choose_prompt
from quiver.engine.replicas import Replica
from quiver.engine.runner import Computed, Form, Runner
from quiver.engine.scoring import cosines, max_similarities, probabilities
from quiver.types import Caller, Floats, Pair, RerankRequest, ScoredBy, Usage


@dataclass(frozen=True, slots=True)
class Scored:
    """A score for each document, in the order in which they were sent."""

    scores: Floats  # (N,)
    scored_by: ScoredBy
    usage: Usage


async def score(runner: Runner, replica: Replica, request: RerankRequest, caller: Caller) -> Scored:
    """Score the documents in the model's own way."""
    match replica.model.spec.kind:
        case "rerank":
            return await _score_pairs(runner, replica, request, caller)
        case "multi_vector":
            return await _score_tokens(runner, replica, request, caller)
        case _:
            return await _score_vectors(runner, replica, request, caller)


async def _score_pairs(runner: Runner, replica: Replica, request: RerankRequest, caller: Caller) -> Scored:
    pairs = [Pair(request.query, document) for document in request.documents]
    computed = await runner.run(replica, request, pairs, caller)
    logits = np.stack(computed.results)  # (N, L)
    scores = logits if request.raw_scores else probabilities(logits)
    return Scored(scores[:, -1], "cross-encoder", computed.usage)


async def _score_vectors(runner: Runner, replica: Replica, request: RerankRequest, caller: Caller) -> Scored:
    query, documents = await _run_roles(runner, replica, request, caller)
    scores = cosines(query.results[0], np.stack(documents.results))
    return Scored(scores, "cosine", _together(query.usage, documents.usage))


async def _score_tokens(runner: Runner, replica: Replica, request: RerankRequest, caller: Caller) -> Scored:
    query, documents = await _run_roles(runner, replica, request, caller)
    ignored = replica.model.tokenizer.punctuation()
    kept = [
        vectors[~np.isin(encoding.ids, ignored)]
        for vectors, encoding in zip(documents.results, documents.encodings, strict=True)
    ]
    return Scored(max_similarities(query.results[0], kept), "maxsim", _together(query.usage, documents.usage))


async def _run_roles(
    runner: Runner, replica: Replica, request: RerankRequest, caller: Caller
) -> tuple[Computed, Computed]:
    """Compute query and documents side by side, each with the prompt that the model has for its role."""
    spec = replica.model.spec
    query, document = (choose_prompt(spec.prompts, task=task) for task in ("query", "document"))
    return await asyncio.gather(
        runner.run(replica, request, [request.query], caller, Form(query, fill=spec.query_tokens)),
        runner.run(replica, request, request.documents, caller, Form(document)),
    )


def _together(query: Usage, documents: Usage) -> Usage:
    """Add up what two parts of a request, computed side by side, were worth; documents count from 0."""
    longest = max(query.timings, documents.timings, key=lambda timings: timings.total)
    return Usage(query.num_tokens + documents.num_tokens, documents.truncated, longest, documents.cached)
