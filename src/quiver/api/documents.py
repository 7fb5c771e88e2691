"""Texts that may come as objects: what several APIs take as an input, a query or a document."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quiver.errors import InvalidInput

Document = str | dict[str, Any]
"""A text, or an object that holds it."""


def text_of(document: Document, field: str) -> str:
    """Return the text of what came in a field; raises `InvalidInput` if it holds none."""
    if isinstance(document, str):
        return document
    text = document.get("text")
    if not isinstance(text, str):
        raise InvalidInput(f"{field} has no 'text' (it has: {_keys(document)}): only texts are read here", param=field)
    return text


def texts_of(documents: Sequence[Document], field: str, rank_fields: Sequence[str] | None = None) -> list[str]:
    """Return the texts of documents in order; of an object, the values of `rank_fields` one under another, if given."""
    named = [(document, f"{field}[{i}]") for i, document in enumerate(documents)]
    if not rank_fields:
        return [text_of(document, name) for document, name in named]
    return [document if isinstance(document, str) else _ranked(document, rank_fields, n) for document, n in named]


def _ranked(document: Mapping[str, Any], rank_fields: Sequence[str], field: str) -> str:
    values = [document[name] for name in rank_fields if name in document]
    if not values:
        wanted = ", ".join(rank_fields)
        raise InvalidInput(f"{field} has none of the rank_fields {wanted} (it has: {_keys(document)})", param=field)
    return "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


def _keys(document: Mapping[str, Any]) -> str:
    return ", ".join(document) or "nothing"


def as_object(document: Document) -> dict[str, Any]:
    """Return a document as an object, whichever way it came."""
    return {"text": document} if isinstance(document, str) else document
