"""TEI's dialect, beyond its recorded exchanges: what holds for any text, option and bad body."""

import asyncio
import base64
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from conftest import assembled, kill_lanes
from fakes import SPEC, HashBackend, LogitBackend, TokenBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver import app
from quiver.api.call import Call
from quiver.config import Config, EngineConfig, ModelsConfig, Secret, ServerConfig
from quiver.engine.model import WarmUp

HEADERS = (
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
)
TIMES = tuple(name for name in HEADERS if name.endswith("-time"))
ERROR_TYPES = {"Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"}
TEXTS = ("plain", "naïve café", "☃ and 🜁", "über—ß\n\ttab", "日本語", "e\u0301")


async def send(parts, path, body=None, *, method="POST", **headers):
    """Send a body straight into the API; returns the reply."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return await parts.api.receive(Call(method, path, headers, raw))


async def ask(parts, path, body):
    """Send a body and decode what comes back, which must be a success."""
    reply = await send(parts, path, body)
    assert reply.status == 200, reply.body
    return json.loads(reply.body)


def ids_of(text):
    """Return the token ids that the byte tokenizer gives a text."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids


def unit(vector):
    """Scale a vector to unit length in double precision."""
    vector = np.float64(vector)
    return vector / np.linalg.norm(vector)


def token_model(**facts):
    """Make a model whose vectors have no unit length: the mean of those of its tokens."""
    return fake_model(TokenBackend(), pooling="mean", **facts)


async def test_a_vector_has_unit_length_unless_told_otherwise():
    """TEI normalises by default, whatever the model's own pipeline does, and after the cut."""
    mean = np.float64([hash_vector([i]) for i in ids_of("to be")]).mean(axis=0)
    wanted = {
        (): unit(mean),
        (("normalize", None),): unit(mean),
        (("normalize", False),): mean,
        (("dimensions", 5),): unit(mean[:5]),
        (("dimensions", 5), ("normalize", False)): mean[:5],
    }
    async with assembled(token_model()) as parts:
        for options, vector in wanted.items():
            (found,) = await ask(parts, "/embed", {"inputs": "to be", **dict(options)})
            assert np.allclose(found, vector, atol=1e-6), options


async def test_a_tokens_vector_is_left_as_it_is():
    """/embed_all scales nothing, and neither the company of a text nor its place changes a bit."""
    async with assembled(token_model(normalize=True)) as parts:
        reply = await ask(parts, "/embed_all", {"inputs": ["to be", "be", "b" * 300]})
    for text, vectors in zip(("to be", "be", "b" * 300), reply, strict=True):
        assert np.array_equal(np.float32(vectors), np.stack([hash_vector([i]) for i in ids_of(text)]))


async def test_a_large_reply_is_written_whole_and_in_order(parts):
    """2,048 inputs come back as 2,048 vectors, each in its place."""
    texts = [f"text {i}" for i in range(2048)]
    vectors = await ask(parts, "/embed", {"inputs": texts})
    assert np.allclose(vectors, [hash_vector(ids_of(text)) for text in texts], atol=1e-6)


async def test_every_form_of_inputs_is_one_verb(parts):
    """A text, its ids, and lists of either give one vector."""
    ids = ids_of("to be").tolist()
    found = [await ask(parts, "/embed", {"inputs": given}) for given in ("to be", ids, ["to be"], [ids])]
    assert all(vectors == found[0] for vectors in found)


async def test_sparse_weights_are_those_of_the_model():
    """Only weights that are not zero are sent, each with its place in the vocabulary."""
    async with assembled(fake_model(TokenBackend(), kind="sparse")) as parts:
        (found,) = await ask(parts, "/embed_sparse", {"inputs": "ab"})
    logits = np.float64([hash_vector([i]) for i in ids_of("ab")])
    wanted = np.log1p(np.maximum(logits, 0)).max(axis=0)  # SPLADE's own formula
    assert [entry["index"] for entry in found] == np.flatnonzero(wanted).tolist()
    assert np.allclose([entry["value"] for entry in found], wanted[wanted > 0], atol=1e-6)


