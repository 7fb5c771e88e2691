"""What RunPod's job API reads and writes: envelopes, states, and a job as it stands."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from quiver import sync_jobs
from quiver.api.runpod_worker import JobInput, WorkerError, error_object
from quiver.errors import DeadlineExceeded, QuiverError
from quiver.job import Job, JobState, Line, LineState
from quiver.sync_jobs import SyncJob

DAY_MS = 24 * 60 * 60 * 1000
WORKER = "quiver"
"""There is one worker: this process."""


class Policy(msgspec.Struct, rename="camel"):
    """How long a job may run, how long it matters, in milliseconds, and whether others go first."""

    execution_timeout: Annotated[int, Meta(ge=5000, le=7 * DAY_MS)] | None = None
    ttl: Annotated[int, Meta(ge=10_000, le=7 * DAY_MS)] | None = None
    low_priority: bool | None = None

    @property
    def execution_seconds(self) -> float:
        """The longest that the job may run."""
        return (self.execution_timeout or 600_000) / 1000

    @property
    def ttl_seconds(self) -> float:
        """The longest that it may wait and run."""
        return (self.ttl or DAY_MS) / 1000


class Envelope(msgspec.Struct):
    """What stands around a job's input, which is read when the job runs."""

    input: Raw | UnsetType = UNSET
    policy: Policy | None = None
    webhook: str | None = None


class JobBody(msgspec.Struct):
    """Body of POST /run and /runsync; the fields of `input` may stand without it, too."""

    input: JobInput
    policy: Policy | None = None
    webhook: str | None = None


class JobReply(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """A job as it stands; times are milliseconds."""

    delay_time: int | None = None
    execution_time: int | None = None
    id: str
    output: Any = None
    """What the job gave: of one that has failed, an error object."""
    error: str | None = None
    status: str
    worker_id: str | None = None


class Told(JobReply, kw_only=True, rename="camel", omit_defaults=True):
    """What a webhook is told."""

    input: Any = None
    webhook: str | None = None


class Chunk(msgspec.Struct):
    """A part of a job's output."""

    output: Any


class StreamReply(msgspec.Struct):
    """Reply of /stream: what has not been read yet."""

    status: str
    stream: list[Chunk]


class PurgeReply(msgspec.Struct):
    """Reply of POST /purge-queue."""

    removed: int
    status: Literal["completed"]


class JobCounts(msgspec.Struct, rename="camel"):
    """Jobs by what has become of them."""

    completed: int
    failed: int
    in_progress: int
    in_queue: int
    retried: int


class WorkerCounts(msgspec.Struct):
    """Workers by what they do."""

    idle: int
    initializing: int
    ready: int
    running: int
    throttled: int
    unhealthy: int


class PingReply(msgspec.Struct):
    """Reply of GET /ping."""

    status: Literal["healthy"]


class HealthReply(msgspec.Struct):
    """Reply of GET /health."""

    jobs: JobCounts
    workers: WorkerCounts


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str


class Failure(msgspec.Struct):
    """The result of a job that has failed, as it is kept."""

    error: str
    output: WorkerError
    is_late: bool = False


SYNC_STATES = {
    sync_jobs.JobState.QUEUED: "IN_QUEUE",
    sync_jobs.JobState.RUNNING: "IN_PROGRESS",
    sync_jobs.JobState.COMPLETED: "COMPLETED",
    sync_jobs.JobState.FAILED: "FAILED",
    sync_jobs.JobState.CANCELLED: "CANCELLED",
    sync_jobs.JobState.TIMED_OUT: "TIMED_OUT",
}


def describe_sync(job: SyncJob) -> JobReply:
    """Write a job that is in memory."""
    return JobReply(
        delay_time=_milliseconds(job.delay_seconds),
        execution_time=_milliseconds(job.execution_seconds),
        id=job.id,
        output=error_object(job.error) if job.error else None if job.output is None else Raw(job.output),
        error=sentence(job.error) if job.error else None,
        status=SYNC_STATES[job.state],
        worker_id=None if job.started_at is None else WORKER,
    )


def describe(job: Job, line: Line | None) -> JobReply:
    """Write a job that is on disk, by its one line."""
    started_at = line.started_at if line else None
    reply = JobReply(
        delay_time=None if started_at is None else _milliseconds(started_at - job.created_at),
        execution_time=None if started_at is None or job.ended_at is None else _milliseconds(job.ended_at - started_at),
        id=job.id,
        status=_status(job, line),
        worker_id=None if started_at is None else WORKER,
    )
    if job.state is JobState.EXPIRED:
        error = DeadlineExceeded(f"not done within its time: {job.expires_at - job.created_at:g} s in all")
        reply.error, reply.output = sentence(error), error_object(error)
    elif line and line.result is not None and job.state is JobState.COMPLETED:
        _add_result(reply, line)
    return reply


def _add_result(reply: JobReply, line: Line) -> None:
    if line.state is LineState.DONE:
        reply.output = Raw(line.result or b"null")
        return
    failure = msgspec.json.decode(line.result or b"", type=Failure)
    reply.error, reply.output = failure.error, failure.output
    reply.status = "TIMED_OUT" if failure.is_late else "FAILED"


def _status(job: Job, line: Line | None) -> str:
    match job.state:
        case JobState.COMPLETED:
            return "COMPLETED"
        case JobState.CANCELLED:
            return "CANCELLED"
        case JobState.EXPIRED:
            return "TIMED_OUT"
        case _:
            return "IN_PROGRESS" if line and line.state is LineState.RUNNING else "IN_QUEUE"


def told(job: Job, line: Line | None) -> bytes:
    """Write what a webhook is told: the job as it stands, what it was given, and the webhook itself."""
    reply = msgspec.structs.asdict(describe(job, line))
    return msgspec.json.encode(Told(**reply, input=Raw(line.request) if line else None, webhook=job.about["webhook"]))


def failure_of(error: QuiverError) -> bytes:
    """Write why a job has failed, as it is kept."""
    return msgspec.json.encode(Failure(sentence(error), error_object(error), isinstance(error, DeadlineExceeded)))


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds * 1000))


def sentence(error: QuiverError) -> str:
    """Say what is wrong, and with which field: there is no other place for that."""
    named = error.param is None or error.param in error.message
    return error.message if named else f"{error.param}: {error.message}"
