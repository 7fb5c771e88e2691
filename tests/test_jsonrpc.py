"""JSON-RPC 2.0: every example of its specification, and what our methods say through it."""

import asyncio
import json
from dataclasses import replace

import httpx
import msgspec
import pytest

from conftest import assembled, listening
from desk import post, staffed
from fakes import HashBackend, LogitBackend, byte_tokenizer, fake_model, hash_vector
from hub_machine import NAME, beside_a_hub
from hub_server import Fault, tiny
from quiver import app, errors
from quiver.api import jsonrpc
from quiver.api.call import Call
from quiver.api.jsonrpc import Method, answer, code_of
from quiver.config import Config, Secret, ServerConfig

# The examples of the specification


class Subtract(msgspec.Struct):
    """As in the specification."""

    minuend: int
    subtrahend: int


class Sum(msgspec.Struct):
    """Three numbers, as the examples have them."""

    a: int
    b: int
    c: int


class Update(msgspec.Struct):
    """Five numbers, or none."""

    a: int | None = None
    b: int | None = None
    c: int | None = None
    d: int | None = None
    e: int | None = None


class Hello(msgspec.Struct):
    """One number."""

    a: int


class Nothing(msgspec.Struct):
    """Nothing."""


def method(name, params, result):
    """Make a method that computes at once."""

    async def run(service, caller, given):
        del service, caller
        return json.dumps(result(given), separators=(",", ":")).encode()

    return Method(name, name, params, int, run)


METHODS = {
    each.name: each
    for each in (
        method("subtract", Subtract, lambda given: given.minuend - given.subtrahend),
        method("sum", Sum, lambda given: given.a + given.b + given.c),
        method("update", Update, lambda _: None),
        method("notify_hello", Hello, lambda _: None),
        method("get_data", Nothing, lambda _: ["hello", 5]),
    )
}
NOT_FOUND = '"error": {"code": -32601, "message": "Method not found"}'
PARSE = '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}'
INVALID = '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'

EXAMPLES = {
    "positional parameters": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
        '{"jsonrpc": "2.0", "result": 19, "id": 1}',
    ),
    "positional parameters, the other way": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        '{"jsonrpc": "2.0", "result": -19, "id": 2}',
    ),
    "named parameters": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        '{"jsonrpc": "2.0", "result": 19, "id": 3}',
    ),
    "named parameters, the other way": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        '{"jsonrpc": "2.0", "result": 19, "id": 4}',
    ),
    "a notification": ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', ""),
    "a notification of no method": ('{"jsonrpc": "2.0", "method": "foobar"}', ""),
    "no such method": (
        '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
        f'{{"jsonrpc": "2.0", {NOT_FOUND}, "id": "1"}}',
    ),
    "invalid JSON": ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', PARSE),
    "an invalid request": ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', INVALID),
    "a batch of invalid JSON": (
        """[
  {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
  {"jsonrpc": "2.0", "method"
]""",
        PARSE,
    ),
    "an empty batch": ("[]", INVALID),
    "a batch of one that is invalid": ("[1]", f"[{INVALID}]"),
    "a batch of three that are invalid": ("[1,2,3]", f"[{INVALID}, {INVALID}, {INVALID}]"),
    "a batch": (
        """[
    {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
    {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
    {"foo": "boo"},
    {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
    {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
]""",
        f"""[
    {{"jsonrpc": "2.0", "result": 7, "id": "1"}},
    {{"jsonrpc": "2.0", "result": 19, "id": "2"}},
    {INVALID},
    {{"jsonrpc": "2.0", {NOT_FOUND}, "id": "5"}},
    {{"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}}
]""",
    ),
    "a batch of notifications": (
        """[
    {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
]""",
        "",
    ),
}
"""https://www.jsonrpc.org/specification#examples, each request with the answer that stands there."""


@pytest.fixture
async def ask(parts):
    """Return what sends a body to a table of methods and returns status and body."""

    async def send(body, methods=METHODS):
        raw = body if isinstance(body, bytes) else body.encode()
        reply = await answer(methods, parts.service, Call("POST", "/rpc", body=raw))
        return reply.status, reply.body.decode()

    return send


