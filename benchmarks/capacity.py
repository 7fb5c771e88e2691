"""How much of everything a load takes, from ten requests a second to a million: arithmetic, and a simulation that checks it.

    python benchmarks/capacity.py                        the table, by the figures of docs/scaling_ray.md
    python benchmarks/capacity.py --requests 5000 --tokens-per-second 6000 --vcpu-hour 0.03
    python benchmarks/capacity.py --check FILE           against what `make bench-ray ARGS="--json FILE"` measured
    python benchmarks/capacity.py --plot FILE.png        how full replicas may be, by how many there are

The arithmetic takes work as a flow, and adds what queues need; the simulation plays single requests, and knows nothing of
the arithmetic. Nothing of it is imported by the server.
"""

import argparse
import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from quiver.scale.policy import FULL

LEVELS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
HUNDRED = 100
MILLION = 1_000_000
LATE = 0.01
"""The part of requests that may wait longer than what is told."""
console = Console()


@dataclass(frozen=True)
class Facts:
    """What a load is like, and what each part of a cluster can do; the defaults are of the machine in docs/scaling_ray.md."""

    texts_per_request: float = 1.0
    tokens_per_text: float = 55.0
    hit_rate: float = 0.0
    """Part of the texts whose results are known."""
    tokens_per_second: float = 1700.0
    """Of one core with the default model."""
    ingress_ms: float = 12.4
    """CPU time of an ingress for a request."""
    proxy_ms: float = 8.9
    """CPU time of Ray's proxy for a request."""
    replica_ms: float = 6.6
    """CPU time of a replica for a request, beside the engine's."""
    wait_ms: float = 150.0
    """What 99 of 100 requests may wait for a core."""
    shared_rates: bool = True
    """Rates and results are shared by Redis."""
    flush_seconds: float = 1.0
    """How often an ingress brings its usage to PostgreSQL."""
    active_keys: float = 1000.0
    confirm_seconds: float = 4.0
    """How often an ingress asks anew for a key that is in use."""
    redis_calls_per_second: float = 60_000.0
    """Of one Redis (it has one thread)."""
    postgres_rows_per_second: float = 5_000.0
    """Rows of usage that one PostgreSQL takes."""
    vcpu_hour: float = 0.04
    """Price of one core for an hour."""


@dataclass(frozen=True)
class Capacity:
    """What a load takes."""

    requests_per_second: float
    tokens_per_second: float
    replicas: int
    """Cores that compute."""
    full: float
    """Part of the time that these are at work."""
    ingress_cores: int
    proxy_cores: int
    redis_calls_per_second: float
    redis_instances: int
    postgres_rows_per_second: float
    postgres_transactions_per_second: float
    postgres_instances: int
    """More than one: the ledger must be split by user."""
    price_per_million_texts: float


def capacity(requests_per_second: float, facts: Facts) -> Capacity:
    """Return what a load takes."""
    texts = requests_per_second * facts.texts_per_request
    computed = texts * (1 - facts.hit_rate) * facts.tokens_per_text
    seconds = request_seconds(facts)
    # The policy lets replicas be busy for so much of the time; few of them must be less.
    least = math.ceil(requests_per_second * seconds / FULL)
    replicas = max(least, enough_replicas(requests_per_second, seconds, allowed_wait(facts)))
    ingress, proxy = (_cores(requests_per_second, ms) for ms in (facts.ingress_ms, facts.proxy_ms))
    redis = redis_calls(facts) * requests_per_second
    rows = requests_per_second
    reads = ingress * min(facts.active_keys, requests_per_second) / facts.confirm_seconds
    price = (replicas + ingress + proxy) * facts.vcpu_hour / (3600 * texts) * MILLION
    return Capacity(
        requests_per_second=requests_per_second,
        tokens_per_second=computed,
        replicas=replicas,
        full=requests_per_second * seconds / replicas,
        ingress_cores=ingress,
        proxy_cores=proxy,
        redis_calls_per_second=redis,
        redis_instances=math.ceil(redis / facts.redis_calls_per_second),
        postgres_rows_per_second=rows,
        postgres_transactions_per_second=ingress / facts.flush_seconds + reads,
        postgres_instances=math.ceil(rows / facts.postgres_rows_per_second),
        price_per_million_texts=price,
    )


def request_seconds(facts: Facts) -> float:
    """Return the time of one core that a request takes of a replica."""
    tokens = facts.texts_per_request * (1 - facts.hit_rate) * facts.tokens_per_text
    return tokens / facts.tokens_per_second + facts.replica_ms / 1e3


def allowed_wait(facts: Facts) -> float:
    """Return what a request may wait: a long one longer, for what stands before it is as long as itself."""
    return max(facts.wait_ms / 1e3, 4 * request_seconds(facts))


