"""Over the wire: bodies, limits, headers, clients that leave, probes and pages."""

import asyncio
import json
import re
import threading

import httpx
import numpy as np
import pytest
from openapi_spec_validator import validate

from conftest import assembled, listening
from fakes import byte_tokenizer, hash_model, hash_vector
from quiver.config import ServerConfig

CLIENTS = 32
EMBEDDINGS = 100_000
INPUTS_PER_REQUEST = 125


async def test_32_clients_and_100000_texts_mix_up_no_vector(url):
    """Each of 100,000 distinct texts, asked for by 32 clients at once, gets the vector of its own hash."""
    tokenizer = byte_tokenizer()

    async def client(number, http):
        rng = np.random.default_rng(number)
        wrong = 0
        for start in range(number * INPUTS_PER_REQUEST, EMBEDDINGS, CLIENTS * INPUTS_PER_REQUEST):
            texts = [f"{i} " + "x" * rng.integers(0, 40) for i in range(start, start + INPUTS_PER_REQUEST)]
            reply = await http.post("/v1/embeddings", json={"input": texts})
            data = reply.json()["data"]
            wanted = [hash_vector(e.ids) for e in tokenizer.encode(texts, truncate=False)]
            got = np.float32([item["embedding"] for item in data])
            assert len(got) == len(texts)
            wrong += int((got != np.stack(wanted)).any(axis=1).sum())
        return wrong

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        wrong = await asyncio.gather(*(client(number, http) for number in range(CLIENTS)))

    assert sum(wrong) == 0


async def test_a_swap_would_be_seen():
    """Negative control: the check above compares every bit, so a server that swaps two vectors fails it."""
    first, second = (hash_vector([i]) for i in (1, 2))
    assert (np.stack([first, second]) != np.stack([second, first])).any(axis=1).all()


async def test_a_body_over_the_limit_is_413_whether_declared_or_not():
    """A declared length is refused unread, a chunked body as soon as it is too long; the connection ends."""
    async with (
        listening(server=ServerConfig(max_body_bytes=1000)) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):

        async def chunks():
            for _ in range(30):
                yield b"x" * 100

        for content in (b"x" * 1001, chunks()):
            reply = await http.post("/v1/embeddings", content=content)
            assert reply.status_code == 413
            assert reply.json()["error"]["code"] == "body_too_large"
            assert reply.headers["connection"] == "close"
        assert (await http.post("/v1/embeddings", json={"input": "a"})).status_code == 200


