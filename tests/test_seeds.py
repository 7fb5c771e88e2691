"""What the dialects of smaller servers that Quiver stands in for promise beyond their recorded exchanges."""

import asyncio
import json
import re
import threading

import numpy as np
import pytest

from conftest import assembled, kill_lanes
from fakes import HIDDEN, HashBackend, LogitBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver import app
from quiver.api.call import Call
from quiver.api.root import SHARED
from quiver.api.router import Router
from quiver.api.s3_embedding import with_unit
from quiver.config import Config, EngineConfig, ModelsConfig, Secret, ServerConfig
from quiver.types import Pair

EMBED = {
    "ollama": ("/ollama/api/embed", "input"),
    "inference_api": ("/inference_api/api/embed", "text"),
    "s3_embedding": ("/s3_embedding/api/v1/embed", "inputs"),
    "fastembed_query": ("/fastembed_query/v1/embed", "text"),
}
ERROR_KEYS = {
    "ollama": ["error"],
    "inference_api": ["error", "code"],
    "s3_embedding": ["error", "error_type"],
    "fastembed_query": ["error", "code"],
}
BATCH, RERANK = "/inference_api/api/embed/batch", "/inference_api/api/rerank"


async def send(parts, path, body=None, *, method="POST", **headers):
    """Send a body straight into the API; returns the whole reply."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return await parts.api.receive(Call(method, path, {"content-type": "application/json"} | headers, raw))


async def ask(parts, path, body=None, **options):
    """Send a body; returns status and decoded reply."""
    reply = await send(parts, path, body, **options)
    return reply.status, json.loads(reply.body)


def embed_body(name, text="a"):
    """Return where an API embeds, and the body that asks for it."""
    path, field = EMBED[name]
    return path, {field: text}


def vector_of(text):
    """Return the vector that the hash model gives a text."""
    return hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids)


def shape_of(name, reply):
    """Return the error; it has exactly the API's own fields, and a sentence."""
    error = json.loads(reply.body)
    assert list(error) == ERROR_KEYS[name]
    assert len(error["error"]) > 10
    return error


# How each says no


@pytest.mark.parametrize("name", EMBED)
async def test_a_bad_body_is_refused_in_the_apis_shape(parts, name):
    """Whatever the body, the reply is the API's own 4xx; the next request is answered."""
    path, field = EMBED[name]
    bodies = {
        "no object": b"[]",
        "no json": b"{text: 1}",
        "NaN": b'{"%b":NaN}' % field.encode(),
        "invalid utf-8": b'{"%b":"\xff\xfe"}' % field.encode(),
        "a lone surrogate": b'{"%b":"\\ud800"}' % field.encode(),
        "2,000-deep nesting": b'{"%b":' % field.encode() + b"[" * 2000 + b"]" * 2000 + b"}",
        "nothing": b"",
        "a number": {field: 5},
        "an object": {field: {"text": "a"}},
        "token ids": {field: [101, 102]},
        "model a number": {field: "a", "model": 5},
    }
    for what, body in bodies.items():
        reply = await send(parts, path, body)
        assert reply.status in (400, 422), what
        shape_of(name, reply)
    assert (await send(parts, *embed_body(name))).status == 200


@pytest.mark.parametrize("name", EMBED)
async def test_unknown_fields_and_nulls_are_as_good_as_nothing(parts, name):
    """What is not read changes no vector."""
    optional = {
        "ollama": ["model", "truncate", "dimensions", "options", "keep_alive"],
        "inference_api": ["model", "input"],
        "s3_embedding": ["model", "truncate", "truncation_direction", "prompt_name", "normalize", "dimensions"],
        "fastembed_query": ["model", "truncate", "normalize"],
    }
    path, body = embed_body(name)
    _, plain = await ask(parts, path, body)
    status, reply = await ask(parts, path, {**body, **dict.fromkeys(optional[name]), "nonsense": {"deep": [1, None]}})
    assert status == 200
    assert vectors_of(reply) == vectors_of(plain)


def vectors_of(reply):
    """Find the vectors in whatever reply."""
    if "data" in reply:
        return [item["embedding"] for item in reply["data"]]
    return reply.get("embeddings") or [reply["embedding"]]


