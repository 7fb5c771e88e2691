"""How the dialects of hosted APIs (Cohere, Jina, Voyage, Mixedbread) say no, and whose a call is that several claim."""

import asyncio
import json
import threading

import pytest

from conftest import assembled
from fakes import hash_model
from quiver import app
from quiver.api.call import Call
from quiver.api.cohere import COHERE
from quiver.api.jina import JINA
from quiver.api.mixedbread import MIXEDBREAD
from quiver.api.root import SHARED
from quiver.api.router import Router
from quiver.api.voyage import VOYAGE
from quiver.config import Config, EngineConfig, ModelsConfig, Secret, ServerConfig

HOSTED = (COHERE, JINA, VOYAGE, MIXEDBREAD)
ERROR_KEYS = {"cohere": ["message", "id"], "jina": ["detail", "code"], "voyage": ["detail"], "mixedbread": ["error"]}
INVALID = {"cohere": 400, "jina": 422, "voyage": 400, "mixedbread": 400}
EMBED = {
    "cohere": ("/cohere/v2/embed", "texts"),
    "jina": ("/jina/v1/embeddings", "input"),
    "voyage": ("/voyage/v1/embeddings", "input"),
    "mixedbread": ("/mixedbread/v1/embeddings", "input"),
}


async def send(parts, path, body, *, method="POST", **headers):
    """Send a body straight into the API; returns the whole reply."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await parts.api.receive(Call(method, path, named, raw))


def embed_body(name, *texts):
    """Return where an API embeds, and the body that asks for it."""
    path, field = EMBED[name]
    return path, {field: [*texts]}


def message_of(name, reply):
    """Return the sentence of an error; its shape is exactly that of the API."""
    error = json.loads(reply.body)
    assert list(error) == ERROR_KEYS[name]
    if name == "mixedbread":
        assert list(error["error"]) == ["message", "type", "param", "code"]
        return error["error"]["message"]
    assert all(isinstance(value, str) for value in error.values())
    return error[ERROR_KEYS[name][0]]


SHARED_CALLS = [
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/embeddings", {"input": "a", "truncation": True}),
    ("/v1/embeddings", {"input": "a", "task": "retrieval.query"}),
    ("/v1/embeddings", {"input": "a", "prompt": "query"}),
    ("/v1/embeddings", {"input": "a", "modality": "text"}),
    ("/embeddings", {"input": "a"}),
    ("/v1/rerank", {"query": "a", "documents": ["a"]}),
    ("/v1/rerank", {"query": "a", "documents": ["a"], "top_k": 1}),
    ("/v1/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["text"]}),
    ("/rerank", {"query": "a", "documents": ["a"]}),
]


@pytest.mark.parametrize(("path", "body"), SHARED_CALLS)
async def test_where_a_path_is_shared_every_client_finds_the_reason(path, body):
    """OpenAI's object, Cohere's message and Voyage's detail stand in one body, whoever the call was told to be for."""
    allowed = {"allow_models": ("BAAI/bge-small-en-v1.5",)}
    async with assembled(models=allowed, server=ServerConfig(api_key=Secret("k3y"))) as parts:
        unknown = await send(parts, path, body | {"model": "gpt-4"}, authorization="k3y")
        stranger = await send(parts, path, body)
    assert (unknown.status in (400, 404), stranger.status) == (True, 401)
    assert stranger.headers["www-authenticate"] == "Bearer"
    for reply, words in ((unknown, "gpt-4"), (stranger, "API key")):
        found = json.loads(reply.body)
        assert {"error", "message", "detail"} <= found.keys()
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert words in found["message"]
        assert found["detail"] in (found["message"], "Unauthorized")  # the word of Infinity's own client


async def test_what_infinitys_client_walks_stays_a_list(parts):
    """At a shared path, a wrong form of its body is 422 with its framework's list, whatever stands beside that."""
    reply = await send(parts, "/v1/rerank", {"query": "a", "documents": [], "raw_scores": False})
    found = json.loads(reply.body)
    assert (reply.status, found["detail"][0]["loc"]) == (422, ["body", "documents"])
    assert found["message"] == found["error"]["message"] == found["detail"][0]["msg"]


BODIES = [(d.name, route.path) for d in HOSTED for route in d.routes if route.body]
BAD = {
    "nothing": b"",
    "no object": b"[]",
    "no json": b"{input: 1}",
    "NaN": b'{"model":NaN}',
    "invalid utf-8": b'{"model":"\xff\xfe"}',
    "a lone surrogate": b'{"model":"\\ud800"}',
    "2,000-deep nesting": b'{"input":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "no fields": b"{}",
    "model a number": b'{"model":5,"input":"a","text":"a","tokens":[5],"inputs":[["a"]],"query":"a","documents":["a"]}',
}


