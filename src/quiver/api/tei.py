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

from quiver import errors
from quiver.api import tei_wire as wire
from quiver.api.call import Call, Dialect, Handler, Reply, Route, decode_json, refuse
from quiver.api.vectors import in_form, write_array, write_object
from quiver.errors import InvalidInput, QuiverError, TooManyInputs, UnknownModel
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
    inputs = await _inputs(service, body)
    request = EmbedRequest(
        inputs=inputs,
        prompt_name=body.prompt_name,
        normalize=body.normalize is not False,
        dimensions=body.dimensions,
        **_options(service, body),
    )
    embeddings = await service.embed(request, call.caller)
    written = await write_array(in_form(embeddings.vectors, "float"))
    return _reply(written, service.model(embeddings.model), embeddings.usage, _length(inputs))


async def embed_all(service: Service, call: Call) -> Reply:
    """Turn each token of texts into a vector."""
    body = decode_json(call, wire.InputsBody)
    inputs = await _inputs(service, body)
    request = EmbedRequest(inputs=inputs, prompt_name=body.prompt_name, **_options(service, body))
    embeddings = await service.embed_tokens(request, call.caller)
    parts = []
    for tokens in embeddings.vectors:
        parts.append(await write_array(list(tokens)))
        await asyncio.sleep(0)  # one input is as much to write as many vectors
    return _reply(_joined(parts), service.model(embeddings.model), embeddings.usage, _length(inputs))


async def embed_sparse(service: Service, call: Call) -> Reply:
    """Turn texts into weights of words."""
    body = decode_json(call, wire.InputsBody)
    inputs = await _inputs(service, body)
    request = EmbedRequest(inputs=inputs, prompt_name=body.prompt_name, **_options(service, body))
    embeddings = await service.embed_sparse(request, call.caller)
    written = await write_array(embeddings.vectors, lambda _, vector: _weights(vector))
    return _reply(written, service.model(embeddings.model), embeddings.usage, _length(inputs))


def _weights(vector: SparseVector) -> list[dict[str, Any]]:
    return [{"index": i, "value": v} for i, v in zip(vector.indices, vector.values, strict=True)]  # noqa: PD011


async def _inputs(service: Service, body: wire.InputsBody) -> Sequence[Input]:
    """Read the forms of `inputs`; ids become texts again where a prompt is to stand before them."""
    inputs = wire.read_inputs(body.inputs)
    given = [item for item in inputs if not isinstance(item, str)]
    if not body.prompt_name or not given:
        return inputs
    texts = iter(await service.decode(DecodeRequest(ids=given, model=_asked(service, body).id)))
    return [item if isinstance(item, str) else next(texts) for item in inputs]


async def embed_as_openai(service: Service, call: Call) -> Reply:
    """Answer in OpenAI's shape, but for errors: those are flat."""
    try:
        return await _embed_as_openai(service, call)
    except QuiverError as error:
        return refuse(_AS_OPENAI, error)


async def _embed_as_openai(service: Service, call: Call) -> Reply:
    body = decode_json(call, wire.OpenAIBody)
    inputs = wire.read_inputs(body.input)
    request = EmbedRequest(
        inputs=inputs, model=_asked(service, body).id, dimensions=body.dimensions, normalize=True
    )
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
    return _reply(written, service.model(embeddings.model), usage, _length(inputs))


# Scores


async def rerank(service: Service, call: Call) -> Reply:
    """Put texts in the order of their relevance; of equal ones, the last comes first, as in TEI."""
    body = decode_json(call, wire.RerankBody)
    if not body.texts:
        raise wire.Empty("`texts` cannot be empty")
    if not body.query and not all(body.texts):
        raise wire.Empty("`query` and a text cannot both be empty")
    request = RerankRequest(
        query=body.query, documents=body.texts, raw_scores=bool(body.raw_scores), **_options(service, body)
    )
    ranking = await service.rerank(request, call.caller)
    best = sorted(zip(ranking.scores, ranking.order, strict=True), reverse=True)
    shown = {i: {"text": body.texts[i]} if body.return_text else {} for _, i in best}
    written = await write_array(best, lambda _, pair: {"index": pair[1], **shown[pair[1]], "score": pair[0]})
    characters = len(body.query) * len(body.texts) + _length(body.texts)
    return _reply(written, service.model(ranking.model), ranking.usage, characters)


async def predict(service: Service, call: Call) -> Reply:
    """Give texts or pairs a score for each label, the best first."""
    body = decode_json(call, wire.PredictBody)
    inputs, asked = wire.read_pairs(body.inputs), body.parameters or wire.PredictParameters()
    function = asked.function_to_apply
    request = ClassifyRequest(
        inputs=inputs,
        raw_scores=bool(body.raw_scores) or function == "none",
        activation=None if function == "none" else function,
        **_options(service, body),
    )
    classified = await service.classify(request, call.caller)
    written = await write_array(
        classified.scores, lambda _, scores: _predictions(classified.labels, scores)[: asked.top_k]
    )
    if body.parameters is None and not wire.is_batch(body.inputs):
        written = written[1:-1]  # huggingface_hub, which sends parameters, reads the first of several
    characters = sum(len(i.query) + len(i.document) if isinstance(i, Pair) else len(i) for i in inputs)
    return _reply(written, service.model(classified.model), classified.usage, characters)


def _predictions(labels: Sequence[str], scores: Floats) -> list[dict[str, Any]]:
    return [{"score": scores[i], "label": labels[i]} for i in np.argsort(scores, kind="stable")[::-1]]


async def compare(service: Service, call: Call) -> Reply:
    """Give the cosine of each sentence with the source."""
    body = decode_json(call, wire.SimilarityBody)
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
        **_options(service, replace_model(parameters, body.model)),
    )
    similarities = await service.compare(request, call.caller)
    characters = len(source) + _length(sentences)
    written = await write_array([similarities.scores])
    return _reply(written[1:-1], service.model(similarities.model), similarities.usage, characters)


# Tokens


async def tokenize(service: Service, call: Call) -> Reply:
    """Cut texts into tokens; their places are counted in bytes."""
    body = decode_json(call, wire.TokenizeBody)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts or not all(texts):
        raise wire.Empty("`inputs` cannot be empty")
    request = TokenizeRequest(
        texts=texts,
        special_tokens=body.add_special_tokens is not False,
        prompt_name=body.prompt_name,
        model=_asked(service, body).id,
    )
    cut = await service.tokenize(request)
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
    request = DecodeRequest(
        ids=wire.read_ids(body.ids),
        special_tokens=body.skip_special_tokens is False,
        model=_asked(service, body).id,
    )
    return Reply(200, msgspec.json.encode(await service.decode(request)))