@pytest.mark.parametrize("name", EMBED)
async def test_a_wrong_key_is_401(name):
    """In the shape of the API whose path was called."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        reply = await send(parts, *embed_body(name), authorization="Bearer wrong")
        assert reply.status == 401
        shape_of(name, reply)
        assert (await send(parts, *embed_body(name), authorization="Bearer k3y")).status == 200


@pytest.mark.parametrize("name", EMBED)
async def test_a_model_that_is_still_loading_is_503(name):
    """With the time to come back."""
    parts = app.build(Config(models=ModelsConfig(model=("test/hash",))))
    async with parts.engine:
        reply = await send(parts, *embed_body(name))
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert "loading" in shape_of(name, reply)["error"]


@pytest.mark.parametrize(
    ("name", "overloaded", "late"),
    [("ollama", 503, 504), ("inference_api", 503, 503), ("s3_embedding", 429, 504), ("fastembed_query", 429, 504)],
)
async def test_overload_and_a_late_answer_say_when_to_come_back(name, overloaded, late):
    """Each with the API's own status and shape; afterwards requests are answered again."""
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
        expiring = asyncio.create_task(send(parts, *embed_body(name, "b" * 90)))
        async with asyncio.timeout(5):
            while not parts.engine.replicas.loaded[0].scheduler.waiting_tokens:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0)
        refused = await send(parts, *embed_body(name, "c" * 90))
        _, status = await ask(parts, "/inference_api/health/status", method="GET")
        expired = await expiring
        gate.set()

        assert (refused.status, expired.status) == (overloaded, late)
        for reply in (refused, expired):
            shape_of(name, reply)
            assert int(reply.headers["retry-after"]) >= 1
        assert status["total_queue_depth"] == 90
        assert (await taken).status in (200, late)
        assert (await send(parts, *embed_body(name))).status == 200


# Whose call it is

WHOSE = [
    ("/api/embed", {"model": "m", "input": ["a"]}, (), "ollama"),
    ("/api/embed", {"model": "m", "input": ["a"]}, ("inference_api",), "inference_api"),
    ("/api/embed", {"model": "m", "input": ["a"]}, ("openai", "ollama", "inference_api"), "ollama"),
    ("/api/embed", {"model": "m", "input": "a", "truncate": True}, ("inference_api",), "ollama"),
    ("/api/embed", {"model": "m", "text": "a"}, ("ollama",), "inference_api"),
    ("/api/embed", {}, (), "ollama"),
    ("/api/embed", {}, ("inference_api",), "inference_api"),
    ("/api/embed/batch", {"texts": ["a"]}, (), "inference_api"),
    ("/api/embeddings", {"prompt": "a"}, (), "ollama"),
    ("/api/v1/embed", {"inputs": "a"}, (), "s3_embedding"),
    ("/v1/embed", {"text": "a"}, ("cohere",), "fastembed_query"),
    ("/v1/embed", {"texts": ["a"]}, ("fastembed_query",), "cohere"),
    ("/v1/embed", {}, (), "cohere"),
    ("/v1/embed", {}, ("fastembed_query",), "fastembed_query"),
]


@pytest.mark.parametrize(("path", "body", "preferred", "owner"), WHOSE)
def test_a_call_at_the_root_reaches_the_api_that_it_was_made_for(path, body, preferred, owner):
    """What the bodies do not tell apart, `root_dialects` does."""
    call = Call("POST", path, {}, json.dumps(body).encode())
    assert Router(app.DIALECTS, SHARED, preferred).find(call)[0].name == owner


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_the_roots_probes_are_quivers_own(path):
    """Unless the settings give them to another API."""
    owner = "fastembed_query" if path == "/health" else "inference_api"
    assert Router(app.DIALECTS, SHARED).find(Call("GET", path))[0].name == "health"
    assert Router(app.DIALECTS, SHARED, (owner,)).find(Call("GET", path))[0].name == owner


# embedding-inference-api


async def test_both_spellings_give_the_same(parts):
    """What the code of this API takes and what its document shows mean the same, one by one and in a batch."""
    spellings = [
        ("/inference_api/api/embed", {"text": "one"}),
        ("/inference_api/api/embed", {"input": "one"}),
        ("/inference_api/api/embed", {"input": ["one"]}),
        (BATCH, {"texts": ["one"]}),
        (BATCH, {"input": ["one"]}),
        (BATCH, {"input": "one"}),
    ]
    for path, body in spellings:
        status, reply = await ask(parts, path, body)
        assert status == 200
        assert list(reply) == ["embeddings", "model", "count", "dimensions"]
        assert np.array_equal(np.float32(reply["embeddings"]), [vector_of("one")])
        assert (reply["count"], reply["dimensions"]) == (1, HIDDEN)


