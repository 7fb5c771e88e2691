"""Vectors as JSON, in the forms that several APIs share.

B inputs, D dimensions.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from quiver.engine import outputs
from quiver.types import Floats

VECTORS_PER_PART = 128
"""About two milliseconds of writing floats."""

Form = Literal["float", "float16", "base64", "int8", "uint8", "binary", "ubinary"]


def in_form(vectors: Floats, form: Form) -> Sequence[Any]:
    """(B, D) -> what stands in JSON for each of the B: numbers, or base64 of little-endian float32."""
    return in_base64(vectors) if form == "base64" else list(as_numbers(vectors, form))


def in_forms(vectors: Floats, forms: Form | Sequence[Form]) -> Sequence[Any]:
    """(B, D) -> what stands in JSON for each of the B: one form as it is, of a list an object with each."""
    if isinstance(forms, str):
        return in_form(vectors, forms)
    columns = [in_form(vectors, form) for form in forms]
    return [dict(zip(forms, column, strict=True)) for column in zip(*columns, strict=True)]


def in_base64(numbers: NDArray[Any]) -> Sequence[str]:
    """(B, N) numbers of any type -> base64 of their bytes, little-endian, for each of the B."""
    return [outputs.to_base64(row) for row in numbers]


def as_numbers(vectors: Floats, form: Form) -> NDArray[Any]:
    """(B, D) -> numbers of a type, (B, D), or (B, ceil(D / 8)) where bits are packed; of base64, those inside."""
    match form:
        case "float" | "base64":
            return vectors
        case "float16":
            return vectors.astype(np.float16)
        case "int8":
            return outputs.to_int8(vectors)[0]
        case "uint8":
            return outputs.to_uint8(vectors)[0]
        case "binary":
            return outputs.to_binary(vectors)
        case "ubinary":
            return outputs.to_ubinary(vectors)


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
