"""RunPod's job API.

https://docs.runpod.io/serverless/endpoints/operation-reference
"""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from quiver.api.call import Call, Dialect, Handler, Reply, Route, decode_json, refuse
from quiver.api.runpod_worker import JobInput, error_object, work
from quiver.errors import InvalidInput, QuiverError
from quiver.jobs import Job, JobRequest, JobState
from quiver.service import Service
from quiver.types import Caller, Priority

DAY_MS = 24 * 60 * 60 * 1000
WAIT_MS = 90_000
MAX_WAIT_MS = 300_000
KEEP_SECONDS = 30 * 60.0
KEEP_SYNC_SECONDS = 60.0
WORKER = "quiver"
"""There is one worker: this process."""


class Policy(msgspec.Struct, rename="camel"):
    """How long a job may run, how long it matters, in milliseconds, and whether others go first."""

    execution_timeout: Annotated[int, Meta(ge=5000, le=7 * DAY_MS)] | None = None
    ttl: Annotated[int, Meta(ge=10_000, le=7 * DAY_MS)] | None = None
    low_priority: bool | None = None


class Envelope(msgspec.Struct):
    """What stands around a job's input, which is read when the job runs."""

    input: Raw | UnsetType = UNSET
    policy: Policy | None = None
    webhook: str | None = None


class JobBody(msgspec.Struct):
    """Body of POST /run and /runsync; the fields of `input` may stand without it, too."""

    input: JobInput
    policy: Policy | None = None


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


STATES = {
    JobState.QUEUED: "IN_QUEUE",
    JobState.RUNNING: "IN_PROGRESS",
    JobState.COMPLETED: "COMPLETED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "CANCELLED",
    JobState.TIMED_OUT: "TIMED_OUT",
}


async def run(service: Service, call: Call) -> Reply:
    """Take a job; its result is asked for later."""
    job = _submit(service, call, f"{uuid4()}-u1", Priority.BULK, KEEP_SECONDS)
    return _encode(JobReply(id=job.id, status=STATES[job.state]))


async def run_sync(service: Service, call: Call) -> Reply:
    """Take a job and wait for its result; what takes longer is asked for later."""
    job = _submit(service, call, f"sync-{uuid4()}-u1", Priority.INTERACTIVE, KEEP_SYNC_SECONDS)
    try:
        return _render(await service.jobs.wait(job.id, _wait_seconds(call)))
    except asyncio.CancelledError:
        service.jobs.cancel(job.id)  # the client has gone, and nobody else knows the id
        raise


def _submit(service: Service, call: Call, job_id: str, priority: Priority, keep_seconds: float) -> Job:
    envelope = decode_json(call, Envelope)
    if envelope.webhook:
        raise InvalidInput("this server calls nobody back: leave webhook out and ask /status", param="webhook")
    policy = envelope.policy or Policy()
    given = b"" if envelope.input is UNSET else bytes(envelope.input)
    # The SDK sends what has an `input` of its own without an envelope.
    job_call = replace(call, body=given) if given.startswith(b"{") else call
    job_call = replace(job_call, caller=Caller(call.caller.id))  # the policy has its deadlines
    priority = Priority.BULK if policy.low_priority else priority
    return service.jobs.submit(
        job_id,
        JobRequest(
            work=partial(work, service, job_call, priority),
            num_bytes=len(job_call.body),
            priority=priority,
            timeout_seconds=(policy.execution_timeout or 600_000) / 1000,
            ttl_seconds=(policy.ttl or DAY_MS) / 1000,
            keep_seconds=keep_seconds,
        ),
    )


async def status(service: Service, call: Call) -> Reply:
    """Show a job as it stands."""
    return _render(service.jobs.get(call.params["id"]))


async def status_sync(service: Service, call: Call) -> Reply:
    """Show a job once it has ended, or after some time."""
    return _render(await service.jobs.wait(call.params["id"], _wait_seconds(call)))


async def stream(service: Service, call: Call) -> Reply:
    """Show what of a job's output has not been read yet."""
    output = service.jobs.read_once(call.params["id"])
    state = service.jobs.get(call.params["id"]).state
    if state is JobState.CANCELLED:
        state = JobState.FAILED  # the SDK would go on asking for ever
    return _encode(StreamReply(STATES[state], [] if output is None else [Chunk(Raw(output))]))


async def cancel(service: Service, call: Call) -> Reply:
    """Stop a job."""
    job = service.jobs.cancel(call.params["id"])
    return _encode(JobReply(id=job.id, status=STATES[job.state]))


async def retry(service: Service, call: Call) -> Reply:
    """Do a job that has failed once more."""
    job = service.jobs.retry(call.params["id"])
    return _encode(JobReply(id=job.id, status=STATES[job.state]))