async def test_a_long_batch_comes_whole_and_in_order(parts):
    """Each of 1,000 texts has its vector at its place."""
    texts = [f"text {i}" for i in range(1000)]
    _, reply = await ask(parts, BATCH, {"texts": texts, "model": "hash"})
    assert np.array_equal(np.float32(reply["embeddings"]), [vector_of(text) for text in texts])


@pytest.mark.parametrize("name", ["top_k", "top_n"])
@pytest.mark.parametrize("count", [1, 3, 10, 99])
async def test_a_ranking_is_by_logit_and_no_longer_than_asked(name, count):
    """Scores are the model's own numbers, below zero too, highest first, each with its document."""
    documents = [f"document {i}" for i in range(10)]
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        tokenizer = parts.engine.replicas.loaded[0].model.tokenizer
        _, reply = await ask(parts, RERANK, {"query": "q", "documents": documents, name: count})
        bare = {"query": "q", "documents": [{"text": text} for text in documents], name: count, "return_scores": False}
        _, without = await ask(parts, RERANK, bare)
    ids = tokenizer.encode([Pair("q", document) for document in documents], truncate=False)
    logits = [float(6 * hash_vector(encoding.ids)[0]) for encoding in ids]
    order = sorted(range(10), key=lambda i: -logits[i])[:count]
    assert min(logits) < 0
    assert [result["index"] for result in reply["results"]] == order
    assert [result["text"] for result in reply["results"]] == [documents[i] for i in order]
    assert [result["score"] for result in reply["results"]] == pytest.approx([logits[i] for i in order], abs=1e-5)
    assert without["results"] == [{"index": i, "text": documents[i]} for i in order]


async def test_a_model_of_vectors_ranks_by_cosine(parts):
    """Not every server has a reranker: another model compares vectors."""
    documents = ["one", "two", "three"]
    _, reply = await ask(parts, RERANK, {"query": "one", "documents": documents, "model": "hash"})
    cosines = [float(vector_of("one") @ vector_of(document)) for document in documents]
    assert reply["results"][0] == {"index": 0, "text": "one", "score": pytest.approx(1, abs=1e-6)}
    assert [result["score"] for result in reply["results"]] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)


async def test_what_the_model_cannot_compute_has_the_verbs_own_code():
    """A failure of the model is 500, and told apart by what was asked for."""

    def fail(_):
        raise ValueError("no")

    async with assembled(fake_model(HashBackend(before=fail))) as parts:
        status, error = await ask(parts, BATCH, {"texts": ["a"]})
        assert (status, error["code"], error["error"][:28]) == (500, "EMBEDDING_ERROR", "Embedding generation failed:")
        status, error = await ask(parts, RERANK, {"query": "q", "documents": ["a"]})
        assert (status, error["code"], error["error"][:17]) == (500, "RERANK_ERROR", "Reranking failed:")


async def test_a_model_that_cannot_be_loaded_has_a_code_of_its_own(tmp_path):
    """Callers of this API wait and try again."""
    (tmp_path / "broken").mkdir()
    async with assembled(models={"allow_models": (str(tmp_path / "broken"),)}) as parts:
        reply = await send(parts, BATCH, {"texts": ["a"], "model": "broken"})
    error = json.loads(reply.body)
    assert (reply.status, error["code"]) == (503, "MODEL_LOAD_ERROR")
    assert error["error"].startswith("Failed to load model: ")
    assert int(reply.headers["retry-after"]) >= 1


async def test_models_are_listed_by_name():
    """Every model of the catalogue that embeds or reranks is in one list, with what is known of it."""
    async with assembled(models={"allow_models": ("*",)}) as parts:
        _, embedders = await ask(parts, "/api/embedders", method="GET")
        _, rerankers = await ask(parts, "/api/rerankers", method="GET")
    for models, kind in ((embedders, "embedding"), (rerankers, "reranker")):
        names = [model["name"] for model in models]
        assert names == sorted(names) == [model["id"] for model in models]
        assert {model["model_type"] for model in models} == {kind}
    assert all(model["dimensions"] > 0 for model in embedders)
    assert all("dimensions" not in model for model in rerankers)
    assert len(embedders) > len(rerankers) > 3
    assert any(model["description"] for model in embedders)


