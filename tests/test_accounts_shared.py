"""Servers that share a database and a Redis, what happens when one of them goes, and what a killed server has lost."""

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.engine import make_url

import checkpoints
from desk import Desk, post, staffed
from fault_proxy import FAULTS, Fault, FaultProxy
from quiver.accounts import Rate, Tier
from quiver.config import CacheConfig, Secret
from quiver.db.tables import USAGE
from server_process import clean_environment, run, serving
from stores import REDIS, database_url, opened, postgres, redis_prefix

RARE = Tier("rare", None, Rate(0.01, 4))
CLIENTS = 8
ENOUGH = 200
"""Requests that are answered before a server is killed."""
WINDOW_SECONDS = 0.25
"""More than one write to a disk takes, on a machine that does something else meanwhile."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the directory of a tiny random model."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "tiny", "bert")


# Redis


@contextlib.asynccontextmanager
async def two_servers(folder, redis):
    """Put two servers together that share a database, and a Redis if there is one; yields them and a key."""
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for _ in range(2):
            parts, desk = await stack.enter_async_context(staffed(folder, cache=redis))
            servers.append(parts)
        yield servers, await desk.key(tier=RARE)


async def let_through(servers, key, calls=8):
    """Call each of the servers in turn; returns how often each of them answered."""
    counts = [0] * len(servers)
    for i, parts in itertools.islice(itertools.cycle(enumerate(servers)), calls * len(servers)):
        reply = await post(parts, "/v1/embeddings", key)
        assert reply.status in (200, 429), reply.body
        counts[i] += reply.status == 200
    return counts


def shared(url, prefix):
    """Return the settings of servers that share a Redis for nothing but rates."""
    return CacheConfig(cache_entries=0, redis_url=Secret(url), redis_prefix=prefix)


async def test_two_servers_with_one_redis_share_a_rate(tmp_path):
    """A key may ask as often as its tier says, whichever server it asks; without Redis each counts for itself."""
    async with redis_prefix() as prefix, two_servers(tmp_path, shared(REDIS, prefix)) as (servers, key):
        assert 4 <= sum(await let_through(servers, key)) <= 5, "one call to Redis may have come too late"
    async with two_servers(tmp_path / "alone", CacheConfig(cache_entries=0)) as (servers, key):
        assert await let_through(servers, key) == [4, 4]


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_its_redis_nobody_is_unlimited(tmp_path, fault):
    """However Redis fails, each server goes on counting for itself, and answers."""
    there = make_url(REDIS)
    async with redis_prefix() as prefix, FaultProxy(there.host, there.port or 6379) as proxy:
        url = f"redis://127.0.0.1:{proxy.listens_at}/{there.database or 0}"
        async with two_servers(tmp_path, shared(url, prefix)) as (servers, key):
            before = await let_through(servers, key, calls=1)
            await proxy.break_down(fault)
            during = await let_through(servers, key, calls=10)
            assert sum(before) == 2
            assert max(during) <= 4, "more than one server alone lets through"
            assert min(during) >= 1, "its own count has not begun"
            await proxy.break_down(Fault.NONE)


# The database


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.BLACK_HOLE])
async def test_without_its_database_known_keys_go_on(tmp_path, fault):
    """Who was known is served and counted later; of others nobody can say, so they are asked to come again."""
    async with postgres() as url, FaultProxy(url.host, url.port or 5432) as proxy:
        away = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        desk = Desk(url.render_as_string(hide_password=False))
        async with staffed(tmp_path, accounts={"database_url": Secret(away)}) as (parts, _):
            key, other = await desk.key(), await desk.key()
            assert (await post(parts, "/v1/embeddings", key)).status == 200
            await proxy.break_down(fault)
            assert [(await post(parts, "/v1/embeddings", key)).status for _ in range(5)] == [200] * 5
            unknown = await post(parts, "/v1/embeddings", other)
            assert (unknown.status, json.loads(unknown.body)["error"]["code"]) == (503, "auth_unavailable")
            await proxy.break_down(Fault.NONE)
            await asyncio.sleep(1.1)
            assert (await post(parts, "/v1/embeddings", other)).status == 200
        assert sum(total.requests for total in await desk.totals()) == 7


# Processes


@dataclass
class Seen:
    """What clients were answered: when, and for how many texts."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    def worth(self, since: float = float("-inf")) -> int:
        """Sum the texts up."""
        return sum(texts for at, texts in self.answers if at >= since)


