"""Hugging Face's Text Embeddings Inference: every route of its HTTP API.

https://huggingface.github.io/text-embeddings-inference/
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Any

import msgspec
import numpy as np

from quiver.api import tei_wire as wire
from quiver.api.call import TEXT, Call, Dialect, Handler, Reply, Route, decode_json, refuse
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import QuiverError, TooManyInputs, UnknownModel
from quiver.service import Service
from quiver.types import (
    ClassifyRequest,
    DecodeRequest,
    EmbedRequest,
    Floats,
    Input,
    ModelStatus,
    Pair,
    RerankRequest,
    SimilarityRequest,
    SparseVector,
    Token,
    TokenizeRequest,
    Usage,
)

# Vectors


async def embed(service: Service, call: Call) -> Reply:
    """Turn texts into vectors; of unit length, unless told otherwise."""
    body = decode_json(call, wire.EmbedBody)
    status = _asked(service, body.model)
    inputs = await _inputs(service, call, status, body)
    request = EmbedRequest(
        inputs=inputs,
        prompt_name=body.prompt_name,
        normalize=body.normalize is not False,
        dimensions=body.dimensions,
        **_options(status, body),
    )
    embeddings = await service.embed(request, call.caller)
    written = await write_array(in_form(embeddings.vectors, "float"))
    return _reply(written, status, embeddings.usage, _length(inputs))


async def embed_all(service: Service, call: Call) -> Reply:
    """Turn each token of texts into a vector."""
    body = decode_json(call, wire.InputsBody)
    status = _asked(service, body.model)
    inputs = await _inputs(service, call, status, body)
    request = EmbedRequest(inputs=inputs, prompt_name=body.prompt_name, **_options(status, body))
    embeddings = await service.embed_tokens(request, call.caller)
    parts = []
    for tokens in embeddings.vectors:
        parts.append(await write_array(list(tokens)))
        await asyncio.sleep(0)  # one input is as much to write as many vectors
    return _reply(_joined(parts), status, embeddings.usage, _length(inputs))


async def embed_sparse(service: Service, call: Call) -> Reply:
    """Turn texts into weights of words."""
    body = decode_json(call, wire.InputsBody)
    status = _asked(service, body.model)
    inputs = await _inputs(service, call, status, body)
    request = EmbedRequest(inputs=inputs, prompt_name=body.prompt_name, **_options(status, body))
    embeddings = await service.embed_sparse(request, call.caller)
    written = await write_array(embeddings.vectors, lambda _, vector: _weights(vector))
    return _reply(written, status, embeddings.usage, _length(inputs))


def _weights(vector: SparseVector) -> list[dict[str, Any]]:
    return [{"index": i, "value": v} for i, v in zip(vector.indices, vector.values, strict=True)]


async def _inputs(service: Service, call: Call, status: ModelStatus, body: wire.InputsBody) -> Sequence[Input]:
    """Read the forms of `inputs`; ids become texts again where a prompt is to stand before them."""
    inputs = wire.read_inputs(body.inputs)
    given = [item for item in inputs if not isinstance(item, str)]
    if not body.prompt_name or not given:
        return inputs
    texts = iter(await service.decode(DecodeRequest(ids=given, model=status.id), call.caller, "embed"))
    return [item if isinstance(item, str) else next(texts) for item in inputs]


async def embed_as_openai(service: Service, call: Call) -> Reply:
    """Answer in OpenAI's shape, but for errors: those are flat."""
    try:
        return await _embed_as_openai(service, call)
    except QuiverError as error:
        return refuse(_AS_OPENAI, error)


