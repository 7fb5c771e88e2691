"""Who gets in: every route asks for a key, every form of one is taken, and no wrong one is."""

import asyncio
import contextlib
import functools
import re
import sqlite3
import time
import zlib

import pytest

from conftest import assembled
from desk import BODY, Desk, get, over_http, post, staffed
from fakes import hash_model
from quiver import app, db, keys
from quiver.api.call import LOCAL, Call
from quiver.api.openai import OPENAI
from quiver.api.openapi import docs_routes
from quiver.api.router import mounted
from quiver.config import AccountsConfig, Config, Secret, ServerConfig
from quiver.errors import ConfigError, DatabaseError
from quiver.gate import Gate

PUBLIC = {
    "/": "says that it is there",
    "/api/openapi.json": "documentation",
    "/api/version": "says that it is there",
    "/docs": "documentation",
    "/fastembed_query/health": "health",
    "/health": "health",
    "/health/live": "health",
    "/health/ready": "health",
    "/health/status": "health",
    "/inference_api/health/live": "health",
    "/inference_api/health/ready": "health",
    "/inference_api/health/status": "health",
    "/infinity/health": "health",
    "/metrics": "open unless `open_metrics` is off",
    "/ollama": "says that it is there",
    "/ollama/api/version": "says that it is there",
    "/openapi.json": "documentation",
    "/ping": "health",
    "/runpod/ping": "health",
    "/swagger-ui": "documentation",
    "/swagger-ui/{file}": "documentation",
    "/tei": "health",
    "/tei/health": "health",
    "/tei/ping": "health",
}
"""All that may be read without a key; nothing else, and nothing by POST."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
SOON_SECONDS = 5.0


@functools.cache
def table(*, open_metrics: bool = True) -> set[tuple[str, str]]:
    """Return the method and path of every route of a server, as its router is given them."""
    dialects = app.dialects(open_metrics=open_metrics)
    return {(r.method, path) for path, _, r in mounted((*dialects, docs_routes(dialects, OPENAI)))}


def concrete(path: str) -> str:
    """Fill in a template."""
    return re.sub(r"\{[^}]+\}", "x", path)


# Every route


@pytest.mark.parametrize("open_metrics", [True, False])
async def test_every_route_asks_for_a_key(tmp_path, open_metrics):
    """Whatever a route does and by whatever method it is called, without a key it does nothing."""
    public = set(PUBLIC) if open_metrics else set(PUBLIC) - {"/metrics"}
    seen = set()
    async with staffed(tmp_path, accounts={"open_metrics": open_metrics}) as (parts, _):
        for path in sorted({path for _, path in table(open_metrics=open_metrics)}):
            for method in METHODS:
                reply = await parts.api.receive(Call(method, concrete(path), {}, BODY if method == "POST" else b""))
                is_route = ("GET" if method == "HEAD" else method, path) in table(open_metrics=open_metrics)
                if not is_route:
                    assert reply.status in (401, 405), (method, path)  # a path may be two templates'
                elif path in public and method in ("GET", "HEAD"):
                    assert reply.status != 401, (method, path)
                    seen.add(path)
                else:
                    assert reply.status == 401, (method, path)
                    assert reply.headers["www-authenticate"] == "Bearer"
    assert seen == public, "the list of what is public is longer than what is"


async def test_every_route_asks_for_a_key_before_it_reads_a_body(tmp_path):
    """By HTTP, all that is posted is refused while the client still has its body to send."""
    posted = sorted(concrete(path) for method, path in table() if method == "POST")
    async with staffed(tmp_path) as (parts, _):
        for path in posted:
            for key in ("", "nonsense"):
                shown = [(b"authorization", f"Bearer {key}".encode())] if key else []
                refusal = parts.edge.refusal("POST", path.encode(), [(b"content-length", b"9"), *shown], "1.2.3.4")
                assert refusal, path
                assert refusal.wire.startswith(b"HTTP/1.1 401 "), path
                assert b"\r\nwww-authenticate: Bearer\r\n" in refusal.wire
        good = f"Bearer {keys.mint('qv').text}".encode()  # nobody's, but only the database can tell
        assert parts.edge.refusal("POST", b"/v1/embeddings", [(b"authorization", good)], "1.2.3.4") is None


async def test_with_auth_off_nobody_is_asked(tmp_path):
    """Negative control: the same calls without a key are answered, and no database is made but for a job."""
    async with staffed(tmp_path, accounts={"auth": "off", "database_url": Secret("")}) as (parts, _):
        for method, path in sorted(one for one in table() if not one[1].endswith("/run")):
            reply = await parts.api.receive(Call(method, concrete(path), {}, BODY if method == "POST" else b""))
            assert reply.status != 401, (method, path)
    assert not list(tmp_path.iterdir())


# Keys


async def test_every_form_of_a_key_is_taken(tmp_path):
    """Clients of every API that we speak send it in their own way."""
    async with staffed(tmp_path) as (parts, desk), over_http(parts) as client:
        key = await desk.key()
        for shown in (
            {"authorization": f"Bearer {key}"},
            {"authorization": f"bearer {key}"},
            {"authorization": key},
            {"x-api-key": key},
            {"api-key": key},
        ):
            reply = await client.post("/v1/embeddings", content=BODY, headers=shown)
            assert reply.status_code == 200, shown
        reply = await client.post(f"/v1/embeddings?api_key={key}", content=BODY)
        assert reply.status_code == 401, "addresses are logged by everyone: no key belongs there"


async def test_all_that_is_no_good_key_reads_the_same(tmp_path):
    """Wrong, unknown, expired, revoked or mistyped: one status and one body, so that nobody learns which."""
    async with staffed(tmp_path) as (parts, desk):
        good, revoked = await desk.key(), await desk.key()
        expired = await desk.key(expires_at=time.time() - 1)
        await desk.revoke(revoked)
        answers = set()
        for shown in (wrong(good), keys.mint("qv").text, expired, revoked, good[:-1], "nonsense", "schlüssel"):
            reply = await post(parts, "/v1/embeddings", shown)
            answers.add((reply.status, reply.body))
        assert len(answers) == 1, answers
        ((status, body),) = answers
        assert status == 401
        assert b'"code":"invalid_api_key"' in body
        assert (await post(parts, "/v1/embeddings", good)).status == 200


def wrong(key: str) -> str:
    """Return another secret under the same id, with its checksum right."""
    prefix, key_id, *_ = key.split("_")
    body = f"{prefix}_{key_id}_{keys.mint(prefix).text.split('_')[2]}"
    return f"{body}_{keys.base62(zlib.crc32(body.encode()), keys.CHECK_LETTERS)}"


async def test_a_revoked_key_ends_within_five_seconds(tmp_path):
    """Whoever holds it is refused soon, however busily it is used."""
    async with staffed(tmp_path) as (parts, desk):
        key, other = await desk.key(), await desk.key(email="bob@b.c")
        assert (await post(parts, "/v1/embeddings", key)).status == 200
        await desk.revoke(key)
        start = time.perf_counter()
        while (await post(parts, "/v1/embeddings", key)).status == 200:
            assert time.perf_counter() - start < SOON_SECONDS
            await asyncio.sleep(0.02)
        assert (await post(parts, "/v1/embeddings", other)).status == 200


async def test_who_tries_many_keys_waits(tmp_path):
    """A stranger's keys cost hashes; after some, its address is told to wait, and known keys go on from there."""
    async with staffed(tmp_path) as (parts, desk):
        good = await desk.key()
        assert (await post(parts, "/v1/embeddings", good)).status == 200
        replies = [await post(parts, "/v1/embeddings", keys.mint("qv").text) for _ in range(20)]
        assert [reply.status for reply in replies] == [401] * 20
        while replies[-1].status == 401:
            assert len(replies) < 60, "one a second is made good meanwhile, and a hash takes less"
            replies.append(await post(parts, "/v1/embeddings", keys.mint("qv").text))
        assert b"too many keys from this address are wrong" in replies[-1].body
        assert (await post(parts, "/v1/embeddings", good)).status == 200


