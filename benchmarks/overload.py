"""`make bench-overload`: what a server does with two, five, ten times what it can do.

The default model, a mix of queries and passages alone and in batches. First the peak, with a closed load; then requests
arrive at random times at multiples of it, whatever comes back (an open load: a closed one hides overload, because its
clients wait). Goodput is the tokens of what was answered with 200 within the deadline, as a share of the peak.
The client shares the cores with the server; what it takes of them is printed too.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from faults.load import OpenLoad, Pool, Shot, embed, open_load
from faults.servers import stub
from quiver.bench.plot import BLUE, GREY, INK
from quiver.bench.workload import Workload
from server_process import serving

MULTIPLES = (0.5, 0.8, 1.0, 2.0, 5.0, 10.0)
BARS = {2.0: 0.95, 5.0: 0.95, 10.0: 0.90}
"""Share of the peak that the goodput is promised to keep."""
MAX_REFUSAL_SECONDS = 0.010
PEAK_CLIENTS = 32
SIZES = (1, 1, 1, 1, 1, 1, 2, 2, 4, 8)
"""Texts in a request."""
FILLING = 400
"""Requests that keep the stub's lane asleep while refusals are counted."""
REFUSAL_BYTES = 180
"""Of a refusal's body, roughly."""
COST_CLIENTS, COST_SECONDS = 8, 2.0
console = Console()


@dataclass(frozen=True, slots=True)
class Point:
    """What was seen at one rate."""

    multiple: float
    requests_per_second: float
    offered: float
    """Tokens a second that were asked for, as a share of the peak."""
    goodput: float
    """Tokens a second that were answered in time, as a share of the peak."""
    p50: float
    p99: float
    """Seconds until a 200."""
    refused_p99: float
    """Seconds until a 429."""
    client_cpu: float
    """Cores that the client took."""
    late_p99: float
    """Seconds by which the client sent too late."""
    statuses: dict[int, int]


def shots(deadline: float) -> list[Shot]:
    """Return requests of the mix; tokens are filled in by the server's own count."""
    texts, rng, made, at = Workload(size=2048).texts, np.random.default_rng(0), list[Shot](), 0
    headers = {"x-request-timeout": f"{deadline:g}"}
    while at < len(texts):
        size = int(rng.choice(SIZES))
        made.append(Shot(embed(texts[at : at + size], headers=headers, encoding_format="base64")))
        at += size
    return made


async def counted(pool: Pool, made: Sequence[Shot]) -> list[Shot]:
    """Ask for each once, for its tokens."""
    found = []
    for shot in made:
        answer = await pool.ask(shot.request.replace(b"x-request-timeout", b"x-later"))
        found.append(Shot(shot.request, answer.json()["usage"]["total_tokens"]))
    return found


async def peak(pool: Pool, made: Sequence[Shot], seconds: float) -> float:
    """Return tokens a second of a closed load that keeps every core busy: of what came back after a first while."""
    begin = time.perf_counter() + seconds / 4
    end, tokens, turns = begin + seconds, 0, itertools.cycle(made)

    async def client() -> None:
        nonlocal tokens
        while time.perf_counter() < end:
            shot = next(turns)
            await pool.ask(shot.request.replace(b"x-request-timeout", b"x-later"))
            tokens += shot.tokens if begin < time.perf_counter() <= end else 0

    await asyncio.gather(*(client() for _ in range(PEAK_CLIENTS)))
    return tokens / seconds


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    return float(sum(psutil.Process(pid).cpu_times()[:2]))


@dataclass(frozen=True, slots=True)
class Sample:
    """An open load, and the peak around it in tokens a second."""

    seen: OpenLoad
    peak: float


