"""What Quiver promises beside its peers, and whether a run kept it; each figure is a median of ratios within rounds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from peers.cells import IDLE_TOKENS, SERVER_CELLS
from peers.peer import Peer
from peers.results import Results, Turn, median

OURS, IN_8_BITS = "quiver", "quiver-int8"
INFINITY = ("infinity-onnx", "infinity-torch")
CLIENTS = tuple(cell for cell in SERVER_CELLS if cell.name.startswith("clients-"))

Side = tuple[Sequence[str], str]
"""Some peers and a cell: the best of them in a round counts."""
Cost = Callable[[Turn], float | None]
"""A figure of which less is better; None where it was not measured."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the table."""

    about: str
    bar: str
    found: str
    kept: bool


def promises(results: Results, peers: Sequence[Peer]) -> Iterator[Promise]:
    """Yield those that this run can tell of."""
    busy = "clients-32"
    for about, bar, ours, theirs in (
        ("32 clients, Infinity's better engine", 3.0, OURS, (INFINITY, busy)),
        ("the same, in 8 bits", 4.0, IN_8_BITS, (INFINITY, busy)),
        ("32 clients, sentence-transformers in process", 1.15, OURS, (("sentence-transformers",), "batch-1024")),
        ("32 clients, FastEmbed in process", 4.0, OURS, (("fastembed",), "batch-1024")),
    ):
        if ratios := list(_times(results, ((ours,), busy), theirs)):
            times = median(ratios)
            yield Promise(f"throughput with {about}", f"≥ {bar:g} ×", f"{times:.2f} ×", times >= bar)
    servers = [peer for peer in peers if peer.is_server]
    yield from _below(results, servers, "latency of requests below every server's", _latencies())
    yield from _below(results, servers, "latency of an idle server below every server's", _idle())
    yield from _below(results, peers, "memory after all of it below every peer's", [("", lambda turn: turn.rss_after)])
    yield from _below(results, peers, "ready sooner than every peer", [("", lambda turn: turn.startup_seconds)])


def _times(results: Results, ours: Side, theirs: Side) -> Iterator[float]:
    for number in results.of(ours[0][0]):
        one, other = _best(results, ours, number), _best(results, theirs, number)
        if one and other:
            yield one / other


def _best(results: Results, side: Side, number: int) -> float:
    names, cell = side
    turns = [turn for name in names if (turn := results.of(name).get(number))]
    return max((turn.loads[cell].rate for turn in turns if cell in turn.loads), default=0.0)


def _below(results: Results, peers: Sequence[Peer], about: str, costs: Sequence[tuple[str, Cost]]) -> Iterator[Promise]:
    """Compare with each peer in each of some costs, and name those that have less."""
    others = [peer for peer in peers if peer.name in results.measured() and not peer.name.startswith(OURS)]
    if not others or not results.of(OURS):
        return
    found = [
        f"{peer.title}{what and f' ({what})'}: {times:.2f} ×"
        for peer in others
        for what, cost in costs
        if (times := _share(results, peer.name, cost)) < 1
    ]
    yield Promise(about, "all", "; ".join(found) or "below all", not found)


def _share(results: Results, peer: str, cost: Cost) -> float:
    """Return a peer's cost as a share of ours."""
    ours, shares = results.of(OURS), []
    for number, turn in results.of(peer).items():
        one, other = cost(ours[number]) if number in ours else None, cost(turn)
        if one and other is not None:
            shares.append(other / one)
    return median(shares) if shares else 1.0


def _latencies() -> list[tuple[str, Cost]]:
    def p50(cell: str) -> Cost:
        return lambda turn: turn.loads[cell].p50_ms if cell in turn.loads else None

    def p99(cell: str) -> Cost:
        return lambda turn: turn.loads[cell].p99_ms if cell in turn.loads else None

    return [(f"{cell.title}, {name}", of(cell.name)) for cell in CLIENTS for name, of in (("p50", p50), ("p99", p99))]


def _idle() -> list[tuple[str, Cost]]:
    def alone(tokens: int) -> Cost:
        return lambda turn: turn.idle_ms.get(str(tokens))

    def rested(tokens: int) -> Cost:
        return lambda turn: turn.rested_ms.get(str(tokens))

    ways = (("", alone), (" after a rest", rested))
    return [(f"{tokens} tokens{name}", of(tokens)) for tokens in IDLE_TOKENS for name, of in ways]
