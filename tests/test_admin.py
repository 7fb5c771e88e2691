"""What the dashboard is told, and who is: every route, by a key at the port and by the file's mode at the socket."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import assembled
from desk import over_http, post, staffed
from fakes import MAX_TOKENS, SPEC, hash_model
from quiver import admin, app
from quiver.accounts import SCOPES
from quiver.admin.dialect import DUTIES
from quiver.api.call import Call
from quiver.api.listeners import ADMIN
from quiver.api.openai import OPENAI
from quiver.app import App
from quiver.config import AccountsConfig, CacheConfig, Config, Secret, ServerConfig, describe
from quiver.errors import ConfigError

ON = ServerConfig(dashboard=True)
ALL_SCOPES = frozenset(SCOPES)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
OPEN = ("/admin", "/admin/", "/admin/static/app.js")


async def ask(
    parts: App, path: str, body: Any = None, *, method: str = "", at: str = ADMIN, **headers: str
) -> tuple[int, Any]:
    """Call a route of the dashboard at its socket, or at another entrance; returns the status and what is said."""
    api = parts.others[at].api if at else parts.api
    shown = {"host": "localhost", **headers}
    path, _, words = path.partition("?")
    query = dict([words.split("=")]) if words else {}
    sent = b"" if body is None else json.dumps(body).encode()
    reply = await api.receive(Call(method or ("GET" if body is None else "POST"), path, shown, sent, query))
    return reply.status, json.loads(reply.body) if reply.body[:1] in (b"{", b"[") else reply.body


def at_port(key: str) -> Mapping[str, Any]:
    """Call the port, with a key."""
    return {"at": "", **({"authorization": f"Bearer {key}"} if key else {})}


# Who may call


@pytest.mark.parametrize("auth", ["required", "auto"])
async def test_every_route_asks_for_a_key_with_the_scope(tmp_path, auth):
    """At the port nothing but the page itself opens without one, whatever the method and whoever needs a key elsewhere."""
    server = ServerConfig(dashboard=True, api_key=Secret("the server's own"))
    async with staffed(tmp_path, accounts={"auth": auth}, server=server) as (parts, desk):
        without = await desk.key(scopes=ALL_SCOPES - {"admin"})
        shown = {
            "": {401},
            "the server's own": {401},
            "nonsense": {401},
            without: {403} if auth == "required" else {401},
        }
        for key, refusals in shown.items():
            for path in {f"/admin{duty.path}".replace("{id}", "x") for duty in DUTIES}:
                taken = {duty.method for duty in DUTIES if f"/admin{duty.path}".replace("{id}", "x") == path}
                for method in METHODS:
                    status, said = await ask(parts, path, {}, method=method, **at_port(key))
                    is_route = method in taken | ({"HEAD"} if "GET" in taken else set())
                    assert status in (refusals if is_route else {405}), (key, method, path, said)


async def test_without_any_key_the_port_stays_shut(tmp_path):
    """Where nobody needs a key for anything else, the dashboard still asks for one, and says how to make it."""
    async with assembled(models={"data_dir": tmp_path}, server=ON) as parts:
        assert (await post(parts, "/v1/embeddings")).status == 200
        status, said = await ask(parts, "/admin/api/status", at="")
        assert status == 401
        assert "quiver keys create" in said["error"]["message"]


async def test_a_key_with_the_scope_opens_every_route(tmp_path):
    """Negative control: the same calls are let in; what they lack is something else."""
    async with staffed(tmp_path, server=ON) as (parts, desk):
        key = await desk.key(scopes=frozenset({"admin"}))
        for duty in DUTIES:
            path = f"/admin{duty.path}".replace("{id}", "x" * 12)
            status, said = await ask(parts, path, {} if duty.method == "POST" else None, **at_port(key))
            assert status in (200, 400, 404), (path, status, said)


async def test_computing_takes_the_scope_of_what_is_computed(tmp_path):
    """The scope admin does not stand for others: trying a model is billed as any other request."""
    async with staffed(tmp_path, server=ON) as (parts, desk):
        bare, whole = await desk.key(scopes=frozenset({"admin"})), await desk.key(scopes=ALL_SCOPES)
        body = {"texts": ["a", "b"]}
        status, said = await ask(parts, "/admin/api/try/embed", body, **at_port(bare))
        assert (status, "not for embed" in said["error"]["message"]) == (403, True)
        assert (await ask(parts, "/admin/api/try/embed", body, **at_port(whole)))[0] == 200
        await asyncio.sleep(1.5)
        (total,) = await desk.totals()
        assert (total.requests, total.embeddings) == (1, 2)


async def test_the_port_has_no_dashboard_unless_told(parts):
    """Without the setting its paths are nobody's, the page included, and the document does not know them."""
    for path in (*OPEN, *(f"/admin{duty.path}" for duty in DUTIES)):
        assert (await ask(parts, path, at=""))[0] == 404, path
    assert "/admin" not in (await parts.api.receive(Call("GET", "/openapi.json"))).body.decode()
    async with assembled(server=ON) as parts_on:
        for path in OPEN:
            assert (await ask(parts_on, path, at=""))[0] in (200, 307), path
        document = json.loads((await parts_on.api.receive(Call("GET", "/openapi.json"))).body)
        assert {f"/admin{duty.path}" for duty in DUTIES} <= set(document["paths"])


