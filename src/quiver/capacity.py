"""How much waits and is at work, and how much may: values, as `types` has them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits for a model."""

    inputs: int
    tokens: int
    capacity_tokens: int
    seconds: float
    """How long it will take until a new input is computed, by the speed measured so far."""


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