async def test_the_servers_own_key_goes_on_beside_keys_of_accounts(tmp_path):
    """A static key opens everything that is open without accounts, before and after the first key of one."""
    async with staffed(tmp_path, server=ServerConfig(api_key=Secret("k3y"))) as (parts, desk):
        assert (await post(parts, "/v1/embeddings", "k3y")).status == 200
        assert (await post(parts, "/v1/embeddings", await desk.key())).status == 200
        assert (await post(parts, "/v1/embeddings", "k3z")).status == 401
        assert (await get(parts, "/v1/usage", "k3y")).status == 404


async def test_a_key_without_a_door_is_a_mistake():
    """A server that is given a key and told to ask for none does not start."""
    server, accounts = ServerConfig(api_key=Secret("k3y")), AccountsConfig(auth="off")
    with pytest.raises(ConfigError, match="api_key is set, but auth is off"):
        app.build(Config(server=server, accounts=accounts))


# The first key


@pytest.mark.parametrize("there_is_a_database", [False, True])
async def test_the_first_key_closes_a_server_that_runs(tmp_path, there_is_a_database):
    """It serves everybody, and from at most five seconds after a key is made only those who have one."""
    desk = Desk(db.sqlite_url(tmp_path))
    async with assembled(hash_model(), models={"data_dir": tmp_path}) as parts:
        assert (await post(parts, "/v1/embeddings")).status == 200
        assert not (tmp_path / "quiver.db").exists()
        if there_is_a_database:
            await desk.totals()
            await asyncio.sleep(2.5)
            assert (await post(parts, "/v1/embeddings")).status == 200
        key = await desk.key()
        start = time.perf_counter()
        while (await post(parts, "/v1/embeddings")).status == 200:
            assert time.perf_counter() - start < SOON_SECONDS
            await asyncio.sleep(0.02)
        while (reply := await post(parts, "/v1/embeddings", key)).status == 503:
            assert time.perf_counter() - start < SOON_SECONDS
            await asyncio.sleep(0.02)
        assert reply.status == 200
        for file in tmp_path.glob("quiver.db*"):
            file.unlink()
        await asyncio.sleep(2.5)
        assert (await post(parts, "/v1/embeddings")).status == 401, "it must not open again"


