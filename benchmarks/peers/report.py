"""The page: ratios first, then the figures that they come from, then how to get them again."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from peers.cells import IDLE_TOKENS, LIBRARY_CELLS, REST_SECONDS, SERVER_CELLS, Cell
from peers.peer import Peer
from peers.promises import CLIENTS, Promise, promises
from peers.results import Load, Results, Turn, median

BEGIN = "<!-- measured: peers -->"
END = "<!-- end -->"
MARKED = re.compile(rf"{BEGIN}\n.*?{END}", re.DOTALL)
NOTHING = "–"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
UNMEASURED = "No run is recorded here yet: `make bench-peers` writes this part."
RELIABLE_ROUNDS = 5
DISTURBED = 0.05
"""Share of the machine, taken by others, above which a run is called disturbed."""

PICTURES = {
    "rates": "Throughput of the servers over the number of clients",
    "ratios": "How many times a peer's throughput Quiver reaches",
}


def render(results: Results | None, peers: Sequence[Peer], pictures: Mapping[str, str]) -> str:
    """Return the generated part of the page, its marks included; `pictures` are files by what they show."""
    body = UNMEASURED if results is None or not results.turns else "\n\n".join(_parts(results, peers, pictures))
    return f"{BEGIN}\n\n{body}\n\n{END}"


def put_into(page: str, part: str) -> str:
    """Return the page with its generated part replaced; raises `ValueError` where it has no place for one."""
    if len(MARKED.findall(page)) != 1:
        raise ValueError(f"the page needs one {BEGIN} … {END}")
    return MARKED.sub(lambda _: part, page)


def _parts(results: Results, peers: Sequence[Peer], pictures: Mapping[str, str]) -> Iterable[str]:
    there = [peer for peer in peers if peer.name in results.measured()]
    servers = [peer for peer in there if peer.is_server]
    libraries = [peer for peer in there if not peer.is_server]
    yield _about(results)
    if kept := list(promises(results, peers)):
        yield f"### What is promised\n\n{_promises(kept)}"
    for kind, some, cells in (("Servers", servers, SERVER_CELLS), ("Libraries, in process", libraries, LIBRARY_CELLS)):
        if some:
            yield _ratios(results, some, cells, kind)
    yield from (f"![{PICTURES[name]}]({file})" for name, file in pictures.items())
    if servers:
        yield f"### Servers: tokens a second\n\n{_rates(results, servers, SERVER_CELLS)}"
        yield f"### Servers: milliseconds of a request, p50 and p99\n\n{_waits(results, servers)}"
    if libraries:
        yield f"### Libraries: tokens a second\n\n{_rates(results, libraries, LIBRARY_CELLS)}"
    yield f"### Idle: milliseconds for one text (p50)\n\n{_idle(results, there, lambda turn: turn.idle_ms)}"
    rested = _idle(results, there, lambda turn: turn.rested_ms)
    yield f"### The same after {REST_SECONDS * 1e3:g} ms of rest before each text\n\n{rested}"
    yield f"### What it costs\n\n{_costs(results, there)}"
    yield f"### Vectors\n\n{_vectors(results, there)}"
    yield f"### How each was run\n\n{_commands(results, there)}"
    yield from _left_out(results, peers)


def _about(results: Results) -> str:
    about, rounds = results.about, len({turn.round for turn in results.turns})
    disturbed = max(load.others for turn in results.turns for load in turn.loads.values())
    middle = median([load.others for turn in results.turns for load in turn.loads.values()])
    client = max(load.client_us for turn in results.turns for load in turn.loads.values())
    how = f"Medians of {rounds} interleaved round{'s' * (rounds > 1)}, {about.seconds:g} seconds a cell"
    lines = [
        f"{about.machine}; {about.system}; {about.date}. {how}; in brackets the smallest and the largest.",
        f"Others took {middle:.1%} of the machine in the median cell, {disturbed:.0%} in the worst.",
        f"Our client took at most {client:,.0f} µs of processor time for a request.",
    ]
    if rounds < RELIABLE_ROUNDS:
        lines.append(f"**A trial, not a measurement:** fewer than {RELIABLE_ROUNDS} rounds.")
    if middle > DISTURBED:
        lines.append("**Disturbed:** the machine was not this run's alone; run it again on a quiet one.")
    return "\n".join(lines)


def _ratios(results: Results, peers: Sequence[Peer], cells: Sequence[Cell], kind: str) -> str:
    base = next((peer for peer in peers if peer.name == peer.baseline), None)
    if base is None:
        return f"### {kind}: no ratios, since Quiver was not measured"
    head = f"### {kind}: how many times its throughput {base.title} reaches\n\n"
    others = [peer for peer in peers if peer is not base]
    return head + _table(peers_of(others), cells, lambda peer, cell: _spread(results.ratios(peer, base.name, cell), 2))


def peers_of(peers: Sequence[Peer]) -> dict[str, str]:
    """Return titles by names."""
    return {peer.name: peer.title for peer in peers}


def _rates(results: Results, peers: Sequence[Peer], cells: Sequence[Cell]) -> str:
    def rate(peer: str, cell: str) -> str:
        loads = _loads(results, peer, cell)
        failed = sum(sum(load.failed.values()) for load in loads)
        return _spread([load.rate for load in loads], 0) + (f", {failed} failed" if failed else "")

    return _table(peers_of(peers), cells, rate)


def _table(titles: Mapping[str, str], cells: Sequence[Cell], figure: Callable[[str, str], str]) -> str:
    rows = ([title, *(figure(name, cell.name) for cell in cells)] for name, title in titles.items())
    return table(["", *(cell.title for cell in cells)], rows)


def _promises(kept: Sequence[Promise]) -> str:
    rows = ([one.about, one.bar, one.found, "met" if one.kept else "**missed**"] for one in kept)
    return table(["", "bar", "measured; of a peer that has less, its share of ours", ""], rows)


def _waits(results: Results, peers: Sequence[Peer]) -> str:
    def wait(peer: str, cell: str) -> str:
        loads = _loads(results, peer, cell)
        middles = (median([load.p50_ms for load in loads]), median([load.p99_ms for load in loads]))
        return " / ".join(f"{ms:,.1f}" for ms in middles) if loads else NOTHING

    return _table(peers_of(peers), CLIENTS, wait)


def _idle(results: Results, peers: Sequence[Peer], figures: Callable[[Turn], Mapping[str, float]]) -> str:
    def one(peer: Peer, tokens: int) -> str:
        found = (figures(turn).get(str(tokens)) for turn in results.of(peer.name).values())
        return _spread([ms for ms in found if ms is not None], 1)

    rows = ([peer.title, *(one(peer, n) for n in IDLE_TOKENS)] for peer in peers)
    return table(["", *(f"{n} tokens" for n in IDLE_TOKENS)], rows)


def _costs(results: Results, peers: Sequence[Peer]) -> str:
    head = ["", "ready after, s", "RSS ready, MB", "RSS after, MB", "CPU s / 1,000 texts", "documents ranked / s"]
    return table(head, ([peer.title, *_cost(results, peer)] for peer in peers))


def _cost(results: Results, peer: Peer) -> Iterable[str]:
    figures: Sequence[tuple[Callable[[Turn], float], int]] = (
        (lambda turn: turn.startup_seconds, 1),
        (lambda turn: turn.rss_ready / 1e6, 0),
        (lambda turn: turn.rss_after / 1e6, 0),
    )
    turns = list(results.of(peer.name).values())
    yield from (_spread([figure(turn) for turn in turns], digits) for figure, digits in figures)
    cell = "clients-32" if peer.is_server else "batch-32"
    yield _spread([1e3 * load.cpu_seconds / load.texts for load in _loads(results, peer.name, cell)], 1)
    yield _spread([load.rate for load in _loads(results, peer.name, "rerank")], 0)


def _vectors(results: Results, peers: Sequence[Peer]) -> str:
    head = ["", "least cosine", "median cosine", "largest error", "same bits in any company", "largest move"]
    return table(head, ([peer.title, *_exactness(list(results.of(peer.name).values()))] for peer in peers))


def _exactness(turns: Sequence[Turn]) -> Iterable[str]:
    """The worst of all rounds."""
    found = [turn.exactness for turn in turns]
    yield f"{min(one.least_cosine for one in found):.7f}"
    yield f"{min(one.median_cosine for one in found):.7f}"
    yield f"{max(one.largest_error for one in found):.1e}"
    yield f"{min(one.steady for one in found):.0%} of {found[0].texts}"
    yield f"{max(one.largest_move for one in found):.1e}"


def _commands(results: Results, peers: Sequence[Peer]) -> str:
    rows = []
    for peer in peers:
        versions = ", ".join(f"{name} {version}" for name, version in results.versions.get(peer.name, {}).items())
        command = " ".join(_shown(word) for word in peer.command)
        rows.append([peer.title, f"{peer.about} `{command}`", versions or NOTHING])
    return table(["", "how", "versions"], rows)


def _shown(word: str) -> str:
    """Show a word of a command without its braces: what is a value in capitals."""
    word = word.replace("{bin}/", "").replace("{python}", "python")
    return PLACEHOLDER.sub(lambda match: match[1].upper(), word)


def _left_out(results: Results, peers: Sequence[Peer]) -> Iterable[str]:
    """Say who is not in the tables, and which cells are not, and why."""
    titles = peers_of(peers)
    rows = [[titles.get(name, name), "all of it", why] for name, why in results.missing.items()]
    notes = {(turn.peer, cell): why for turn in results.turns for cell, why in turn.notes.items()}
    rows += [[titles.get(name, name), cell, why] for (name, cell), why in notes.items()]
    if rows:
        yield "### Not measured\n\n" + table(["", "what", "why"], rows)


def _loads(results: Results, peer: str, cell: str) -> list[Load]:
    return [turn.loads[cell] for turn in results.of(peer).values() if cell in turn.loads]


def _spread(values: Sequence[float], digits: int) -> str:
    """Show the median, and the ends where there are several."""
    if not values:
        return NOTHING
    middle = f"{median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay cells out as Markdown."""
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_page(path: Path, part: str) -> None:
    """Put the generated part into a page; a page that is not there yet holds nothing else."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    path.write_text(put_into(page, part), encoding="utf-8")
