"""The page's pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.cells import LIBRARY_CELLS, SERVER_CELLS
from peers.peer import Peer
from peers.results import Results, median
from quiver.bench.plot import BLUE, GREY, INK, require_plot

COLOURS = (BLUE, "#0d9488", "#ea580c", "#9333ea", "#dc2626", "#65a30d", GREY, INK)
LOADS = [cell for cell in SERVER_CELLS if cell.kind == "mixed" and cell.batch == 1 and cell.encoding == "float"]
COMPARED = ("clients-32", "queries", "passages", "batch-32")


def draw_all(results: Results, peers: Sequence[Peer], folder: Path) -> dict[str, str]:
    """Draw both pictures into a folder and return their files' names by what they show."""
    require_plot()
    there = [peer for peer in peers if peer.name in results.measured()]
    drawn = {"rates": _draw_rates(results, [p for p in there if p.is_server]), "ratios": _draw_ratios(results, there)}
    files = {name: f"peers-{name}.png" for name, figure in drawn.items() if figure}
    for name, file in files.items():
        drawn[name].savefig(folder / file)
    return files


def _draw_rates(results: Results, servers: Sequence[Peer]) -> Any:
    """Draw tokens a second over clients, a line for each server with its smallest and largest."""
    if not servers:
        return None
    figure, axes = _figure(1)
    for number, peer in enumerate(servers):
        found = {cell: _rates(results, peer.name, cell.name) for cell in LOADS}
        found = {cell: rates for cell, rates in found.items() if rates}
        x, colour = [cell.clients for cell in found], COLOURS[number % len(COLOURS)]
        middles = [median(rates) for rates in found.values()]
        ends = [[m - min(r), max(r) - m] for m, r in zip(middles, found.values(), strict=True)]
        bars = list(zip(*ends, strict=True)) if ends else None
        axes[0].errorbar(x, middles, yerr=bars, marker="o", ms=4, lw=1.6, capsize=2, color=colour, label=peer.title)
    axes[0].set_xscale("log")
    axes[0].set_xticks([cell.clients for cell in LOADS], [str(cell.clients) for cell in LOADS])
    axes[0].minorticks_off()
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))
    _dress(axes[0], "Mixed workload, one text in a request", "clients", "tokens/s")
    return figure


def _draw_ratios(results: Results, peers: Sequence[Peer]) -> Any:
    """Draw how many times a peer's throughput the baseline reaches, in a panel for each cell."""
    others = [p for p in peers if p.baseline in results.measured() and not p.name.startswith("quiver")]
    if not others:
        return None
    figure, axes = _figure(len(COMPARED))
    names = {cell.name: cell.title.partition(",")[0] for cell in (*LIBRARY_CELLS, *SERVER_CELLS)}
    for panel, cell in zip(axes, COMPARED, strict=True):
        ratios = [results.ratios(peer.name, peer.baseline, cell) for peer in others]
        panel.barh(range(len(others)), [median(some) if some else 0 for some in ratios], color=BLUE, height=0.6)
        panel.set_yticks(
            range(len(others)), [peer.title for peer in others] if panel is axes[0] else [""] * len(others)
        )
        panel.axvline(1, color=GREY, lw=1, ls="--")
        panel.invert_yaxis()
        _dress(panel, names[cell], "× the peer", "")
    return figure


def _rates(results: Results, peer: str, cell: str) -> list[float]:
    return [turn.loads[cell].rate for turn in results.of(peer).values() if cell in turn.loads]


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(visible=True, color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
