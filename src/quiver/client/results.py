"""What a server's answers are, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
T = TypeVar("T")

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
"""States that a batch does not leave."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a client has used of a server since it was made."""

    num_requests: int = 0
    """Those that were answered."""
    num_tokens: int = 0
    """Tokens that models read, where the reply told."""

    def __add__(self, other: "Used") -> "Used":
        return Used(self.num_requests + other.num_requests, self.num_tokens + other.num_tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """What all keys of the caller's user used in a month."""

    period: str
    """2026-07."""
    email: str = ""
    tier: str = ""
    quota: int | None = None
    """Embeddings that the tier has in a month; None: no bound."""
    used: int = 0
    """Embeddings that count towards it."""
    left: int | None = None
    """What is left of this month's; None where nothing bounds it, and for other months."""
    resets_at: int | None = None
    """Unix seconds when this month ends; None for other months."""
    requests: int = 0
    cached: int = 0
    """Embeddings that were known before."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document in its place."""

    index: int
    """Its place among those that were given."""
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    special: bool
    start: int | None = None
    """Where it begins in the text with its prompt, in bytes of UTF-8; None for a special token."""
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model that may be asked for."""

    id: str
    kind: str = "embed"
    """embed, rerank, classify, sparse or multi_vector."""
    state: str = "ready"
    """available, downloading, loading, ready or failed."""
    dimensions: int = 0
    max_tokens: int = 0
    prompts: Sequence[str] = ()
    """Names of the prompts that it knows."""
    backend: str = ""
    dtype: str = ""
    batch_invariant: bool = False
    """On the server's machine, a text's vector has the same bits alone and in any company."""


@dataclass(frozen=True, slots=True)
class Download:
    """How far a file is."""

    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """What one model is doing."""

    id: str
    state: str
    error: str = ""
    downloads: Sequence[Download] = ()


@dataclass(frozen=True, slots=True)
class Health:
    """The server at a glance."""

    status: str
    """starting, ok, stopping or failed."""
    version: str
    models: Sequence[ModelHealth] = ()

    @property
    def is_ok(self) -> bool:
        """Whether a request would be answered now."""
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class Counts:
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are embedded in the background, as it stood when it was asked for."""

    id: str
    status: str
    """validating, in_progress, finalizing, completed, failed, expired, cancelling or cancelled."""
    endpoint: str = ""
    created_at: int = 0
    """Unix seconds."""
    input_file_id: str = ""
    output_file_id: str | None = None
    error_file_id: str | None = None
    counts: Counts = field(default_factory=Counts)
    """Its lines, each of several texts."""
    errors: Sequence[str] = ()
    """Why it could not begin, if so."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED


def made(kind: type[T], told: Mapping[str, Any], **known: Any) -> T:
    """Make a value of what a reply tells of it: fields without a default must be there, None counts as absent."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # each kind is a dataclass
    given = {name: value for name, value in told.items() if name in names and value is not None}
    return kind(**(given | known))


def read_health(told: Mapping[str, Any]) -> Health:
    """Read the body of GET /health."""
    models = [
        made(ModelHealth, model, downloads=[made(Download, each) for each in model["downloads"]])
        for model in told["models"]
    ]
    return made(Health, told, models=models)


def read_batch(told: Mapping[str, Any]) -> Batch:
    """Read OpenAI's batch object."""
    faults = (told.get("errors") or {}).get("data") or []
    errors = [str(fault.get("message") or fault.get("code")) for fault in faults]
    return made(Batch, told, counts=made(Counts, told.get("request_counts") or {}), errors=errors)