async def test_scores_fall_and_equals_come_last_first():
    """A ranking falls, holds every text once, and equal scores have falling places."""
    texts = ["a", "b", "a", "c", "a", "b"]
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        ranks = await ask(parts, "/rerank", {"query": "q", "texts": texts, "return_text": True})
    keys = [(rank["score"], rank["index"]) for rank in ranks]
    assert keys == sorted(keys, reverse=True)
    assert sorted(rank["index"] for rank in ranks) == list(range(6))
    assert all(rank["text"] == texts[rank["index"]] for rank in ranks)


async def test_a_batch_of_predictions_is_each_one_alone():
    """Texts and pairs have the same scores together and apart."""
    given = [["to be"], ["to be", "or not"], ["or"]]
    async with assembled(fake_model(LogitBackend(labels=3), kind="classify", labels=("x", "y", "z"))) as parts:
        together = await ask(parts, "/predict", {"inputs": given})
        assert together == [await ask(parts, "/predict", {"inputs": one}) for one in given]
    for predictions in together:
        scores = [prediction["score"] for prediction in predictions]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt_name", [None, "query"])
async def test_places_of_tokens_are_bytes(text, prompt_name):
    """The bytes between start and stop, in the text behind its prompt, are the token's text."""
    async with assembled(fake_model(HashBackend(), prompts={"query": "quéry: "})) as parts:
        (tokens,) = await ask(parts, "/tokenize", {"inputs": text, "prompt_name": prompt_name})
    whole = (("quéry: " if prompt_name else "") + text).encode()
    assert [whole[token["start"] : token["stop"]].decode() for token in tokens] == [token["text"] for token in tokens]
    assert tokens[-1]["stop"] == len(whole)


@pytest.mark.parametrize("minilm", ["float32"], indirect=True)
async def test_special_tokens_stand_nowhere(minilm):
    """Those around a text have no place, and are not there unless wanted; decoding leaves them out unless wanted."""
    async with assembled(minilm) as parts:
        (tokens,) = await ask(parts, "/tokenize", {"inputs": "To be"})
        (bare,) = await ask(parts, "/tokenize", {"inputs": "To be", "add_special_tokens": False})
        ids = [token["id"] for token in tokens]
        assert await ask(parts, "/decode", {"ids": ids}) == ["to be"]
        assert await ask(parts, "/decode", {"ids": [ids], "skip_special_tokens": False}) == ["[CLS] to be [SEP]"]
    assert [(t["text"], t["start"], t["stop"]) for t in bare] == [("To", 0, 2), ("be", 3, 5)]
    assert [tokens[0], tokens[-1]] == [
        {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None},
        {"id": 102, "text": "[SEP]", "special": True, "start": None, "stop": None},
    ]
    assert tokens[1:-1] == bare


COMPUTED = {
    "/embed": {"inputs": "a"},
    "/embed_all": {"inputs": "a"},
    "/rerank": {"query": "a", "texts": ["b"]},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/": {"inputs": "a"},
    "/invocations": {"inputs": "a"},
    "/tei/v1/embeddings": {"input": "a"},
    "/tei/embeddings": {"input": "a"},
}


@pytest.mark.parametrize("path", COMPUTED)
async def test_a_computed_reply_says_what_it_cost(parts, path):
    """Every header is there, times are whole milliseconds, and none exceeds the total."""
    headers = (await send(parts, path, COMPUTED[path])).headers
    times = {name: int(headers[name]) for name in TIMES}
    assert set(HEADERS) <= set(headers)
    assert max(times.values()) == times["x-total-time"] == times["x-compute-time"]
    assert "server-timing" in headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "a"}),
        ("/decode", {"ids": [1]}),
        ("/vertex", {"instances": [{"inputs": "a"}]}),
        ("/embed", {"inputs": ""}),
    ],
)
async def test_no_other_reply_does(parts, path, body):
    """Tokens, Vertex's replies and errors come without."""
    assert not set(HEADERS) & set((await send(parts, path, body)).headers)