async def load(url, key, seen, sizes):
    """Ask one request after the other, until the server is gone."""
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=20) as client:
        with contextlib.suppress(httpx.TransportError):
            while True:
                texts = next(sizes)
                reply = await client.post("/v1/embeddings", json={"input": [f"CANARY {i}" for i in range(texts)]})
                assert reply.status_code == 200, reply.text
                seen.answers.append((time.perf_counter(), texts))
                if len(seen.answers) == ENOUGH:
                    seen.enough.set()


async def rows_of(url):
    """Return how many requests the ledger has, and how many embeddings they are."""
    async with opened(url) as database:
        query = select(func.count(), func.coalesce(func.sum(USAGE.c.embeddings), 0)).select_from(USAGE)
        return tuple((await database.read(lambda connection: connection.execute(query))).one())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_the_ledger_is_what_clients_saw(tiny, tmp_path, kind, capsys):
    """A server that is killed in the middle of work has counted all but its last moment, and nothing twice."""
    seen, sizes = Seen(), itertools.cycle(range(1, 6))
    async with database_url(kind, tmp_path) as url:
        key = await Desk(url).key()
        options = ("--model", str(tiny), "--data-dir", str(tmp_path), "--log-level", "debug", "--cache-entries", "0")
        with serving(*options, QUIVER_DATABASE_URL=url) as server:
            there = await asyncio.to_thread(server.ready_url)
            clients = [asyncio.create_task(load(there, key, seen, sizes)) for _ in range(CLIENTS)]
            async with asyncio.timeout(60):  # however slow the machine is: it is killed in the middle of work
                await seen.enough.wait()
            killed_at = time.perf_counter()
            server.signal(signal.SIGKILL)
            await asyncio.gather(*clients)
            said = "".join(server.lines)
        with serving(*options, QUIVER_DATABASE_URL=url) as server:
            await asyncio.to_thread(server.ready_url)
            server.signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.ended) == 0
            said += "".join(server.lines)
        requests, embeddings = await rows_of(url)
        totals = await Desk(url).totals()
    with capsys.disabled():
        print(f" ({kind}: clients saw {seen.worth()}, the ledger has {embeddings}) ", end="")  # noqa: T201  the figures
    assert requests > ENOUGH / 2
    assert (sum(t.requests for t in totals), sum(t.embeddings for t in totals)) == (requests, embeddings)
    assert embeddings <= seen.worth() + 5 * CLIENTS, "more than was asked for"
    assert embeddings >= seen.worth() - seen.worth(since=killed_at - WINDOW_SECONDS), "more was lost than a moment"
    assert "CANARY" not in said
    assert key.split("_")[2] not in said


def test_a_server_without_accounts_has_none_of_their_packages(tmp_path):
    """SQLAlchemy and Alembic cost memory and time; one that asks for no key, or for one of its own, does without."""
    code = (
        "import asyncio, sys; from pathlib import Path; from quiver import app; from quiver.config import *\n"
        "async def main(**accounts):\n"
        f"    config = Config(models=ModelsConfig(data_dir=Path({str(tmp_path)!r})), accounts=AccountsConfig(**accounts))\n"
        "    async with app.build(config).stores: await asyncio.sleep(0)\n"
        "asyncio.run(main(**ACCOUNTS)); print({'sqlalchemy', 'alembic', 'aiosqlite', 'asyncpg'} & set(sys.modules) != set())"
    )
    for accounts, wanted in (({}, "False"), ({"auth": "off"}, "False"), ({"auth": "required"}, "True")):
        asked = subprocess.run(  # noqa: S603  our own code
            [sys.executable, "-c", code.replace("ACCOUNTS", repr(accounts))],
            capture_output=True,
            text=True,
            check=True,
            env=clean_environment(),
        )
        assert asked.stdout.splitlines()[-1] == wanted, accounts


@pytest.mark.parametrize("url", ["postgresql://ann:s3cret@127.0.0.1:9/quiver", "mysql://ann:s3cret@127.0.0.1/quiver"])
def test_a_server_without_its_database_does_not_start(tiny, tmp_path, url):
    """It ends with 78 and names the database without its password."""
    ended = run("serve", "--port", "0", "--model", str(tiny), "--data-dir", str(tmp_path), QUIVER_DATABASE_URL=url)
    assert ended.returncode == 78
    assert "s3cret" not in ended.stdout + ended.stderr
    assert "database" in ended.stderr
