"""OpenAI's dialect: exact shapes, and a reason for everything that it refuses."""

import asyncio
import base64
import json
import re
import threading

import numpy as np
import pytest

from conftest import assembled
from fakes import HIDDEN, byte_tokenizer, hash_model, hash_vector
from quiver.api.call import Call
from quiver.api.openai import go_duration
from quiver.config import EngineConfig, Secret, ServerConfig

PATH = "/v1/embeddings"


async def ask(parts, body, *, path=PATH, method="POST", **headers):
    """Send a body straight into the API; returns status and decoded reply."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await parts.api.receive(Call(method, path, named, raw))
    return reply.status, json.loads(reply.body)


def ids_of(text):
    """Return the token ids that the byte tokenizer gives a text."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids.tolist()


async def test_the_reply_has_exactly_openais_shape(parts):
    """Every key, in OpenAI's order, with the tokens counted."""
    status, reply = await ask(parts, {"input": ["ab", "c"], "model": "hash", "user": "u"})

    assert status == 200
    assert list(reply) == ["object", "data", "model", "usage"]
    assert reply["object"] == "list"
    assert reply["model"] == "test/hash"
    assert reply["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [list(item) for item in reply["data"]] == [["object", "index", "embedding"]] * 2
    assert [item["index"] for item in reply["data"]] == [0, 1]
    assert np.array_equal(np.float32(reply["data"][0]["embedding"]), hash_vector(ids_of("ab")))


async def test_base64_holds_the_same_bits_as_floats(parts):
    """The text form of a float32 is exact, and so is base64."""
    _, floats = await ask(parts, {"input": "text", "encoding_format": "float"})
    _, packed = await ask(parts, {"input": "text", "encoding_format": "base64"})

    from_text = np.float32(floats["data"][0]["embedding"])
    from_bytes = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.array_equal(from_text, from_bytes)


async def test_all_four_forms_of_input_are_one_verb(parts):
    """A text, texts, the ids of a text and the ids of texts give the same vectors."""
    first, second = "one", "two and three"
    forms = {
        "text": [first],
        "texts": [[first, second]],
        "ids": [ids_of(first)],
        "lists of ids": [[ids_of(first), ids_of(second)]],
    }
    vectors = {}
    for name, (given,) in forms.items():
        status, reply = await ask(parts, {"input": given})
        assert status == 200, reply
        vectors[name] = [item["embedding"] for item in reply["data"]]

    assert vectors["text"] == vectors["ids"] == vectors["texts"][:1]
    assert vectors["texts"] == vectors["lists of ids"]


async def test_a_large_reply_is_written_whole_and_in_order(parts):
    """2,048 inputs come back as 2,048 vectors, each at its index."""
    texts = [f"text {i}" for i in range(2048)]

    _, reply = await ask(parts, {"input": texts, "encoding_format": "base64"})

    assert [item["index"] for item in reply["data"]] == list(range(2048))
    for item, text in zip(reply["data"], texts, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), hash_vector(ids_of(text)))


async def test_a_model_answers_to_its_id_its_alias_and_no_name(parts):
    """Ids and aliases in any case, null, the empty string and a missing field all name the model."""
    for body in ({"model": "test/hash"}, {"model": "HASH"}, {"model": None}, {"model": ""}, {}):
        status, _ = await ask(parts, {"input": "a", **body})
        assert status == 200


async def test_dimensions_cut_the_vector(parts):
    """`dimensions` gives that many numbers."""
    _, reply = await ask(parts, {"input": "a", "dimensions": 8})
    assert len(reply["data"][0]["embedding"]) == 8


async def test_the_empty_text_has_a_vector(minilm):
    """The empty text, which langchain asks for, has the vector of the special tokens."""
    async with assembled(minilm) as parts:
        status, reply = await ask(parts, {"input": ["", "a"]})
        assert status == 200
        assert reply["usage"]["total_tokens"] == 2 + 3


async def test_azures_path_is_the_same_verb(parts):
    """The deployment in the path names the model when the body names none."""
    path = "/openai/deployments/hash/embeddings"
    assert (await ask(parts, {"input": "a"}, path=path))[0] == 200
    assert (await ask(parts, {"input": "a"}, path="/openai/deployments/other/embeddings"))[0] == 404