def compact(text):
    """Write JSON in its shortest form, members in their order."""
    return json.dumps(json.loads(text), separators=(",", ":")) if text else ""


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_of_the_specification_is_answered_as_it_stands_there(ask, name):
    """Byte for byte, but for white space; what must not be answered has an empty body, and 204."""
    request, wanted = EXAMPLES[name]
    assert await ask(request) == (200 if wanted else 204, compact(wanted))


async def test_another_answer_would_be_seen(ask):
    """Negative control: the comparison is of values, members and their order."""
    request, wanted = EXAMPLES["positional parameters"]
    _, found = await ask(request)
    for other in (
        wanted.replace("19", "20"),
        wanted.replace(', "id": 1', ""),
        '{"id": 1, "result": 19, "jsonrpc": "2.0"}',
    ):
        assert found != compact(other)


@pytest.mark.parametrize(
    "id_", ["1", "-7", "1.50", "1e3", '"a\\u00e9"', '""', "null", "123456789012345678901234567890"]
)
async def test_an_id_comes_back_as_it_was_written(ask, id_):
    """Whatever string or number it is, and null: that is a request, not a notification."""
    _, found = await ask(f'{{"jsonrpc": "2.0", "method": "get_data", "id": {id_}}}')
    assert found.endswith(f'"id":{id_}}}')


@pytest.mark.parametrize(
    "body",
    [
        "1",
        '"text"',
        "null",
        "{}",
        '{"jsonrpc": "1.0", "method": "get_data", "id": 1}',
        '{"jsonrpc": 2.0, "method": "get_data", "id": 1}',
        '{"method": "get_data", "id": 1}',
        '{"jsonrpc": "2.0", "id": 1}',
        '{"jsonrpc": "2.0", "method": null, "id": 1}',
        '{"jsonrpc": "2.0", "method": "get_data", "params": null, "id": 1}',
        '{"jsonrpc": "2.0", "method": "get_data", "params": 1, "id": 1}',
        '{"jsonrpc": "2.0", "method": "get_data", "id": [1]}',
        '{"jsonrpc": "2.0", "method": "get_data", "id": {}}',
        '{"jsonrpc": "2.0", "method": "get_data", "id": true}',
    ],
)
async def test_what_is_no_request_is_invalid(ask, body):
    """Its id comes back where it has a right one, or else null; without an id it is no notification for that."""
    status, found = await ask(body)
    wanted = json.loads(INVALID) | {"id": 1 if '"id": 1}' in body else None}
    assert (status, json.loads(found)) == (200, wanted)


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "{",
        "nul",
        "[1,",
        '{"a": 1}}',
        b"\xff",
        b'{"jsonrpc": "2.0", "method": "get_data", "id": "\xff"}',
        "[" * 100_000,
    ],
)
async def test_what_is_no_json_is_a_parse_error(ask, body):
    """One object, whatever it was to be."""
    status, found = await ask(body)
    assert (status, json.loads(found)) == (200, json.loads(PARSE))


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ("[1]", None),
        ("[1, 2, 3]", None),
        ('["a", 2]', "minuend"),
        ('{"minuend": 1}', None),
        ('{"minuend": 1, "subtrahend": "2"}', "subtrahend"),
        ('{"minuend": null, "subtrahend": 2}', "minuend"),
    ],
)
async def test_wrong_parameters_are_named(ask, params, param):
    """-32602, with the parameter, by position as by name; of a notification, nothing."""
    body = f'{{"jsonrpc": "2.0", "method": "subtract", "params": {params}, "id": 1}}'
    _, found = await ask(body)
    error = json.loads(found)["error"]
    assert (error["code"], error["data"].get("param")) == (-32602, param)
    assert await ask(body.replace(', "id": 1', "")) == (204, "")


