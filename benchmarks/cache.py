"""`make bench-cache`: what does a known result cost, from memory and from Redis?

The default model, single queries that were all asked before, over HTTP: in requests that came before byte for byte,
without a key and with one (whose rate, quota and usage are kept), on OpenAI's and on the FastEmbed Query API's route; in
requests that differ; and with all results in Redis. Beside each, in turn, a bare ASGI application that answers with as
many bytes and does nothing else: no server on this stack can be faster than that.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from desk import Desk
from faults.load import Pool, embed, post
from quiver import db
from quiver.accounts import Rate, Tier
from quiver.bench.workload import Workload
from server_process import serving

ECHO = (sys.executable, str(Path(__file__).with_name("echo.py")))
REDIS = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
TEXTS = 64
REPEATED, KEYED, QUERY_API = "the same requests", "the same, with a key", "the same, with a key, at /v1/embed"
MEMORY, SHARED = "from memory", "from Redis"
BARS = {REPEATED: 0.05, KEYED: 0.05, QUERY_API: 0.05, MEMORY: 0.05, SHARED: 0.8}
"""Milliseconds that finding a result may take on the server."""
LEAST_OF_ECHO = {REPEATED: 0.6, KEYED: 0.6, QUERY_API: 0.6}
"""Shares of the bare application's requests a second that are promised."""
PLENTY = Tier("plenty", 10**9, Rate(10**6, 10**6))
_FOUND = re.compile(rb"(?:compute|server-timing: total);dur=([\d.]+)")
console = Console()