@pytest.mark.parametrize(("name", "path"), BODIES)
async def test_a_bad_body_is_refused_in_the_apis_shape(parts, name, path):
    """Whatever the body and the route, the reply is the API's own 4xx with a sentence."""
    for what, body in BAD.items():
        reply = await send(parts, f"/{name}{path}", body)
        assert reply.status == INVALID[name], what
        assert message_of(name, reply)


REFUSED = {
    "no texts": ("cohere", "/v1/embed", {"texts": []}),
    "texts and inputs": ("cohere", "/v2/embed", {"texts": ["a"], "inputs": [{"content": []}]}),
    "texts a text": ("cohere", "/v1/embed", {"texts": "a"}),
    "an input of nothing": ("cohere", "/v2/embed", {"inputs": [{"content": []}]}),
    "an unknown input_type": ("cohere", "/v1/embed", {"texts": ["a"], "input_type": "poem"}),
    "images by input_type": ("cohere", "/v1/embed", {"texts": ["a"], "input_type": "image"}),
    "an unknown embedding type": ("cohere", "/v1/embed", {"texts": ["a"], "embedding_types": ["float8"]}),
    "an unknown truncate": ("cohere", "/v1/embed", {"texts": ["a"], "truncate": "MIDDLE"}),
    "output_dimension 0": ("cohere", "/v2/embed", {"texts": ["a"], "output_dimension": 0}),
    "output_dimension 33": ("cohere", "/v2/embed", {"texts": ["a"], "output_dimension": 33}),
    "too many texts": ("cohere", "/v2/embed", {"texts": ["a"] * 2049}),
    "top_n 0": ("cohere", "/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}),
    "no documents": ("cohere", "/v2/rerank", {"query": "a", "documents": []}),
    "a number as document": ("cohere", "/v2/rerank", {"query": "a", "documents": [5]}),
    "none of the rank_fields": ("cohere", "/v1/rerank", {"query": "a", "documents": [{"a": 1}], "rank_fields": ["b"]}),
    "negative tokens": ("cohere", "/v1/detokenize", {"tokens": [-1]}),
    "tokens beyond the vocabulary": ("cohere", "/v1/detokenize", {"tokens": [100_000]}),
    "no input": ("jina", "/v1/embeddings", {"input": []}),
    "token ids": ("jina", "/v1/embeddings", {"input": [[1, 2, 3]]}),
    "an object without text": ("jina", "/v1/embeddings", {"input": {"url": "https://example.com"}}),
    "an unknown embedding_type": ("jina", "/v1/embeddings", {"input": "a", "embedding_type": "int4"}),
    "dimensions 999": ("jina", "/v1/embeddings", {"input": "a", "dimensions": 999}),
    "late chunks of nothing": ("jina", "/v1/embeddings", {"input": ["a", ""], "late_chunking": True}),
    "top_n -1": ("jina", "/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}),
    "a query without text": ("jina", "/v1/rerank", {"query": {"image": "a"}, "documents": ["a"]}),
    "an unknown input_type of Voyage": ("voyage", "/v1/embeddings", {"input": "a", "input_type": "passage"}),
    "an unknown output_dtype": ("voyage", "/v1/embeddings", {"input": "a", "output_dtype": "int4"}),
    "an unknown encoding_format": ("voyage", "/v1/embeddings", {"input": "a", "encoding_format": "hex"}),
    "top_k 0": ("voyage", "/v1/rerank", {"query": "a", "documents": ["a"], "top_k": 0}),
    "objects at Voyage": ("voyage", "/v1/rerank", {"query": "a", "documents": [{"text": "a"}]}),
    "an unknown format in a list": ("mixedbread", "/v1/embeddings", {"input": "a", "encoding_format": ["int4"]}),
    "mixedbread's top_k 0": ("mixedbread", "/v1/reranking", {"query": "a", "input": ["a"], "top_k": 0}),
    "mixedbread's empty input": ("mixedbread", "/v1/reranking", {"query": "a", "input": []}),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_bad_values_are_refused_with_the_reason(parts, what):
    """The reply is the API's own 4xx with a sentence; the next request is answered."""
    name, path, body = REFUSED[what]
    reply = await send(parts, f"/{name}{path}", body)
    assert reply.status == INVALID[name], reply.body
    assert len(message_of(name, reply)) > 10
    assert (await send(parts, *embed_body(name, "a"))).status == 200


@pytest.mark.parametrize("name", EMBED)
async def test_nulls_are_as_good_as_nothing(parts, name):
    """Every optional field of every body may be null."""
    bodies = {
        "cohere": {"truncate": None, "output_dimension": None, "input_type": None, "embedding_types": None},
        "jina": {"task": None, "dimensions": None, "embedding_type": None, "normalized": None, "truncate": None},
        "voyage": {"input_type": None, "truncation": None, "output_dtype": None, "encoding_format": None},
        "mixedbread": {"dimensions": None, "prompt": None, "normalized": None, "encoding_format": None},
    }
    path, body = embed_body(name, "a")
    plain = json.loads((await send(parts, path, body)).body) | {"id": ""}
    reply = await send(parts, path, {**body, **bodies[name], "model": None, "nonsense": 1})
    assert json.loads(reply.body) | {"id": ""} == plain


@pytest.mark.parametrize("name", EMBED)
async def test_a_wrong_key_is_401(name):
    """In the shape of the API whose path was called."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        reply = await send(parts, *embed_body(name, "a"), authorization="Bearer wrong")
        assert reply.status == 401
        assert message_of(name, reply)
        assert (await send(parts, *embed_body(name, "a"), authorization="Bearer k3y")).status == 200


@pytest.mark.parametrize("name", EMBED)
async def test_a_model_that_is_still_loading_is_503(name):
    """With the time to come back, which every client heeds."""
    parts = app.build(Config(models=ModelsConfig(model=("test/hash",))))
    async with parts.engine:
        reply = await send(parts, *embed_body(name, "a"))
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert "loading" in message_of(name, reply)


@pytest.mark.parametrize("name", EMBED)
async def test_overload_is_429_and_a_late_answer_504(name):
    """What may be tried again says when, in the API's own shape; who was taken is answered."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    model = hash_model(lanes=1, before=wait)
    async with assembled(
        model, engine=EngineConfig(max_waiting_tokens=100), server=ServerConfig(timeout_seconds=0.5)
    ) as parts:
        taken = asyncio.create_task(send(parts, *embed_body(name, "a" * 90)))
        await asyncio.to_thread(busy.wait)
        late = asyncio.create_task(send(parts, *embed_body(name, "b" * 90)))
        async with asyncio.timeout(5):
            while not parts.engine.replicas.loaded[0].scheduler.waiting_tokens:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0)
        refused = await send(parts, *embed_body(name, "c" * 90))
        expired = await late
        gate.set()

        assert (refused.status, expired.status) == (429, 504)
        assert int(refused.headers["retry-after"]) >= 1
        assert message_of(name, refused)
        assert message_of(name, expired)
        assert (await taken).status in (200, 504)
        assert (await send(parts, *embed_body(name, "d"))).status == 200


async def test_mixedbreads_client_says_how_long_it_waits():
    """Its read timeout is the request's: a late answer is 504, though the server has more patience."""
    gate = threading.Event()
    async with assembled(hash_model(before=lambda _: gate.wait(10))) as parts:
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/reranking", {"query": "a", "input": ["a"]})):
            reply = await send(parts, f"/mixedbread{path}", body, x_stainless_read_timeout="0.05")
            assert reply.status == 504
        gate.set()


async def test_an_error_has_jinas_own_word_where_it_has_one(parts):
    """Programs tell an unknown model and an over-long text by their codes."""
    for body, code in (
        ({"input": ["a" * 600]}, "INPUT_TOKEN_LIMIT_EXCEEDED"),
        ({"input": ["a"], "model": "none"}, "INPUT_MODEL_NOT_FOUND"),
        ({"input": []}, "invalid_value"),
    ):
        assert json.loads((await send(parts, "/jina/v1/embeddings", body)).body)["code"] == code


TEXTS, PLAIN = {"texts": ["a"]}, {"model": "m", "input": ["a"]}
PAIRS = {"model": "m", "query": "a", "documents": ["a"]}
FERN = {"x-fern-sdk-name": "cohere"}
WHOSE = [
    ("POST", "/v1/embeddings", PLAIN, {}, "openai"),
    ("POST", "/v1/embeddings", {**PLAIN, "encoding_format": "base64", "user": "u"}, {}, "openai"),
    ("POST", "/v1/embeddings", {**PLAIN, "dimensions": 8, "truncate": True}, {}, "openai"),
    ("POST", "/v1/embeddings", {**PLAIN, "input_type": "query", "dimensions": 8}, {}, "openai"),
    ("POST", "/v1/embeddings", {**PLAIN, "input_type": "passage"}, {}, "openai"),
    ("POST", "/v1/embeddings", {**PLAIN, "input_type": "query"}, {}, "voyage"),
    ("POST", "/v1/embeddings", {**PLAIN, "input_type": None, "truncation": True, "output_dtype": None}, {}, "voyage"),
    ("POST", "/v1/embeddings", {**PLAIN, "output_dimension": 8}, {}, "voyage"),
    ("POST", "/v1/embeddings", {**PLAIN, "task": "text-matching", "dimensions": 8, "truncate": True}, {}, "jina"),
    ("POST", "/v1/embeddings", {**PLAIN, "late_chunking": True}, {}, "jina"),
    ("POST", "/v1/embeddings", {**PLAIN, "embedding_type": "float"}, {}, "jina"),
    ("POST", "/v1/embeddings", {**PLAIN, "normalized": True}, {}, "jina"),
    ("POST", "/v1/embeddings", {"input": [{"text": "a"}]}, {}, "jina"),
    ("POST", "/v1/embeddings", {**PLAIN, "normalized": True, "prompt": "query"}, {}, "mixedbread"),
    ("POST", "/v1/embeddings", {**PLAIN, "normalized": True, "encoding_format": ["float"]}, {}, "mixedbread"),
    ("POST", "/v1/embeddings", PLAIN, {"user-agent": "AsyncMixedbread/Python 0.54.0"}, "mixedbread"),
    ("POST", "/v1/embed", TEXTS, {}, "cohere"),
    ("POST", "/v1/rerank", PAIRS, {}, "jina"),
    ("POST", "/v1/rerank", {**PAIRS, "top_n": 1, "return_documents": True}, {}, "jina"),
    ("POST", "/v1/rerank", PAIRS, FERN, "cohere"),
    ("POST", "/v1/rerank", {**PAIRS, "max_chunks_per_doc": 10}, {}, "cohere"),
    ("POST", "/v1/rerank", {**PAIRS, "top_k": None, "truncation": True}, {}, "voyage"),
    ("GET", "/v1/models", None, {}, "openai"),
    ("GET", "/v1/models", None, {"user-agent": "cohere/7.3.1"}, "cohere"),
    ("GET", "/v1/models/test/hash", None, {}, "openai"),
    ("GET", "/v1/models/test/hash", None, FERN, "cohere"),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "owner"), WHOSE)
def test_a_call_at_the_root_reaches_the_api_that_it_was_made_for(method, path, body, headers, owner):
    """What clients of each API send is told apart by what no other client sends."""
    call = Call(method, path, headers, b"" if body is None else json.dumps(body).encode())
    assert Router(app.DIALECTS, SHARED).find(call)[0].name == owner


@pytest.mark.parametrize("owner", ["jina", "cohere", "voyage", "infinity"])
def test_a_rerank_that_tells_nothing_goes_where_the_settings_say(owner):
    """The bodies of several APIs may be the same: `root_dialects` decides, and without it, it is Jina's."""
    call = Call("POST", "/v1/rerank", {}, json.dumps(PAIRS).encode())
    assert Router(app.DIALECTS, SHARED, ("openai", owner)).find(call)[0].name == owner
    assert Router(app.DIALECTS, SHARED, ("openai",)).find(call)[0].name == "jina"


@pytest.mark.parametrize("owner", ["openai", "jina", "voyage", "mixedbread", "infinity"])
@pytest.mark.parametrize("body", [PLAIN, {**PLAIN, "dimensions": 8}, b"no json"])
def test_embeddings_that_tell_nothing_go_where_the_settings_say(owner, body):
    """Texts and a model are everybody's body: `root_dialects` decides, and without it, it is OpenAI's."""
    call = Call("POST", "/v1/embeddings", {}, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert Router(app.DIALECTS, SHARED, (owner,)).find(call)[0].name == owner
    assert Router(app.DIALECTS, SHARED).find(call)[0].name == "openai"


@pytest.mark.parametrize("path", ["/v1/v1/embed", "/v1/v1/rerank", "/v1/v1/models", "/v1/v1/models/test/hash"])
def test_a_version_that_is_named_twice_is_named_once(path):
    """Clients that put /v1 before their paths find them with a base URL that ends so as well."""
    call = Call("GET" if "models" in path else "POST", path, FERN, b'{"texts": ["a"]}')
    dialect, route, _ = Router(app.DIALECTS, SHARED).find(call)
    assert dialect.name == "cohere"
    assert route.path.count("/v1") == 1
