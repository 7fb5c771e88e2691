"""`make bench-peers`: Quiver beside its peers, on the same model, with the same texts and the same client.

Each round starts every peer once, in turns, so that the machine's drift hits all alike; every figure is a median over
the rounds. What was measured is written after each turn: a run that ends early goes on with --resume.
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from peers import report, roster
from peers.cells import Asked
from peers.child import PeerFailed
from peers.exact import Reference
from peers.measure import Measurer, Settings
from peers.peer import Peer
from peers.places import ROOT, Places
from peers.plot import draw_all
from peers.results import About, Results

VERSIONS = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep='\\n')"
QUICK = {"rounds": 1, "seconds": 2.0, "slow_cells": False}
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Measure what is asked for, and write JSON, pictures and page."""
    options = parsed(sys.argv[1:])
    peers = chosen(options)
    if options.render:
        results = Results.read(options.results)
    else:
        results = started(options)
        with contextlib.suppress(asyncio.CancelledError):
            uvloop.run(run(options, peers, results))
    write(results, options)
    sys.exit(not results.turns)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(peer.name for peer in roster.PEERS)
    reader.add_argument("--peers", default="", help=f"names with commas between them (default: all of {names})")
    reader.add_argument("--rounds", type=int, default=5, help="turns of each peer (default: 5)")
    reader.add_argument("--seconds", type=float, default=2.5, help="of each cell (default: 2.5)")
    reader.add_argument(
        "--quick", action="store_true", help="1 round, 2 seconds, no request of 1,024: about eight minutes"
    )
    reader.add_argument("--no-slow-cells", dest="slow_cells", action="store_false", help="leave out requests of 1,024")
    reader.add_argument("--largest-batch", type=int, default=1024, help="texts of the largest request (default: 1024)")
    reader.add_argument("--results", type=Path, default=ROOT / "docs/benchmarks.json", help="file of what is measured")
    reader.add_argument("--resume", action="store_true", help="go on with what the file of results lacks")
    reader.add_argument("--render", action="store_true", help="measure nothing, write the page from the results")
    reader.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks.md", help="page to write, with pictures")
    reader.add_argument("--cache", type=Path, default=ROOT / "build/peers", help="where exported models are kept")
    reader.add_argument("--ready-seconds", type=float, default=300.0, help="a peer's time to start (default: 300)")
    reader.add_argument("--patience", type=float, default=5.0, help="seconds to wait for a quiet machine (default: 5)")
    for binary in ("tei", "ollama"):
        reader.add_argument(f"--{binary}", default="", metavar="PATH", help=f"program of {binary}; without it, no turn")
    options = reader.parse_args(words)
    if options.quick:
        vars(options).update(QUICK)
    return options


def chosen(options: argparse.Namespace) -> list[Peer]:
    """Return the peers to measure, in the order of the page."""
    wanted = [name for name in options.peers.split(",") if name]
    known = {peer.name for peer in roster.PEERS}
    if unknown := sorted(set(wanted) - known):
        sys.exit(f"there is no peer {unknown[0]!r} (there are: {', '.join(sorted(known))})")
    return [peer for peer in roster.PEERS if not wanted or peer.name in wanted]


def started(options: argparse.Namespace) -> Results:
    """Return empty results, or those to go on with."""
    about = About(
        machine=machine(),
        system=f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        seconds=options.seconds,
        largest_batch=options.largest_batch,
        slow_cells=options.slow_cells,
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
    )
    if not options.resume or not options.results.exists():
        return Results(about=about)
    results = Results.read(options.results)
    about.date = results.about.date
    if results.about != about:
        sys.exit(f"cannot go on with {options.results}: it is of {results.about}, this run is {about}")
    results.missing.clear()  # who failed is tried again
    return results


def machine() -> str:
    """Describe the hardware."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split("\t: ", 1) for line in info.replace("\t\t", "\t").splitlines() if "\t: " in line)
    flags = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni") if name in fields.get("flags", "").split()]
    model = fields.get("model name", platform.processor() or platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores of {model} ({', '.join(flags) or 'no AVX2'}), {memory:.0f} GiB"


async def run(options: argparse.Namespace, peers: Sequence[Peer], results: Results) -> None:
    """Prepare everything, and let the peers take turns; SIGTERM ends the turn, and with it its peer."""
    this = asyncio.current_task()
    assert this, "a coroutine runs outside of any task. This is a bug."
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    places = Places.of_default_model(options.cache, {name: vars(options)[name] for name in ("tei", "ollama")})
    console.print("computing the float64 reference ...")
    known = Reference.kept(places.model, places.cache)
    ready = [peer for peer in peers if provided(peer, places, known, results)]
    settings = Settings(
        seconds=options.seconds,
        slow_cells=options.slow_cells,
        largest_batch=options.largest_batch,
        ready_seconds=options.ready_seconds,
        patience_seconds=options.patience,
    )
    measurer = Measurer(places, known, settings, lambda text: console.print(f"  [dim]{text}[/dim]"))
    for number in range(1, options.rounds + 1):
        await take_round(measurer, ready, number, results, options.results)


async def take_round(measurer: Measurer, peers: Sequence[Peer], number: int, results: Results, path: Path) -> None:
    """Let each peer take the turn that it lacks, each round in another order, and write after each."""
    first = number % max(1, len(peers))
    left = [peer for peer in (*peers[first:], *peers[:first]) if not results.has(peer.name, number)]
    if not left:
        return
    asked = Asked.of(number, measurer.places.model / "tokenizer.json", measurer.settings.pool)
    for peer in left:
        if peer.name not in results.missing:
            await take(measurer, peer, number, asked, results)
            results.write(path)


async def take(measurer: Measurer, peer: Peer, number: int, asked: Asked, results: Results) -> None:
    """Take one turn, or note why there was none."""
    start = time.perf_counter()
    try:
        results.turns.append(await measurer.turn(peer, number, asked))
    except PeerFailed as failure:
        results.missing[peer.name] = str(failure)
        console.print(f"[red]{peer.name} is left out:[/red] {failure}")
        return
    console.print(f"round {number}: {peer.name}, {time.perf_counter() - start:.0f} s")


def provided(peer: Peer, places: Places, known: Reference, results: Results) -> bool:
    """Install and export what a peer needs, and note its versions; tell whether it can take turns."""
    if peer.binary and not places.binaries.get(peer.binary):
        results.missing[peer.name] = f"its program was not given (--{peer.binary} PATH)"
        return False
    console.print(f"preparing {peer.name} ...")
    try:
        places.provide(peer, known)
        results.versions[peer.name] = versions(peer, places)
    except PeerFailed as failure:
        results.missing[peer.name] = str(failure)
        console.print(f"[red]{peer.name} is left out:[/red] {failure}")
        return False
    return True


def versions(peer: Peer, places: Places) -> dict[str, str]:
    """Ask an environment for the versions of its packages, or a program for its own."""
    if peer.binary:
        said = subprocess.run([places.binaries[peer.binary], "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        return {peer.binary: (said.stdout.split() or ["unknown"])[-1]}
    command = [places.python(peer), "-c", VERSIONS, *peer.packages]
    said = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return dict(line.split(" ", 1) for line in said.stdout.splitlines())  # type: ignore[misc]


def write(results: Results, options: argparse.Namespace) -> None:
    """Write pictures and page."""
    if not options.render:
        results.write(options.results)
    pictures = draw_all(results, roster.PEERS, options.page.parent) if results.turns else {}
    report.write_page(options.page, report.render(results, roster.PEERS, pictures))
    console.print(f"{options.page} is written")


if __name__ == "__main__":
    main()