async def test_the_characters_of_a_ranking_count_the_query_each_time(parts):
    """It is read with every text; characters are counted, not bytes."""
    reply = await send(parts, "/rerank", {"query": "né", "texts": ["ü", "abc"]})
    assert reply.headers["x-compute-characters"] == str(2 * 2 + 1 + 3)


async def test_waiting_for_a_lane_is_told_from_computing():
    """A request that stood behind another says how long, and its own forward pass was short."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    async with assembled(hash_model(lanes=1, before=wait)) as parts:
        first = asyncio.create_task(send(parts, "/embed", {"inputs": "a"}))
        await asyncio.to_thread(busy.wait)
        second = asyncio.create_task(send(parts, "/embed", {"inputs": ["b", "c"]}))
        await asyncio.sleep(0.2)
        gate.set()
        running, waited = (reply.headers for reply in await asyncio.gather(first, second))

    assert int(waited["x-queue-time"]) >= 150 > int(waited["x-inference-time"])
    assert int(running["x-inference-time"]) >= 150 > int(running["x-queue-time"])


async def test_a_name_that_is_served_chooses_the_model():
    """TEI has one model and ignores names; here a known one counts, and any other is the first model's."""
    async with assembled() as parts:
        spec = replace(SPEC, id="test/mean", aliases=("mean",), pooling="mean")
        parts.engine.replicas.add("mean", replace(token_model(), spec=spec), WarmUp())
        first = await ask(parts, "/embed", {"inputs": "ab"})
        other = await ask(parts, "/embed", {"inputs": "ab", "model": "MEAN"})
        assert first != other
        assert await ask(parts, "/embed", {"inputs": "ab", "model": "gpt-9"}) == first
        reply = await ask(parts, "/tei/v1/embeddings", {"input": "ab", "model": "test/mean"})
        assert (reply["model"], reply["data"][0]["embedding"]) == ("test/mean", other[0])


async def test_the_root_of_the_prefix_needs_no_slash(parts):
    """Clients post to the address that they are given, as it is."""
    found = [await ask(parts, path, {"inputs": "a"}) for path in ("/", "/tei", "/tei/")]
    assert found[0] == found[1] == found[2]


async def test_openais_form_in_base64_holds_the_same_bits(parts):
    """The text form of a float32 is exact, and so is base64."""
    floats = await ask(parts, "/tei/v1/embeddings", {"input": ["a", "b"], "user": "u", "encoding_format": None})
    packed = await ask(parts, "/tei/embeddings", {"input": ["a", "b"], "encoding_format": "base64"})
    for plain, other in zip(floats["data"], packed["data"], strict=True):
        assert np.array_equal(
            np.float32(plain["embedding"]), np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        )
        assert plain["index"] == other["index"]


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"input": ""}, 400, "Empty"),
        ({"input": "a" * 600}, 422, "Validation"),
        ({"input": "a", "dimensions": 33}, 422, "Validation"),
        ({"input": "a", "encoding_format": "hex"}, 422, "Validation"),
        (b"{", 400, "Validation"),
    ],
)
async def test_openais_form_has_a_flat_error(parts, body, status, kind):
    """Its error is TEI's own: message, code and type, not nested as OpenAI's is."""
    reply = await send(parts, "/tei/v1/embeddings", body)
    error = json.loads(reply.body)
    assert (reply.status, error["code"], error["type"]) == (status, status, kind)
    assert list(error) == ["message", "code", "type"]
    assert error["message"]