async def test_readiness_fails_while_the_server_stops(parts):
    """It is 503 with the fields that it always has; liveness and the status stay 200."""
    parts.service.stopping = True
    wanted = {"status": "not_ready", "embedding": True, "reranker": False}
    assert await ask(parts, "/inference_api/health/ready", method="GET") == (503, wanted)
    assert (await ask(parts, "/inference_api/health/live", method="GET"))[0] == 200
    status, reply = await ask(parts, "/inference_api/health/status", method="GET")
    assert (status, reply["status"]) == (200, "not_ready")
    assert (await ask(parts, "/fastembed_query/health", method="GET"))[0] == 503


async def test_probes_fail_once_a_lane_has_died():
    """A process that can compute no more is neither live nor ready nor healthy."""

    def die(_):
        raise SystemExit

    async with assembled(hash_model(lanes=1, before=die)) as parts:
        assert (await send(parts, "/inference_api/health/live", method="GET")).status == 200
        await kill_lanes(parts)
        assert (await send(parts, BATCH, {"texts": ["a"]})).status == 503
        for path in ("/inference_api/health/live", "/inference_api/health/ready", "/fastembed_query/health"):
            assert (await send(parts, path, method="GET")).status == 503


# AI Embedding Inference Server


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ns"),
        (-1e-9, "0ns"),
        (5e-9, "5ns"),
        (120e-6, "120µs"),
        (2e-3, "2ms"),
        (0.0351234, "35.123ms"),
        (1.25, "1.25s"),
        (75, "75s"),
    ],
)
def test_a_duration_has_the_unit_that_fits(seconds, text):
    """As Rust writes it, to three digits behind the point."""
    assert with_unit(seconds) == text


async def test_inference_is_the_time_in_the_model():
    """A forward pass of 50 ms shows there, and not in another stage."""
    async with assembled(fake_model(HashBackend(before=lambda _: threading.Event().wait(0.05)))) as parts:
        _, reply = await ask(parts, "/api/v1/embed", {"inputs": "a"})
    amount, unit = re.fullmatch(r"([\d.]+)(\D+)", reply["timings"]["inference"]).groups()
    assert float(amount) * {"ms": 1e-3, "s": 1}[unit] >= 0.05


async def test_more_texts_than_a_request_may_bring_are_413():
    """Its own limit is two."""
    async with assembled(engine=EngineConfig(max_client_batch_size=2)) as parts:
        assert (await send(parts, "/api/v1/embed", {"inputs": ["a", "b"]})).status == 200
        reply = await send(parts, "/api/v1/embed", {"inputs": ["a", "b", "c"]})
    assert (reply.status, shape_of("s3_embedding", reply)["error_type"]) == (413, "validation")


async def test_its_words_for_errors_are_teis(parts):
    """In lower case, as its document has them."""

    def fail(_):
        raise ValueError("no")

    for body, status, kind in (({"inputs": ""}, 400, "empty"), ({"inputs": "a" * 600}, 422, "validation")):
        reply = await send(parts, "/api/v1/embed", body)
        assert (reply.status, shape_of("s3_embedding", reply)["error_type"]) == (status, kind)
    async with assembled(fake_model(HashBackend(before=fail))) as broken:
        reply = await send(broken, "/api/v1/embed", {"inputs": "a"})
        assert (reply.status, shape_of("s3_embedding", reply)["error_type"]) == (500, "backend")


@pytest.mark.parametrize("name", ["s3_embedding", "fastembed_query"])
async def test_normalize_false_keeps_the_models_own_length(name):
    """Unit length is the default, whatever the model does."""
    async with assembled(fake_model(LogitBackend(labels=HIDDEN))) as parts:
        for normalize, length in ((None, 1), (True, 1), (False, 6)):
            path, body = embed_body(name)
            _, reply = await ask(parts, path, {**body, "normalize": normalize})
            assert np.linalg.norm(vectors_of(reply)[0]) == pytest.approx(length, abs=1e-4)


# FastEmbed Query API


async def test_the_tokens_are_the_texts_own(minilm):
    """Its document's example has four words and four tokens: the two that the model adds do not count."""
    async with assembled(minilm) as parts:
        reply = await send(parts, "/v1/embed", {"text": "how to reset password"}, authorization="Bearer fe_key")
    body = json.loads(reply.body)
    assert list(body) == ["embedding", "model", "tokens", "cached", "latency_ms"]
    assert (body["model"], body["tokens"], body["cached"]) == ("all-MiniLM-L6-v2", 4, False)
    assert 0 < body["latency_ms"] < 60_000
    assert len(body["embedding"]) == 384