async def _embed_as_openai(service: Service, call: Call) -> Reply:
    body = decode_json(call, wire.OpenAIBody)
    status = _asked(service, body.model)
    inputs = wire.read_inputs(body.input)
    request = EmbedRequest(inputs=inputs, model=status.id, dimensions=body.dimensions, normalize=True)
    embeddings = await service.embed(request, call.caller)
    usage, vectors = embeddings.usage, in_form(embeddings.vectors, body.encoding_format or "float")
    written = write_object(
        {
            "object": "list",
            "data": await write_array(vectors, lambda i, v: {"object": "embedding", "embedding": v, "index": i}),
            "model": embeddings.model,
            "usage": {"prompt_tokens": usage.num_tokens, "total_tokens": usage.num_tokens},
        }
    )
    return _reply(written, status, usage, _length(inputs))


# Scores


async def rerank(service: Service, call: Call) -> Reply:
    """Put texts in the order of their relevance; of equal ones, the last comes first, as in TEI."""
    body = decode_json(call, wire.RerankBody)
    status = _asked(service, body.model)
    if not body.texts:
        raise wire.Empty("`texts` cannot be empty")
    if not body.query and not all(body.texts):
        raise wire.Empty("`query` and a text cannot both be empty")
    request = RerankRequest(
        query=body.query, documents=body.texts, raw_scores=bool(body.raw_scores), **_options(status, body)
    )
    ranking = await service.rerank(request, call.caller)
    best = sorted(zip(ranking.scores, ranking.order, strict=True), reverse=True)
    texts = body.texts if body.return_text else None
    written = await write_array(best, lambda _, pair: _rank(pair[1], pair[0], texts))
    characters = len(body.query) * len(body.texts) + _length(body.texts)
    return _reply(written, status, ranking.usage, characters)


def _rank(index: int, score: np.float32, texts: Sequence[str] | None) -> dict[str, Any]:
    text = {"text": texts[index]} if texts else {}
    return {"index": index, **text, "score": score}


async def predict(service: Service, call: Call) -> Reply:
    """Give texts or pairs a score for each label, the best first."""
    body = decode_json(call, wire.PredictBody)
    status = _asked(service, body.model)
    inputs, asked = wire.read_pairs(body.inputs), body.parameters or wire.PredictParameters()
    function = asked.function_to_apply
    request = ClassifyRequest(
        inputs=inputs,
        raw_scores=bool(body.raw_scores) or function == "none",
        activation=None if function == "none" else function,
        **_options(status, body),
    )
    classified = await service.classify(request, call.caller)
    written = await write_array(
        list(classified.scores), lambda _, scores: _predictions(classified.labels, scores)[: asked.top_k]
    )
    if body.parameters is None and not wire.is_batch(body.inputs):
        written = written[1:-1]  # huggingface_hub, which sends parameters, reads the first of several
    characters = sum(len(i.query) + len(i.document) if isinstance(i, Pair) else len(i) for i in inputs)
    return _reply(written, status, classified.usage, characters)


def _predictions(labels: Sequence[str], scores: Floats) -> list[dict[str, Any]]:
    return [{"score": scores[i], "label": labels[i]} for i in np.argsort(scores, kind="stable")[::-1]]


async def compare(service: Service, call: Call) -> Reply:
    """Give the cosine of each sentence with the source."""
    body = decode_json(call, wire.SimilarityBody)
    status = _asked(service, body.model)
    source, sentences = body.inputs.source_sentence, body.inputs.sentences
    if not sentences:
        raise wire.Empty("`inputs.sentences` cannot be empty")
    if not source or not all(sentences):
        raise wire.Empty("`inputs` cannot be empty")
    parameters = body.parameters or wire.SimilarityParameters()
    request = SimilarityRequest(
        source=source,
        texts=sentences,
        prompt_name=parameters.prompt_name,
        **_options(status, parameters),
    )
    similarities = await service.compare(request, call.caller)
    characters = len(source) + _length(sentences)
    written = await write_array(list(similarities.scores))
    return _reply(written, status, similarities.usage, characters)


# Tokens


