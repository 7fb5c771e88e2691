"""Vectors as JSON, in the forms that several APIs share.

B inputs, D dimensions.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

import orjson

from quiver.engine import outputs
from quiver.types import Floats

VECTORS_PER_PART = 128
"""About two milliseconds of writing floats."""

Form = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


def in_form(vectors: Floats, form: Form) -> Sequence[Any]:
    """(B, D) -> what stands in JSON for each of the B: numbers, or base64 of little-endian float32."""
    match form:
        case "float":
            return list(vectors)
        case "base64":
            return [outputs.to_base64(vector) for vector in vectors]
        case "int8":
            return list(outputs.to_int8(vectors)[0])
        case "uint8":
            return list(outputs.to_uint8(vectors)[0])
        case "binary":
            return list(outputs.to_binary(vectors))
        case "ubinary":
            return list(outputs.to_ubinary(vectors))


async def write_array(items: Sequence[Any], as_json: Callable[[int, Any], Any] = lambda _, item: item) -> bytes:
    """Write a JSON array of what `as_json(index, item)` makes of each item; numpy arrays may stand in it anywhere.

    Serialising holds the interpreter's lock, so no thread would help: a large reply is written in parts, between
    which the event loop serves others.
    """
    parts = []
    for start in range(0, len(items), VECTORS_PER_PART):
        some = [as_json(i, item) for i, item in enumerate(items[start : start + VECTORS_PER_PART], start)]
        parts.append(orjson.dumps(some, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        if start + VECTORS_PER_PART < len(items):
            await asyncio.sleep(0)
    return b"[%b]" % b",".join(parts)


def write_object(fields: dict[str, Any]) -> bytes:
    """Write a JSON object; a value of bytes is JSON already."""
    return b"{%b}" % b",".join(
        b"%b:%b" % (orjson.dumps(name), value if isinstance(value, bytes) else _dump(value))
        for name, value in fields.items()
    )


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