async def test_a_dashboard_that_nobody_could_open_is_a_mistake():
    """With auth off there are no keys, so that the server does not start."""
    with pytest.raises(ConfigError, match=r"auth is off.*admin\.sock"):
        app.build(Config(server=ON, accounts=AccountsConfig(auth="off")))


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({"host": "localhost"}, True),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"}, True),
        ({"host": "127.0.0.1:9000"}, True),
        ({"host": "[::1]:9000"}, True),
        ({"host": "quiver"}, True),
        ({"host": ""}, True),
        ({"host": "rebound.example:9000"}, False),
        ({"host": "localhost:9000", "origin": "http://evil.example"}, False),
        ({"host": "localhost:9000", "origin": "http://localhost:8000"}, False),
        ({"host": "localhost:9000", "origin": "null"}, False),
    ],
)
async def test_pages_of_others_may_not_use_a_tunnel_to_the_socket(parts, headers, is_let_in):
    """Nobody shows a key there: a page of another origin, or one whose name was made to point here, is refused."""
    for path, body in (("/api/status", None), ("/api/keys/x/revoke", {})):
        assert ((await ask(parts, path, body, **headers))[0] == 403) is not is_let_in, path


# The page


async def test_the_page_is_served_with_tags_and_a_strict_policy(parts):
    """Every file has its type, a policy without inline scripts or styles, and a tag by which it is not sent twice."""
    for path, kind in (("/", "text/html"), ("/static/app.js", "text/javascript"), ("/static/style.css", "text/css")):
        reply = await parts.others[ADMIN].api.receive(Call("GET", path))
        assert reply.status == 200
        assert reply.media_type.startswith(kind)
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in reply.headers["content-security-policy"]
        tag = reply.headers["etag"]
        again = await parts.others[ADMIN].api.receive(Call("GET", path, {"if-none-match": f'W/"x", {tag}'}))
        other = await parts.others[ADMIN].api.receive(Call("GET", path, {"if-none-match": '"x"'}))
        assert (again.status, again.body, other.status) == (304, b"", 200)


async def test_what_is_not_modified_has_no_length(tmp_path):
    """By HTTP, a 304 is whole by itself, and the connection goes on."""
    async with assembled(models={"data_dir": tmp_path}, server=ON) as parts, over_http(parts) as client:
        tag = (await client.get("/admin/static/style.css")).headers["etag"]
        for _ in range(2):
            reply = await client.get("/admin/static/style.css", headers={"if-none-match": tag})
            assert (reply.status_code, reply.content, "content-length" in reply.headers) == (304, b"", False)
        page = await client.get("/admin", follow_redirects=True)
        assert (page.status_code, page.url.path) == (200, "/admin/")


@pytest.mark.parametrize("name", ["x", "..", "app.js%00", "__init__.py"])
async def test_nothing_else_is_a_file(parts, name):
    """A name is looked up among the page's files, and is never a path."""
    assert (await ask(parts, f"/static/{name}"))[0] == 404


# Status