class Curve:
    """Measures one rate after the other, and the peak between them: on a shared machine it moves."""

    def __init__(self, pool: Pool, made: Sequence[Shot], options: argparse.Namespace) -> None:
        self._pool = pool
        self._made = made
        self._options = options
        self._tokens = float(np.mean([shot.tokens for shot in made]))
        """Of a request."""

    async def measure(self) -> list[Point]:
        """Go through the multiples in several rounds; what all rounds did is held against all their peaks."""
        rounds = [await self._round() for _ in range(self._options.rounds)]
        return [describe(m, samples, self._options.deadline) for m, *samples in zip(MULTIPLES, *rounds, strict=True)]

    async def _round(self) -> list[Sample]:
        options, samples, before = self._options, list[Sample](), await self._peak()
        for multiple in MULTIPLES:
            rate, patience = multiple * before / self._tokens, options.deadline + 5.0
            seen = await open_load(self._pool, self._made, rate, options.seconds, patience=patience)
            after = await self._peak()
            samples.append(Sample(seen, (before + after) / 2))
            point = describe(multiple, samples[-1:], options.deadline)
            console.print(
                f"{multiple:4g} ×: offered {point.offered:.0%}, goodput {point.goodput:.0%}, p99 {1e3 * point.p99:.0f} ms, "
                f"refused within {1e3 * point.refused_p99:.1f} ms, {point.statuses}"
            )
            before = after
        return samples

    async def _peak(self) -> float:
        rate = await peak(self._pool, self._made, self._options.seconds / 2)
        console.print(f"peak: {rate / self._tokens:.0f} requests/s, {rate:,.0f} tokens/s")
        return rate


def describe(multiple: float, samples: Sequence[Sample], deadline: float) -> Point:
    """Put together what several rounds saw at one rate."""
    loads, seconds = [sample.seen for sample in samples], sum(sample.seen.elapsed for sample in samples)
    peaks = float(np.mean([sample.peak for sample in samples]))
    status, taken = (np.concatenate([getattr(load, name) for load in loads]) for name in ("status", "seconds"))
    p50, p99, refused_p99 = (
        float(np.percentile(chosen, share)) if len(chosen := taken[status == wanted]) else float("nan")
        for wanted, share in ((200, 50), (200, 99), (429, 99))
    )
    return Point(
        multiple=multiple,
        requests_per_second=sum(len(load.due) for load in loads) / seconds,
        offered=float(np.mean([load.tokens.sum() / load.elapsed for load in loads])) / peaks,
        goodput=float(np.mean([load.goodput(deadline) for load in loads])) / peaks,
        p50=p50,
        p99=p99,
        refused_p99=refused_p99,
        client_cpu=sum(load.cpu_seconds for load in loads) / seconds,
        late_p99=float(np.percentile(np.concatenate([load.late for load in loads]), 99)),
        statuses={int(s): int(n) for s, n in zip(*np.unique(status, return_counts=True), strict=True)},
    )


async def run(options: argparse.Namespace) -> list[Point]:
    """Start a server and measure it."""
    with serving("--cache-entries", "0") as server:
        async with Pool(await asyncio.to_thread(server.ready_url)) as pool:
            console.print("counting the tokens of the mix ...")
            made = await counted(pool, shots(options.deadline))
            return await Curve(pool, made, options).measure()


async def refusal_cpu() -> tuple[float, float]:
    """Return the processor seconds of a refusal, from a server whose lanes sleep, and of a bare application's reply."""
    query = Workload(size=64).texts[0]
    refused = embed([query], headers={"x-request-timeout": "0.1"})
    with stub(behave={"latency_seconds": 0.5}, lanes=1) as server, bare(REFUSAL_BYTES) as (url, process):
        async with Pool(await asyncio.to_thread(server.ready_url)) as pool, Pool(url) as echo:
            filling = [asyncio.create_task(pool.ask(embed(["x" * 400] * 8))) for _ in range(FILLING)]
            await asyncio.sleep(0.3)
            assert (await pool.ask(refused)).status == 429  # noqa: PLR2004
            rounds = [
                (await cost(pool, refused, server.process.pid), await cost(echo, refused, process.pid))
                for _ in range(3)
            ]
            for task in filling:
                task.cancel()
            await asyncio.wait(filling)
    refusal, reply = (float(np.median(costs)) for costs in zip(*rounds, strict=True))
    return refusal, reply


async def cost(pool: Pool, request: bytes, pid: int) -> float:
    """Return the processor seconds that a server takes for each of a request that a few clients repeat."""
    before, count, end = cpu_seconds(pid), 0, time.perf_counter() + COST_SECONDS

    async def client() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await pool.ask(request)
            count += 1

    await asyncio.gather(*(client() for _ in range(COST_CLIENTS)))
    return (cpu_seconds(pid) - before) / count