async def purge_queue(service: Service, call: Call) -> Reply:
    """Cancel the jobs that have not begun."""
    del call
    return _encode(PurgeReply(service.jobs.purge(), "completed"))


async def health(service: Service, call: Call) -> Reply:
    """Count jobs and workers."""
    del call
    counts = service.jobs.counts
    loading, broken, busy = service.is_loading(), service.fault() is not None, counts.running > 0
    able = not (loading or broken)
    workers = WorkerCounts(
        idle=int(able and not busy),
        initializing=int(loading and not broken),
        ready=int(able),
        running=int(able and busy),
        throttled=0,
        unhealthy=int(broken),
    )
    jobs = JobCounts(counts.completed, counts.failed, counts.running, counts.queued, counts.retried)
    return _encode(HealthReply(jobs, workers))


async def ping(service: Service, call: Call) -> Reply:
    """Tell a load balancer: 200 ready, 204 still loading, anything else broken."""
    del call
    if service.is_loading() and service.fault() is None:
        return Reply(204, b"")
    await service.check_ready()
    return _encode(PingReply("healthy"))


def _wait_seconds(call: Call) -> float:
    text = call.query.get("wait", "")[:10]  # more digits are as good as these
    milliseconds = int(text) if text.isdecimal() else WAIT_MS
    return min(max(milliseconds, 1000), MAX_WAIT_MS) / 1000


def _render(job: Job) -> Reply:
    output = Raw(job.output) if job.output is not None else None
    return _encode(
        JobReply(
            delay_time=_milliseconds(job.delay_seconds),
            execution_time=_milliseconds(job.execution_seconds),
            id=job.id,
            output=error_object(job.error) if job.error else output,
            error=_sentence(job.error) if job.error else None,
            status=STATES[job.state],
            worker_id=None if job.started_at is None else WORKER,
        )
    )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _encode(reply: msgspec.Struct) -> Reply:
    return Reply(200, msgspec.json.encode(reply))


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error about a call; what is wrong with a job stands in its reply."""
    del status
    return msgspec.json.encode(ErrorReply(_sentence(error)))


def _sentence(error: QuiverError) -> str:
    """Say what is wrong, and with which field: there is no other place for that."""
    named = error.param is None or error.param in error.message
    return error.message if named else f"{error.param}: {error.message}"


def runpod_dialect(openai: Dialect) -> Dialect:
    """Return RunPod's API around OpenAI's, which RunPod's gateway has under every endpoint."""
    routes = [replace(route, is_queued=True) for route in _routes()]
    gateway = [
        replace(
            route,
            path=f"/v2/{{endpoint}}/openai{route.path}",
            handler=_refusing_as(openai, route.handler),
            error=openai.error,
        )
        for route in openai.routes
        if route.path.startswith("/v1/")
    ]
    ping_route = Route(
        "GET", "/ping", ping, "Tell a load balancer: 200 ready, 204 loading", reply=PingReply, public=True
    )
    return Dialect(
        name="runpod",
        routes=[*routes, *(replace(r, path=f"/v2/{{endpoint}}{r.path}") for r in routes), *gateway, ping_route],
        render_error=render_error,
        error=ErrorReply,
    )


def _refusing_as(shape: Dialect, handler: Handler) -> Handler:
    """Return a handler whose errors have the shape of another dialect."""

    async def handle(service: Service, call: Call) -> Reply:
        try:
            return await handler(service, call)
        except QuiverError as error:
            return refuse(shape, error)

    return handle


def _routes() -> list[Route]:
    """Ops that only look may be asked for with POST as well: RunPod's own test server takes nothing else."""
    return [
        Route("POST", "/run", run, "Take a job", JobBody, JobReply),
        Route("POST", "/runsync", run_sync, "Take a job and wait for its result", JobBody, JobReply),
        *(
            Route(method, path, handler, summary, reply=reply)
            for path, handler, summary, reply in (
                ("/status/{id}", status, "Show a job", JobReply),
                ("/status-sync/{id}", status_sync, "Show a job once it has ended", JobReply),
                ("/stream/{id}", stream, "Show the output that has not been read yet", StreamReply),
            )
            for method in ("GET", "POST")
        ),
        Route("POST", "/cancel/{id}", cancel, "Stop a job", reply=JobReply),
        Route("POST", "/retry/{id}", retry, "Do a job that has failed once more", reply=JobReply),
        Route("POST", "/purge-queue", purge_queue, "Cancel the jobs that have not begun", reply=PurgeReply),
        Route("GET", "/health", health, "Count jobs and workers", reply=HealthReply),
    ]