def asked(name: str, texts: Sequence[str], key: str = "") -> Iterator[bytes]:
    """Yield requests for one text each, for ever; from memory and Redis no two are alike."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for number, text in enumerate(itertools.cycle(texts)):
        own = {"user": str(number)} if name in (MEMORY, SHARED) else {}
        if name == QUERY_API:
            yield post("/v1/embed", orjson.dumps({"text": text}), headers)
        else:
            yield embed([text], headers=headers, encoding_format="base64", **own)


async def load(pool: Pool, turns: Iterator[bytes], clients: int, seconds: float) -> float:
    """Return requests a second of a closed load. Raises if any was not answered with 200."""
    end, count = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal count
        while time.perf_counter() < end:
            answer = await pool.ask(next(turns))
            assert answer.status == 200, answer  # noqa: PLR2004
            count += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return count / seconds


async def hits(pool: Pool, turns: Iterator[bytes]) -> list[float]:
    """Return the milliseconds that the server took to find results, by its own clock, one request at a time."""
    answers = [await pool.ask(next(turns)) for _ in range(TEXTS)]
    return [float(_FOUND.search(answer.head)[1]) for answer in answers]


@contextlib.contextmanager
def echo(size: int) -> Iterator[str]:
    """Run the bare application; it is gone afterwards."""
    process = subprocess.Popen([*ECHO, str(size)], stdout=subprocess.PIPE, text=True)  # noqa: S603  our own file
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


@contextlib.asynccontextmanager
async def pools(prefix: str, folder: str) -> AsyncIterator[tuple[Mapping[str, Pool], str]]:
    """Start the servers; yields connections to the one that each way is measured on, and a key of an account."""
    async with contextlib.AsyncExitStack() as stack:
        url = db.sqlite_url(Path(folder))
        key = await Desk(url).key(tier=PLENTY)
        accounts = (
            "--auth",
            "required",
            "--data-dir",
            folder,
            "--root-dialects",
            "openai",
            "--root-dialects",
            "fastembed_query",
        )
        shared = ("--redis-url", REDIS, "--redis-prefix", prefix, "--cache-ttl-seconds", "600")
        options = {
            MEMORY: ("--redis-url", ""),
            KEYED: ("--redis-url", "", *accounts),
            SHARED: ("--cache-entries", "0", *shared),
        }
        servers = {name: stack.enter_context(serving(*own)) for name, own in options.items()}
        urls = {name: await asyncio.to_thread(server.ready_url) for name, server in servers.items()}
        urls |= {REPEATED: urls[MEMORY], QUERY_API: urls[KEYED]}
        yield {name: await stack.enter_async_context(Pool(urls[name])) for name in BARS}, key


@contextlib.asynccontextmanager
async def beside(pool: Pool, turns: Iterator[bytes], number: int) -> AsyncIterator[Pool]:
    """Let every result be known, and run a bare application with replies as large."""
    answers = [await pool.ask(next(turns)) for _ in range(3 * number)]
    assert all(answer.status == 200 for answer in answers), answers[-1]  # noqa: PLR2004
    with echo(round(statistics.median(len(answer.body) for answer in answers))) as url:
        async with Pool(url) as bare:
            yield bare


async def run(options: argparse.Namespace) -> dict[str, object]:
    """Let all take turns."""
    texts = sorted(Workload(size=2 * TEXTS).texts, key=len)[:TEXTS]  # the queries
    rates: dict[str, list[float]] = {name: [] for name in BARS}
    shares: dict[str, list[float]] = {name: [] for name in BARS}
    found: dict[str, list[float]] = {name: [] for name in BARS}
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        served, key = await stack.enter_async_context(pools(f"quiver-bench-{secrets.token_hex(4)}:", folder))
        turns = {name: asked(name, texts, key if name in (KEYED, QUERY_API) else "") for name in BARS}
        bare = {n: await stack.enter_async_context(beside(served[n], turns[n], len(texts))) for n in BARS}
        for _ in range(options.rounds):
            for name, pool in served.items():
                rate = await load(pool, turns[name], options.clients, options.seconds)
                most = await load(bare[name], turns[name], options.clients, options.seconds)
                rates[name].append(rate)
                shares[name].append(rate / most)
                found[name].extend(await hits(pool, turns[name]))
    return {
        "requests_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "of_echo": {name: statistics.median(values) for name, values in shares.items()},
        "hit_ms_p50": {name: statistics.median(values) for name, values in found.items()},
        "hit_ms_p99": {name: statistics.quantiles(values, n=100)[98] for name, values in found.items()},
        "clients": options.clients,
        "rounds": options.rounds,
    }


def misses(report: dict[str, object]) -> Iterator[str]:
    """Say which promises were not kept."""
    for name, bar in BARS.items():
        if (took := report["hit_ms_p50"][name]) > bar:
            yield f"{name}: a result takes {took:.3f} ms, not {bar} ms"
    for name, least in LEAST_OF_ECHO.items():
        if (share := report["of_echo"][name]) < least:
            yield f"{name}: {share:.0%} of a bare application's requests a second, not {least:.0%}"


def show(report: dict[str, object]) -> None:
    """Print the table."""
    table = Table(
        "", "requests/s", "of the bare application", "found in (p50)", "found in (p99)", title="Results that are known"
    )
    for name, rate in report["requests_per_second"].items():
        times = [f"{report[key][name]:.3f} ms" for key in ("hit_ms_p50", "hit_ms_p99")]
        table.add_row(name, f"{rate:,.0f}", f"{report['of_echo'][name]:.0%}", *times)
    console.print(table)
    console.print(
        f"{report['clients']} clients with one query at a time, medians of {report['rounds']} rounds in turn."
    )


def main() -> None:
    """Measure, print, and exit with 1 if a promise was not kept."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7, help="of which medians count (default: 7)")
    arguments.add_argument("--seconds", type=float, default=2.0, help="of each in a round (default: 2)")
    arguments.add_argument("--clients", type=int, default=8, help="connections of a closed load (default: 8)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    options = arguments.parse_args()
    console.stderr = options.json
    report = uvloop.run(run(options))
    show(report)
    if options.json:
        print(json.dumps(report))
    missed = list(misses(report))
    for miss in missed:
        console.print(f"[bold red]missed:[/] {miss}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
