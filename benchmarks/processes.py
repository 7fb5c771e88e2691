"""`make bench-processes`: are two processes of a core each worth two, and what do they share?

The default model, batches of passages: a load that the engine bounds. One process on one core and several on as many
take turns, and each round's ratio is of its speed to the mean of the single process's before and after, so that what
else the machine does meanwhile touches both. Speed is in tokens, by the server's own count of each forward pass: requests
of eight texts come back in waves, which a window of some seconds cuts anywhere. The client has no core of its own: what
it takes is printed. Then the vectors of both are compared bit by bit, and the memory of all processes is added up, with
pages that they share (RSS) and without (PSS).
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from faults.load import Answer, Pool, embed, get
from faults.servers import BASE64, members
from quiver.bench.server import OK
from quiver.bench.workload import Workload
from server_process import ServerProcess, serving

CLIENTS_PER_CORE = 12
TEXTS = 8
"""In a request."""
BAR = 1.85
SETTLE_SECONDS = 1.0
PATIENCE_SECONDS = 300.0
SAME_TEXTS, SAME_TIMES = 64, 12
"""Texts that are compared, and on how many connections: each process must have answered on some."""
console = Console()


@dataclass(frozen=True, slots=True)
class Round:
    """What one server did for a while."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    """Of the server's own time on the cores: what it would do if nobody else had any."""
    client_share: float
    """Of a core, that the client took."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the processes of a server hold, in megabytes."""

    rss: float
    pss: float
    weights_rss: float
    weights_pss: float


