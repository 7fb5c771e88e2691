"""`make bench`: the promised figures, measured on this machine in one run and held against their bars.

Ratios are medians over interleaved rounds, so that they hold on a machine whose speed drifts.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from quiver import app, config
from quiver.bench import BenchOptions, BenchResult, Workload, idle_texts, local_limits, run_bench
from quiver.bench.server import free_port
from quiver.types import Caller, EmbedRequest

MODEL = config.DEFAULT_MODEL
CHUNK = 32


@dataclass(frozen=True, slots=True)
class Figure:
    """One promise: what was measured, and whether it is at the bar."""

    name: str
    bar: str
    measured: str
    met: bool


def main() -> None:
    """Measure everything, print the table, and exit with 1 if a bar was missed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: 9)")
    arguments.add_argument("--requests", type=int, default=512, help="requests of a round (default: 512)")
    arguments.add_argument("--plot", type=Path, help="draw the latencies under load into this PNG")
    options = arguments.parse_args()
    with server() as (process, url, ready_seconds):
        result = measure_server(url, options)
        rss = process.memory_info().rss / 1e6
    speedup = asyncio.run(measure_int8(options.rounds))
    figures = [
        *compare(result),
        *idle(result),
        at_least("int8 against float32, engine", speedup, 1.3, "{:.2f} ×"),
        at_most("ready after start", ready_seconds, 3.0, "{:.2f} s"),
        at_most("RSS of the server after load and bench", rss, 450, "{:.0f} MB"),
    ]
    show(figures)
    sys.exit(not all(figure.met for figure in figures))


@contextmanager
def server() -> Iterator[tuple[psutil.Process, str, float]]:
    """Run a server of the defaults; yields its process, its API and the seconds until it was ready."""
    port, start = free_port(), time.perf_counter()
    command = (sys.executable, "-m", "quiver", "serve", "--port", str(port), "--cache-entries", "0")
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603  our own command
    try:
        while not is_ready(f"http://127.0.0.1:{port}/health/ready"):
            time.sleep(0.02)
        yield psutil.Process(child.pid), f"http://127.0.0.1:{port}/v1", time.perf_counter() - start
    finally:
        child.terminate()
        child.wait(60)


def is_ready(url: str) -> bool:
    """Tell whether a server answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310  our own child
            return bool(reply.status == 200)  # noqa: PLR2004
    except (urllib.error.URLError, ConnectionError):
        return False


def measure_server(url: str, options: argparse.Namespace) -> BenchResult:
    """Run the built-in load at 32 clients, in turn with the engine alone and with bare matrix products."""
    settings = config.load(env={}, flags={})
    bench = BenchOptions(model=MODEL, url=url, rounds=options.rounds, requests=options.requests, plot=options.plot)
    return run_bench(bench, limits=local_limits(settings), idle=idle_texts(settings))


async def measure_int8(rounds: int) -> float:
    """Return the median ratio of int8's throughput to float32's, both engines in this process, in turn."""
    texts = Workload(seed=1, size=256).texts
    engines = {}
    for dtype in ("float32", "int8"):
        engines[dtype] = app.build(config.load(env={}, flags={"dtype": dtype, "cache_entries": 0})).engine
        await engines[dtype].load(lambda *_: None)
    ratios = []
    for _ in range(rounds + 1):
        seconds = {}
        for dtype, engine in engines.items():
            start = time.perf_counter()
            requests = (EmbedRequest(inputs=texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK))
            await asyncio.gather(*(engine.embed(request, Caller("figures")) for request in requests))
            seconds[dtype] = time.perf_counter() - start
        ratios.append(seconds["float32"] / seconds["int8"])
    for engine in engines.values():
        await engine.close()
    return statistics.median(ratios[1:])  # the first round warms up


def compare(result: BenchResult) -> Iterator[Figure]:
    """Hold the engine against the machine's limit, and the server against the engine."""
    comparison = result.comparison
    assert comparison, "measured with limits"
    yield at_least("engine's direct rate, of the GEMM limit", 100 * comparison.direct_of_gemm, 72, "{:.1f} %")
    yield at_least("HTTP at 32 clients, of the direct rate", 100 * comparison.http_of_direct, 92, "{:.1f} %")


def idle(result: BenchResult) -> Iterator[Figure]:
    """Hold the latency of an idle server against the engine's."""
    for one in result.idle:
        assert one.http, "measured over HTTP"
        assert one.direct, "measured with limits"
        added = one.http.p50 - one.direct.p50
        yield at_most(f"HTTP adds to an idle {one.label}, p50", added, 1.5, "{:.2f} ms")


def at_least(name: str, value: float, bar: float, form: str) -> Figure:
    """Return a figure that should not be smaller than its bar."""
    return Figure(name, "≥ " + form.format(bar), form.format(value), value >= bar)


def at_most(name: str, value: float, bar: float, form: str) -> Figure:
    """Return a figure that should not be larger than its bar."""
    return Figure(name, "≤ " + form.format(bar), form.format(value), value <= bar)


def show(figures: list[Figure]) -> None:
    """Print the table."""
    table = Table("figure", "bar", "measured", "", title="Promised and measured")
    for figure in figures:
        table.add_row(figure.name, figure.bar, figure.measured, "met" if figure.met else "[bold red]missed[/]")
    Console().print(table)


if __name__ == "__main__":
    main()
