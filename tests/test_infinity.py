"""Infinity's dialect: exact shapes, its two kinds of refusal, and who owns the paths that it shares."""

import asyncio
import base64
import itertools
import json
import threading

import numpy as np
import pytest

from conftest import assembled
from fakes import HIDDEN, LogitBackend, TokenBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver import app
from quiver.api.call import Call
from quiver.config import Config, EngineConfig, ModelsConfig, Secret, ServerConfig
from quiver.engine.scoring import sigmoid
from quiver.types import Pair

EMBEDDINGS = "/infinity/embeddings"


async def send(parts, path, body, *, method="POST", **headers):
    """Send a body straight into the API; returns the reply."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await parts.api.receive(Call(method, path, named, raw))


async def ask(parts, path, body, **options):
    """Send a body straight into the API; returns status and decoded reply."""
    reply = await send(parts, path, body, **options)
    return reply.status, json.loads(reply.body)


def ids_of(text):
    """Return the token ids that the byte tokenizer gives a text or a pair."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids.tolist()


def reranker():
    """Make a model that scores pairs."""
    return fake_model(LogitBackend(), kind="rerank", dimensions=1)


async def test_the_reply_has_exactly_infinitys_shape(parts):
    """Every key, in Infinity's order, with an id, the time and the tokens."""
    status, reply = await ask(parts, EMBEDDINGS, {"input": ["ab", "c"], "model": "hash"})

    assert status == 200
    assert list(reply) == ["object", "data", "model", "usage", "id", "created"]
    assert [list(item) for item in reply["data"]] == [["object", "embedding", "index"]] * 2
    assert reply["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert reply["id"].startswith("infinity-")
    assert type(reply["created"]) is int
    for item, text in zip(reply["data"], ["ab", "c"], strict=True):
        assert np.array_equal(np.float32(item["embedding"]), hash_vector(ids_of(text)))


async def test_base64_holds_the_same_bits_as_floats(parts):
    """The text form of a float32 is exact, and so is base64."""
    _, floats = await ask(parts, EMBEDDINGS, {"input": "text"})
    _, packed = await ask(parts, EMBEDDINGS, {"input": "text", "encoding_format": "base64"})
    from_bytes = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.array_equal(np.float32(floats["data"][0]["embedding"]), from_bytes)


async def test_a_text_is_cut_to_what_the_model_reads(parts):
    """Up to 122,880 characters a text is embedded, by its beginning; with one more it is refused."""
    status, reply = await ask(parts, EMBEDDINGS, {"input": ["%_" * 4096 * 15]})
    assert (status, reply["usage"]["total_tokens"]) == (200, 512)
    assert np.array_equal(np.float32(reply["data"][0]["embedding"]), hash_vector(ids_of("%_" * 256)))
    status, reply = await ask(parts, EMBEDDINGS, {"input": ["a", "%_" * 4096 * 15 + "%"]})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "input", 1])


async def test_2048_texts_are_taken_and_no_more(parts):
    """The largest request is answered in order; a larger one is refused as a whole."""
    texts = [f"text {i}" for i in range(2049)]
    status, reply = await ask(parts, EMBEDDINGS, {"input": texts[:-1], "encoding_format": "base64"})
    assert status == 200
    assert [item["index"] for item in reply["data"]] == list(range(2048))
    last = np.frombuffer(base64.b64decode(reply["data"][-1]["embedding"]), "<f4")
    assert np.array_equal(last, hash_vector(ids_of(texts[2047])))
    status, reply = await ask(parts, EMBEDDINGS, {"input": texts})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "input"])


async def test_a_model_of_token_vectors_gives_one_for_each_token():
    """Lists of vectors as floats, their bytes one after another as base64; such vectors are not cut."""
    model = fake_model(TokenBackend(), kind="multi_vector")
    async with assembled(model) as parts:
        _, floats = await ask(parts, EMBEDDINGS, {"input": ["abc", "d"]})
        _, packed = await ask(parts, EMBEDDINGS, {"input": ["abc", "d"], "encoding_format": "base64"})
        status, refused = await ask(parts, EMBEDDINGS, {"input": "a", "dimensions": 2})

    for text, item, bytes_item in zip(["abc", "d"], floats["data"], packed["data"], strict=True):
        expected = np.stack([hash_vector([token]) for token in ids_of(text)])
        assert np.array_equal(np.float32(item["embedding"]), expected)
        flat = np.frombuffer(base64.b64decode(bytes_item["embedding"]), "<f4")
        assert np.array_equal(flat.reshape(-1, HIDDEN), expected)
    assert (status, list(refused)) == (400, ["error"])


async def test_each_document_has_its_own_score():
    """Whatever the order of the documents, the best comes first with its own index, score and text."""
    documents = ["one", "two", "three", "four"]
    score = {d: sigmoid(6 * hash_vector(ids_of(Pair("q", d)))[:1])[0] for d in documents}
    best_first = sorted(documents, key=score.get, reverse=True)
    async with assembled(reranker()) as parts:
        for given, top_n in itertools.product(itertools.permutations(documents), (1, 2, 8000, None)):
            body = {"query": "q", "documents": given, "top_n": top_n, "return_documents": True}
            status, reply = await ask(parts, "/infinity/rerank", body)
            assert (status, reply["object"]) == (200, "rerank")
            assert [result["document"] for result in reply["results"]] == best_first[:top_n]
            for result in reply["results"]:
                assert given[result["index"]] == result["document"]
                assert np.float32(result["relevance_score"]) == score[result["document"]]