def processes_of(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes of a server that compute."""
    return members(server) or [psutil.Process(server.process.pid)]


def cpu_seconds(server: ServerProcess) -> float:
    """Return the time that a server has spent on the cores."""
    return sum(sum(process.cpu_times()[:2]) for process in processes_of(server))


async def measure(server: ServerProcess, url: str, requests: Sequence[bytes], clients: int, seconds: float) -> Round:
    """Keep so many requests out at once, and count what is computed once it is under way."""
    end = time.perf_counter() + SETTLE_SECONDS + seconds

    async with Pool(url) as pool:

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                answer = await pool.ask(requests[number % len(requests)], patience=PATIENCE_SECONDS)
                assert answer.status == OK, answer
                number += clients

        running = [asyncio.create_task(client(number)) for number in range(clients)]
        await asyncio.sleep(SETTLE_SECONDS)
        before, start, cpu, own = await computed(pool), time.perf_counter(), cpu_seconds(server), time.process_time()
        await asyncio.sleep(end - time.perf_counter())
        done, elapsed = await computed(pool) - before, time.perf_counter() - start
        cpu, own = cpu_seconds(server) - cpu, time.process_time() - own
        await asyncio.gather(*running)
    return Round(done / elapsed, done / cpu, own / elapsed)


async def computed(pool: Pool) -> float:
    """Return the tokens of all forward passes, of all processes."""
    answer = await pool.ask(get("/metrics"))
    return sum(float(number) for number in re.findall(rb"^quiver_batch_tokens_sum\S* (\S+)", answer.body, re.MULTILINE))


async def are_identical(one: str, many: str) -> bool:
    """Ask both servers for the same vectors, the one of several processes on many connections."""
    request = embed(Workload(size=SAME_TEXTS).texts, **BASE64)
    answers: list[Answer] = []
    for url in (one, *[many] * SAME_TIMES):
        async with Pool(url) as pool:  # a connection of its own
            answers.append(await pool.ask(request, patience=PATIENCE_SECONDS))
    return all(answer.json()["data"] == answers[0].json()["data"] for answer in answers)


def memory_of(server: ServerProcess) -> Memory:
    """Add up what a server's processes hold, its supervisor with them."""
    pids = {server.process.pid, *(process.pid for process in processes_of(server))}
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii") for pid in pids]
    weights = [weights_of(pid) for pid in pids]
    return Memory(
        rss=sum(kilobytes(text, "Rss") for text in rollups) / 1024,
        pss=sum(kilobytes(text, "Pss") for text in rollups) / 1024,
        weights_rss=sum(rss for rss, _ in weights) / 1024,
        weights_pss=sum(pss for _, pss in weights) / 1024,
    )


def weights_of(pid: int) -> tuple[int, int]:
    """Return what a process has in memory of files of weights: RSS and PSS, in kilobytes."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text("utf-8"), flags=re.MULTILINE)
    mapped = [part for part in parts if "safetensors\n" in part]
    return sum(kilobytes(part, "Rss") for part in mapped), sum(kilobytes(part, "Pss") for part in mapped)


def kilobytes(text: str, name: str) -> int:
    """Read one line of what the kernel says of memory."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Start what is started meanwhile on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def run(options: argparse.Namespace, servers: Sequence[ServerProcess], urls: Sequence[str]) -> dict[str, object]:
    """Let both servers take turns; return all figures."""
    one, many = servers
    texts = Workload(size=1024).texts
    requests = [embed(texts[i : i + TEXTS], **BASE64) for i in range(0, len(texts) - TEXTS + 1, TEXTS)]
    clients = CLIENTS_PER_CORE * options.processes
    alone: list[Round] = [await measure(one, urls[0], requests, clients, options.seconds)]
    together: list[Round] = []
    for _ in range(options.rounds):
        together.append(await measure(many, urls[1], requests, clients, options.seconds))
        alone.append(await measure(one, urls[0], requests, clients, options.seconds))
        ratios = ratios_of(alone, together)
        console.print(
            f"one {alone[-1].tokens_per_second:7,.0f} tokens/s, {options.processes} processes "
            f"{together[-1].tokens_per_second:7,.0f}: x {ratios[-1]:.3f}"
        )
    per_cpu = [statistics.median(r.tokens_per_cpu_second for r in rounds) for rounds in (alone, together)]
    return {
        "ratio": statistics.median(ratios_of(alone, together)),
        "ratios": ratios_of(alone, together),
        "ratio_by_cpu_time": options.processes * per_cpu[1] / per_cpu[0],
        "client_share": statistics.median(r.client_share for r in together),
        "identical": await are_identical(*urls),
        "memory": {"one": asdict(memory_of(one)), "many": asdict(memory_of(many))},
    }


def ratios_of(alone: Sequence[Round], together: Sequence[Round]) -> list[float]:
    """Return each round's speed as a multiple of the single process's around it."""
    neighbours = [(a.tokens_per_second + b.tokens_per_second) / 2 for a, b in pairwise(alone)]
    return [many.tokens_per_second / one for many, one in zip(together, neighbours, strict=False)]


def main() -> None:
    """Measure, print, and exit with 1 below the bar or where a bit differs."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--seconds", type=float, default=6.0, help="of each half of a round")
    arguments.add_argument("--bar", type=float, default=BAR, help="the least ratio, for two processes")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    options = arguments.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.processes]
    if len(cores) < options.processes:
        raise SystemExit(f"{options.processes} processes of a core each need {options.processes} cores")
    settings = ("--cache-entries", "0")
    with contextlib.ExitStack() as started:
        servers, urls = [], []
        for count, given in ((1, settings), (options.processes, (*settings, "--processes", str(options.processes)))):
            with on_cores(cores[:count]):
                servers.append(started.enter_context(serving(*given)))
            urls.append(servers[-1].ready_url())
        figures = uvloop.run(run(options, servers, urls))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    show(figures, options)
    raise SystemExit(float(str(figures["ratio"])) < options.bar or not figures["identical"])


def show(figures: dict[str, object], options: argparse.Namespace) -> None:
    """Print what was found."""
    console.print(
        f"{options.processes} processes of a core each: x {figures['ratio']:.3f} (at least {options.bar:g}); "
        f"by the cores' time that they spent x {figures['ratio_by_cpu_time']:.3f}; "
        f"the client took {figures['client_share']:.0%} of a core"
    )
    console.print(f"vectors are {'identical' if figures['identical'] else 'NOT identical'}, bit by bit")
    memory = figures["memory"]
    assert isinstance(memory, dict)
    for name, held in memory.items():
        console.print(
            f"{name:5} RSS {held['rss']:5.0f} MB, PSS {held['pss']:5.0f} MB; of the weights' file "
            f"RSS {held['weights_rss']:5.1f} MB, PSS {held['weights_pss']:5.1f} MB"
        )


if __name__ == "__main__":
    main()
