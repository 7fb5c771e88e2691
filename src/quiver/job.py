"""Jobs, their lines, and files, as values. Times are Unix seconds.

    READING ──> OPEN ──────────────────────> COMPLETED
       │          ├──> CANCELLING ─────────> CANCELLED
       │          └──> EXPIRING ───────────> EXPIRED
       └──> FAILED

A line waits, runs, and is then done or failed; it is in a job's output once, whatever is killed when.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from quiver.errors import QuiverError
from quiver.types import Caller


class JobState(StrEnum):
    """What becomes of a job."""

    READING = "reading"
    """Its lines are being read from a file."""
    OPEN = "open"
    """Its lines wait or run."""
    CANCELLING = "cancelling"
    EXPIRING = "expiring"
    """Lines that were not done are being closed."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self in ENDS


ENDS = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
CLOSING = {JobState.CANCELLING: JobState.CANCELLED, JobState.EXPIRING: JobState.EXPIRED}
"""What a job becomes once all of its lines are closed."""


class LineState(IntEnum):
    """What becomes of a line."""

    WAITING = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work that outlasts a request."""

    id: str
    kind: str
    owner: str = ""
    """The account that it belongs to; "" where there are none."""
    caller: str = "local"
    key_id: str | None = None
    """The key that it was made with."""
    state: JobState = JobState.OPEN
    about: dict[str, Any] = field(default_factory=dict)
    """What its kind knows of it, as JSON has it."""
    created_at: float = 0.0
    opened_at: float | None = None
    closing_at: float | None = None
    """When it was cancelled, or its time ran out."""
    ended_at: float | None = None
    expires_at: float = math.inf
    """When it is of no use any more."""
    keep_seconds: float = 1800.0
    """How long it is known once it has ended."""
    total: int = 0
    done: int = 0
    failed: int = 0
    retries: int = 0

    @property
    def gives_files(self) -> bool:
        """Whether its lines become files: one that was not done says there why not."""
        return "output_file_id" in self.about


@dataclass(frozen=True, slots=True)
class NewLine:
    """A line that nobody has begun; its number is its place in the job, from 1."""

    number: int
    custom_id: str
    request: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it is given to whoever does it."""

    id: int
    job_id: str
    number: int
    custom_id: str
    request: bytes
    attempts: int = 1
    """How often it was begun, this time included."""
    state: LineState = LineState.RUNNING
    started_at: float | None = None
    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a line: its result as it stands in the job's output, or why there is none."""

    result: bytes
    is_done: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that was uploaded, or what the lines of a job gave."""

    id: str
    owner: str = ""
    filename: str
    purpose: str
    num_bytes: int = 0
    created_at: float = 0.0
    expires_at: float | None = None
    job_id: str | None = None
    """The job whose lines it is made of; None: it was uploaded."""
    line_state: LineState | None = None
    """Which of them."""


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Jobs by what became of them."""

    queued: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    """Those whose time ran out, too."""
    retried: int = 0


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is to be done, by all servers of a database."""

    jobs: int = 0
    """That have not ended."""
    waiting: int = 0
    running: int = 0
    """Lines."""
    oldest_at: float | None = None
    """When that job came of which a line waits for the longest time."""


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted."""

    limit: int
    after: str | None = None
    newest_first: bool = True


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a file that should be a job's lines."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class UnreadableLines(Exception):
    """A file cannot be the lines of a job."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Kind:
    """What jobs of one kind do; made by the dialect whose jobs they are."""

    do: Callable[[Job, Line, Caller], Awaitable[Outcome]]
    """Does a line. Raises `Unavailable` where there is no room now: the line waits."""
    refuse: Callable[[Job, Line, QuiverError], Outcome]
    """Writes why a line could not be done."""
    read: Callable[[Job, AsyncIterator[bytes]], AsyncIterator[Sequence[NewLine]]] | None = None
    """Reads the lines out of a file, some at a time. Raises `UnreadableLines`."""
    describe: Callable[[Job, Line | None], bytes] | None = None
    """Writes what a webhook is told."""