@contextlib.contextmanager
def bare(size: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run an application that does nothing but answer; it is gone afterwards."""
    echo = Path(__file__).with_name("echo.py")
    process = subprocess.Popen([sys.executable, str(echo), str(size)], stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.wait()


def misses(points: Sequence[Point], deadline: float) -> Iterator[str]:
    """Say which promises were not kept."""
    for point in points:
        bar = BARS.get(point.multiple, 0.0)
        if point.goodput < bar:
            yield f"goodput at {point.multiple:g} × is {point.goodput:.1%}, not {bar:.0%}"
        if point.p99 > deadline:
            yield f"p99 at {point.multiple:g} × is {point.p99:.2f} s, over the deadline"
        if point.refused_p99 > MAX_REFUSAL_SECONDS:
            yield f"p99 of refusals at {point.multiple:g} × is {1e3 * point.refused_p99:.1f} ms"


def show(points: Sequence[Point]) -> None:
    """Print the table."""
    names = ("load", "requests/s", "offered", "goodput", "p50", "p99", "refused p99", "client", "answers")
    table = Table(*names, title="Offered and done, as shares of the peak")
    for p in points:
        refusal = f"{1e3 * p.refused_p99:.1f} ms" if 429 in p.statuses else ""  # noqa: PLR2004
        answers = ", ".join(f"{count} × {status}" for status, count in p.statuses.items())
        times = (f"{1e3 * p.p50:.0f} ms", f"{1e3 * p.p99:.0f} ms")
        table.add_row(
            f"{p.multiple:g} ×", f"{p.requests_per_second:.0f}", f"{p.offered:.1%}", f"{p.goodput:.1%}", *times, refusal,
            f"{p.client_cpu:.2f} cores", answers,
        )  # fmt: skip
    console.print(table)


def draw(points: Sequence[Point], deadline: float, path: Path) -> None:
    """Draw goodput and latency over the load."""
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    goodput, latency = figure.subplots(1, 2)
    x = [p.multiple for p in points]
    goodput.plot(x, [100 * p.goodput for p in points], "o-", color=BLUE)
    goodput.axhline(100, color=GREY, lw=1, ls="--")
    latency.plot(x, [1e3 * p.p50 for p in points], "o-", color=BLUE, alpha=0.5, label="p50 of what was let in")
    latency.plot(x, [1e3 * p.p99 for p in points], "o-", color=BLUE, label="p99 of what was let in")
    latency.plot(x, [1e3 * p.refused_p99 for p in points], "o-", color=INK, label="p99 of refusals")
    latency.axhline(1e3 * deadline, color=GREY, lw=1, ls="--", label="deadline")
    latency.set_yscale("log")
    latency.legend(frameon=False, labelcolor=INK)
    dress(goodput, "Goodput", "% of the peak")
    dress(latency, "Latency", "milliseconds")
    goodput.set_ylim(bottom=0)
    figure.savefig(path)


def dress(axes: Any, title: str, unit: str) -> None:
    """Give a picture its title, axes and grid."""
    axes.set_xscale("log")
    axes.set_xticks(MULTIPLES, [f"{m:g}" for m in MULTIPLES], minor=False)
    axes.minorticks_off()
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("offered load, as a multiple of the peak", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.grid(visible=True, color="#e4e7eb", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure, print, and exit with 1 if a promise was not kept."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=16.0, help="of each rate (default: 16)")
    arguments.add_argument("--rounds", type=int, default=4, help="which count together (default: 4)")
    arguments.add_argument("--deadline", type=float, default=2.0, help="of each request, in seconds (default: 2)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    arguments.add_argument("--plot", type=Path, help="draw into this PNG")
    options = arguments.parse_args()
    console.stderr = options.json
    points = uvloop.run(run(options))
    refusal, reply = uvloop.run(refusal_cpu())
    show(points)
    console.print(
        f"a refusal costs {1e6 * refusal:.0f} µs of processor time, a bare application's reply {1e6 * reply:.0f} µs"
    )
    if options.plot:
        draw(points, options.deadline, options.plot)
    if options.json:
        print(
            json.dumps(
                {
                    "points": [asdict(point) for point in points],
                    "refusal_cpu_us": 1e6 * refusal,
                    "bare_cpu_us": 1e6 * reply,
                }
            )
        )
    missed = list(misses(points, options.deadline))
    for miss in missed:
        console.print(f"[bold red]missed:[/] {miss}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
