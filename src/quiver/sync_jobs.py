"""Jobs whose clients wait for them: done at once, or in turn, their results kept for a while.

They live in memory and end with the process; `jobs.py` has those that outlive it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

import structlog

from quiver.errors import DeadlineExceeded, InvalidInput, NotReady, Overloaded, QuiverError, UnknownJob
from quiver.telemetry.observer import Figure
from quiver.types import Priority

log = structlog.get_logger(__name__)

Work = Callable[[], Awaitable[bytes]]
"""What a job does; gives its output."""


class JobState(StrEnum):
    """What a job is doing, or how it ended."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


ENDS = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncJobRequest:
    """Work to do in the background, and for how long it matters."""

    work: Work
    owner: str = ""
    """The account that it belongs to: to any other, it is as if there were no such job."""
    num_bytes: int = 0
    """What it holds in memory."""
    priority: Priority = Priority.BULK
    """Bulk jobs take turns; an interactive one begins at once."""
    timeout_seconds: float = 600.0
    """The longest that it may run."""
    ttl_seconds: float = 86400.0
    """The longest that it may wait and run."""
    keep_seconds: float = 1800.0
    """How long it is known once it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncJob:
    """A job as it stands; times are seconds of a clock that has no date."""

    id: str
    queued_at: float
    state: JobState = JobState.QUEUED
    started_at: float | None = None
    ended_at: float | None = None
    output: bytes | None = None
    error: QuiverError | None = None

    @property
    def delay_seconds(self) -> float | None:
        """How long it waited, once it has started."""
        return None if self.started_at is None else self.started_at - self.queued_at

    @property
    def execution_seconds(self) -> float | None:
        """How long it ran, once it has ended."""
        return None if self.started_at is None or self.ended_at is None else self.ended_at - self.started_at


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Jobs that wait and run now, and those that have ended since the start."""

    queued: int
    running: int
    completed: int
    failed: int
    """Timed out ones, too."""
    retried: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A job, and what only its keeper knows of it."""

    job: SyncJob
    request: SyncJobRequest
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: bool = False
    task: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None

    @property
    def num_bytes(self) -> int:
        return self.request.num_bytes + len(self.job.output or b"")


class SyncJobs:
    """Owns every job; used on one event loop, and closed before what its jobs work with."""

    def __init__(self, *, max_running: int = 32, max_jobs: int = 10_000, max_bytes: int = 1 << 30) -> None:
        self._turns = asyncio.Semaphore(max_running)
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._open: dict[str, _Entry] = {}
        self._ended: dict[str, _Entry] = {}
        """The one that ended first stands first."""
        self._endings: Counter[JobState] = Counter()
        self._num_retried = 0

    @property
    def counts(self) -> JobCounts:
        """Tell how many there are, and were."""
        states = Counter(entry.job.state for entry in self._open.values())
        return JobCounts(
            queued=states[JobState.QUEUED],
            running=states[JobState.RUNNING],
            completed=self._endings[JobState.COMPLETED],
            failed=self._endings[JobState.FAILED] + self._endings[JobState.TIMED_OUT],
            retried=self._num_retried,
        )

    def figures(self) -> Sequence[Figure]:
        """Tell how many there are, and what became of those that have ended."""
        counts, endings = self.counts, {str(state): self._endings[state] for state in ENDS}
        now = {"waiting": counts.queued, "running": counts.running}
        return (
            Figure("quiver_sync_jobs", "Jobs whose clients wait for them.", now, "state"),
            Figure("quiver_sync_jobs_ended", "Jobs whose clients waited for them.", endings, "how", counted=True),
        )

    def submit(self, job_id: str, request: SyncJobRequest) -> SyncJob:
        """Take a job. Raises `Overloaded` if too many wait already."""
        self._make_room(num_jobs=1, num_bytes=request.num_bytes)
        if len(self._open) >= self._max_jobs or self._num_bytes + request.num_bytes > self._max_bytes:
            raise Overloaded(f"{len(self._open)} jobs are waiting already: come back later", retry_after_seconds=5)
        entry = _Entry(SyncJob(id=job_id, queued_at=time.monotonic()), request)
        self._open[job_id] = entry
        self._num_bytes += entry.num_bytes
        entry.task = asyncio.create_task(self._run(entry))
        return entry.job

    def has(self, job_id: str, owner: str = "") -> bool:
        """Whether an owner's job is known."""
        entry = self._open.get(job_id) or self._ended.get(job_id)
        return entry is not None and entry.request.owner == owner

    def get(self, job_id: str, owner: str = "") -> SyncJob:
        """Return a job as it stands. Raises `UnknownJob`."""
        return self._find(job_id, owner).job

    async def wait(self, job_id: str, seconds: float, owner: str = "") -> SyncJob:
        """Return a job once it has ended, or as it stands after some time. Raises `UnknownJob`."""
        entry = self._find(job_id, owner)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await entry.ended.wait()
        return entry.job

    def read_once(self, job_id: str, owner: str = "") -> bytes | None:
        """Return a job's output to the first who asks after it has ended. Raises `UnknownJob`."""
        entry = self._find(job_id, owner)
        if entry.is_read:
            return None
        entry.is_read = entry.job.output is not None
        return entry.job.output

    def cancel(self, job_id: str, owner: str = "") -> SyncJob:
        """Stop a job that has not ended. Raises `UnknownJob`."""
        entry = self._find(job_id, owner)
        if job_id in self._open:
            self._cancel(entry)
        return entry.job

    def retry(self, job_id: str, owner: str = "") -> SyncJob:
        """Do a job that has failed once more. Raises `UnknownJob`, or `InvalidInput` if it has not."""
        entry = self._find(job_id, owner)
        if entry.job.state not in (JobState.FAILED, JobState.TIMED_OUT):
            raise InvalidInput(f"the job has not failed, it is {entry.job.state}: submit it anew")
        self._forget(entry)
        self._num_retried += 1
        return self.submit(job_id, entry.request)

    def purge(self, owner: str = "") -> int:
        """Cancel whatever of an owner's has not begun; returns how many that were."""
        owned = [entry for entry in self._open.values() if entry.request.owner == owner]
        queued = [entry for entry in owned if entry.job.state is JobState.QUEUED]
        for entry in queued:
            self._cancel(entry)
        return len(queued)

    async def close(self) -> None:
        """Stop whatever waits or runs, and forget the rest."""
        tasks = [entry.task for entry in self._open.values() if entry.task]
        for entry in tuple(self._open.values()):
            self._cancel(entry)
        for entry in tuple(self._ended.values()):
            self._forget(entry)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _cancel(self, entry: _Entry) -> None:
        if entry.task:
            entry.task.cancel()
            self._end(entry, JobState.CANCELLED)

    def _find(self, job_id: str, owner: str) -> _Entry:
        entry = self._open.get(job_id) or self._ended.get(job_id)
        if entry is None or entry.request.owner != owner:
            raise UnknownJob(f"there is no job {job_id!r}: it never was, or ended too long ago")
        return entry

    async def _run(self, entry: _Entry) -> None:
        request = entry.request
        try:
            async with asyncio.timeout(request.ttl_seconds):
                async with self._turns if request.priority is Priority.BULK else nullcontext():
                    output = await self._attempt(entry)
            self._end(entry, JobState.COMPLETED, output=output)
        except TimeoutError:
            limits = f"{request.timeout_seconds:g} s to run, {request.ttl_seconds:g} s in all"
            self._end(entry, JobState.TIMED_OUT, error=DeadlineExceeded(f"not done within its time: {limits}"))
        except DeadlineExceeded as error:
            self._end(entry, JobState.TIMED_OUT, error=error)
        except QuiverError as error:
            self._end(entry, JobState.FAILED, error=error)
        except Exception:
            log.exception("a job failed", job=entry.job.id)
            self._end(entry, JobState.FAILED, error=QuiverError("the server failed; the log says why"))

    async def _attempt(self, entry: _Entry) -> bytes:
        """Do the work; where there is no room for it now, wait instead of failing: that is what a queue is for."""
        while True:
            entry.job = replace(entry.job, state=JobState.RUNNING, started_at=time.monotonic())
            try:
                async with asyncio.timeout(entry.request.timeout_seconds):
                    return await entry.request.work()
            except (Overloaded, NotReady) as busy:
                entry.job = replace(entry.job, state=JobState.QUEUED, started_at=None)
                await asyncio.sleep(busy.retry_after_seconds)

    def _end(
        self, entry: _Entry, state: JobState, *, output: bytes | None = None, error: QuiverError | None = None
    ) -> None:
        job_id = entry.job.id
        if self._open.get(job_id) is not entry:
            return  # it was cancelled while it ended
        self._make_room(num_bytes=len(output or b""))
        del self._open[job_id]
        self._num_bytes += len(output or b"")
        self._endings[state] += 1
        entry.job = replace(entry.job, state=state, ended_at=time.monotonic(), output=output, error=error)
        entry.expiry = asyncio.get_running_loop().call_later(entry.request.keep_seconds, self._forget, entry)
        self._ended[job_id] = entry
        entry.ended.set()

    def _make_room(self, *, num_bytes: int, num_jobs: int = 0) -> None:
        """Forget what ended longest ago, as far as that is needed."""
        while self._ended and (
            len(self._open) + len(self._ended) + num_jobs > self._max_jobs
            or self._num_bytes + num_bytes > self._max_bytes
        ):
            self._forget(next(iter(self._ended.values())))

    def _forget(self, entry: _Entry) -> None:
        del self._ended[entry.job.id]
        self._num_bytes -= entry.num_bytes
        if entry.expiry:
            entry.expiry.cancel()
