"""What a client can ask a server for: each verb as a plan, from its arguments to its result.

B texts, D dimensions.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import numpy as np

from quiver.client.core import Core, body_of, object_of, post, together, understanding
from quiver.client.results import Floats, Health, Model, Ranked, Token, Usage, made, read_health
from quiver.client.steps import Plan, Request

EMBEDDINGS = "/openai/v1/embeddings"
MODELS = "/openai/v1/models"
RERANK = "/voyage/v1/rerank"
CLASSIFY = "/infinity/classify"
TOKENIZE = "/tei/tokenize"
HEALTH = "/health"
USAGE = "/v1/usage"


def embed(  # noqa: PLR0913  each is a field of the request
    core: Core,
    texts: str | Iterable[str],
    *,
    model: str | None = None,
    dimensions: int | None = None,
    input_type: str | None = None,
    prompt_name: str | None = None,
    truncate: bool | None = None,
    timeout: float | None = None,
) -> Plan[Floats]:
    """Turn texts into vectors, (B, D) float32, in the order of the texts; a single text gives (1, D).

    `dimensions` cuts each vector. `input_type` (query, document) is what the texts are for, and `prompt_name` one of
    the model's own prompts. `truncate` cuts a text that is too long instead of refusing it. `timeout` is for the whole
    call, in seconds. Raises `QuiverError`.
    """
    deadline, given = core.deadline(timeout), listed(texts)
    options = {
        "model": model or core.settings.model,
        "dimensions": dimensions,
        "input_type": input_type,
        "prompt_name": prompt_name,
        "truncate": truncate,
    }
    if not given:
        return np.empty((0, dimensions or 0), np.float32)
    parts = [_embed(core, given[part], options, deadline) for part in core.parts(given, size_of)]
    return np.concatenate((yield from together(parts)))


def _embed(core: Core, texts: Sequence[str], options: Mapping[str, Any], deadline: float) -> Plan[Floats]:
    request = post(EMBEDDINGS, input=texts, encoding_format="base64", **options)
    response = yield from core.exchange(request, deadline)
    with understanding(response):
        told = object_of(response)
        vectors = vectors_of(told, len(texts))
        core.count(told["usage"]["total_tokens"])
    return vectors


def vectors_of(told: Mapping[str, Any], num_texts: int) -> Floats:
    """Read the vectors of an embeddings reply, (B, D); raises `ValueError` if there are not as many as texts."""
    data = sorted(told["data"], key=lambda item: item["index"])
    if [item["index"] for item in data] != list(range(num_texts)):
        raise ValueError(f"it has {len(data)} vectors for {num_texts} texts")
    vectors = [np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4") for item in data]
    return np.stack(vectors).astype(np.float32, copy=False)


def rerank(  # noqa: PLR0913  each is a field of the request
    core: Core,
    query: str,
    documents: Iterable[str],
    *,
    top_n: int | None = None,
    model: str | None = None,
    truncate: bool | None = None,
    timeout: float | None = None,
) -> Plan[list[Ranked]]:
    """Put documents in the order of their relevance to a query, the best first; of equal ones, the first given.

    `top_n` keeps so many of the best. `truncate=False` refuses a document that is too long instead of cutting it.
    Raises `QuiverError`.
    """
    deadline, given = core.deadline(timeout), listed(documents)
    options = {
        "query": query,
        "model": model or core.settings.model,
        "top_k": min(top_n, len(given)) if top_n else None,
        "truncation": truncate,
    }
    plans = [_rerank(core, given, part, options, deadline) for part in core.parts(given, size_of)]
    scores = dict(pair for scored in (yield from together(plans)) for pair in scored) if plans else {}
    best = sorted(scores, key=lambda index: (-scores[index], index))[: top_n or None]
    return [Ranked(index, scores[index], given[index]) for index in best]


def _rerank(
    core: Core, documents: Sequence[str], part: slice, options: Mapping[str, Any], deadline: float
) -> Plan[list[tuple[int, float]]]:
    """Return (index, score) of a part's best documents."""
    wanted = documents[part]
    most = options["top_k"] and min(options["top_k"], len(wanted))
    request = post(RERANK, documents=wanted, **{**options, "top_k": most})
    response = yield from core.exchange(request, deadline)
    with understanding(response):
        told = object_of(response)
        scored = [(int(item["index"]), float(item["relevance_score"])) for item in told["data"]]
        if {index for index, _ in scored} - set(range(len(wanted))) or len(scored) != (most or len(wanted)):
            raise ValueError("it has other documents")
        core.count(told["usage"]["total_tokens"])
    return [(part.start + index, score) for index, score in scored]


