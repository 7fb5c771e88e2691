"""What came out: plain values that go to JSON and come back, so that a long run may be split."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec


class Load(msgspec.Struct, kw_only=True):
    """One cell of one turn."""

    texts: int
    tokens: int
    seconds: float
    cpu_seconds: float
    """Processor time of the peer, with its children."""
    p50_ms: float
    p99_ms: float
    failed: dict[str, int] = {}
    client_us: float = 0.0
    """Processor time of our client for each request."""
    others: float = 0.0
    """Share of the machine that neither the peer nor the client took meanwhile."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Exactness(msgspec.Struct, kw_only=True):
    """How near vectors come to the float64 reference, and whether company changes them."""

    texts: int
    least_cosine: float
    median_cosine: float
    largest_error: float
    """Largest difference of any element from the reference."""
    steady: float
    """Share of the texts whose vector has the same bits alone and in every company that was tried."""
    largest_move: float
    """Largest difference of any element between two companies."""


class Turn(msgspec.Struct, kw_only=True):
    """One peer in one round."""

    peer: str
    round: int
    startup_seconds: float
    rss_ready: int
    rss_after: int = 0
    exactness: Exactness
    loads: dict[str, Load] = {}
    """By cell."""
    idle_ms: dict[str, float] = {}
    """p50 of single texts one after another, by their tokens."""
    rested_ms: dict[str, float] = {}
    """The same after a rest before each."""
    notes: dict[str, str] = {}
    """By cell: why it could not be measured."""


class About(msgspec.Struct, kw_only=True):
    """Where and how it was measured; a run that is resumed must agree in all of it."""

    machine: str
    system: str
    seconds: float
    largest_batch: int
    slow_cells: bool
    date: str = ""


class Results(msgspec.Struct, kw_only=True):
    """A whole run."""

    about: About
    versions: dict[str, dict[str, str]] = {}
    """By peer: its packages."""
    missing: dict[str, str] = {}
    """By peer: why it was not measured."""
    turns: list[Turn] = []

    def has(self, peer: str, number: int) -> bool:
        """Tell whether a turn is there already."""
        return any(turn.peer == peer and turn.round == number for turn in self.turns)

    def of(self, peer: str) -> dict[int, Turn]:
        """Return a peer's turns by their rounds."""
        return {turn.round: turn for turn in self.turns if turn.peer == peer}

    def measured(self) -> list[str]:
        """Name the peers that have turns."""
        return list(dict.fromkeys(turn.peer for turn in self.turns))

    def ratios(self, peer: str, base: str, cell: str) -> list[float]:
        """Return how many times the peer's rate the baseline reached in a cell, round by round."""
        return list(self._pairs(peer, base, cell))

    def _pairs(self, peer: str, base: str, cell: str) -> Iterator[float]:
        bases = self.of(base)
        for number, turn in self.of(peer).items():
            one, other = turn.loads.get(cell), bases[number].loads.get(cell) if number in bases else None
            if one and other and one.tokens:
                yield other.rate / one.rate

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a run from its file."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """Write the run so that a kill in the midst leaves the old file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        part.replace(path)


def median(values: Sequence[float]) -> float:
    """Return the middle one, NaN of none."""
    return statistics.median(values) if values else float("nan")