async def tokenize(service: Service, call: Call) -> Reply:
    """Cut texts into tokens; their places are counted in bytes."""
    body = decode_json(call, wire.TokenizeBody)
    status = _asked(service, body.model)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts or not all(texts):
        raise wire.Empty("`inputs` cannot be empty")
    request = TokenizeRequest(
        texts=texts,
        special_tokens=body.add_special_tokens is not False,
        prompt_name=body.prompt_name,
        model=status.id,
    )
    cut = await service.tokenize(request, call.caller)
    pairs = list(zip(cut.texts, cut.tokens, strict=True))
    return Reply(200, await write_array(pairs, lambda _, pair: _tokens(*pair)))


def _tokens(text: str, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    places = [0, *accumulate(len(character.encode()) for character in text)]
    return [
        {
            "id": token.id,
            "text": token.text,
            "special": token.special,
            "start": None if token.start is None else places[token.start],
            "stop": None if token.stop is None else places[token.stop],
        }
        for token in tokens
    ]


async def decode(service: Service, call: Call) -> Reply:
    """Turn token ids back into texts."""
    body = decode_json(call, wire.DecodeBody)
    status = _asked(service, body.model)
    request = DecodeRequest(
        ids=wire.read_ids(body.ids),
        special_tokens=body.skip_special_tokens is False,
        model=status.id,
    )
    return Reply(200, msgspec.json.encode(await service.decode(request, call.caller)))


# Whatever it is


async def answer(service: Service, call: Call) -> Reply:
    """Do what the body looks like; of mere inputs, what the model is for."""
    body = decode_json(call, wire.AnyBody)
    if body.query is not None or body.texts is not None:
        return await rerank(service, call)
    if isinstance(body.inputs, dict):
        return await compare(service, call)
    verb = _VERBS.get(_asked(service, body.model).kind, embed)
    return await verb(service, call)


_VERBS: dict[str, Handler] = {
    "classify": predict,
    "rerank": predict,
    "sparse": embed_sparse,
    "multi_vector": embed_all,
}
"""What a model of some kind does with inputs; any other embeds them."""


async def predict_as_vertex(service: Service, call: Call) -> Reply:
    """Answer several bodies at once, as Google's Vertex AI asks; one that fails fails all."""
    instances = decode_json(call, wire.VertexBody).instances
    if not instances:
        raise wire.Empty("`instances` cannot be empty")
    if len(instances) > (most := service.limits().client_batch_size):
        raise TooManyInputs(f"{len(instances)} instances are more than the {most} of one request")
    async with service.together(call.caller) as caller:
        call = replace(call, caller=caller)
        answers = [asyncio.ensure_future(answer(service, replace(call, body=bytes(raw)))) for raw in instances]
        try:
            replies = await asyncio.gather(*answers)
        finally:
            for each in answers:
                each.cancel()  # does nothing to one that is done
    return Reply(200, write_object({"predictions": _joined([reply.body for reply in replies])}))


# The server


async def info(service: Service, call: Call) -> Reply:
    """Say which model is served, and how."""
    del call
    status, limits = _asked(service, None), service.limits()
    reply = wire.InfoReply(
        model_id=status.id,
        model_sha=None if status.revision in {"", "main"} else status.revision,
        model_dtype=status.dtype,
        served_model_name=status.id,
        model_type=wire.model_type(status),
        max_concurrent_requests=limits.waiting_tokens // max(1, status.max_tokens),
        max_input_length=status.max_tokens,
        max_batch_tokens=max(status.batch_tokens, status.max_tokens),
        max_client_batch_size=limits.client_batch_size,
        auto_truncate=limits.truncate,
        tokenization_workers=limits.encoders,
        version=service.version,
    )
    return Reply(200, msgspec.json.encode(reply))


async def health(service: Service, call: Call) -> Reply:
    """Tell whether a request would be answered now, by its status alone."""
    del call
    if fault := service.fault():
        raise fault
    await service.check_ready()
    return Reply(200, b"", media_type=TEXT)


# Parts of every request and reply


def _asked(service: Service, name: str | None) -> ModelStatus:
    """Return the model of this name, else the server's first: TEI has one model, and clients call it anything."""
    with suppress(UnknownModel):
        if name:
            return service.model(name)
    return service.models()[0]


def _options(status: ModelStatus, cut: wire.CutBody | wire.SimilarityParameters) -> dict[str, Any]:
    """Return what all requests to a model have in common."""
    side = (cut.truncation_direction or "right").lower()
    return {"model": status.id, "truncate": cut.truncate, "truncate_side": side}


def _length(inputs: Sequence[Input]) -> int:
    """Count characters; of token ids, the ids."""
    return sum(map(len, inputs))


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"[%b]" % b",".join(parts)


def _reply(body: bytes, status: ModelStatus, usage: Usage, characters: int) -> Reply:
    """Add what a request cost, with times in whole milliseconds."""
    timings = usage.timings
    device = "gpu" if "cuda" in status.backend else "cpu"
    headers = {
        "x-compute-type": f"{device}+optimized",
        "x-compute-time": _milliseconds(timings.total),
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(usage.num_tokens),
        "x-total-time": _milliseconds(timings.total),
        "x-tokenization-time": _milliseconds(timings.encode),
        "x-queue-time": _milliseconds(timings.queue),
        "x-inference-time": _milliseconds(timings.compute - timings.queue),
    }
    return Reply(200, body, headers=headers, timings=timings)


def _milliseconds(seconds: float) -> str:
    return str(int(max(0.0, seconds) * 1000))


def _as_openai(path: str) -> Route:
    """At the root, OpenAI's own dialect answers."""
    route = Route("POST", path, embed_as_openai, "Embed texts", wire.OpenAIBody, wire.OpenAIReply, at_root=False)
    return replace(route, error=wire.OpenAIErrorReply)


_AS_OPENAI = Dialect("tei", (), wire.render_flat_error, wire.STATUSES)
_PREDICTIONS = list[wire.Prediction | list[wire.Prediction]]

TEI = Dialect(
    name="tei",
    routes=[
        Route("POST", "/embed", embed, "Embed texts", wire.EmbedBody, list[list[float]]),
        Route("POST", "/embed_all", embed_all, "Embed each token", wire.InputsBody, list[list[list[float]]]),
        Route("POST", "/embed_sparse", embed_sparse, "Weigh words", wire.InputsBody, list[list[wire.Weight]]),
        Route("POST", "/rerank", rerank, "Rank texts by a query", wire.RerankBody, list[wire.Rank]),
        Route("POST", "/predict", predict, "Score labels", wire.PredictBody, _PREDICTIONS),
        Route("POST", "/similarity", compare, "Compare texts with one", wire.SimilarityBody, list[float]),
        Route("POST", "/tokenize", tokenize, "Cut texts into tokens", wire.TokenizeBody, list[list[wire.TokenReply]]),
        Route("POST", "/decode", decode, "Turn token ids into texts", wire.DecodeBody, list[str]),
        _as_openai("/v1/embeddings"),
        _as_openai("/embeddings"),
        Route("POST", "/", answer, "Do what the body looks like", wire.AnyBody, list[Any]),
        Route("POST", "/invocations", answer, "Do what the body looks like (SageMaker)", wire.AnyBody, list[Any]),
        Route(
            "POST", "/vertex", predict_as_vertex, "Answer several bodies (Vertex AI)", wire.VertexBody, wire.VertexReply
        ),
        Route("GET", "/info", info, "Show the model and the limits", reply=wire.InfoReply),
        Route("GET", "/health", health, "200 if a request would be answered", media_type=TEXT, public=True),
        Route("GET", "/ping", health, "200 if a request would be answered (SageMaker)", media_type=TEXT, public=True),
        Route("GET", "/", health, "200 if a request would be answered", media_type=TEXT, public=True),
    ],
    render_error=wire.render_error,
    statuses=wire.STATUSES,
    error=wire.ErrorReply,
)