def classify(
    core: Core,
    texts: str | Iterable[str],
    *,
    raw_scores: bool = False,
    model: str | None = None,
    timeout: float | None = None,
) -> Plan[list[dict[str, float]]]:
    """Give each text a score for every label of the model, the likeliest label first.

    A text that is too long is cut. `raw_scores` gives logits instead of probabilities. Raises `QuiverError`.
    """
    deadline, given = core.deadline(timeout), listed(texts)
    options = {"model": (yield from _known(core, model, deadline)), "raw_scores": raw_scores}
    plans = [_classify(core, given[part], options, deadline) for part in core.parts(given, size_of)]
    return [scores for part in (yield from together(plans)) for scores in part] if plans else []


def _classify(
    core: Core, texts: Sequence[str], options: Mapping[str, Any], deadline: float
) -> Plan[list[dict[str, float]]]:
    response = yield from core.exchange(post(CLASSIFY, input=texts, **options), deadline)
    with understanding(response):
        told = object_of(response)
        scores = [{str(each["label"]): float(each["score"]) for each in labels} for labels in told["data"]]
        if len(scores) != len(texts):
            raise ValueError(f"it has scores for {len(scores)} texts")
        core.count(told["usage"]["total_tokens"])
    return scores


def tokenize(
    core: Core,
    texts: str | Iterable[str],
    *,
    special_tokens: bool = True,
    prompt_name: str | None = None,
    model: str | None = None,
    timeout: float | None = None,
) -> Plan[list[list[Token]]]:
    """Cut texts into the tokens that the model reads, those around a text included unless `special_tokens` is false.

    Raises `QuiverError`.
    """
    deadline, given = core.deadline(timeout), listed(texts)
    options = {
        "model": (yield from _known(core, model, deadline)),
        "add_special_tokens": special_tokens,
        "prompt_name": prompt_name,
    }
    plans = [_tokenize(core, given[part], options, deadline) for part in core.parts(given, size_of)]
    return [tokens for part in (yield from together(plans)) for tokens in part] if plans else []


def _tokenize(core: Core, texts: Sequence[str], options: Mapping[str, Any], deadline: float) -> Plan[list[list[Token]]]:
    response = yield from core.exchange(post(TOKENIZE, inputs=texts, **options), deadline)
    with understanding(response):
        tokens = [[made(Token, token) for token in text] for text in body_of(response)]
        if len(tokens) != len(texts):
            raise ValueError(f"it has tokens of {len(tokens)} texts")
        core.count(0)
    return tokens


def models(core: Core, *, timeout: float | None = None) -> Plan[list[Model]]:
    """List the models that may be asked for, the server's first one first. Raises `QuiverError`."""
    response = yield from core.exchange(Request("GET", MODELS), core.deadline(timeout))
    with understanding(response):
        return [made(Model, model) for model in object_of(response)["data"]]


def model(core: Core, name: str, *, timeout: float | None = None) -> Plan[Model]:
    """Show one model, by its id or an alias. Raises `NotFound` if it is not served, or another `QuiverError`."""
    return (yield from _model(core, name, core.deadline(timeout)))


def _model(core: Core, name: str, deadline: float) -> Plan[Model]:
    response = yield from core.exchange(Request("GET", f"{MODELS}/{quote(name)}"), deadline)
    with understanding(response):
        return made(Model, object_of(response))


def _known(core: Core, name: str | None, deadline: float) -> Plan[str | None]:
    """Return the id of a model; raises `NotFound` where an API takes any name for its only model."""
    name = name or core.settings.model
    return (yield from _model(core, name, deadline)).id if name else None


def health(core: Core, *, timeout: float | None = None) -> Plan[Health]:
    """Tell what the server and its models are doing; one that is still loading says so, and raises nothing.

    Raises `Unreachable` where there is no server.
    """
    request = Request("GET", HEALTH, accepts=(HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE))
    response = yield from core.exchange(request, core.deadline(timeout))
    with understanding(response):
        return read_health(object_of(response))


def usage(core: Core, period: str | None = None, *, timeout: float | None = None) -> Plan[Usage]:
    """Tell what all keys of the caller's user used in a month (`2026-07`; None is this one), and what is left of it.

    Raises `NotFound` where the server has no accounts, or another `QuiverError`.
    """
    path = USAGE if period is None else f"{USAGE}?period={quote(period)}"
    response = yield from core.exchange(Request("GET", path), core.deadline(timeout))
    with understanding(response):
        return made(Usage, object_of(response))


def listed(texts: str | Iterable[str]) -> list[str]:
    """Take one text for a list of one: nobody wants a vector for each of its letters."""
    given = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is no text but {type(text).__name__}: {text!r:.80}")
    return given


def size_of(text: str) -> int:
    """Return how many bytes a text has in a request, at least."""
    return len(text.encode("utf-8", "surrogatepass"))