async def test_raw_scores_are_the_logits():
    """Sigmoid of the raw score is the score."""
    async with assembled(reranker()) as parts:
        replies = [
            (await ask(parts, "/infinity/rerank", {"query": "q", "documents": ["a", "b"], "raw_scores": raw}))[1]
            for raw in (True, False)
        ]
    raw, scores = ([result["relevance_score"] for result in reply["results"]] for reply in replies)
    assert np.array_equal(sigmoid(np.float32(raw)), np.float32(scores))


async def test_every_label_has_its_score():
    """Each text's labels come likeliest first, their scores add up to one, and belong to the right label."""
    labels = ("sad", "glad", "mad")
    model = fake_model(LogitBackend(labels=3), kind="classify", labels=labels, dimensions=3)
    texts = [f"text {i}" for i in range(20)]
    async with assembled(model) as parts:
        status, reply = await ask(parts, "/infinity/classify", {"input": texts})

    assert (status, reply["object"], len(reply["data"])) == (200, "classify", 20)
    for text, scored in zip(texts, reply["data"], strict=True):
        logits = hash_vector(ids_of(text))[:3]
        assert [item["label"] for item in scored] == [labels[i] for i in np.argsort(-logits)]
        assert [list(item) for item in scored] == [["score", "label"]] * 3
        assert sum(item["score"] for item in scored) == pytest.approx(1)


async def test_the_models_tell_what_waits():
    """Stats count the inputs that no lane has taken, as a number and as a share of the room."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    model = hash_model(lanes=1, batch_tokens=64, before=wait)
    async with assembled(model, engine=EngineConfig(max_waiting_tokens=100)) as parts:
        taken = [asyncio.create_task(ask(parts, EMBEDDINGS, {"input": "a" * 90}))]
        await asyncio.to_thread(busy.wait)
        taken.append(asyncio.create_task(ask(parts, EMBEDDINGS, {"input": ["b" * 30, "c" * 20]})))
        async with asyncio.timeout(5):
            while not parts.engine.replicas.loaded[0].scheduler.waiting_tokens:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0)
        _, listed = await ask(parts, "/infinity/models", b"", method="GET")
        refused = await send(parts, EMBEDDINGS, {"input": "d" * 90})
        gate.set()
        assert [status for status, _ in await asyncio.gather(*taken)] == [200, 200]

    stats = listed["data"][0]["stats"]
    assert stats == {"queue_fraction": 0.5, "queue_absolute": 2, "results_pending": 0, "batch_size": 64}
    assert refused.status == 429
    assert json.loads(refused.body)["error"]["code"] == 429
    assert int(refused.headers["retry-after"]) >= 1


REFUSED = {
    "no body": (b"", 422),
    "no object": (b"[]", 422),
    "no json": (b"{input: 1}", 422),
    "NaN": (b'{"input":NaN}', 422),
    "a lone surrogate": (b'{"input":"\\ud800"}', 422),
    "invalid utf-8": (b'{"input":"\xff\xfe"}', 422),
    "2,000-deep nesting": (b'{"input":' + b"[" * 2000 + b"]" * 2000 + b"}", 422),
    "no input": ({}, 422),
    "input null": ({"input": None}, 422),
    "input a number": ({"input": 5}, 422),
    "input of token ids": ({"input": [1, 2]}, 422),
    "input of lists of token ids": ({"input": [[1, 2]]}, 422),
    "input of nulls": ({"input": [None]}, 422),
    "input empty": ({"input": []}, 422),
    "model a number": ({"input": "a", "model": 5}, 422),
    "dimensions a float": ({"input": "a", "dimensions": 1.5}, 422),
    "dimensions -1": ({"input": "a", "dimensions": -1}, 400),
    "dimensions a billion": ({"input": "a", "dimensions": 10**9}, 400),
    "unknown encoding_format": ({"input": "a", "encoding_format": "hex"}, 422),
    "an image": ({"input": "a", "modality": "image"}, 422),
    "audio": ({"input": "a", "modality": "audio"}, 422),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_input_is_refused_in_infinitys_own_shape(parts, name):
    """422 has a list that its client can walk, 400 an error object; the next request is answered."""
    body, status = REFUSED[name]
    got, reply = await ask(parts, EMBEDDINGS, body)
    assert got == status, reply
    if status == 422:
        assert list(reply) == ["detail"]
        assert [sorted(fault) for fault in reply["detail"]] == [["loc", "msg", "type"]]
        assert reply["detail"][0]["loc"][0] == "body"
        assert reply["detail"][0]["msg"]
    else:
        assert list(reply) == ["error"]
        assert {key: reply["error"][key] for key in ("type", "param", "code")} == {
            "type": None,
            "param": None,
            "code": 400,
        }
        assert reply["error"]["message"]
    assert (await ask(parts, EMBEDDINGS, {"input": "a"}))[0] == 200


async def test_another_media_type_is_a_fault_of_the_body(parts):
    """What is not declared as JSON is 422, as by Infinity's own framework."""
    status, reply = await ask(parts, EMBEDDINGS, {"input": "a"}, content_type="text/plain")
    assert (status, list(reply)) == (422, ["detail"])
    assert "application/json" in reply["detail"][0]["msg"]


