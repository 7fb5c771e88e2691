"""`make bench-overload`: what a server does with two, five, ten times what it can do.

The default model, a mix of queries and passages alone and in batches. First the peak, with a closed load; then requests
arrive at random times at multiples of it, whatever comes back (an open load: a closed one hides overload, because its
clients wait). Goodput is the tokens of what was answered with 200 within the deadline, as a share of the peak.
The client shares the cores with the server; what it takes of them is printed too.
"""

import argparse
import asyncio
import itertools
import json
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
from server_process import ServerProcess, serving

MULTIPLES = (0.5, 0.8, 1.0, 2.0, 5.0, 10.0)
BARS = {2.0: 0.95, 5.0: 0.95, 10.0: 0.90}
"""Share of the peak that the goodput is promised to keep."""
MAX_REFUSAL_SECONDS = 0.010
PEAK_CLIENTS = 32
SIZES = (1, 1, 1, 1, 1, 1, 2, 2, 4, 8)
"""Texts in a request."""
FILLING = 400
"""Requests that keep the stub's lane asleep while refusals are counted."""
REFUSALS_PER_SECOND = 500.0
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


def cpu_seconds(server: ServerProcess) -> float:
    """Return the processor time that a server has taken."""
    return float(sum(psutil.Process(server.process.pid).cpu_times()[:2]))


class Curve:
    """Measures one point after the other, and the peak between them: on a shared machine it moves."""

    def __init__(self, pool: Pool, made: Sequence[Shot], options: argparse.Namespace) -> None:
        self._pool = pool
        self._made = made
        self._options = options
        self._tokens = float(np.mean([shot.tokens for shot in made]))
        """Of a request."""

    async def measure(self) -> list[Point]:
        """Go through the multiples in several rounds; returns for each the round with the median goodput."""
        rounds = [await self._round() for _ in range(self._options.rounds)]
        return [sorted(points, key=lambda p: p.goodput)[len(points) // 2] for points in zip(*rounds, strict=True)]

    async def _round(self) -> list[Point]:
        points, before = list[Point](), await self._peak()
        for multiple in MULTIPLES:
            options = self._options
            seen = await open_load(
                self._pool,
                self._made,
                multiple * before / self._tokens,
                options.seconds,
                patience=options.deadline + 5.0,
            )
            after = await self._peak()
            points.append(point := self._describe(multiple, seen, (before + after) / 2))
            console.print(
                f"{multiple:4g} ×: offered {point.offered:.0%}, goodput {point.goodput:.0%}, p50 {1e3 * point.p50:.0f} ms, "
                f"p99 {1e3 * point.p99:.0f} ms, refused within {1e3 * point.refused_p99:.1f} ms, {point.statuses}"
            )
            before = after
        return points

    async def _peak(self) -> float:
        rate = await peak(self._pool, self._made, self._options.seconds / 2)
        console.print(f"peak: {rate / self._tokens:.0f} requests/s, {rate:,.0f} tokens/s")
        return rate

    def _describe(self, multiple: float, seen: OpenLoad, peak: float) -> Point:
        return Point(
            multiple=multiple,
            requests_per_second=len(seen.due) / seen.elapsed,
            offered=float(seen.tokens.sum() / seen.elapsed / peak),
            goodput=seen.goodput(self._options.deadline) / peak,
            p50=seen.percentile(50),
            p99=seen.percentile(99),
            refused_p99=seen.percentile(99, 429),
            client_cpu=seen.cpu_seconds / seen.elapsed,
            late_p99=float(np.percentile(seen.late, 99)),
            statuses=seen.counts(),
        )


async def run(options: argparse.Namespace) -> list[Point]:
    """Start a server and measure it."""
    with serving("--cache-entries", "0") as server:
        async with Pool(await asyncio.to_thread(server.ready_url)) as pool:
            console.print("counting the tokens of the mix ...")
            made = await counted(pool, shots(options.deadline))
            return await Curve(pool, made, options).measure()


async def refusal_cpu() -> float:
    """Return the processor seconds that a server takes for a refusal, where its lanes sleep and take none."""
    query = Workload(size=64).texts[0]
    with stub(behave={"latency_seconds": 0.5}, lanes=1) as server:
        async with Pool(await asyncio.to_thread(server.ready_url)) as pool:
            headers = {"x-request-timeout": "2"}
            filling = [asyncio.create_task(pool.ask(embed(["x" * 400] * 8))) for _ in range(FILLING)]
            await asyncio.sleep(0.3)
            shot = Shot(embed([query + " x" * 200] * 8, headers=headers))
            await open_load(pool, [shot], REFUSALS_PER_SECOND, 0.5)
            start = cpu_seconds(server)
            seen = await open_load(pool, [shot], REFUSALS_PER_SECOND, 3.0)
            spent = cpu_seconds(server) - start
            for task in filling:
                task.cancel()
            await asyncio.wait(filling)
    assert set(seen.counts()) == {429}, seen.counts()
    return spent / len(seen.due)


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
    arguments.add_argument("--seconds", type=float, default=10.0, help="of each rate (default: 10)")
    arguments.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    arguments.add_argument("--deadline", type=float, default=2.0, help="of each request, in seconds (default: 2)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    arguments.add_argument("--plot", type=Path, help="draw into this PNG")
    options = arguments.parse_args()
    console.stderr = options.json
    points = uvloop.run(run(options))
    cpu = uvloop.run(refusal_cpu())
    show(points)
    console.print(f"a refusal costs {1e6 * cpu:.0f} µs of the server's processor time")
    if options.plot:
        draw(points, options.deadline, options.plot)
    if options.json:
        print(json.dumps({"points": [asdict(point) for point in points], "refusal_cpu_us": 1e6 * cpu}))
    missed = list(misses(points, options.deadline))
    for miss in missed:
        console.print(f"[bold red]missed:[/] {miss}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
