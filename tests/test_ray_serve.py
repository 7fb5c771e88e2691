"""A cluster of two nodes whose parts are killed under load. `make test-ray` runs it; it needs the extra `ray`."""

import asyncio
import base64
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from desk import Desk
from quiver.accounts import UsageTotal
from quiver.errors import ConfigError
from quiver.scale import cluster
from ray_cluster import (
    INGRESS,
    REPLICA,
    Load,
    Nodes,
    Outcome,
    config_of,
    free_port,
    served,
    two_nodes,
    vector_of,
    with_accounts,
)
from ray_stub import load_hash
from server_process import clean_environment
from stores import REDIS, postgres, redis_prefix

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
SECONDS = 14.0
KILL_AT = 4.0
HEALED_SECONDS = 120.0


@pytest.fixture(scope="module")
def nodes():
    """Two nodes for all tests of this file."""
    with two_nodes() as nodes:
        yield nodes


@dataclass
class Survived:
    """What became of a cluster that lost a part."""

    outcome: Outcome
    victims: list[str]
    """What of ours died."""
    failing_seconds: float
    """From the kill to the last request that failed."""
    healing_seconds: float
    """From the kill until all processes were there again."""
    requests: int
    embeddings: int

    def __str__(self) -> str:
        seen = self.outcome
        return (
            f"{', '.join(self.victims)} killed: {seen.answered} answered, {seen.statuses[503]} times 503, cut {seen.cut}, "
            f"in flight {seen.in_flight}, why {dict(seen.reasons)}, last failure after {self.failing_seconds:.2f} s, whole again after "
            f"{self.healing_seconds:.1f} s, slowest {max(seen.seconds):.2f} s, usage {self.embeddings}"
        )


async def survived(nodes: Nodes, tmp_path: Path, victim: str) -> Survived:
    """Load a cluster, kill a part of it, and return what came of it."""
    async with postgres() as url, redis_prefix() as prefix:
        database = url.render_as_string(hide_password=False)
        desk = Desk(database)
        key = await desk.key()
        config = with_accounts(config_of(tmp_path, free_port()), database, REDIS, prefix)
        with served(config, load_hash) as base:
            before = nodes.count(REPLICA, INGRESS)
            assert before == [2, 2]
            died: list[str] = []
            load = Load(base, {"authorization": f"Bearer {key}"})
            healing = asyncio.create_task(healed(nodes, before, died))
            killed_at = await load.run(SECONDS, KILL_AT, lambda: died.extend(nodes.strike(victim)))
            if victim == "node":
                nodes.add_second()  # each machine has one of the ingresses
            healing_seconds = await asyncio.wait_for(healing, HEALED_SECONDS) - killed_at
            totals = await settled(desk, load.outcome.answered)
    failing = max(load.outcome.failed_at, default=killed_at) - killed_at
    requests, embeddings = (sum(getattr(total, name) for total in totals) for name in ("requests", "embeddings"))
    return Survived(load.outcome, died, failing, healing_seconds, requests, embeddings)


async def healed(nodes: Nodes, before: list[int], died: list[str]) -> float:
    """Return when there are as many processes as before, once some have died."""
    while not died or await asyncio.to_thread(nodes.count, REPLICA, INGRESS) != before:  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(0.1)
    return time.monotonic()


async def settled(desk: Desk, expected: int) -> list[UsageTotal]:
    """Return the ledger's sums once they are what is expected, or after a while."""
    for _ in range(40):
        if sum(total.embeddings for total in await desk.totals()) >= expected:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(1.5)  # more would come now, if it came
    return await desk.totals()


@pytest.mark.parametrize("victim", ["replica", "ingress", "node"])
async def test_a_part_that_is_killed_costs_what_was_in_flight_on_it(nodes, tmp_path, victim, capsys):
    """No answer is wrong, none hangs, what was lost says when to come back, and each request is paid for once."""
    found = await survived(nodes, tmp_path, victim)
    with capsys.disabled():
        print(f"\n{victim}: {found}")  # noqa: T201  the figures that it is run for
    seen = found.outcome
    assert found.victims
    assert (seen.wrong, seen.hung, seen.without_time) == ([], 0, 0)
    assert set(seen.statuses) <= {200, 503}
    assert seen.statuses[503] + seen.cut <= seen.in_flight
    assert found.requests == found.embeddings == seen.answered


RARE = "test/rare"


@pytest.fixture
def pooled(nodes, tmp_path):
    """A cluster that serves one model, and another when it is asked for."""
    del nodes
    config = config_of(tmp_path, free_port(), ray_min_replicas=(1,), ray_max_replicas=(1,), ray_ingresses=1)
    config = replace(config, models=replace(config.models, allow_models=(RARE,)))
    with served(config, load_hash) as base:
        yield base


async def test_a_pool_loads_what_is_asked_for_and_lets_go_of_who_has_gone(pooled):
    """A model that is not configured answers with its bits; who leaves in the middle of much work blocks nobody."""
    body = {"input": ["a"], "model": RARE, "encoding_format": "base64"}
    async with httpx.AsyncClient(base_url=pooled, timeout=60) as client:
        reply = await client.post("/v1/embeddings", json=body)
        assert base64.b64decode(reply.json()["data"][0]["embedding"]) == vector_of("a")

        much = {"input": ["x" * 500] * 1000, "model": RARE}  # 25 seconds of work
        with pytest.raises(httpx.TimeoutException):
            await client.post("/v1/embeddings", json=much, timeout=2)
        start = time.monotonic()
        assert (await client.post("/v1/embeddings", json={**body, "input": ["b"]})).status_code == 200
        assert time.monotonic() - start < 10

        late = await client.post("/v1/embeddings", json=much, headers={"x-request-timeout": "1"})
        assert late.status_code in (429, 504)
        unknown = await client.post("/v1/embeddings", json={**body, "model": "test/none"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_more_work_brings_another_replica(nodes, tmp_path):
    """While one replica is full, Serve starts a second, because of the tokens that it has heard of."""
    config = config_of(tmp_path, free_port(), ray_min_replicas=(1,), ray_ingresses=1, ray_queue_seconds=0.05)
    with served(config, load_hash) as base:
        assert nodes.count(REPLICA) == [1]
        async with httpx.AsyncClient(base_url=base, timeout=60) as client, asyncio.timeout(120):
            while nodes.count(REPLICA) != [2]:
                work = {"input": ["x" * 500] * 40}  # a second of it
                await asyncio.gather(*(client.post("/v1/embeddings", json=work) for _ in range(4)))


def test_a_wrong_token_is_said(nodes):
    """Who has another token than the cluster is told which setting to mend, and exits with 78."""
    command = (
        sys.executable,
        "-m",
        "quiver",
        "scale",
        "serve",
        "--ray-address",
        nodes.address,
        "--ray-token",
        "f" * 64,
    )
    done = subprocess.run(  # noqa: S603  our own command
        command, capture_output=True, text=True, timeout=120, check=False, env=clean_environment(RAY_AUTH_MODE="token")
    )
    assert (done.returncode, "set ray_token" in done.stderr) == (78, True), done.stderr


def test_a_model_that_no_machine_has_room_for_is_said(nodes, tmp_path):
    """Which, how much, and how much there is."""
    del nodes
    with pytest.raises(ConfigError, match=r"a replica of test/hash takes 64 CPU, but .* has 2"):
        cluster.check_room(config_of(tmp_path, 0, ray_cpus=(64.0,)))


def test_the_load_would_see_a_wrong_answer():
    """Negative control: the bits of another text are not those of this one."""
    assert vector_of("a") != vector_of("b")