async def test_a_key_is_asked_for_everything_but_health():
    """401 has Infinity's own word and the header; health stays open."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        reply = await send(parts, EMBEDDINGS, {"input": "a"}, authorization="Bearer wrong")
        assert (reply.status, json.loads(reply.body)) == (401, {"detail": "Unauthorized"})
        assert reply.headers["www-authenticate"] == "Bearer"
        assert (await ask(parts, "/infinity/health", b"", method="GET"))[0] == 200
        assert (await ask(parts, EMBEDDINGS, {"input": "a"}, authorization="Bearer k3y"))[0] == 200


async def test_health_is_no_constant():
    """While models load it is 503, and so is a request."""
    parts = app.build(Config(models=ModelsConfig(model=("test/hash",))))
    async with parts.engine, parts.service.jobs:
        for path, method in (("/infinity/health", "GET"), (EMBEDDINGS, "POST")):
            status, reply = await ask(parts, path, {"input": "a"}, method=method)
            assert (status, reply["error"]["code"]) == (503, 503)


TWO = {"allow_models": ("BAAI/bge-small-en-v1.5",)}
"""Settings with which another model may be asked for, too."""


@pytest.mark.parametrize("name", ["text-embedding-ada-002", "../../etc/passwd", "default/not-specified", "", None])
async def test_any_name_is_that_of_the_only_model(parts, name):
    """With one model Infinity takes every name; the reply says what it was."""
    status, reply = await ask(parts, EMBEDDINGS, {"input": "a", "model": name})
    assert (status, reply["model"]) == (200, "test/hash")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embeddings", {"input": "a"}),
        ("/rerank", {"query": "q", "documents": ["a"]}),
        ("/classify", {"input": ["a"]}),
    ],
)
async def test_of_several_models_the_name_tells(path, body):
    """A name that none of them has is 400, with the names that there are; with `any_model_name` it is the first's."""
    async with assembled(models=TWO) as parts:
        for name in ("gpt-4", "../../etc/passwd"):
            status, reply = await ask(parts, f"/infinity{path}", body | {"model": name})
            assert (status, list(reply)) == (400, ["error"])
            assert reply["error"]["code"] == 400
            assert all(served in reply["error"]["message"] for served in ("test/hash", "BAAI/bge-small-en-v1.5"))
        assert (await ask(parts, EMBEDDINGS, {"input": "a", "model": "hash"}))[0] == 200
    async with assembled(models=TWO | {"any_model_name": True}) as parts:
        assert (await ask(parts, EMBEDDINGS, {"input": "a", "model": "gpt-4"}))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "owner"),
    [
        ("/embeddings", {"input": "a"}, "openai"),
        ("/embeddings", {"input": "a", "modality": "text"}, "infinity"),
        ("/v1/embeddings", {"input": "a"}, "openai"),
        ("/v1/embeddings", {"input": "a", "modality": "text"}, "infinity"),
        ("/infinity/v1/embeddings", {"input": "a"}, "infinity"),
        ("/rerank", {"query": "q", "documents": ["a"]}, "infinity"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "raw_scores": False}, "infinity"),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}, "jina"),
        ("/models", None, "infinity"),
        ("/v1/models", None, "openai"),
        ("/infinity/v1/models", None, "infinity"),
    ],
)
async def test_the_root_belongs_to_whom_a_call_is_meant_for(parts, path, body, owner):
    """A path that several APIs share is answered in the shape of the one that the call is for."""
    _, reply = await ask(parts, path, body or b"", method="POST" if body else "GET")
    if path.endswith("models"):
        is_infinitys = reply["data"][0]["owned_by"] == "infinity"
    else:
        is_infinitys = reply.get("id", "").startswith("infinity-")
    assert is_infinitys == (owner == "infinity")


async def test_infinity_may_own_the_root():
    """With the setting, what does not tell is Infinity's, errors included."""
    async with assembled(server=ServerConfig(root_dialects=("infinity",))) as parts:
        assert "id" in (await ask(parts, "/embeddings", {"input": "a"}))[1]
        assert (await ask(parts, "/embeddings", {"input": []}))[0] == 422
        assert "id" in (await ask(parts, "/v1/embeddings", {"input": "a"}))[1]
        assert (await ask(parts, "/v1/models", b"", method="GET"))[1]["data"][0]["owned_by"] == "infinity"
        _, ranked = await ask(parts, "/v1/rerank", {"query": "q", "documents": ["a"], "return_documents": True})
        assert ranked["results"][0]["document"] == "a"
        assert list((await ask(parts, "/health", b"", method="GET"))[1]) == ["unix"]
