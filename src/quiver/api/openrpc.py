"""The OpenRPC document of a table of methods, generated from their structs.

https://spec.open-rpc.org
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from quiver import __version__
from quiver.api.jsonrpc import MESSAGES, Method, code_of
from quiver.errors import EngineError, InvalidInput, QuiverError, Unavailable

OPENRPC = "1.3.2"
EVERY_METHOD: tuple[type[QuiverError], ...] = (InvalidInput, Unavailable, EngineError)


def describe(methods: Iterable[Method]) -> dict[str, Any]:
    """Return the document."""
    table = list(methods)
    kinds = list(dict.fromkeys(kind for method in table for kind in (method.params, method.result)))
    references, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, references, strict=True))
    described = [_method(method, schemas[method.params.__name__], schema_of[method.result]) for method in table]
    for method in table:
        schemas.pop(method.params.__name__, None)  # its fields stand with the method itself
    return {
        "openrpc": OPENRPC,
        "info": {
            "title": "Quiver",
            "version": __version__,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "methods": described,
        "components": {"schemas": schemas},
    }


def _method(method: Method, params: Mapping[str, Any], result: Any) -> dict[str, Any]:
    required = params.get("required", [])
    return {
        "name": method.name,
        "summary": method.summary,
        "paramStructure": "either",
        "params": [
            {"name": name, "required": name in required, "schema": dict(schema)}
            for name, schema in params.get("properties", {}).items()
        ],
        "result": {"name": "result", "schema": result},
        "errors": [_error(kind) for kind in (*EVERY_METHOD, *method.errors)],
    }


def _error(kind: type[QuiverError]) -> dict[str, Any]:
    code = code_of(kind)
    return {"code": code, "message": MESSAGES.get(code) or (kind.__doc__ or "").partition("\n")[0]}
