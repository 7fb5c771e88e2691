"""`make soak`: does a server that runs for long hold more and more?

The default model under requests of all shapes, some of them wrong. RSS, descriptors and threads every five seconds; the
slope of RSS over the last two thirds is the median of the slopes between all pairs of points (Theil-Sen).
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from faults.load import Pool
from faults.soaking import Samples, random_load, watch
from quiver.bench.plot import BLUE, GREY, INK
from quiver.bench.workload import Workload
from server_process import serving

EVERY_SECONDS = 5.0
TELL_SECONDS = 30.0
MAX_GROWTH = 0.02
console = Console()


async def run(options: argparse.Namespace) -> tuple[Samples, dict[int, int]]:
    """Start a server, load it and watch it."""
    seconds, samples, counts = 60 * options.minutes, Samples(), dict[int, int]()
    with serving("--cache-entries", "0") as server:
        async with Pool(await asyncio.to_thread(server.ready_url)) as pool:
            process = psutil.Process(server.process.pid)
            telling = asyncio.create_task(tell(samples, seconds))
            texts = Workload(size=2000).texts
            load = random_load(pool, texts, clients=options.clients, seconds=seconds)
            _, counts = await asyncio.gather(
                watch(process, pool, every=EVERY_SECONDS, seconds=seconds, samples=samples), load
            )
            telling.cancel()
    return samples, counts


async def tell(samples: Samples, seconds: float) -> None:
    """Say now and then how it goes."""
    start = time.perf_counter()
    while True:
        await asyncio.sleep(TELL_SECONDS)
        passed = time.perf_counter() - start
        console.print(
            f"{passed / 60:5.1f} of {seconds / 60:g} minutes: RSS {samples.rss[-1] / 1e6:.0f} MB, "
            f"{samples.descriptors[-1]} descriptors, {samples.threads[-1]} threads, {samples.tasks[-1]} tasks"
        )


def draw(samples: Samples, path: Path) -> None:
    """Draw what was held over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    memory, counts = figure.subplots(1, 2)
    minutes = [s / 60 for s in samples.seconds]
    memory.plot(minutes, [rss / 1e6 for rss in samples.rss], color=BLUE, lw=1.5)
    counts.plot(minutes, samples.descriptors, color=BLUE, lw=1.5, label="descriptors")
    counts.plot(minutes, samples.threads, color=GREY, lw=1.5, label="threads")
    counts.plot(minutes, samples.tasks, color=INK, lw=1.5, label="tasks")
    counts.legend(frameon=False, labelcolor=INK)
    for axes, title, unit in ((memory, "Resident memory", "MB"), (counts, "Descriptors, threads and tasks", "")):
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        axes.set_xlabel("minutes", color=INK)
        axes.set_ylabel(unit, color=INK)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, color="#e4e7eb", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Watch, print, and exit with 1 if anything grows."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=20.0, help="how long (default: 20)")
    arguments.add_argument("--clients", type=int, default=8, help="requests out at once (default: 8)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    arguments.add_argument("--plot", type=Path, help="draw into this PNG")
    options = arguments.parse_args()
    console.stderr = options.json
    samples, counts = uvloop.run(run(options))
    third = len(samples.rss) // 3
    held = {
        name: (max(v[:third]), max(v[-third:]))
        for name, v in (
            ("descriptors", samples.descriptors),
            ("threads", samples.threads),
            ("tasks", samples.tasks),
        )
    }
    figures = {
        "minutes": options.minutes,
        "answers": counts,
        "rss_mb": round(samples.rss[-1] / 1e6, 1),
        "rss_growth": round(samples.growth, 5),
        **{name: {"first_third": first, "last_third": last} for name, (first, last) in held.items()},
    }
    if options.plot:
        draw(samples, options.plot)
    console.print(figures)
    if options.json:
        print(json.dumps(figures))
    grows = samples.growth > MAX_GROWTH or any(last > first + options.clients for first, last in held.values())
    sys.exit(grows or set(counts) - {200, 404} != set())


if __name__ == "__main__":
    main()
