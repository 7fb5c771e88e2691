"""`make bench-ray`: what does a cluster cost, and what does another replica bring?

Everything runs on this machine. Two applications are up at once, one with one replica and one with two, and take turns,
so that the ratio holds on a machine whose speed drifts. First with a model that only waits for as long as a real one
computes: that is the cluster's own part, whatever else the cores do. Then with the default model, one core a replica.
What a request costs each process is its CPU time, which other work on the machine does not change much.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from faults.load import Pool, embed
from quiver.bench.workload import BLOCK, QUERY_TOKENS, Workload, stream
from quiver.bulk import BulkOptions, Wanted
from quiver.config import DEFAULT_MODEL, Config, EngineConfig
from quiver.scale.ingress import Ingress
from quiver.scale.plan import NO_QUEUE
from quiver.scale.wire import Answer, Asked, Described
from quiver.types import Embeddings, ModelState, ModelStatus, Usage
from ray_cluster import ENV, MODEL, config_of, free_port
from ray_stub import load_hash, open_hash

console = Console()
SETTLE_SECONDS = 2.0
SAMPLE = 10_000
"""Lines that tell the default model's rate."""
TITLES = {"proxy": "ProxyActor", "ingress": ":ingress", "replica": ":model-", "controller": "ServeController"}
BARS = {
    "two replicas that wait": 1.8,
    "two replicas that compute": 1.8,
    "Ray Data, data": 0.85,
    "Ray Data, data-hash": 0.85,
}


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Start a cluster of this machine; nothing of it is left afterwards."""
    os.environ.update(ENV)
    import ray  # noqa: PLC0415  it reads its settings when it is imported

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 << 20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield
    finally:
        from ray import serve  # noqa: PLC0415  as above

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


@contextlib.contextmanager
def applications(model: str, load: Callable[..., object] | None, folder: Path) -> Iterator[dict[str, str]]:
    """Run one application with two replicas and one with one; yields their paths' beginnings."""
    from ray import serve  # noqa: PLC0415  see above

    from quiver.scale.ray_serve import application  # noqa: PLC0415  see above

    port = free_port()
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly", logging_config=quiet)
    given = {} if load is None else {"load": load}
    for name, replicas in (("two", 2), ("one", 1)):  # these two get a core each, while there are any
        base = config_of(folder, port, ray_min_replicas=(replicas,), ray_max_replicas=(replicas,), ray_ingresses=1)
        config = replace(
            base,
            models=replace(base.models, model=(model,)),
            server=replace(base.server, url_prefix=f"/{name}", timeout_seconds=600.0),
            engine=EngineConfig(lanes=1),
        )
        serve.run(application(config, **given), name=name, route_prefix=f"/{name}", logging_config=quiet)
    try:
        yield {name: f"http://127.0.0.1:{port}/{name}" for name in ("one", "two")}
    finally:
        for name in ("one", "two"):
            serve.delete(name)
        serve.shutdown()


def request(path: str, texts: Sequence[str]) -> bytes:
    """Return the bytes of a request at a path's beginning."""
    return embed(texts, encoding_format="base64", truncate=True).replace(b"POST /v1", f"POST /{path}/v1".encode(), 1)


async def closed_load(url: str, path: str, batches: Iterator[Sequence[str]], clients: int, seconds: float) -> float:
    """Return texts a second of clients that each ask again when they have their answer, once it is under way.

    Neither the first seconds count nor the last answers: while these come, the queue is not what it is in between. Of a
    request that is under way when the time begins or ends, that part counts which lies within.
    """
    begin = time.perf_counter() + SETTLE_SECONDS
    end, count = begin + seconds, 0.0
    async with Pool(url) as pool:

        async def client() -> None:
            nonlocal count
            while time.perf_counter() < end:
                texts, asked = next(batches), time.perf_counter()
                answer = await pool.ask(request(path, texts))
                assert answer.status == 200, answer  # noqa: PLR2004
                answered = time.perf_counter()
                count += len(texts) * max(0.0, min(end, answered) - max(begin, asked)) / (answered - asked)

        await asyncio.gather(*(client() for _ in range(clients)))
    return count / seconds


def batches_of(size: int) -> Iterator[Sequence[str]]:
    """Yield texts of the usual mix, so many at a time, for ever."""
    texts = Workload(size=4096).texts
    place = 0
    while True:
        yield [texts[(place + i) % len(texts)] for i in range(size)]
        place += size


