"""The OpenRPC document: valid by OpenRPC's meta-schema, and true of what the methods take and give."""

import json

import jsonschema
import pytest

from conftest import assembled
from fakes import hash_model
from quiver.api.call import Call
from quiver.api.jsonrpc_methods import METHODS


def closed(required, /, **properties):
    """Describe an object that has these members and no other, but for extensions."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "patternProperties": {"^x-": {}},
        "additionalProperties": False,
    }


TEXT, NAME = {"type": "string"}, {"type": "string", "minLength": 1}
ERROR = closed(["code", "message"], code={"type": "integer"}, message=TEXT, data={})
SCHEMA = {"type": ["object", "boolean"]}
DESCRIPTOR = closed(
    ["name", "schema"], name=NAME, summary=TEXT, description=TEXT, schema=SCHEMA, required={"type": "boolean"}
)
METHOD = closed(
    ["name", "params"],
    name=NAME,
    summary=TEXT,
    description=TEXT,
    paramStructure={"enum": ["by-position", "by-name", "either"]},
    params={"type": "array", "items": DESCRIPTOR},
    result=DESCRIPTOR,
    errors={"type": "array", "items": ERROR},
)
META_SCHEMA = closed(
    ["openrpc", "info", "methods"],
    openrpc={"enum": ["1.3.0", "1.3.1", "1.3.2"]},
    info=closed(["title", "version"], title=TEXT, version=TEXT, license=closed([], name=TEXT, url=TEXT)),
    methods={"type": "array", "items": METHOD},
    components=closed([], schemas={"type": "object", "additionalProperties": SCHEMA}),
)
"""What OpenRPC 1.3's meta-schema asks of those parts that our document has; a part that is not here is not allowed."""


async def rpc(parts, name, params=None):
    """Call a method and return its result or error."""
    body = {"jsonrpc": "2.0", "id": 1, "method": name, "params": params or []}
    reply = json.loads((await parts.api.receive(Call("POST", "/rpc", body=json.dumps(body).encode()))).body)
    return reply.get("result"), reply.get("error")


@pytest.fixture
async def document(parts):
    """Return the document as the server gives it."""
    return (await rpc(parts, "rpc.discover"))[0]


def faults_of(document):
    """List what a document has wrong: by the meta-schema, and by the rules that no schema can state."""
    faults = [error.message for error in jsonschema.Draft7Validator(META_SCHEMA).iter_errors(document)]
    if faults:
        return faults
    names = [method["name"] for method in document["methods"]]
    faults += [f"{name} stands twice" for name in set(names) if names.count(name) > 1]
    for method in document["methods"]:
        wanted = [param.get("required", False) for param in method["params"]]
        if wanted != sorted(wanted, reverse=True):
            faults.append(f"{method['name']}: a required parameter stands behind one that is not")
        params = [param["name"] for param in method["params"]]
        faults += [f"{method['name']}: {name} stands twice" for name in set(params) if params.count(name) > 1]
    text, schemas = json.dumps(document), document["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    faults += [f"{name} is used and not there" for name in used - set(schemas)]
    faults += [f"{name} is there and not used" for name in set(schemas) - used]
    for schema in [*schemas.values(), *(param["schema"] for m in document["methods"] for param in m["params"])]:
        jsonschema.Draft7Validator.check_schema(schema)
    return faults


async def test_the_document_is_valid(document):
    """By the meta-schema's rules and by the text's: names once, required parameters first, every reference resolved."""
    assert faults_of(document) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("info"),
        lambda d: d.update(openrpc="3.0.0"),
        lambda d: d.update(paths={}),
        lambda d: d["methods"][0].pop("params"),
        lambda d: d["methods"][0].update(paramStructure="any"),
        lambda d: d["methods"][5]["params"][0].pop("schema"),
        lambda d: d["methods"][5]["params"].reverse(),
        lambda d: d["methods"].append(d["methods"][0]),
        lambda d: d["methods"][0]["errors"][0].update(code="-32602"),
        lambda d: d["components"]["schemas"].pop("Hit"),
        lambda d: d["components"]["schemas"].update(Lonely={}),
    ],
)
async def test_a_fault_would_be_seen(document, damage):
    """Negative control: each of these makes the document invalid."""
    damage(document)
    assert faults_of(document)


async def test_every_method_is_described(document):
    """Those that the server has, by their names, and no other."""
    assert [method["name"] for method in document["methods"]] == list(METHODS)
    assert "rpc.discover" in METHODS


CALLS = {
    "health": [],
    "status": [],
    "models.list": [],
    "mem_info": [],
    "ort_info": [],
    "rpc.discover": [],
    "embed": [["a", "b"]],
    "rerank": ["a", [{"id": "x", "text": "b"}], 1],
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_method_takes_and_gives_what_is_described(document, name):
    """Its parameters, by position and by name, and its result fit their schemas."""
    (method,) = [each for each in document["methods"] if each["name"] == name]
    components = {"components": document["components"]}
    named = dict(zip([param["name"] for param in method["params"]], CALLS[name], strict=False))
    for param in method["params"]:
        if param["name"] in named:
            jsonschema.validate(named[param["name"]], param["schema"] | components)
    async with assembled(hash_model()) as parts:
        for params in (CALLS[name], named):
            result, error = await rpc(parts, name, params)
            assert error is None
            jsonschema.validate(result, method["result"]["schema"] | components)