async def test_models_are_listed_and_found_by_any_spelling_of_their_id(parts):
    """An id may hold slashes; an unknown one is 404."""
    _, listed = await ask(parts, b"", path="/v1/models", method="GET")
    status, one = await ask(parts, b"", path="/v1/models/test/hash", method="GET")

    assert listed == {"object": "list", "data": [one]}
    assert status == 200
    assert (one["id"], one["object"], one["owned_by"]) == ("test/hash", "model", "test")
    status, reply = await ask(parts, b"", path="/v1/models/no/such", method="GET")
    assert (status, reply["error"]["code"]) == (404, "model_not_found")


DEEP = b'{"input":' + b"[" * 2000 + b"]" * 2000 + b"}"
REFUSED = {
    "no body": (b"", 400, "invalid_json", None),
    "no object": (b"[]", 400, "invalid_value", None),
    "no json": (b"{input: 1}", 400, "invalid_json", None),
    "trailing bytes": (b'{"input":"a"} x', 400, "invalid_json", None),
    "NaN": (b'{"input":NaN}', 400, "invalid_json", None),
    "Infinity": (b'{"input":"a","dimensions":Infinity}', 400, "invalid_json", None),
    "1e999": (b'{"input":"a","dimensions":1e999}', 400, None, None),
    "a lone surrogate": (b'{"input":"\\ud800"}', 400, "invalid_json", None),
    "a lone surrogate in a list": (b'{"input":["\\ud800",5]}', 400, "invalid_json", None),
    "a lone surrogate as key": (b'{"input":{"\\ud800":1}}', 400, None, None),
    "invalid utf-8": (b'{"input":"\xff\xfe"}', 400, "invalid_json", None),
    "2,000-deep nesting": (DEEP, 400, None, None),
    "a byte order mark": (b'\xef\xbb\xbf{"input":"a"}', 400, "invalid_json", None),
    "a number of 5,000 digits": (
        b'{"input":"a","dimensions":' + b"1" * 5000 + b"}",
        400,
        "invalid_value",
        "dimensions",
    ),
    "no input": ({}, 400, "invalid_value", None),
    "input null": ({"input": None}, 400, "invalid_value", "input"),
    "input a number": ({"input": 5}, 400, "invalid_value", "input"),
    "input a bool": ({"input": True}, 400, "invalid_value", "input"),
    "input an object": ({"input": {"text": "a"}}, 400, "invalid_value", "input"),
    "input of bools": ({"input": [True]}, 400, "invalid_value", "input[0]"),
    "input of floats": ({"input": [1.5]}, 400, "invalid_value", "input[0]"),
    "input of nulls": ({"input": [None]}, 400, "invalid_value", "input[0]"),
    "input mixed": ({"input": ["a", 5]}, 400, "invalid_value", "input"),
    "input empty": ({"input": []}, 400, "invalid_value", "input"),
    "input of empty ids": ({"input": [[]]}, 400, "invalid_value", "input[0]"),
    "input too deep": ({"input": [[[5]]]}, 400, "invalid_value", "input[0][0]"),
    "ids negative": ({"input": [-1]}, 400, "invalid_value", "input[0]"),
    "ids beyond the vocabulary": ({"input": [5, 100_257]}, 400, "invalid_value", "input[0]"),
    "ids beyond 64 bits": ({"input": [2**70]}, 400, None, None),
    "too many inputs": ({"input": ["a"] * 100_000}, 400, "too_many_inputs", "input"),
    "over-long input": ({"input": ["a", "b" * 513]}, 400, "context_length_exceeded", "input[1]"),
    "a 10 MB text": ({"input": "a" * 10_000_000}, 400, "context_length_exceeded", "input[0]"),
    "over-long ids": ({"input": [[7] * 513]}, 400, "context_length_exceeded", "input[0]"),
    "unknown model": ({"input": "a", "model": "gpt-4"}, 404, "model_not_found", "model"),
    "a path as model": ({"input": "a", "model": "../../etc/passwd"}, 404, "model_not_found", "model"),
    "model a number": ({"input": "a", "model": 5}, 400, "invalid_value", "model"),
    "dimensions 0": ({"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
    "dimensions -1": ({"input": "a", "dimensions": -1}, 400, "invalid_value", "dimensions"),
    "dimensions a billion": ({"input": "a", "dimensions": 10**9}, 400, "invalid_value", "dimensions"),
    "dimensions a float": ({"input": "a", "dimensions": 1.5}, 400, "invalid_value", "dimensions"),
    "dimensions a text": ({"input": "a", "dimensions": "8"}, 400, "invalid_value", "dimensions"),
    "unknown encoding_format": ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_input_is_refused_with_the_reason(parts, name):
    """Whatever the body, the reply is a 4xx that has OpenAI's object, which names the field; the next one is answered."""
    body, status, code, param = REFUSED[name]

    got, reply = await ask(parts, body)

    assert got == status, reply
    assert list(reply) == ["error", "message", "detail"]
    assert reply["message"] == reply["detail"] == reply["error"]["message"]
    assert list(reply["error"]) == ["message", "type", "param", "code"]
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"]
    assert reply["error"]["code"] == (code or reply["error"]["code"])
    assert reply["error"]["param"] == (param or reply["error"]["param"])
    assert (await ask(parts, {"input": "a"}))[0] == 200


async def test_an_over_long_input_is_told_its_tokens_and_the_limit(parts):
    """The refusal holds both numbers; `truncate` cuts instead."""
    _, reply = await ask(parts, {"input": "b" * 600})
    assert "600 tokens" in reply["error"]["message"]
    assert "512" in reply["error"]["message"]

    status, reply = await ask(parts, {"input": ["b" * 600, "b" * 10_000_000], "truncate": True})

    assert status == 200
    assert reply["usage"]["total_tokens"] == 2 * 512
    assert np.array_equal(np.float32(reply["data"][0]["embedding"]), hash_vector(ids_of("b" * 512)))


async def test_unknown_fields_are_ignored(parts):
    """extra_body is common: a field that nobody knows changes nothing."""
    _, plain = await ask(parts, {"input": "a"})
    status, extra = await ask(parts, {"input": "a", "nonsense": {"deep": [1, None]}, "Input": 5})
    assert (status, extra) == (200, plain)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
async def test_another_media_type_is_refused(parts, media_type):
    """A body that is not declared as JSON is 415, and the reason says what to send."""
    status, reply = await ask(parts, {"input": "a"}, content_type=media_type)
    assert status == 415
    assert "application/json" in reply["error"]["message"]


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
)
async def test_every_spelling_of_json_is_taken(parts, media_type):
    """Parameters, case and +json types are JSON."""
    assert (await ask(parts, {"input": "a"}, content_type=media_type))[0] == 200


async def test_unknown_paths_and_methods_keep_the_shape(parts):
    """404 and 405 are OpenAI's error objects; 405 says what is allowed."""
    status, reply = await ask(parts, b"", path="/v1/nothing", method="GET")
    assert (status, reply["error"]["code"]) == (404, "not_found")
    status, reply = await ask(parts, b"", method="DELETE")
    assert (status, reply["error"]["code"]) == (405, "method_not_allowed")
    refused = await parts.api.receive(Call("DELETE", PATH))
    assert refused.headers["allow"] == "POST"


FORMS = [
    {"authorization": "Bearer k3y"},
    {"authorization": "bearer k3y"},
    {"authorization": "k3y"},
    {"x_api_key": "k3y"},
    {"api_key": "k3y"},
]


@pytest.mark.parametrize("headers", FORMS)
async def test_a_key_is_taken_in_every_form_that_clients_send(headers):
    """Bearer in any case, bare, x-api-key and Azure's api-key."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        assert (await ask(parts, {"input": "a"}, **headers))[0] == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer k3"}, {"authorization": "Bearer k3y2"}, {"api_key": "é"}]
)
async def test_a_wrong_or_missing_key_is_refused(headers):
    """401 in OpenAI's shape; health stays open."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        status, reply = await ask(parts, {"input": "a"}, **headers)
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert (await ask(parts, b"", path="/health", method="GET"))[0] == 200


async def test_overload_is_429_with_a_time_to_come_back():
    """The refusal carries Retry-After in seconds and milliseconds; those who were taken are answered."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    async with assembled(hash_model(lanes=1, before=wait), engine=EngineConfig(max_waiting_tokens=100)) as parts:
        taken = [asyncio.create_task(ask(parts, {"input": "a" * 90}))]
        await asyncio.to_thread(busy.wait)
        taken.append(asyncio.create_task(ask(parts, {"input": "b" * 90})))
        async with asyncio.timeout(5):
            while not parts.engine.replicas.loaded[0].scheduler.waiting_tokens:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0)
        body = json.dumps({"input": "c" * 90}).encode()
        refused = await parts.api.receive(Call("POST", PATH, {}, body))
        gate.set()

        error = json.loads(refused.body)["error"]
        assert (refused.status, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1
        assert [status for status, _ in await asyncio.gather(*taken)] == [200, 200]


class Held:
    """A lane that computes so many batches as it is let."""

    def __init__(self):
        self.busy, self.allowed = threading.Event(), threading.Semaphore(0)

    def __call__(self, _):
        """Be what a backend calls before each batch."""
        self.busy.set()
        assert self.allowed.acquire(timeout=10)


def limits_of(reply):
    """Return the headers of a reply that tell what is left, by what stands behind their common name."""
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): text for name, text in reply.headers.items() if name.startswith(prefix)}


async def test_headers_tell_what_is_left():
    """An idle server has room for all its tokens, and where requests at work are bounded, for all of those."""
    body = json.dumps({"input": "a"}).encode()
    tokens = {"limit-tokens": "100", "remaining-tokens": "100", "reset-tokens": "0s"}
    requests = {"limit-requests": "3", "remaining-requests": "3", "reset-requests": "0s"}
    for bound, wanted in ((0, tokens), (3, tokens | requests)):
        server = ServerConfig(max_concurrent_requests=bound)
        async with assembled(server=server, engine=EngineConfig(max_waiting_tokens=100)) as parts:
            reply = await parts.api.receive(Call("POST", PATH, {}, body))
            assert limits_of(reply) == wanted
            assert int(reply.headers["openai-processing-ms"]) >= 0


async def test_headers_count_what_others_send():
    """A reply that comes while others wait says how much room they leave, and when there will be all of it."""
    lane, server = Held(), ServerConfig(max_concurrent_requests=8)
    model = hash_model(lanes=1, batch_tokens=64, before=lane)
    async with assembled(model, server=server, engine=EngineConfig(max_waiting_tokens=200)) as parts:

        def send(length):
            body = json.dumps({"input": "a" * length}).encode()
            return asyncio.create_task(parts.api.receive(Call("POST", PATH, {}, body)))

        sent = [send(60)]
        await asyncio.to_thread(lane.busy.wait)
        for length, waiting in ((1, 1), (70, 71), (71, 142)):
            sent.append(send(length))
            async with asyncio.timeout(5):
                while parts.service.queue().tokens < waiting:  # noqa: ASYNC110  a queue has no event
                    await asyncio.sleep(0)
        lane.allowed.release(2)
        told = limits_of(await sent[1])
        lane.allowed.release(2)
        assert [reply.status for reply in await asyncio.gather(*sent)] == [200] * 4
    assert (told["limit-requests"], told["remaining-requests"]) == ("8", "6")
    assert told["limit-tokens"] == "200"
    assert told["remaining-tokens"] in {"59", "129"}  # the lane may have taken the next one already
    assert all(re.fullmatch(r"[1-9][\d.]*m?s", told[f"reset-{what}"]) for what in ("tokens", "requests"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (361.25, "6m1.25s")],
)
def test_durations_are_written_as_openai_does(seconds, text):
    """In Go's form, and never sooner than it is."""
    assert go_duration(seconds) == text


async def test_the_vector_width_is_the_models(parts):
    """The fake and the reply agree on D."""
    _, reply = await ask(parts, {"input": "a"})
    assert len(reply["data"][0]["embedding"]) == HIDDEN
