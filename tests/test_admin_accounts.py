"""Keys, users, tiers, usage and jobs by the dashboard's JSON: the same that the commands do, on a server that runs."""

import asyncio
import json
import time

import pytest

from conftest import assembled
from desk import post, staffed
from quiver import keys
from quiver.accounts import DEFAULT_SCOPES, period_of
from quiver.config import Secret, ServerConfig
from stores import database_url
from test_admin import ask

SOON_SECONDS = 5.0


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, tmp_path):
    """Name an empty database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield url


async def made(parts, **order):
    """Make a key; returns its text and its row."""
    status, said = await ask(parts, "/api/keys", {"email": "ann@b.c", **order})
    assert status == 201, said
    return said["key"], said["row"]


async def until(parts, key, status):
    """Wait until a call with a key is answered so."""
    start = time.perf_counter()
    while (reply := await post(parts, "/v1/embeddings", key)).status != status:
        assert time.perf_counter() - start < SOON_SECONDS, reply.body
        await asyncio.sleep(0.02)


# Keys


async def test_looking_makes_no_database(tmp_path):
    """On a server without accounts every list is empty, and nothing appears on the disk; the tiers are the first ones."""
    async with assembled(models={"data_dir": tmp_path}) as parts:
        assert await ask(parts, "/api/keys") == (200, {"auth": "auto", "needs_key": False, "keys": []})
        assert [tier["name"] for tier in (await ask(parts, "/api/tiers"))[1]] == ["free", "pro", "scale"]
        for path in ("/api/users", "/api/usage"):
            assert await ask(parts, path) == (200, [])
        assert (await ask(parts, "/api/jobs"))[1] == {"jobs": [], "after": None}
    assert not list(tmp_path.iterdir())


async def test_the_first_key_closes_the_server(tmp_path):
    """It is made with database and user, opens what it is for, and from then on everybody needs one."""
    async with assembled(models={"data_dir": tmp_path}) as parts:
        assert (await post(parts, "/v1/embeddings")).status == 200
        key, row = await made(parts, name="the first")
        assert (keys.parse(key).id, row["name"], row["tier"], row["state"]) == (row["id"], "the first", "free", "good")
        assert set(row["scopes"]) == DEFAULT_SCOPES
        await until(parts, "", 401)
        await until(parts, key, 200)
        assert (await ask(parts, "/api/keys"))[1]["needs_key"] is True


async def test_a_key_is_made_listed_replaced_and_ended(tmp_path, url):
    """Its text is said once and nowhere else; the new one works, the old one ends when it was told to."""
    async with staffed(tmp_path, accounts={"database_url": Secret(url)}) as (parts, _):
        key, row = await made(parts, scopes=["embed"], tier="pro", expires_seconds=3600)
        assert 3500 < row["expires_at"] - time.time() <= 3600
        assert (await post(parts, "/v1/embeddings", key)).status == 200
        assert (await post(parts, "/jina/v1/rerank", key, b'{"query": "a", "documents": ["b"]}')).status == 403
        status, new = await ask(parts, f"/api/keys/{row['id']}/rotate", {"grace_seconds": 0})
        assert (status, new["row"]["scopes"], new["row"]["tier"]) == (201, ["embed"], "pro")
        await until(parts, new["key"], 200)
        await until(parts, key, 401)
        assert (await ask(parts, f"/api/keys/{new['row']['id']}/revoke", {}))[1]["state"] == "revoked"
        await until(parts, new["key"], 401)
        _, listed = await ask(parts, "/api/keys")
        assert [each["state"] for each in listed["keys"]] == ["revoked", "revoked"]
        assert listed["keys"][0]["id"] == new["row"]["id"], "the newest comes first"
        for text in (key, new["key"]):
            assert text.split("_")[2] not in json.dumps(listed)


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("keys", {}, 400, "email"),
        ("keys", {"email": "nobody"}, 400, "no e-mail address"),
        ("keys", {"email": "a@b.c", "scopes": ["fly"]}, 400, "no scope 'fly'"),
        ("keys", {"email": "a@b.c", "tier": "gold"}, 404, "no tier 'gold'"),
        ("keys", {"email": "a@b.c", "expires_seconds": 0}, 400, "expires_seconds"),
        ("keys", {"email": "a@b.c", "name": "two\nlines"}, 400, "name of a key"),
        ("keys", {"email": "a@b.c", "colour": "red"}, 400, "colour"),
        ("keys/x/revoke", {}, 404, "no key 'x'"),
        ("keys/x/rotate", {}, 404, "no key 'x'"),
        ("keys/x/rotate", {"grace_seconds": -1}, 400, "grace_seconds"),
        ("users", {"email": "a@b.c", "tier": "gold"}, 404, "no tier 'gold'"),
        ("users", {"email": "a", "tier": "free"}, 400, "no e-mail address"),
        ("tiers", {"name": ""}, 400, "name of a tier"),
        ("tiers", {"name": "a", "rate_per_second": 1}, 400, "two parts"),
        ("tiers", {"name": "a", "rate_per_second": 0, "burst": 1}, 400, "lets nobody through"),
        ("tiers", {"name": "a", "monthly_embeddings": -1}, 400, "monthly_embeddings"),
    ],
)
async def test_what_cannot_be_done_is_said(tmp_path, path, body, status, word):
    """Each mistake is refused in the words that the commands use."""
    async with staffed(tmp_path) as (parts, _):
        got, said = await ask(parts, f"/api/{path}", body)
        assert (got, word in said["error"]["message"] + str(said["error"]["param"])) == (status, True), said


async def test_operators_are_let_in_when_there_is_too_much_to_do(tmp_path):
    """A key can be revoked while no place is free for requests that compute."""
    async with staffed(tmp_path, server=ServerConfig(max_concurrent_requests=1)) as (parts, desk):
        key = await desk.key()
        async with parts.admission.place():
            assert (await post(parts, "/v1/embeddings", key)).status == 429
            assert (await ask(parts, "/api/try/embed", {"texts": ["a"]}))[0] == 429
            assert (await ask(parts, f"/api/keys/{key.split('_')[1]}/revoke", {}))[0] == 200


# Users, tiers and usage


async def test_tiers_and_users_are_changed(tmp_path, url):
    """A tier is added and edited, a user moves to it, and the lists tell."""
    gold = {"name": "gold", "monthly_embeddings": 5, "rate_per_second": 2.5, "burst": 10}
    async with staffed(tmp_path, accounts={"database_url": Secret(url)}) as (parts, _):
        assert await ask(parts, "/api/tiers", {**gold, "monthly_embeddings": 7}) == (
            200,
            {**gold, "monthly_embeddings": 7},
        )
        assert (await ask(parts, "/api/tiers", gold))[0] == 200
        assert gold in (await ask(parts, "/api/tiers"))[1]
        key, _ = await made(parts)
        status, user = await ask(parts, "/api/users", {"email": "ANN@b.c", "tier": "gold"})
        assert (status, user["email"], user["tier"]) == (200, "ann@b.c", "gold")
        assert [each["tier"] for each in (await ask(parts, "/api/users"))[1]] == ["gold"]
        assert (await post(parts, "/v1/embeddings", key, b'{"input": ["a", "b", "c", "d", "e", "f"]}')).status == 429
        bare = {"name": "gold", "monthly_embeddings": None, "rate_per_second": None, "burst": None}
        assert await ask(parts, "/api/tiers", {"name": "gold"}) == (200, bare)


async def test_usage_is_summed_up_by_month(tmp_path):
    """What keys used is there with its quota a second later, in its own month alone."""
    async with staffed(tmp_path) as (parts, _):
        key, row = await made(parts)
        for _ in range(2):
            assert (await post(parts, "/v1/embeddings", key, b'{"input": ["ab", "c"]}')).status == 200
        await asyncio.sleep(1.5)
        month = period_of(time.time())
        _, (found,) = await ask(parts, f"/api/usage?period={month}")
        assert await ask(parts, "/api/usage") == (200, [found])
        assert await ask(parts, "/api/usage?period=2020-01") == (200, [])
    assert (found["key"], found["period"], found["quota"]) == (row["id"], month, 20_000)
    assert (found["requests"], found["embeddings"], found["tokens"]) == (2, 4, 6)


# Jobs


async def submitted(parts, text="a"):
    """Submit a RunPod job; returns its id."""
    body = {"input": {"openai_route": "/v1/embeddings", "openai_input": {"input": [text]}}}
    reply = await post(parts, "/run", body=json.dumps(body).encode())
    assert reply.status == 200, reply.body
    return json.loads(reply.body)["id"]


async def test_jobs_are_listed_shown_and_stopped(tmp_path):
    """Whose ever they are: the newest first, page by page; one that waits can be stopped, one that is done cannot."""
    async with assembled(models={"data_dir": tmp_path}) as parts:
        done = await submitted(parts)
        start = time.perf_counter()
        while (shown := (await ask(parts, f"/api/jobs/{done}"))[1])["state"] != "completed":
            assert time.perf_counter() - start < SOON_SECONDS
            await asyncio.sleep(0.02)
        assert (shown["done"], shown["total"], shown["has_ended"]) == (1, 1, True)
        parts.service.jobs._open.work.cancel()  # nobody takes a line any more
        waiting = [await submitted(parts, f"text {i}") for i in range(60)]
        _, first = await ask(parts, "/api/jobs")
        _, second = await ask(parts, f"/api/jobs?after={first['after']}")
        assert [job["id"] for job in first["jobs"] + second["jobs"]] == [*reversed(waiting), done]
        assert (len(first["jobs"]), second["after"]) == (50, None)
        status, stopped = await ask(parts, f"/api/jobs/{waiting[0]}/cancel", {})
        assert (status, stopped["state"], stopped["has_ended"]) == (200, "cancelled", True)
        assert (await ask(parts, f"/api/jobs/{done}/cancel", {}))[1]["state"] == "completed"


async def test_an_unknown_job_is_said_to_be_unknown(parts):
    """With a database and without one."""
    for path, body in (("/api/jobs/nobody", None), ("/api/jobs/nobody/cancel", {})):
        assert (await ask(parts, path, body))[0] == 404
    await submitted(parts)
    for path, body in (("/api/jobs/nobody", None), ("/api/jobs/nobody/cancel", {})):
        assert (await ask(parts, path, body))[0] == 404
    assert (await ask(parts, "/api/jobs?after=nobody"))[0] == 400