def redis_calls(facts: Facts) -> float:
    """Return the calls of one request: for its rate, to look results up, and to keep those that were computed (64 at once)."""
    if not facts.shared_rates:
        return 0.0
    kept = math.ceil(facts.texts_per_request * (1 - facts.hit_rate) / 64)
    return 2.0 + kept


def _cores(requests_per_second: float, ms: float) -> int:
    return max(1, math.ceil(requests_per_second * ms / 1e3 / FULL))


def enough_replicas(requests_per_second: float, seconds: float, wait_seconds: float) -> int:
    """Return the fewest cores with which 99 of 100 requests wait no longer than that."""
    work = requests_per_second * seconds
    least = math.floor(work) + 1
    for cores in itertools.chain(range(least, least + 64), _growing(least + 64)):
        if two_choices_wait(work / cores, cores, seconds) <= wait_seconds:
            return cores
    raise AssertionError("with enough cores nobody waits")


def _growing(start: int) -> Iterator[int]:
    while True:
        yield start
        start = math.ceil(start * 1.01)


def slowest_wait(full: float, cores: int, seconds: float) -> float:
    """Return what 99 of 100 requests wait at most at cores that share one queue, for work of no regular length.

    Sakasegawa's approximation of the mean of M/M/c, and the exponential tail that such a queue has.
    """
    if full >= 1:
        return math.inf
    mean = seconds * full ** (math.sqrt(2 * (cores + 1)) - 1) / (cores * (1 - full))
    if not mean:
        return 0.0
    scale = seconds / (cores * (1 - full))  # of the waits of those who wait at all
    waiting = min(1.0, mean / scale)
    return max(0.0, scale * math.log(waiting / LATE))


def two_choices_wait(full: float, cores: int, seconds: float) -> float:
    """Return the same where each request goes to the replica with the shorter line of two, as Ray Serve does it.

    Of many replicas the part with k or more in line is full ** (2 ** k - 1) (Mitzenmacher 1996); of few, the
    wait of one queue comes on top: the simulation says that the sum is never too little.
    """
    shared = slowest_wait(full, cores, seconds)
    if cores == 1 or full >= 1:
        return shared
    in_line = math.log2(2 + math.log(LATE) / math.log(full)) - 1
    return shared + seconds * in_line


# The simulation


@dataclass(frozen=True)
class Played:
    """What came of a simulation."""

    waits: np.ndarray
    """Of each request, in seconds."""
    seconds: float
    """From the first to the last."""

    @property
    def p99(self) -> float:
        """What 99 of 100 waited at most."""
        return float(np.quantile(self.waits, 0.99))

    @property
    def requests_per_second(self) -> float:
        """How many were answered."""
        return len(self.waits) / self.seconds


def play_open(rate: float, works: Sequence[float], replicas: int, *, seed: int = 0, shared: bool = False) -> Played:
    """Play requests that come when they like, to replicas with one core and a queue each.

    Each goes to the shorter line of two by chance, as Ray Serve does it; `shared`: to the first that is free of all.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, len(works)))
    free_at = np.zeros(replicas)
    waits = np.empty(len(works))
    picks = rng.integers(0, replicas, (len(works), 2))
    lines: list[deque[float]] = [deque() for _ in range(replicas)]
    for i, (now, work) in enumerate(zip(times, works, strict=True)):
        place = int(free_at.argmin()) if shared else min(picks[i], key=lambda one: _in_line(lines[one], now))
        begin = max(now, free_at[place])
        waits[i] = begin - now
        free_at[place] = begin + work
        lines[place].append(begin + work)
    return Played(waits, float(max(free_at.max(), times[-1]) - times[0]))


def _in_line(line: deque[float], now: float) -> int:
    """Return how many are not done of those who were sent to a replica."""
    while line and line[0] <= now:
        line.popleft()
    return len(line)


def play_closed(clients: int, works: Sequence[float], replicas: int, *, pause: float = 0.0, seed: int = 0) -> Played:
    """Play clients that each ask again when they have their answer, which is `pause` seconds on its way besides."""
    rng = np.random.default_rng(seed)
    free_at = np.zeros(replicas)
    ready = [(0.0, client) for client in range(clients)]
    heapq.heapify(ready)
    waits, last = np.empty(len(works)), 0.0
    for i, work in enumerate(works):
        now, client = heapq.heappop(ready)
        place = min(rng.integers(0, replicas, 2), key=lambda one: free_at[one])
        begin = max(now + pause / 2, free_at[place])
        free_at[place] = begin + work
        waits[i] = begin - now - pause / 2
        last = free_at[place] + pause / 2
        heapq.heappush(ready, (last, client))
    return Played(waits, last)


def works_of(facts: Facts, count: int, seed: int = 0) -> np.ndarray:
    """Return the seconds of single requests: texts of a log-normal length, as the bench's are."""
    rng = np.random.default_rng(seed)
    sigma = 0.6
    texts = max(1, round(facts.texts_per_request))
    median = facts.tokens_per_text / math.exp(sigma**2 / 2)
    tokens = rng.lognormal(math.log(median), sigma, (count, texts)).sum(axis=1)
    return tokens / facts.tokens_per_second + facts.replica_ms / 1e3