DEEP = b'{"inputs":' + b"[" * 2000 + b"]" * 2000 + b"}"
ROUTES = (
    "/embed",
    "/embed_all",
    "/embed_sparse",
    "/rerank",
    "/predict",
    "/similarity",
    "/tokenize",
    "/decode",
    "/",
    "/invocations",
    "/vertex",
)
HOSTILE = {
    "no body": b"",
    "no json": b"{inputs",
    "not an object": b"[]",
    "nothing asked": {},
    "invalid utf-8": b'{"inputs":"\xff"}',
    "a lone surrogate": b'{"inputs":"\\ud800"}',
    "deep nesting": DEEP,
    "NaN": b'{"inputs":NaN}',
    "null": {"inputs": None, "query": None, "texts": None, "ids": None, "instances": None},
    "numbers": {"inputs": 5, "query": 5, "texts": 5, "ids": 5, "instances": 5},
    "floats": {"inputs": [1.5], "texts": [1.5], "ids": [1.5], "instances": [1.5]},
    "huge numbers": {"inputs": [2**70], "texts": [2**70], "ids": [2**70], "instances": [2**70]},
    "negative numbers": {"inputs": [-1], "texts": [-1], "ids": [-1], "instances": [-1]},
    "empty lists": {"inputs": [], "query": "", "texts": [], "ids": [], "instances": []},
    "empty inner lists": {"inputs": [[]], "query": "", "texts": [[]], "ids": [[]], "instances": [[]]},
    "deeper lists": {"inputs": [[["a"]]], "texts": [["a"]], "ids": [[[1]]], "instances": [[["a"]]]},
    "mixtures": {"inputs": ["a", 1, [2]], "texts": ["a", 1], "ids": [1, [2]], "instances": ["a", 1]},
    "objects": {"inputs": {"text": "a"}, "query": {}, "texts": {}, "ids": {}, "instances": {}},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", HOSTILE)
async def test_bad_input_is_refused_in_teis_shape(parts, name, path):
    """Whatever the body, the reply is a 4xx whose body is an object with a reason; the next request is answered."""
    reply = await send(parts, f"/tei{path}", HOSTILE[name])
    error = json.loads(reply.body)
    assert 400 <= reply.status < 500, error
    assert list(error) == ["error", "error_type"]
    assert error["error"]
    assert error["error_type"] in ERROR_TYPES
    assert (await send(parts, "/embed", {"inputs": "a"})).status == 200


async def test_more_inputs_than_one_request_may_bring_are_422():
    """Each route counts its own inputs."""
    bodies = {
        "/embed": {"inputs": ["a", "b", "c"]},
        "/embed_all": {"inputs": ["a", "b", "c"]},
        "/rerank": {"query": "a", "texts": ["a", "b", "c"]},
        "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["a", "b", "c"]}},
        "/tokenize": {"inputs": ["a", "b", "c"]},
        "/decode": {"ids": [[1], [2], [3]]},
        "/vertex": {"instances": [{"inputs": "a"}] * 3},
    }
    async with assembled(engine=EngineConfig(max_client_batch_size=2)) as parts:
        for path, body in bodies.items():
            reply = await send(parts, path, body)
            assert (reply.status, json.loads(reply.body)["error_type"]) == (422, "Validation"), path


async def test_what_the_model_cannot_compute_is_424():
    """A forward pass that fails is the backend's error."""

    def explode(_):
        raise ValueError

    async with assembled(hash_model(before=explode)) as parts:
        reply = await send(parts, "/embed", {"inputs": "a"})
    assert (reply.status, json.loads(reply.body)["error_type"]) == (424, "Backend")


async def test_overload_is_429_with_a_time_to_come_back():
    """The refusal is TEI's, and says when; who was taken is answered."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    async with assembled(hash_model(lanes=1, before=wait), engine=EngineConfig(max_waiting_tokens=100)) as parts:
        taken = [asyncio.create_task(send(parts, "/embed", {"inputs": "a" * 90}))]
        await asyncio.to_thread(busy.wait)
        taken.append(asyncio.create_task(send(parts, "/embed", {"inputs": "b" * 90})))
        async with asyncio.timeout(5):
            while not parts.service.queue().inputs:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0)
        refused = await send(parts, "/embed", {"inputs": "c" * 90})
        gate.set()
        assert [(await task).status for task in taken] == [200, 200]
    assert (refused.status, json.loads(refused.body)["error_type"]) == (429, "Overloaded")
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_late_answer_is_504():
    """Time that runs out is an overload, too."""
    gate = threading.Event()
    model = hash_model(lanes=1, before=lambda _: gate.wait(10))
    async with assembled(model, server=ServerConfig(timeout_seconds=0.05)) as parts:
        reply = await send(parts, "/embed", {"inputs": "a"})
        gate.set()
    assert (reply.status, json.loads(reply.body)["error_type"]) == (504, "Overloaded")


async def test_a_loading_server_is_unhealthy():
    """Until its model is there, requests and probes are 503; /info tells what is known."""
    parts = app.build(Config(models=ModelsConfig(model=("org/unknown",))))
    async with parts.engine:
        for reply in (
            await send(parts, "/embed", {"inputs": "a"}),
            await send(parts, "/tei/health", method="GET"),
            await send(parts, "/", method="GET"),
        ):
            assert (reply.status, json.loads(reply.body)["error_type"]) == (503, "Unhealthy")
        info = json.loads((await send(parts, "/info", method="GET")).body)
    assert info["model_id"] == "org/unknown"


async def test_a_server_without_its_lanes_is_unhealthy():
    """Once a lane has died, requests and probes are 503."""

    def die(_):
        raise SystemExit

    async with assembled(hash_model(lanes=1, before=die)) as parts:
        await kill_lanes(parts)
        for path, method in (("/embed", "POST"), ("/tei/health", "GET"), ("/tei/ping", "GET")):
            reply = await send(parts, path, {"inputs": "a"}, method=method)
            assert (reply.status, json.loads(reply.body)["error_type"]) == (503, "Unhealthy")


@pytest.mark.parametrize("path", ["/", "/tei", "/tei/health", "/tei/ping"])
async def test_a_healthy_server_says_nothing(parts, path):
    """The status is the answer, and the body is empty."""
    reply = await send(parts, path, method="GET")
    assert (reply.status, reply.body) == (200, b"")


async def test_at_the_root_the_probe_is_teis_where_it_is_preferred():
    """`root_dialects` gives TEI the paths that a call itself does not give to anyone."""
    async with assembled(server=ServerConfig(root_dialects=("tei",))) as parts:
        assert (await send(parts, "/health", method="GET")).body == b""
    async with assembled() as parts:
        assert json.loads((await send(parts, "/health", method="GET")).body)["status"] == "ok"


async def test_the_key_is_asked_for_but_by_probes():
    """401 is an object, too, which TEI leaves empty; /info needs the key as in TEI."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        for path, method in (("/embed", "POST"), ("/info", "GET")):
            refused = await send(parts, path, {"inputs": "a"}, method=method)
            assert refused.status == 401
            assert list(json.loads(refused.body)) == ["error", "error_type"]
            assert (await send(parts, path, {"inputs": "a"}, method=method, authorization="Bearer k3y")).status == 200
        assert (await send(parts, "/tei/health", method="GET")).status == 200


async def test_info_tells_the_settings():
    """What is configured is what is said, and what is said holds."""
    engine = EngineConfig(max_client_batch_size=32, max_waiting_tokens=5120, batch_tokens=1024, truncate=True)
    model = fake_model(HashBackend(batch_tokens=2048), revision="0d124dc", pooling="last_token")
    async with assembled(model, engine=engine) as parts:
        info = json.loads((await send(parts, "/info", method="GET")).body)
        assert (await send(parts, "/embed", {"inputs": "a" * 600})).status == 200
    assert info["model_sha"] == "0d124dc"
    assert info["model_type"] == {"embedding": {"pooling": "last_token"}}
    assert info["max_client_batch_size"] == 32
    assert info["max_concurrent_requests"] == 10
    assert info["max_input_length"] == 512
    assert info["max_batch_tokens"] == 1024
    assert info["auto_truncate"] is True