async def test_a_batch_is_done_at_once_and_bounded(parts, ask):
    """Its entries wait for each other if they must; one of more entries than a request may have inputs is refused."""
    met = asyncio.Barrier(3)

    async def meet(service, caller, given):
        del service, caller, given
        await met.wait()
        return b"true"

    methods = {"meet": Method("meet", "", Nothing, bool, meet)}
    entry = {"jsonrpc": "2.0", "method": "meet", "id": 1}
    async with asyncio.timeout(5):
        _, found = await ask(json.dumps([entry] * 3), methods)
    assert [each["result"] for each in json.loads(found)] == [True] * 3
    most = parts.service.limits().client_batch_size
    assert json.loads((await ask(json.dumps([{}] * (most + 1))))[1]) == json.loads(INVALID)
    assert len(json.loads((await ask(json.dumps([{}] * most)))[1])) == most


def test_every_error_has_a_number_of_its_range():
    """The server's own are from -32099 to -32000, and the words of kinds that differ are in the data."""
    own = {code for kind, code in jsonrpc.CODES.items() if code not in jsonrpc.MESSAGES}
    assert own
    assert own <= set(range(-32099, -31999))
    assert len(set(jsonrpc.CODES.values())) == len(jsonrpc.CODES)
    assert code_of(errors.Closed) == code_of(errors.Unavailable)
    assert code_of(errors.NotFinite) == code_of(errors.EngineError)


# Our methods


def body(name, params=None, **members):
    """Make a request."""
    return {"jsonrpc": "2.0", "id": 1, "method": name, **({} if params is None else {"params": params}), **members}


async def rpc(parts, *bodies, headers=None):
    """Send a body to the whole server and return status and what it answers."""
    (given,) = bodies
    reply = await parts.api.receive(Call("POST", "/rpc", headers or {}, json.dumps(given).encode()))
    return reply.status, json.loads(reply.body) if reply.body else None


def level(name, dtype):
    """Make the fake model a quality level's."""
    return replace(fake_model(HashBackend(), id=name, weights=name, aliases=()), dtype=dtype)


@pytest.mark.parametrize("params", [[["to be", "or not"], 2], {"texts": ["to be", "or not"], "quality": 2}])
async def test_embed_by_quality_in_full_precision(params):
    """Level 2 is its model's own numbers, by position as by name."""
    async with assembled(level("bge-small-q2", "float32")) as parts:
        status, reply = await rpc(parts, body("embed", params))
    result = reply["result"]
    wanted = [hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids) for text in ("to be", "or not")]
    assert status == 200
    assert [each["values"] for each in result["embeddings"]] == [pytest.approx(v.tolist(), abs=1e-7) for v in wanted]
    assert all("scale" not in each for each in result["embeddings"])
    facts = {name: result[name] for name in ("precision", "dimensions", "quality", "model")}
    assert facts == {"precision": "float32", "dimensions": 32, "quality": 2, "model": "bge-small-q2"}


async def test_embed_by_quality_in_int8_has_scales():
    """Level 1 gives integers, and the scale that makes each vector again to half a step."""
    async with assembled(level("bge-small-q1", "int8")) as parts:
        _, reply = await rpc(parts, body("embed", [["to be"], 1]))
    (found,) = reply["result"]["embeddings"]
    wanted = hash_vector(byte_tokenizer().encode(["to be"], truncate=False)[0].ids)
    assert all(isinstance(value, int) and -127 <= value <= 127 for value in found["values"])
    assert [value * found["scale"] for value in found["values"]] == pytest.approx(
        wanted.tolist(), abs=found["scale"] / 2
    )
    assert (reply["result"]["precision"], reply["result"]["quality"]) == ("int8", 1)


@pytest.mark.parametrize(
    ("name", "params", "code", "word"),
    [
        ("embed", [["a"], 4], -32001, "model_not_found"),
        ("embed", {"texts": ["a"], "model": "no/such"}, -32001, "model_not_found"),
        ("embed", [["a"], 5], -32602, "invalid_value"),
        ("embed", [[], None], -32602, "invalid_value"),
        ("embed", {"texts": ["a"], "quality": 1, "model": "hash"}, -32602, "invalid_value"),
        ("embed", {"texts": ["a"], "qualty": 1}, -32602, "invalid_value"),
        ("embed", [["a" * 600]], -32002, "context_length_exceeded"),
        ("embed", [["a"] * 2049], -32003, "too_many_inputs"),
        ("rerank", ["a", [{"text": "b"}]], -32602, "invalid_value"),
        ("health", [1], -32602, "invalid_value"),
    ],
)
async def test_errors_have_their_numbers(parts, name, params, code, word):
    """The number is the kind's, and `data.code` has our word."""
    status, reply = await rpc(parts, body(name, params))
    assert status == 200
    assert (reply["error"]["code"], reply["error"]["data"]["code"]) == (code, word)
    assert reply["id"] == 1