async def test_the_status_counts_what_is_done(tmp_path):
    """Requests, tokens, latencies and the cache grow by what was asked, and by nothing that the dashboard asks itself."""
    cache = CacheConfig(cache_entries=100)
    async with assembled(models={"data_dir": tmp_path}, cache=cache) as parts:
        _, before = await ask(parts, "/api/status")
        for text in ("abc", "abc", "de"):
            await parts.api.receive(Call("POST", "/v1/embeddings", {}, json.dumps({"input": text}).encode()))
        await parts.api.receive(Call("POST", "/v1/embeddings", {}, b"{}"))
        assert (await ask(parts, "/"))[0] == 200
        _, after = await ask(parts, "/api/status")
    assert (before["dialects"], before["models"][0]["tokens"]) == ([], 0)
    assert after["dialects"] == [{"dialect": "openai", "answered": 3, "refused": 1, "failed": 0}]
    assert after["models"][0]["tokens"] == 5
    assert (after["figures"]["quiver_cache_hits"], after["figures"]["quiver_cache_misses"]) == (1, 2)
    assert after["latency"]["counts"][-1] == 4
    assert after["latency"]["bounds"][-1] is None
    assert after["latency"]["counts"] == sorted(after["latency"]["counts"])
    assert after["memory"]["resident"] > 0
    assert after["state"] == "ok"


async def test_the_status_knows_lanes_and_queue(tmp_path):
    """While two lanes compute, both are busy and the rest waits."""
    started, go_on = asyncio.Semaphore(0), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(_):
        loop.call_soon_threadsafe(started.release)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()

    async with assembled(hash_model(before=hold, batch_tokens=4), models={"data_dir": tmp_path}) as parts:
        asking = asyncio.create_task(post(parts, "/v1/embeddings", body=b'{"input": ["abcd", "efgh", "ijkl"]}'))
        for _ in range(2):
            await started.acquire()
        _, status = await ask(parts, "/api/status")
        go_on.set()
        assert (await asking).status == 200
    (model,) = status["models"]
    assert (model["lanes"], model["busy_lanes"], model["waiting_inputs"], model["waiting_tokens"]) == (2, 2, 1, 4)


async def test_a_model_that_failed_says_why(tmp_path):
    """A model that could not be loaded on first use is shown as failed, with the reason."""
    models = {"data_dir": tmp_path, "allow_models": ("acme/nowhere",), "hub_offline": True}
    async with assembled(models=models) as parts:
        _, before = await ask(parts, "/api/status")
        assert (await post(parts, "/v1/embeddings", body=b'{"model": "acme/nowhere", "input": "a"}')).status == 503
        _, after = await ask(parts, "/api/status")
    assert [model["state"] for model in before["models"]] == ["ready", "available"]
    assert [model["state"] for model in after["models"]] == ["ready", "failed"]
    assert "hub_offline" in after["models"][1]["error"]


async def test_a_stopping_server_says_so(parts):
    """The state is a word."""
    parts.service.stopping = True
    assert (await ask(parts, "/api/status"))[1]["state"] == "stopping"


# Settings


async def test_no_secret_is_shown_among_the_settings(tmp_path):
    """Keys, tokens and passwords are hidden, in an address too; everything else is there with its default."""
    url = "http://ann:passw0rd@collector:4317"
    server = ServerConfig(api_key=Secret("s3cret-key"), otlp_endpoint=url, port=81)
    given = {"data_dir": tmp_path, "hub_token": Secret("hf_secret"), "hub_endpoint": "https://bob:hush-hush@hub"}
    async with assembled(models=given, server=server) as parts:
        _, sections = await ask(parts, "/api/settings")
    rows = {row["name"]: row for section in sections for row in section["settings"]}
    assert not [word for word in ("s3cret", "passw0rd", "hf_secret", "hush") if word in json.dumps(sections)]
    assert (rows["api_key"]["value"], rows["hub_token"]["value"]) == ("***", "***")
    assert rows["otlp_endpoint"]["value"] == "http://ann:***@collector:4317"
    assert (rows["port"]["value"], rows["port"]["default"], rows["port"]["is_changed"]) == ("81", "8000", True)
    assert set(rows) == {name for section in describe(Config()).values() for name in section}


# Trying


