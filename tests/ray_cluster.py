"""Two nodes of a Ray cluster on this machine, and what a test does to them. Imported before Ray, which reads its settings then."""

import asyncio
import base64
import contextlib
import os
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from fakes import byte_tokenizer, hash_vector
from quiver.config import (
    AccountsConfig,
    CacheConfig,
    Config,
    ModelsConfig,
    ScaleConfig,
    Secret,
    ServerConfig,
)
from quiver.scale.cluster import RAY_SETTINGS

TESTS = Path(__file__).parent
TOKEN = secrets.token_hex(32)
ENV = {
    **RAY_SETTINGS,
    "PYTHONPATH": str(TESTS),
    "RAY_raylet_start_wait_time_s": "180",  # of a machine that is busy
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
}
MODEL = "test/hash"
REPLICA = "ServeReplica:quiver:model-"
INGRESS = "ServeReplica:quiver:ingress"
KINDS = {"a replica": REPLICA, "an ingress": INGRESS, "a proxy": "ProxyActor", "a machine": "raylet/raylet"}
STORE_BYTES = 100 << 20
PATIENCE_SECONDS = 30.0
READ = byte_tokenizer()


def free_port() -> int:
    """Name a port that nobody has."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Nodes:
    """A cluster, and the processes of its nodes."""

    cluster: Any
    second: Any = None

    @property
    def address(self) -> str:
        """Where the head listens."""
        return str(self.cluster.address)

    def raylets(self) -> list[psutil.Process]:
        """List the nodes' own processes."""
        nodes = [node for node in (self.cluster.head_node, *self.cluster.worker_nodes) if node]
        return [psutil.Process(info.process.pid) for node in nodes for info in node.all_processes.get("raylet", ())]

    def processes(self, title: str) -> list[psutil.Process]:
        """List those whose title holds some words: replicas say whose they are."""
        found = []
        for raylet in self.raylets():
            for child in raylet.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if title in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def count(self, *titles: str) -> list[int]:
        """Count the processes of each kind."""
        return [len(self.processes(title)) for title in titles]

    def strike(self, victim: str) -> list[str]:
        """Kill a replica, an ingress, or all of the second node; returns what of ours died."""
        if victim == "node":
            (raylet,) = [info.process for info in self.second.all_processes["raylet"]]
            struck = [psutil.Process(raylet.pid), *psutil.Process(raylet.pid).children(recursive=True)]
        else:
            struck = self.processes(REPLICA if victim == "replica" else INGRESS)[:1]
        died = []
        for process in struck:
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                died += [name for name, words in KINDS.items() if words in title]
                process.send_signal(signal.SIGKILL)
        return died

    def add_second(self) -> None:
        """Put another node in its place."""
        self.second = self.cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False)


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Start two nodes and join them; nothing of them is left afterwards."""
    os.environ.update(ENV)
    import ray  # noqa: PLC0415  it reads its settings now
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    head = {"num_cpus": 2, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = Nodes(cluster)
    try:
        nodes.add_second()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error", namespace="quiver")
        yield nodes
    finally:
        left = [
            p for raylet in nodes.raylets() if raylet.is_running() for p in (raylet, *raylet.children(recursive=True))
        ]
        ray.shutdown()
        cluster.shutdown()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()


def config_of(folder: Path, port: int, **scale: Any) -> Config:
    """Return the settings of a cluster that serves the hash model to everybody."""
    return Config(
        server=ServerConfig(port=port, drain_seconds=2.0, timeout_seconds=PATIENCE_SECONDS),
        models=ModelsConfig(model=(MODEL,), data_dir=folder),
        cache=CacheConfig(cache_entries=0),
        accounts=AccountsConfig(auth="off"),
        scale=ScaleConfig(**{"ray_min_replicas": (2,), "ray_max_replicas": (2,), **scale}),
    )


def with_accounts(config: Config, database_url: str, redis_url: str, prefix: str) -> Config:
    """Let it ask for keys, which all of its processes share."""
    accounts = AccountsConfig(auth="required", database_url=Secret(database_url))
    cache = CacheConfig(
        cache_entries=0, redis_url=Secret(redis_url), redis_prefix=prefix, cache_secret=Secret("x" * 32)
    )
    return replace(config, accounts=accounts, cache=cache)


@contextlib.contextmanager
def served(config: Config, load: Any) -> Iterator[str]:
    """Run an application on the cluster that was joined; yields its URL."""
    from quiver.scale import ray_serve  # noqa: PLC0415  Ray is told of its settings first

    ray_serve.run(config, load)
    try:
        yield f"http://127.0.0.1:{config.server.port}"
    finally:
        ray_serve.serve.shutdown()


def vector_of(text: str) -> bytes:
    """Return the bits that the hash model gives a text in a single process."""
    (encoding,) = READ.encode([text], truncate=False)
    return np.ascontiguousarray(hash_vector(encoding.ids), "<f4").tobytes()


@dataclass
class Outcome:
    """What a load has seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: int = 0
    cut: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    without_time: int = 0
    """Refusals that do not say when to come back."""
    failed_at: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    in_flight: int = 0

    @property
    def answered(self) -> int:
        """Requests that got their vector."""
        return self.statuses[200]


@dataclass
class Load:
    """Clients that send one request after the other, each until it is answered."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    clients: int = 8
    outcome: Outcome = field(default_factory=Outcome)

    async def run(self, seconds: float, at: float, event: Callable[[], None]) -> float:
        """Load for some seconds, with an event in between; returns when that was, by the monotonic clock."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=self.clients)
        client = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_SECONDS, limits=limits)
        async with client, asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(client, number, end))
            await asyncio.sleep(at)
            then = time.monotonic()
            in_flight = self.outcome.in_flight
            await asyncio.to_thread(event)
        self.outcome.in_flight = in_flight
        return then

    async def _client(self, client: httpx.AsyncClient, number: int, end: float) -> None:
        count = 0
        while time.monotonic() < end:
            count += 1
            await self._until_answered(client, f"client {number} asks for the {count}th time")

    async def _until_answered(self, client: httpx.AsyncClient, text: str) -> None:
        give_up = time.monotonic() + 2 * PATIENCE_SECONDS
        while time.monotonic() < give_up:
            seconds = await self._once(client, text)
            if seconds is None:
                return
            await asyncio.sleep(seconds)
        self.outcome.hung += 1

    async def _once(self, client: httpx.AsyncClient, text: str) -> float | None:
        """Ask; returns in how many seconds to ask again, if that is to be done."""
        body = {"input": text, "model": MODEL, "encoding_format": "base64"}
        outcome, start = self.outcome, time.monotonic()
        outcome.in_flight += 1
        try:
            reply = await client.post("/v1/embeddings", json=body, headers={**self.headers, "idempotency-key": text})
        except httpx.TimeoutException:
            outcome.hung += 1
            return None
        except httpx.TransportError:
            outcome.cut += 1
            outcome.failed_at.append(time.monotonic())
            return 0.1
        finally:
            outcome.in_flight -= 1
        outcome.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            outcome.failed_at.append(time.monotonic())
            outcome.reasons[reply.text[:90]] += 1
            outcome.without_time += "retry-after" not in reply.headers
            return float(reply.headers.get("retry-after", "1"))
        outcome.seconds.append(time.monotonic() - start)
        if base64.b64decode(reply.json()["data"][0]["embedding"]) != vector_of(text):
            outcome.wrong.append(text)
        return None