async def test_every_reply_carries_a_request_id(url):
    """A plain id is echoed; anything else is replaced."""
    async with httpx.AsyncClient(base_url=url) as http:
        for given, echoed in (("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("", False)):
            reply = await http.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-id": given})
            assert (reply.headers["x-request-id"] == given) is echoed
            assert re.fullmatch(r"[\w.-]{1,64}", reply.headers["x-request-id"])


async def test_a_request_of_a_trace_is_called_by_it(url):
    """Without an id of its own, a request has the id of the trace context that it brings, if that is one."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    given = {
        f"00-{trace}-00f067aa0ba902b7-01": True,
        f"01-{trace}-00f067aa0ba902b7-00": True,
        f"01-{trace}-00f067aa0ba902b7-00-more": True,
        f"01-{trace}-00f067aa0ba902b7-00more": False,
        f"00-{trace}-00f067aa0ba902b7-00-more": False,
        f"ff-{trace}-00f067aa0ba902b7-01": False,
        f"00-{'0' * 32}-00f067aa0ba902b7-01": False,
        f"00-{trace}-{'0' * 16}-01": False,
        f"00-{trace.upper()}-00f067aa0ba902b7-01": False,
        trace: False,
    }
    async with httpx.AsyncClient(base_url=url) as http:
        for parent, counts in given.items():
            reply = await http.get("/health", headers={"traceparent": parent})
            assert (reply.headers["x-request-id"] == trace) is counts
        both = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "mine"}
        assert (await http.get("/health", headers=both)).headers["x-request-id"] == "mine"


async def test_a_client_that_leaves_frees_its_place():
    """When a client disconnects, its waiting inputs are never computed, and the next client is served."""
    gate, busy, computed = threading.Event(), threading.Event(), []

    def wait(batch):
        computed.append(len(batch.ids))
        busy.set()
        assert gate.wait(10)

    async with listening(hash_model(lanes=1, before=wait)) as url, httpx.AsyncClient(base_url=url) as http:
        running = asyncio.create_task(http.post("/v1/embeddings", json={"input": "a"}))
        await asyncio.to_thread(busy.wait)
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/embeddings", json={"input": "b" * 77}, timeout=0.2)
        await asyncio.sleep(0.2)
        gate.set()
        assert (await running).status_code == 200
        assert (await http.post("/v1/embeddings", json={"input": "ccc"})).status_code == 200
    assert computed == [1, 3]


async def test_a_percent_encoded_model_id_is_found(url):
    """openai-python encodes the slash of a model's id, cohere does not: both find it."""
    async with httpx.AsyncClient(base_url=url) as http:
        for path in ("/v1/models/test%2Fhash", "/v1/models/test/hash", "/openai/v1/models/hash"):
            assert (await http.get(path)).json()["id"] == "test/hash"


async def test_probes_tell_the_truth(url):
    """A server whose model computes is live, ready and ok, and says which model it has."""
    async with httpx.AsyncClient(base_url=url) as http:
        for path in ("/health", "/health/live", "/health/ready"):
            reply = await http.get(path)
            assert reply.status_code == 200
            assert reply.json()["status"] == "ok"
            assert reply.json()["models"] == [{"id": "test/hash", "state": "ready", "error": "", "downloads": []}]


async def test_probes_fail_once_a_lane_has_died():
    """Negative control of the above: with a dead lane, liveness and readiness are 503, and so is the next request."""

    def die(_):
        raise SystemExit

    async with listening(hash_model(lanes=1, before=die)) as url, httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/health/live")).status_code == 200
        assert [(await http.post("/v1/embeddings", json={"input": "a"})).status_code for _ in range(5)] == [503] * 5
        for path in ("/health", "/health/live", "/health/ready"):
            assert (await http.get(path)).status_code == 503
        assert (await http.get("/health")).json()["status"] == "failed"


async def test_metrics_count_what_was_done(url):
    """Requests, tokens and batches show under Prometheus's text format."""
    async with httpx.AsyncClient(base_url=url) as http:
        await http.post("/v1/embeddings", json={"input": ["abc", "de"]})
        text = (await http.get("/metrics")).text
    assert 'quiver_requests_total{dialect="openai",route="/v1/embeddings",status="200"} 1.0' in text
    assert 'quiver_tokens_total{model="test/hash"} 5.0' in text
    assert 'quiver_waiting_tokens{model="test/hash"} 0.0' in text


async def test_random_paths_do_not_grow_the_metrics(url):
    """Labels come from our own tables, never from a client."""
    async with httpx.AsyncClient(base_url=url) as http:
        for i in range(20):
            await http.get(f"/nowhere/{i}")
            await http.post("/v1/embeddings", json={"input": "a", "model": f"m{i}"})
        text = (await http.get("/metrics")).text
    assert "nowhere" not in text
    assert "m19" not in text


async def test_the_openapi_document_is_valid_and_names_every_route():
    """The document passes the validator, and each mounted route is in it."""
    async with assembled() as parts, listening() as url, httpx.AsyncClient(base_url=url) as http:
        document = (await http.get("/openapi.json")).json()
    validate(document)
    assert document["openapi"].startswith("3.1")
    operation = document["paths"]["/openai/v1/embeddings"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(document["components"]["schemas"][schema]["properties"]) >= {"input", "model", "dimensions"}
    assert {"/v1/models/{id}", "/health/ready", "/metrics"} <= set(document["paths"])
    assert parts.config.server.port


@pytest.mark.parametrize("page", ["/docs", "/swagger-ui"])
async def test_swagger_ui_needs_no_network(url, page):
    """The page loads nothing from another host, and what it loads is served here."""
    async with httpx.AsyncClient(base_url=url) as http:
        html = await http.get(page)
        assert html.headers["content-type"].startswith("text/html")
        assert "://" not in html.text
        for asset in re.findall(r'(?:src|href|url:) ?=?"(/[^"]+)"', html.text):
            reply = await http.get(asset)
            assert reply.status_code == 200, asset
            assert len(reply.content) > 1000
        assert (await http.get("/swagger-ui/../../secret")).status_code == 404


async def test_head_and_options_do_not_confuse_the_server(url):
    """HEAD is GET without a body; OPTIONS without CORS is a plain 405."""
    async with httpx.AsyncClient(base_url=url) as http:
        head = await http.head("/health")
        assert (head.status_code, head.content) == (200, b"")
        assert (await http.options("/v1/embeddings")).status_code == 405


async def test_browsers_may_call_from_the_configured_origins_only():
    """CORS is off unless an origin is configured, and then for that origin alone."""
    async with (
        listening(server=ServerConfig(cors_origins=("https://a.example",))) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            reply = await http.post("/v1/embeddings", json={"input": "a"}, headers={"origin": origin})
            assert reply.headers.get("access-control-allow-origin") == allowed


async def test_garbage_on_the_wire_ends_with_a_status(url):
    """A line that is not HTTP is answered with 400 and a closed connection; the server goes on."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert b"400" in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/health")).status_code == 200


async def test_a_handler_that_fails_is_a_plain_500(capsys):
    """An unexpected exception reaches the log, and the client only a sentence in the dialect's shape."""

    def explode(_):
        raise ValueError("secret detail")

    async with listening(hash_model(before=explode)) as url, httpx.AsyncClient(base_url=url) as http:
        reply = await http.post("/v1/embeddings", json={"input": "a"})
    assert reply.status_code == 500
    assert list(json.loads(reply.text)["error"]) == ["message", "type", "param", "code"]
    assert "secret detail" not in reply.text
    assert "secret detail" not in capsys.readouterr().out