def check_arithmetic(facts: Facts, levels: Sequence[float] = (10, 100, 1000)) -> list[dict[str, float]]:
    """Hold the arithmetic's number of replicas against the simulation: what do 99 of 100 requests wait there?"""
    found = []
    for rate in levels:
        cores = capacity(rate, facts).replicas
        works = works_of(facts, 40_000)
        one_queue = play_open(rate, works, cores, shared=True)
        two_choices = play_open(rate, works, cores)
        found.append(
            {
                "requests_per_second": rate,
                "replicas": cores,
                "allowed_ms": 1e3 * allowed_wait(facts),
                "one_queue_ms": 1e3 * one_queue.p99,
                "two_choices_ms": 1e3 * two_choices.p99,
            }
        )
    return found


def check_measured(measured: dict[str, dict[str, float]], clients: int, texts: int) -> list[dict[str, float]]:
    """Hold the simulation against what was measured: with one replica's rate, what would two do?"""
    found = []
    for name in ("two replicas that wait", "two replicas that compute"):
        if name not in measured:
            continue
        figures = measured[name]
        seconds = texts / figures["one_texts_per_second"]
        works = np.random.default_rng(0).lognormal(math.log(seconds) - 0.02, 0.2, 20_000)
        pause = measured.get("a request", {}).get("latency_ms_p50", 0.0) / 1e3
        one, two = (play_closed(clients, works, n, pause=pause) for n in (1, 2))
        found.append(
            {
                "what": name,
                "simulated_ratio": two.requests_per_second / one.requests_per_second,
                "measured_ratio": figures["ratio"],
            }
        )
    return found


def draw(path: Path, facts: Facts) -> None:
    """Draw how full replicas may be, by how many there are and who chooses among them."""
    import matplotlib as mpl  # noqa: PLC0415  only the plot needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  as above

    figure, axes = plt.subplots(figsize=(7, 4))
    seconds, loads = request_seconds(facts), np.linspace(0.3, 0.98, 24)
    for replicas in (1, 4, 16, 64):
        works = works_of(facts, 20_000)
        waits = [1e3 * play_open(full * replicas / seconds, works, replicas).p99 for full in loads]
        axes.plot(100 * loads, waits, label=f"{replicas} replicas, the shorter line of two")
        told = [1e3 * two_choices_wait(full, replicas, seconds) for full in loads]
        axes.plot(100 * loads, told, "k:", linewidth=0.8, label="arithmetic" if replicas == 1 else None)
    axes.set(xlabel="at work, % of the time", ylabel="wait of 99 of 100 requests, ms", yscale="log", ylim=(1, 1e4))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: Sequence[object], title: str) -> Table:
    """Lay dataclasses or mappings out, one a column."""
    columns = [row if isinstance(row, dict) else {f.name: getattr(row, f.name) for f in fields(row)} for row in rows]
    made = Table(title=title, show_header=False)
    for name in columns[0]:
        made.add_row(name.replace("_", " "), *(_shown(column[name]) for column in columns))
    return made


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{2 if abs(value) < HUNDRED else 0}f}"


def facts_of(options: argparse.Namespace) -> Facts:
    """Take what was given, and the rest as it is."""
    given = {f.name: getattr(options, f.name) for f in fields(Facts) if getattr(options, f.name, None) is not None}
    return replace(Facts(), **given)


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind: Callable[[str], float] = float
    for one in fields(Facts):
        if one.name != "shared_rates":
            parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, help=f"default: {one.default}")
    parser.add_argument("--requests", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--check", type=Path, help="figures of make bench-ray")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    facts = facts_of(options)
    console.print(table([capacity(rate, facts) for rate in options.requests], "what a load takes"))
    console.print(table(check_arithmetic(facts), "the number of replicas, played"))
    if options.check:
        measured = json.loads(options.check.read_text(encoding="utf-8"))
        if rows := check_measured(measured, options.clients, options.texts):
            console.print(table(rows, "a second replica, played and measured"))
    if options.plot:
        draw(options.plot, facts)


if __name__ == "__main__":
    main()