async def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path):
    """The server does not start, and says which database it is."""
    url = "postgresql://ann:s3cret@127.0.0.1:9/quiver"
    with pytest.raises(DatabaseError, match=r"postgresql://ann:\*\*\*@127\.0\.0\.1:9/quiver") as told:
        async with staffed(tmp_path, accounts={"database_url": Secret(url)}):
            pass
    assert "s3cret" not in str(told.value)
    assert app.exit_code(told.value) == 78


def from_the_future(folder):
    """Make a database as a later version would leave it."""
    with contextlib.closing(sqlite3.connect(folder / "quiver.db")) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")


async def test_a_database_of_a_newer_version_opens_no_door(tmp_path):
    """A server does not start with it, and one that runs already lets nobody in any more: it cannot tell who has a key."""
    async with assembled(hash_model(), models={"data_dir": tmp_path}) as parts:
        assert (await post(parts, "/v1/embeddings")).status == 200
        from_the_future(tmp_path)
        start = time.perf_counter()
        while (await post(parts, "/v1/embeddings")).status == 200:
            assert time.perf_counter() - start < SOON_SECONDS
            await asyncio.sleep(0.02)
        reply = await post(parts, "/v1/embeddings", keys.mint("qv").text)
        assert reply.status == 503
        assert b"belongs to a newer version of Quiver" in reply.body
    with pytest.raises(DatabaseError, match="belongs to a newer version"):
        async with assembled(hash_model(), models={"data_dir": tmp_path}):
            pass


async def test_without_accounts_a_call_costs_microseconds_more(parts, capsys):
    """What the gate and the service add where nobody is asked for a key: less than 10 µs of a call."""
    gate, caller, headers = Gate(Secret(""), parts.stores.register, parts.stores.limiter, AccountsConfig()), LOCAL, {}

    async def nothing(request, caller):
        del request, caller

    async def asked():
        gate.glance(headers, "local")
        await gate.admit(headers, "local")
        await parts.service._counted("embed", 1, caller, nothing, None)

    bare, added = [await fastest(work) for work in (lambda: nothing(None, None), asked)]
    with capsys.disabled():
        print(f" ({(added - bare) * 1e6:.1f} µs) ", end="")  # noqa: T201  the figure
    assert added - bare < 10e-6


async def fastest(work, calls=1000, rounds=20):
    """Return the seconds of one call, in the best of some rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            await work()
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)