async def test_rerank_gives_ids_by_falling_score():
    """Each document's own id, a text or a number; `top_k` keeps the best."""
    docs = [{"id": "d1", "text": "a dog"}, {"id": 2, "text": "the cat"}, {"id": "d3", "text": "çà"}]
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        _, reply = await rpc(parts, body("rerank", ["a pet", docs]))
        _, best = await rpc(parts, body("rerank", {"query": "a pet", "docs": docs, "top_k": 1}))
    hits = reply["result"]
    assert {hit["id"] for hit in hits} == {"d1", 2, "d3"}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert best["result"] == hits[:1]


async def test_what_operators_ask(parts):
    """Health, progress, models, memory and runtime, each with numbers that are true."""
    found = {}
    for name in ("health", "status", "models.list", "mem_info", "ort_info"):
        status, reply = await rpc(parts, body(name))
        assert status == 200
        found[name] = reply["result"]
    assert found["health"] == {"status": "ok", "models_ready": True}
    assert found["status"]["models"] == [{"id": "test/hash", "state": "ready", "error": "", "downloads": []}]
    assert found["status"]["models_root"] == str(parts.config.models.data_dir / "models")
    assert [model["id"] for model in found["models.list"]] == ["test/hash"]
    assert 0 < found["mem_info"]["rss_bytes"] < found["mem_info"]["total_bytes"]
    assert 0 < found["mem_info"]["available_bytes"] < found["mem_info"]["total_bytes"]
    assert [each["id"] for each in found["mem_info"]["models"]] == ["test/hash"]
    assert found["ort_info"]["is_supported"] is True
    assert "CPUExecutionProvider" in found["ort_info"]["providers"]


# Accounts


async def as_key(parts, key, given, **headers):
    """Send a body with a key and return what is answered."""
    reply = await post(parts, "/rpc", key, json.dumps(given).encode(), **headers)
    assert reply.status == 200
    return json.loads(reply.body)


@pytest.mark.parametrize(
    ("name", "params", "scope"),
    [
        ("embed", [["a"]], "embed"),
        ("rerank", ["a", [{"id": 1, "text": "b"}]], "rerank"),
        ("status", [], "metrics"),
        ("mem_info", [], "metrics"),
        ("ort_info", [], "metrics"),
    ],
)
async def test_a_key_is_good_for_its_scopes_only(tmp_path, name, params, scope):
    """Without the scope, a method is -32011; `health` needs none."""
    async with staffed(tmp_path) as (parts, desk):
        with_it, without = await desk.key(scopes=frozenset({scope})), await desk.key(scopes=frozenset({"usage"}))
        assert "result" in await as_key(parts, with_it, body(name, params))
        refused = await as_key(parts, without, body(name, params))
        assert "result" in await as_key(parts, without, body("health"))
    assert (refused["error"]["code"], refused["error"]["data"]["code"]) == (-32011, "insufficient_permissions")


async def test_entries_of_a_batch_are_counted_each_once(tmp_path):
    """One that fails costs nothing and takes no other with it; a batch that is repeated costs nothing more."""
    batch = [body("embed", [["a", "b"]], id=1), body("embed", [[]], id=2), body("embed", [["c"]], id=3)]
    async with staffed(tmp_path) as (parts, desk):
        key = await desk.key()
        for _ in range(2):
            answers = await as_key(parts, key, batch, idempotency_key="once")
            assert ["result" in each for each in answers] == [True, False, True]
        await parts.stores.register.meter.flush()
        assert [(total.requests, total.embeddings) for total in await desk.totals()] == [(2, 3)]
        await as_key(parts, key, batch)
        await parts.stores.register.meter.flush()
        assert [(total.requests, total.embeddings) for total in await desk.totals()] == [(4, 6)]