async def scaling(urls: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Let one replica and two take turns.

    Where others want the cores too, two replicas do not get two: so what a second of the replicas' own CPU time brings
    is told, too. If that stays as it is, two with a core each bring twice as much.
    """
    rates: dict[str, list[float]] = {"one": [], "two": []}
    worth: dict[str, list[float]] = {"one": [], "two": []}
    batches = batches_of(options.texts)
    for name, url in urls.items():
        await closed_load(url, name, batches, 2, 1.0)
    for _ in range(options.rounds):
        for name, url in urls.items():
            start, before = time.perf_counter(), cpu_seconds()["replica"]
            rates[name].append(await closed_load(url, name, batches, options.clients, options.seconds))
            passed, taken = time.perf_counter() - start, cpu_seconds()["replica"] - before
            worth[name].append(rates[name][-1] * passed / max(1e-3, taken))
    worths = [two / one for one, two in zip(worth["one"], worth["two"], strict=True)]
    ratios = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
    return {
        "one_texts_per_second": statistics.median(rates["one"]),
        "two_texts_per_second": statistics.median(rates["two"]),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "ratio_by_cpu_second": 2 * statistics.median(worths),
    }


def cpu_seconds() -> dict[str, float]:
    """Return what each kind of the cluster's processes has taken of the cores."""
    taken = dict.fromkeys(TITLES, 0.0)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            for name, words in TITLES.items():
                if words in title:
                    times = process.cpu_times()
                    taken[name] += times.user + times.system
    return taken


async def costs(url: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of CPU that a request with one short text takes of each process, and its latency alone.

    What the processes do anyway, without requests, is measured before, and left out.
    """
    texts = sorted(Workload(size=512).texts, key=len)[:256]
    singles = ([text] for text in itertools.cycle(texts))
    start, idle = time.perf_counter(), cpu_seconds()
    await asyncio.sleep(options.seconds)
    idle_rate = {name: (now - idle[name]) / (time.perf_counter() - start) for name, now in cpu_seconds().items()}
    async with Pool(url) as pool:
        alone = [(await pool.ask(request("one", [text]))).seconds for text in texts[:128]]
    start, before, count = time.perf_counter(), cpu_seconds(), 0.0
    for _ in range(options.rounds):
        rate = await closed_load(url, "one", singles, options.clients, options.seconds)
        count += (SETTLE_SECONDS + options.seconds) * rate
    passed, after = time.perf_counter() - start, cpu_seconds()
    kinds = ("proxy", "ingress", "replica")
    found = {f"{name}_cpu_ms": 1e3 * (after[name] - before[name] - passed * idle_rate[name]) / count for name in kinds}
    found |= {f"{name}_idle_cpu_percent": 100 * idle_rate[name] for name in (*kinds, "controller")}
    return found | {"latency_ms_p50": 1e3 * statistics.median(alone)}


class Canned:
    """A wire whose answer is ready: what is left is the ingress's own work."""

    def __init__(self) -> None:
        self._answer = Answer(Embeddings(MODEL, np.ones((1, 384), np.float32), Usage(12)), NO_QUEUE)

    async def ask(self, asked: Asked) -> Answer:
        """Answer at once."""
        del asked
        return self._answer

    async def describe(self) -> Described:
        """Tell what the model is."""
        return Described(ModelStatus(id=MODEL, state=ModelState.READY), NO_QUEUE)


async def own_cost(folder: Path, count: int = 2000) -> float:
    """Return the milliseconds of CPU that an ingress takes for a request, but for what Ray does to bring it."""
    ingress = Ingress(config_of(folder, 0), lambda: {MODEL: Canned()})
    ends: asyncio.Queue[dict] = asyncio.Queue()
    begun = asyncio.Event()

    async def live(message: dict) -> None:
        begun.set()
        del message

    await ends.put({"type": "lifespan.startup"})
    life = asyncio.create_task(ingress({"type": "lifespan"}, ends.get, live))
    await begun.wait()
    body = json.dumps({"input": "what does a request cost", "encoding_format": "base64"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings"}
    scope |= {"query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "scheme": "http"}
    statuses: list[int] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        statuses.append(message.get("status", 200))

    start = time.process_time()
    for _ in range(count):
        await ingress(dict(scope), receive, send)
    taken = time.process_time() - start
    assert set(statuses) == {200}, set(statuses)
    await ends.put({"type": "lifespan.shutdown"})
    await life
    return 1e3 * taken / count


def direct_rate(config: Config, opening: Callable[..., object], texts: Sequence[str]) -> float:
    """Return texts a second of the engine in this process, asked by nobody but this."""

    async def run() -> float:
        async with opening(config, Wanted()) as embedder:
            chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
            places = asyncio.Semaphore(embedder.max_flights)

            async def fly(chunk: Sequence[str]) -> None:
                async with places:
                    await embedder.embed(chunk)

            await fly(chunks[0])
            start = time.perf_counter()
            await asyncio.gather(*(fly(chunk) for chunk in chunks))
            return len(texts) / (time.perf_counter() - start)

    return asyncio.run(run())


def cluster_rate(config: Config, opening: Callable[..., object], file: Path, output: Path) -> float:
    """Return lines a second through Ray Data with one actor, its start not counted."""
    from quiver.scale import ray_data  # noqa: PLC0415  see above

    at: list[tuple[float, int]] = []

    def note(done: object) -> None:
        at.append((time.perf_counter(), done.num_rows))

    ray_data.embed([str(file)], str(output), BulkOptions(files=(), output=output), config, opening, note)
    return sum(rows for _, rows in at[1:]) / (at[-1][0] - at[0][0])


@dataclass(frozen=True, slots=True)
class Corpus:
    """What goes through Ray Data, and how often."""

    model: str
    opening: Callable[..., object]
    texts: Sequence[str]
    rounds: int
    sample: int
    """So many of the texts are enough for the rate of the engine alone."""


def offline(folder: Path, corpus: Corpus) -> dict[str, float]:
    """Let the engine alone and Ray Data take turns; each turn of Ray Data is between two of the engine's."""
    base = config_of(folder, 0, ray_min_replicas=(1,), ray_max_replicas=(1,))
    config = replace(
        base, models=replace(base.models, model=(corpus.model,)), engine=EngineConfig(lanes=1, truncate=True)
    )
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus.texts), encoding="utf-8")
    alone = [rate_on_one_core(config, corpus)]
    through: list[float] = []
    for number in range(corpus.rounds):
        through.append(cluster_rate(config, corpus.opening, file, folder / f"out{number}"))
        alone.append(rate_on_one_core(config, corpus))
    ratios = [rate / statistics.mean(around) for rate, around in zip(through, pairwise(alone), strict=True)]
    return {
        "direct_texts_per_second": statistics.median(alone),
        "ray_data_texts_per_second": statistics.median(through),
        "ratio": statistics.median(ratios),
        "lines": len(corpus.texts),
    }


def rate_on_one_core(config: Config, corpus: Corpus) -> float:
    """Return texts a second of the engine alone, on a core as an actor has it."""
    from quiver.scale.cores import Cores  # noqa: PLC0415  see above

    cores, allowed = Cores(1), os.sched_getaffinity(0)
    cores.pin()
    try:
        return direct_rate(config, corpus.opening, corpus.texts[: corpus.sample])
    finally:
        os.sched_setaffinity(0, allowed)
        cores.close()


def corpora(options: argparse.Namespace) -> dict[str, Corpus]:
    """Return what goes through Ray Data: the mixed workload for a hash, questions for the default model."""
    from quiver.scale.bulk_worker import open_engine  # noqa: PLC0415  Ray is told of its settings first

    mixed, lines = itertools.cycle(Workload(size=512).texts), options.lines
    texts = [f"{i} {text}" for i, text in zip(range(lines), mixed, strict=False)]
    questions = [
        text for text in itertools.islice(stream(1), 2 * lines + BLOCK) if len(text.split()) <= QUERY_TOKENS[1]
    ]
    return {
        "data-hash": Corpus(MODEL, open_hash, texts, options.rounds, lines),
        "data": Corpus(DEFAULT_MODEL, open_engine, questions[:lines], 1, min(lines, SAMPLE)),
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Do what is asked for."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, cluster():
        folder = Path(name)
        if "wait" in options.parts:
            with applications(MODEL, load_hash, folder) as urls:
                found["two replicas that wait"] = asyncio.run(scaling(urls, options))
                found["a request"] = asyncio.run(costs(urls["one"], options))
                found["a request"]["ingress_without_ray_cpu_ms"] = asyncio.run(own_cost(folder))
        if "compute" in options.parts:
            with applications(DEFAULT_MODEL, None, folder) as urls:
                found["two replicas that compute"] = asyncio.run(scaling(urls, options))
        for part, corpus in corpora(options).items():
            if part in options.parts:
                (folder / part).mkdir()
                found[f"Ray Data, {part}"] = offline(folder / part, corpus)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--texts", type=int, default=128, help="texts in a request of the scaling")
    parser.add_argument("--lines", type=int, default=200_000, help="lines through Ray Data")
    parser.add_argument("--parts", nargs="+", default=["wait", "compute", "data-hash", "data"])
    parser.add_argument("--json", type=Path, help="file that the figures are written into, too")
    options = parser.parse_args()
    found = measure(options)
    if options.json:  # what is printed, Ray's processes may write between
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table("what", "figure", "value", "bar")
    for what, figures in found.items():
        for figure, value in figures.items():
            bar = f">= {BARS[what]:g}" if figure == "ratio" and what in BARS else ""
            table.add_row(what, figure, f"{value:,.2f}", bar)
    console.print(table)
    sys.exit(0)


if __name__ == "__main__":
    main()