async def test_texts_are_compared_by_their_vectors(parts):
    """The matrix is that of the vectors which the API gives, symmetric, with ones in its diagonal."""
    texts = ["one", "two", "three"]
    status, said = await ask(parts, "/api/try/embed", {"texts": texts, "model": "hash"})
    data = json.loads((await post(parts, "/v1/embeddings", body=json.dumps({"input": texts}).encode())).body)["data"]
    vectors = np.array([each["embedding"] for each in data])
    assert status == 200
    assert np.abs(np.array(said["similarities"]) - vectors @ vectors.T).max() < 1e-4
    assert np.array_equal(said["similarities"], np.transpose(said["similarities"]))
    assert (said["model"], said["dimensions"], said["tokens"]) == (SPEC.id, SPEC.dimensions, 11)
    assert np.abs(np.array(said["vectors"]) - vectors).max() < 1e-5


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("embed", {"texts": []}, 400, "texts"),
        ("embed", {"texts": ["a"] * 33}, 400, "texts"),
        ("embed", {"texts": ["a"], "dimensions": 99}, 400, "dimensions"),
        ("embed", {"texts": ["a"], "model": "nobody"}, 404, "nobody"),
        ("embed", {"texts": ["a"], "colour": 1}, 400, "colour"),
        ("rerank", {"query": "", "documents": ["a"]}, 400, "query"),
        ("rerank", {"query": "a", "documents": ["a"] * 101}, 400, "documents"),
        ("benchmark", {"seconds": 60}, 400, "seconds"),
        ("benchmark", {"concurrency": 65}, 400, "concurrency"),
        ("benchmark", {"model": "nobody", "seconds": 0.1}, 404, "nobody"),
    ],
)
async def test_what_cannot_be_tried_is_said(parts, path, body, status, word):
    """Each mistake is refused with the field that it is about."""
    got, said = await ask(parts, f"/api/try/{path}", body)
    assert (got, word in json.dumps(said)) == (status, True), said


async def test_a_long_text_is_cut_and_named(parts):
    """A person who tries a model sees that a text was longer than it reads."""
    _, said = await ask(parts, "/api/try/embed", {"texts": ["a", "b" * (MAX_TOKENS + 1)]})
    assert said["truncated"] == [1]


async def test_documents_are_ranked_as_the_api_ranks_them(parts):
    """Places and scores are those of another dialect's reply."""
    body = {"query": "q", "documents": ["one", "two", "three"]}
    _, said = await ask(parts, "/api/try/rerank", body)
    theirs = json.loads((await post(parts, "/jina/v1/rerank", body=json.dumps(body).encode())).body)["results"]
    assert [hit["index"] for hit in said["hits"]] == [each["index"] for each in theirs]
    assert np.allclose([hit["score"] for hit in said["hits"]], [each["relevance_score"] for each in theirs])


async def test_a_benchmark_measures_and_leaves_the_cache_alone(tmp_path):
    """It counts what was computed, takes the time that it was given, and neither finds nor keeps a result."""
    async with assembled(models={"data_dir": tmp_path}, cache=CacheConfig(cache_entries=100)) as parts:
        status, said = await ask(parts, "/api/try/benchmark", {"concurrency": 3, "texts": 2, "seconds": 0.3})
        _, after = await ask(parts, "/api/status")
    assert status == 200
    assert said["requests"] > 3
    assert 0.3 <= said["seconds"] < 3
    assert said["texts_per_second"] == pytest.approx(2 * said["requests"] / said["seconds"])
    assert 0 < said["p50"] <= said["p95"] <= said["p99"]
    assert (after["figures"]["quiver_cache_misses"], after["figures"]["quiver_cache_entries"]) == (0, 0)
    assert after["models"][0]["tokens"] > 0


async def test_a_benchmark_ends_with_its_client(tmp_path):
    """Who leaves stops it: no lane works for a step that nobody waits for."""
    async with assembled(models={"data_dir": tmp_path}, server=ON) as parts:
        api = parts.others[ADMIN].api
        running = asyncio.create_task(
            api.receive(Call("POST", "/api/try/benchmark", {"host": "a"}, b'{"seconds": 20, "concurrency": 4}'))
        )
        await asyncio.sleep(0.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        _, first = await ask(parts, "/api/status")
        await asyncio.sleep(0.1)
        _, second = await ask(parts, "/api/status")
    assert first["models"][0]["tokens"] == second["models"][0]["tokens"] > 0
    assert running.cancelled()


async def test_errors_have_the_shape_of_openais(tmp_path):
    """By HTTP too, a refusal is JSON that the page can show."""
    async with assembled(models={"data_dir": tmp_path}, server=ON) as parts, over_http(parts) as client:
        reply = await client.get("/admin/api/status")
        assert reply.status_code == httpx.codes.UNAUTHORIZED
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert admin.admin_dialect(None, admin.by_file, OPENAI).render_error is OPENAI.render_error
