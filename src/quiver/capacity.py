"""How much waits and is at work, and how much may: values, as `types` has them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits for a model."""

    inputs: int
    tokens: int
    capacity_tokens: int
    seconds: float
    """How long it will take until a new input is computed, by the speed measured so far."""
    tokens_per_second: float = 0.0
    """That speed (0: not loaded)."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What waits for a model's lanes, and what they do."""

    waiting_inputs: int = 0
    waiting_tokens: int = 0
    overdue_seconds: float = 0.0
    """For how long what is due first has been due."""
    lanes: int = 0
    busy_lanes: int = 0


@dataclass(slots=True)
class Places:
    """How many requests may be at work at once, and how many are."""

    limit: int
    taken: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much the server takes, and what it does with more."""

    client_batch_size: int
    """Most inputs in one request."""
    waiting_tokens: int
    """Most tokens that may wait for a model."""
    truncate: bool
    """What happens to an over-long input where a request does not say: it is cut, or refused."""
    encoders: int
    """Threads that turn texts into tokens."""


@dataclass(frozen=True, slots=True)
class Load:
    """How full the server is when it refuses a request."""

    queue: Queue
    """Of the model that was asked for; where that is not known yet, of the one for which the least waits."""
    places: Places | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the process holds and the machine has, in bytes; 0 where the system does not say."""

    resident_bytes: int
    limit_bytes: int
    """What the process should hold at most."""
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime of models, as it is installed."""

    version: str
    path: Path
    min_version: str
    """The oldest that is known to do."""
    is_supported: bool
    providers: tuple[str, ...]
    """Where it can compute."""
