"""`make bench-batch`: is a batch as fast as the engine, and does it leave single requests alone?

The engine alone embeds the texts in its own process, by requests of 256 in the bulk lane, before and after a server does
the same texts as a batch, one a line. Beside the batch a client asks one short text after the other. Printed are the
ratio of the rates, by how much p95 rises above its idle value, and how far the server's memory rises.
"""

import argparse
import asyncio
import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from typing import Self
from urllib.parse import urlsplit

import httpx
import numpy as np

from batching import Batch, begin, faults_of, until
from faults.servers import stub
from faults.stub import Behaviour, stub_model
from quiver.bench.workload import Workload
from quiver.config import DEFAULT_MODEL, CacheConfig, EngineConfig, ModelsConfig
from quiver.engine.engine import Engine
from quiver.engine.model import WarmUp
from quiver.engine.watchdog import Watchdog
from quiver.models.catalogue import Catalogue
from quiver.telemetry.observer import Observer
from quiver.types import Caller, EmbedRequest, Priority
from server_process import ServerProcess, serving

STUB_SECONDS = 0.00005
"""What a token takes a lane of the stub: with two lanes, 40,000 tokens a second."""
LANES = 2
CHUNK, AT_ONCE = 256, 4
PAUSE_SECONDS = 0.05
POLL_SECONDS = 1.0
"""How often the batch is asked for; near its end, ten times as often."""
MIN_RATIO = 0.9
MAX_RSS_BYTES = 200 << 20


class Asker:
    """A client that asks a short text again and again, in a thread; it leaves the machine to the server, as far as it can."""

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url = url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        with contextlib.closing(HTTPConnection(urlsplit(self._url).netloc, timeout=60)) as http:
            for i in itertools.count():
                if self._done.wait(PAUSE_SECONDS):
                    return
                start = time.perf_counter()
                http.request("POST", "/v1/embeddings", b'{"input": "query %d"}' % i)
                with http.getresponse() as reply:
                    reply.read()
                assert reply.status == HTTPStatus.OK
                self.seconds.append(time.perf_counter() - start)

    @property
    def p95(self) -> float:
        """Return the latency in milliseconds that one in twenty exceeds."""
        return float(np.percentile(self.seconds, 95) * 1000)


@contextlib.asynccontextmanager
async def engine_of(options: argparse.Namespace) -> AsyncIterator[Engine]:
    """Open an engine with the model that is measured."""
    name = DEFAULT_MODEL if options.real else "stub/a"
    settings = ModelsConfig(model=(name,))
    async with Engine(settings, EngineConfig(), Catalogue.load(), Observer(), Watchdog(stall_seconds=60)) as engine:
        if options.real:
            await engine.load(lambda *_: None)
        else:
            behaviour = Behaviour(seconds_per_token=STUB_SECONDS)
            engine.replicas.add(
                name, stub_model(name, behaviour, lanes=LANES), WarmUp(tokens_per_second=1 / STUB_SECONDS)
            )
        yield engine


async def direct_rate(options: argparse.Namespace, texts: Sequence[str]) -> tuple[float, float]:
    """Return how many texts a second the engine embeds alone, and the mean seconds of one batch at a lane."""
    chunks = iter([texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)])
    async with engine_of(options) as engine:

        async def work() -> int:
            tokens = 0
            for chunk in chunks:
                request = EmbedRequest(inputs=chunk, priority=Priority.BULK, truncate=True)
                tokens += (await engine.embed(request, Caller("bench"))).usage.num_tokens
            return tokens

        start = time.perf_counter()
        tokens = sum(await asyncio.gather(*(work() for _ in range(AT_ONCE))))
        seconds = time.perf_counter() - start
        status = engine.replicas.statuses[0]
    return len(texts) / seconds, status.batch_tokens * LANES / (tokens / seconds)


def batch_rate(
    server: ServerProcess, options: argparse.Namespace, texts: Sequence[str]
) -> tuple[float, Asker, Asker, int]:
    """Return lines a second from the upload's end to the batch's, single requests before and beside it, and bytes."""
    url = server.ready_url()
    with httpx.Client(base_url=url, timeout=600) as http:
        with Asker(url) as idle:
            time.sleep(options.idle_seconds)
        before, most = server.resident_bytes(), 0
        with Asker(url) as beside:
            batch_id = begin(http, texts, truncate=True)
            start = time.perf_counter()

            def has_done(number: int, batch: Batch) -> bool:
                nonlocal most
                most = max(most, server.resident_bytes())
                return batch["request_counts"]["completed"] >= number or batch["status"] == "completed"

            until(http, batch_id, partial(has_done, int(0.98 * len(texts))), seconds=3600, pause_seconds=POLL_SECONDS)
            batch = until(http, batch_id, partial(has_done, len(texts)), pause_seconds=POLL_SECONDS / 10)
            seconds = time.perf_counter() - start
        with http.stream("GET", f"/v1/files/{batch['output_file_id']}/content") as reply:
            output = "\n".join(line[:200] for line in reply.iter_lines())
        most = max(most, server.resident_bytes())
    assert batch["request_counts"]["completed"] == len(texts), batch
    assert faults_of(
        "\n".join(f"{line.split(',', 2)[0]},{line.split(',', 2)[1]}}}" for line in output.splitlines()), len(texts)
    ) == ([], [])
    return len(texts) / seconds, idle, beside, most - before


def main() -> None:
    """Measure, print, and exit with 1 if something is not as promised."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--lines", type=int, default=50_000)
    arguments.add_argument("--real", action="store_true", help="the default model instead of a stub")
    arguments.add_argument("--idle-seconds", type=float, default=5.0)
    options = arguments.parse_args()
    texts = tuple(itertools.islice(itertools.cycle(Workload(size=1024).texts), options.lines))
    sample = texts[: max(1024, len(texts) // 5)]
    with tempfile.TemporaryDirectory() as folder:
        running = (
            serving(f"--data-dir={folder}", f"--cache-entries={CacheConfig(cache_entries=0).cache_entries}")
            if options.real
            else stub(lanes=LANES, behave={"seconds_per_token": STUB_SECONDS}, data_dir=folder)
        )
        before, one_batch = asyncio.run(direct_rate(options, sample))
        with running as server:
            rate, idle, beside, grown = batch_rate(server, options, texts)
        after, _ = asyncio.run(direct_rate(options, sample))
    ratio, more = rate / ((before + after) / 2), beside.p95 - idle.p95
    print(f"engine alone   {before:8.0f} texts/s before, {after:.0f} after")
    print(f"batch          {rate:8.0f} lines/s: {ratio:.1%} of it (at least {MIN_RATIO:.0%}), {len(texts)} lines")
    print(
        f"single p95     {idle.p95:8.1f} ms idle, {beside.p95:.1f} ms beside: + {more:.1f} (at most {one_batch * 1000:.1f})"
    )
    print(f"memory         {grown / (1 << 20):8.0f} MiB more at the most (at most {MAX_RSS_BYTES >> 20})")
    raise SystemExit(ratio < MIN_RATIO or more > one_batch * 1000 or grown > MAX_RSS_BYTES)


if __name__ == "__main__":
    main()
