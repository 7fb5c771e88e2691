"""The one table of collisions: whose call it is, where several APIs live at one path of the root.

Facts of their clients: each body below is what the client of that API sends, and no other's does.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec

from quiver.api.call import Call, Dialect
from quiver.api.openai import render_error
from quiver.api.router import Choice, Keys, Shared
from quiver.errors import QuiverError

Condition = Callable[[Call, Keys], bool]


def has(*names: str) -> Condition:
    """Tell by a field of the body, whatever its value."""
    fields = frozenset(names)
    return lambda _, keys: not fields.isdisjoint(keys)


def says(name: str, pattern: bytes) -> Condition:
    """Tell by how the JSON of a field begins."""
    begins = re.compile(pattern)
    return lambda _, keys: name in keys and begins.match(keys[name]) is not None


def both(one: Condition, other: Condition) -> Condition:
    """Tell by two things together."""
    return lambda call, keys: one(call, keys) and other(call, keys)


def lacks(*names: str) -> Condition:
    """Tell by fields that the body has not."""
    fields = frozenset(names)
    return lambda _, keys: fields.isdisjoint(keys)


def asks(*names: str) -> Condition:
    """Tell by what stands behind the path's `?`."""
    return lambda call, _: any(name in call.query for name in names)


def sent_by(client: str) -> Condition:
    """Tell by the name under which a client's own package goes."""

    def is_sent(call: Call, _: Keys) -> bool:
        given = call.headers
        return client in given.get("user-agent", "").lower() or client in given.get("x-fern-sdk-name", "").lower()

    return is_sent


NOT_VOYAGES = ("dimensions", "prompt_name", "truncate", "user")
"""In Voyage's own examples nothing but `input_type` tells; OpenAI's dialect here knows that word too."""

SHARED: Shared = {
    ("GET", "/"): (Choice("tei"),),
    ("GET", "/health"): (
        Choice("health"),
        Choice("tei"),
        Choice("infinity"),
        Choice("runpod"),
        Choice("fastembed_query"),
    ),
    ("GET", "/health/live"): (Choice("health"), Choice("inference_api")),
    ("GET", "/health/ready"): (Choice("health"), Choice("inference_api")),
    ("GET", "/info"): (Choice("tei"),),
    ("GET", "/models"): (Choice("infinity"), Choice("openai")),  # OpenAI's clients read what Infinity's need
    ("GET", "/ping"): (Choice("runpod"), Choice("tei")),  # the first tells loading from broken
    ("GET", "/v1/models"): (
        Choice("cohere", sent_by("cohere")),
        Choice("cohere", asks("endpoint", "default_only", "page_size", "page_token")),
        Choice("openai"),
        Choice("infinity"),
    ),
    ("GET", "/v1/models/{id:path}"): (Choice("cohere", sent_by("cohere")), Choice("openai")),
    ("POST", "/"): (Choice("tei", has("inputs", "texts", "query")),),
    ("POST", "/api/embed"): (
        Choice("inference_api", has("text")),
        Choice("ollama", has("truncate", "dimensions", "options", "keep_alive")),
        Choice("ollama"),  # `input` may be for either: the code of the other does not know it, only its document
        Choice("inference_api"),
    ),
    ("POST", "/embed"): (Choice("tei", has("inputs")),),
    ("POST", "/embeddings"): (Choice("infinity", has("modality")), Choice("openai"), Choice("infinity")),
    ("POST", "/rerank"): (Choice("tei", has("texts")), Choice("infinity")),
    ("POST", "/tokenize"): (Choice("tei", has("inputs")),),
    ("POST", "/v1/embed"): (
        Choice("fastembed_query", has("text")),
        Choice("cohere", has("texts", "inputs", "images")),
        Choice("cohere"),
        Choice("fastembed_query"),
    ),
    ("POST", "/v1/embeddings"): (
        Choice("mixedbread", sent_by("mixedbread")),
        Choice("mixedbread", has("prompt")),
        Choice("mixedbread", says("encoding_format", rb"\[")),
        Choice("voyage", has("truncation", "output_dtype", "output_dimension")),
        Choice("jina", has("task", "late_chunking", "embedding_type", "normalized", "return_multivector")),
        Choice("jina", says("input", rb"\[\s*\{")),
        Choice("infinity", has("modality")),
        Choice("voyage", both(says("input_type", rb'"(query|document)"'), lacks(*NOT_VOYAGES))),
        Choice("openai"),
        Choice("infinity"),
        Choice("jina"),
        Choice("voyage"),
        Choice("mixedbread"),
    ),
    ("POST", "/v1/rerank"): (
        Choice("voyage", has("top_k", "truncation")),
        Choice("infinity", has("raw_scores")),
        Choice("cohere", sent_by("cohere")),
        Choice("cohere", has("rank_fields", "max_chunks_per_doc", "max_tokens_per_doc")),
        Choice("jina"),  # its clients read documents that they did not ask for; Cohere's and vLLM's read the rest
        Choice("cohere"),
        Choice("infinity"),
        Choice("voyage"),
    ),
}
"""By method and path; the order of the choices is the order in which they are tried."""

WIDE = frozenset({"/embeddings", "/rerank", "/v1/embeddings", "/v1/rerank"})
"""Where clients of hosted APIs call with bodies that may be those of another: each looks for the reason elsewhere."""


def widened(path: str, dialect: Dialect) -> Dialect:
    """Return a dialect whose errors the clients of all can read: OpenAI's object, Cohere's `message`, Voyage's `detail`.

    TEI's calls are told by their own field, and its `error` is a text.
    """
    if path not in WIDE or dialect.name == "tei":
        return dialect
    return replace(dialect, render_error=partial(_render_for_all, dialect))


def _render_for_all(dialect: Dialect, status: int, error: QuiverError) -> bytes:
    """Write an error as the dialect does, with what the others' clients look for behind it."""
    own = msgspec.json.decode(dialect.render_error(status, error))
    others = {**msgspec.json.decode(render_error(status, error)), "message": error.message, "detail": error.message}
    return msgspec.json.encode(own | {name: value for name, value in others.items() if name not in own})
