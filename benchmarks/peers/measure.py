"""One peer's turn in one round: started, asked for everything, ended."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from peers import exact
from peers.cells import POOL, REST_SECONDS, Asked, Cell, Texts, cells_of
from peers.child import Child, PeerFailed, busy_seconds, others_share
from peers.exact import Reference
from peers.peer import Peer
from peers.places import Places
from peers.results import Load, Turn
from peers.subject import Library, Server, rerank_load, running
from quiver.bench.load import Recording
from quiver.bench.results import Latency

WARM_UP = Cell("warm-up", "", clients=8)
ALONE = Cell("idle", "")
LIBRARY_WARM_UP = Cell("warm-up", "", batch=32)
RERANK = Cell("rerank", "16 documents to rank, 8 clients", "queries", clients=8, batch=16)
CALM_SHARE = 0.08
"""How busy others may keep the machine when a cell begins."""
CALM_WINDOW = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how much."""

    seconds: float
    slow_cells: bool
    largest_batch: int
    ready_seconds: float
    pool: int = POOL
    """Texts of a round."""
    patience_seconds: float
    """How long a cell waits for others to leave the machine alone; then it begins all the same."""


@dataclass(frozen=True, slots=True)
class Measurer:
    """Takes turns; `say` is told what is going on."""

    places: Places
    known: Reference
    settings: Settings
    say: Callable[[str], None]

    async def turn(self, peer: Peer, number: int, asked: Asked) -> Turn:
        """Measure one peer once; raises `PeerFailed`."""
        async with running(peer, self.places, ready_seconds=self.settings.ready_seconds) as subject:
            rss_ready = subject.child.rss()
            turn = Turn(
                peer=peer.name,
                round=number,
                startup_seconds=subject.startup_seconds,
                rss_ready=rss_ready,
                exactness=await exact.measure(subject.vectors, self.known),
            )
            await self._warm_up(subject, asked)
            cells = self._cells(peer)
            for number_of_cell, cell in enumerate(cells):
                texts = asked.kinds[cell.kind].rotated(number_of_cell / len(cells))
                load = partial(subject.load, cell, texts, seconds=self.settings.seconds)
                await self._load(turn, subject.child, cell, load)
            turn.idle_ms = {str(n): await self._idle(subject, texts) for n, texts in asked.idle.items()}
            turn.rested_ms = {str(n): await self._rested(subject, texts) for n, texts in asked.idle.items()}
            turn.rss_after = subject.child.rss()
        if peer.rerank:
            await self._rerank(turn, peer, asked)
        return turn

    def _cells(self, peer: Peer) -> list[Cell]:
        slow, batch = self.settings.slow_cells, self.settings.largest_batch
        return list(cells_of(is_server=peer.is_server, base64=peer.base64, slow=slow, batch=batch))

    async def _warm_up(self, subject: Server | Library, asked: Asked) -> None:
        cell = WARM_UP if isinstance(subject, Server) else LIBRARY_WARM_UP
        await subject.load(cell, asked.kinds["mixed"], seconds=self.settings.seconds / 3)

    async def _idle(self, subject: Server | Library, texts: Texts) -> float:
        """Ask for one text after another; returns the median of their milliseconds."""
        await calm(subject.child, self.settings.patience_seconds)
        return 1e3 * statistics.median(await _latencies(subject, texts))

    async def _rested(self, subject: Server | Library, texts: Texts) -> float:
        """The same, where the peer has had nothing to do before each text."""
        await calm(subject.child, self.settings.patience_seconds)
        found: list[float] = []
        for one in texts.each():
            await asyncio.sleep(REST_SECONDS)
            found += await _latencies(subject, one)
        return 1e3 * statistics.median(found)

    async def _load(self, turn: Turn, child: Child, cell: Cell, load: Callable[[], Awaitable[Recording]]) -> None:
        """Measure one cell, or note why there is nothing to measure."""
        self.say(f"{turn.peer}: {cell.title}")
        await calm(child, self.settings.patience_seconds)
        busy, cpu = busy_seconds(), child.cpu_seconds()
        recording = await load()
        cpu = child.cpu_seconds() - cpu
        others = others_share(busy, busy_seconds(), cpu + recording.cpu_seconds, recording.seconds)
        latency = Latency.of(recording.latencies)
        if latency is None:
            turn.notes[cell.name] = f"nothing was answered: {dict(recording.errors)}"
            return
        turn.loads[cell.name] = Load(
            texts=len(recording.latencies) * cell.batch,
            tokens=sum(recording.tokens),
            seconds=recording.seconds,
            cpu_seconds=cpu,
            p50_ms=latency.p50,
            p99_ms=latency.p99,
            failed=dict(recording.errors),
            client_us=1e6 * recording.cpu_seconds / len(recording.latencies),
            others=others,
        )

    async def _rerank(self, turn: Turn, peer: Peer, asked: Asked) -> None:
        """Start the peer once more, with the reranker; without it, all else still counts."""
        texts, seconds, ready = asked.kinds["queries"], self.settings.seconds, self.settings.ready_seconds
        try:
            async with running(peer, self.places, ready_seconds=ready, command=peer.rerank) as server:
                assert isinstance(server, Server), "only servers rerank. This is a bug."
                load = partial(rerank_load, server, texts, RERANK)
                await load(seconds=seconds / 3)
                await self._load(turn, server.child, RERANK, partial(load, seconds=seconds))
        except PeerFailed as failure:
            turn.notes[RERANK.name] = str(failure)


async def _latencies(subject: Server | Library, texts: Texts) -> list[float]:
    """Ask for each text once; returns the seconds that each took."""
    recording = await subject.load(ALONE, texts, seconds=float(1 << 20), calls=len(texts.texts))
    if not recording.latencies:
        raise PeerFailed(f"no text of {texts.tokens[0]} tokens was answered: {dict(recording.errors)}")
    return recording.latencies


async def calm(child: Child, patience_seconds: float) -> None:
    """Wait until others leave the machine alone, as long as the patience lasts."""
    end = time.perf_counter() + patience_seconds
    while time.perf_counter() < end:
        busy, cpu, start = busy_seconds(), child.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(CALM_WINDOW)
        own, seconds = child.cpu_seconds() - cpu, time.perf_counter() - start
        if others_share(busy, busy_seconds(), own, seconds) <= CALM_SHARE:
            return