# Over HTTP


async def test_a_batch_over_http():
    """Answers in order; notifications alone are 204 with neither length nor type."""
    entries = [body("health"), body("health", id="x"), body("no.such", id=3)]
    quiet = [{name: value for name, value in entry.items() if name != "id"} for entry in entries]
    async with listening() as url, httpx.AsyncClient(base_url=url) as http:
        answered, silent = await http.post("/rpc", json=entries), await http.post("/rpc", json=quiet)
        again = await http.post("/rpc", json=entries[0])
    assert [each["id"] for each in answered.json()] == [1, "x", 3]
    assert (silent.status_code, silent.content) == (204, b"")
    assert not {"content-length", "content-type", "transfer-encoding"} & set(silent.headers)
    assert again.json()["result"]["status"] == "ok"


@pytest.mark.parametrize(
    ("headers", "content", "status", "code", "word"),
    [
        ({"authorization": "Bearer wrong"}, b"{}", 401, -32010, "invalid_api_key"),
        ({"content-type": "text/plain"}, b"{}", 415, -32000, "unsupported_media_type"),
        ({}, b" " * 2000, 413, -32000, "body_too_large"),
    ],
)
async def test_what_is_wrong_with_the_request_itself_has_its_status(headers, content, status, code, word):
    """And JSON-RPC's shape, without an id."""
    given = {"authorization": "Bearer secret", "content-type": "application/json", **headers}
    server = ServerConfig(api_key=Secret("secret"), max_body_bytes=1000)
    async with listening(server=server) as url, httpx.AsyncClient(base_url=url) as http:
        refused = await http.post("/rpc", content=content, headers=given)
    reply = refused.json()
    assert (refused.status_code, reply["error"]["code"], reply["error"]["data"]["code"]) == (status, code, word)
    assert (reply["jsonrpc"], reply["id"]) == ("2.0", None)


async def test_status_shows_how_far_a_file_is(tmp_path, monkeypatch):
    """Bytes that have come and bytes in all, as the hub sends them; what is wrong with the model then is told as well."""
    weights, size = "model.safetensors", 24 << 20
    with beside_a_hub(tmp_path, monkeypatch) as machine:
        machine.publish(tiny() | {weights: b"\0" * size})
        machine.repository.faults[weights] = Fault.HELD
        parts = app.build(Config(models=replace(machine.config, model=(NAME,))))
        async with parts.stores, parts.engine, parts.service.jobs:
            loading = asyncio.create_task(parts.engine.load(lambda *_: None))
            done = await held_at(parts, weights)
            assert done == (pytest.approx(size / 2, rel=0.2), size)
            assert (await rpc(parts, body("health")))[1]["result"] == {"status": "starting", "models_ready": False}
            machine.hub.gate.set()
            with pytest.raises(errors.LoadError):
                await loading
            (model,) = (await rpc(parts, body("status")))[1]["result"]["models"]
    assert model["state"] == "failed"
    assert weights in model["error"]


async def held_at(parts, file):
    """Ask for the status until a file is on its way and no more of it comes; return its bytes so far, and in all."""
    seen = None
    async with asyncio.timeout(20):
        while True:
            models = (await rpc(parts, body("status")))[1]["result"]["models"]
            files = [each for model in models for each in model["downloads"]]
            now = {each["file"]: (each["done_bytes"], each["total_bytes"]) for each in files}.get(file)
            if now and now[0] and now == seen:
                return now
            seen = now
            await asyncio.sleep(0.3)


@pytest.mark.parametrize("path", ["/rpc", "/jsonrpc/rpc", "/jsonrpc/nowhere"])
async def test_a_wrong_method_or_path_is_told_in_its_shape(parts, path):
    """Below its own prefix as at the path that is nobody else's."""
    reply = await parts.api.receive(Call("GET", path))
    error = json.loads(reply.body)
    assert reply.status == (404 if "nowhere" in path else 405)
    assert (error["jsonrpc"], error["error"]["code"], error["id"]) == ("2.0", -32000, None)
