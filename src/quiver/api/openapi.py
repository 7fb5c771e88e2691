"""The OpenAPI document, generated from the routes and their structs, and Swagger UI from files on this machine."""

import base64
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from quiver import __version__
from quiver.api import secure
from quiver.api.call import JSON, Call, Dialect, Reply, Route
from quiver.api.openai import ErrorReply
from quiver.api.root import WIDE
from quiver.api.router import mounted
from quiver.errors import UnknownRoute
from quiver.service import Service

ASSETS = {"swagger-ui.css": "text/css; charset=utf-8", "swagger-ui-bundle.js": "text/javascript; charset=utf-8"}

FORM = "multipart/form-data"

PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quiver API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/swagger-ui/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="/swagger-ui/swagger-ui-bundle.js"></script>
<script>%b</script>
</body>
</html>
"""
START = b'SwaggerUIBundle({url: "/openapi.json", dom_id: "#ui", deepLinking: true})'
PAGE_HEADERS = secure.page(script=f"'sha256-{base64.b64encode(hashlib.sha256(START).digest()).decode()}'")


def docs_routes(dialects: Sequence[Dialect], shape: Dialect) -> Dialect:
    """Return the routes that describe the others; their errors are written in the shape of another dialect."""
    document = msgspec.json.encode(describe(dialects))

    async def show_document(service: Service, call: Call) -> Reply:
        del service, call
        return Reply(200, document)

    return Dialect(
        name="docs",
        routes=[
            Route("GET", "/openapi.json", show_document, "This document", public=True),
            Route("GET", "/api/openapi.json", show_document, "This document", public=True),
            Route("GET", "/docs", show_page, "Swagger UI", public=True),
            Route("GET", "/swagger-ui", show_page, "Swagger UI", public=True),
            Route("GET", "/swagger-ui/{file}", show_asset, "A file of Swagger UI", public=True),
        ],
        render_error=shape.render_error,
        error=shape.error,
        has_prefix=False,
    )


async def show_page(service: Service, call: Call) -> Reply:
    """Show Swagger UI."""
    del service, call
    return Reply(200, PAGE % START, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


async def show_asset(service: Service, call: Call) -> Reply:
    """Serve one of the two files that the page needs."""
    del service
    name = call.params["file"]
    if name not in ASSETS:
        raise UnknownRoute("Swagger UI has no such file here")
    headers = {"cache-control": "public, max-age=86400"}
    return Reply(200, (_assets() / name).read_bytes(), media_type=ASSETS[name], headers=headers)


def _assets() -> Path:
    """Find the package that carries Swagger UI, without importing it."""
    spec = importlib.util.find_spec("swagger_ui")
    if spec is None or spec.origin is None:
        raise UnknownRoute("Swagger UI is not installed: pip install swagger-ui-py")
    return Path(spec.origin).parent / "static"


def describe(dialects: Sequence[Dialect]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the dialects' routes."""
    kinds = [
        kind for d in dialects for r in d.routes for kind in (r.body, r.reply, r.error, d.error) if kind is not None
    ]
    unique = list(dict.fromkeys([*kinds, ErrorReply]))
    references, schemas = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(unique, references, strict=True))
    claims: dict[tuple[str, str], list[tuple[Dialect, Route]]] = {}
    for path, dialect, route in mounted(dialects):
        claims.setdefault((path, route.method), []).append((dialect, route))
    paths: dict[str, dict[str, Any]] = {}
    for (path, method), claimants in claims.items():
        operations = paths.setdefault(re.sub(r":path\}", "}", path), {})
        operations[method.lower()] = _operation(path, claimants, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quiver",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, claims: Sequence[tuple[Dialect, Route]], schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """Describe what lives at a path: one API's route, or that of several, told apart by what is sent."""
    method = claims[0][1].method.lower()
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"),
        "summary": " · ".join(dict.fromkeys(route.summary for _, route in claims)),
        "tags": [dialect.name for dialect, _ in claims],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)", path)
        ],
        "responses": {
            "200": {"description": "Success"} | _replies([route for _, route in claims], schema_of),
            "default": {"description": "What went wrong"}
            | _content([*_errors(claims), ErrorReply if path in WIDE else None], schema_of),
        },
    }
    if any(route.may_be_empty for _, route in claims):
        operation["responses"]["204"] = {"description": "There is nothing to say"}
    if bodies := [route.body for _, route in claims if route.body is not None]:
        operation["requestBody"] = {"required": True} | _content(bodies, schema_of, _body_type(claims))
    if not all(route.public for _, route in claims):
        operation["security"] = [{}, {"key": []}]
    return operation


def _body_type(claims: Sequence[tuple[Dialect, Route]]) -> str:
    return FORM if any(route.is_upload for _, route in claims) else JSON


def _errors(claims: Sequence[tuple[Dialect, Route]]) -> Sequence[Any]:
    return [kind for dialect, route in claims for kind in (dialect.error, route.error)]


def _replies(routes: Sequence[Route], schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """Describe what the routes of one path reply: JSON, text, or the one or the other."""
    texts = {route.media_type: {"schema": {"type": "string"}} for route in routes if route.media_type != JSON}
    described = _content([route.reply for route in routes], schema_of)
    return {"content": described.get("content", {}) | texts} if texts else described


def _content(kinds: Sequence[Any], schema_of: Mapping[Any, Any], media_type: str = JSON) -> dict[str, Any]:
    schemas = [schema_of[kind] for kind in dict.fromkeys(kinds) if kind is not None]
    if not schemas:
        return {}
    return {"content": {media_type: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}}
