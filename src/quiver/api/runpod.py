"""RunPod's job API.

https://docs.runpod.io/serverless/endpoints/operation-reference

A job of /runsync is in memory: its client waits for it. One of /run is on disk, and so is one with a webhook.
"""

import asyncio
import math
from dataclasses import replace
from functools import partial
from uuid import uuid4

import msgspec
from msgspec import UNSET

from quiver import webhook
from quiver.api.call import JSON, Call, Dialect, Handler, Reply, Route, decode_json, refuse
from quiver.api.runpod_wire import (
    Chunk,
    Envelope,
    ErrorReply,
    HealthReply,
    JobBody,
    JobCounts,
    JobReply,
    PingReply,
    Policy,
    PurgeReply,
    StreamReply,
    WorkerCounts,
    describe,
    describe_sync,
    failure_of,
    sentence,
    told,
)
from quiver.api.runpod_worker import work
from quiver.errors import DeadlineExceeded, InvalidInput, QuiverError
from quiver.job import Job, Kind, Line, NewLine, Outcome
from quiver.service import Service
from quiver.sync_jobs import SyncJob, SyncJobRequest
from quiver.types import Caller, Priority

KIND = "runpod"
GATEWAY = ("/v1/embeddings", "/v1/models")
"""What of OpenAI's API RunPod's gateway has under every endpoint."""
WAIT_MS = 90_000
MAX_WAIT_MS = 300_000
KEEP_SECONDS = 30 * 60.0
KEEP_SYNC_SECONDS = 60.0


async def run(service: Service, call: Call) -> Reply:
    """Take a job; its result is asked for later."""
    envelope, given = _read(service, call)
    job = await _add(service, call, f"{uuid4()}-u1", envelope, given)
    return _encode(JobReply(id=job.id, status="IN_QUEUE"))


async def run_sync(service: Service, call: Call) -> Reply:
    """Take a job and wait for its result; what takes longer is asked for later."""
    envelope, given = _read(service, call)
    job_id, seconds = f"sync-{uuid4()}-u1", _wait_seconds(call)
    if envelope.webhook:
        return _encode(await _waited(service, await _add(service, call, job_id, envelope, given), seconds))
    job = _submit(service, replace(call, body=given), job_id, envelope.policy or Policy())
    try:
        return _encode(describe_sync(await service.jobs.sync.wait(job.id, seconds, call.caller.account)))
    except asyncio.CancelledError:
        service.jobs.sync.cancel(job.id, call.caller.account)  # the client has gone, and nobody else knows the id
        raise


def _read(service: Service, call: Call) -> tuple[Envelope, bytes]:
    """Return a job's envelope and its input. Raises `InvalidInput`."""
    envelope = decode_json(call, Envelope)
    if envelope.webhook:
        if not service.jobs.config.webhooks:
            raise InvalidInput("this server calls nobody back: leave webhook out and ask /status", param="webhook")
        webhook.check_address(envelope.webhook)
    given = b"" if envelope.input is UNSET else bytes(envelope.input)
    # The SDK sends what has an `input` of its own without an envelope.
    return envelope, given if given.startswith(b"{") else call.body


async def _add(service: Service, call: Call, job_id: str, envelope: Envelope, given: bytes) -> Job:
    policy = envelope.policy or Policy()
    about = {"execution_seconds": policy.execution_seconds}
    job = Job(
        id=job_id,
        kind=KIND,
        owner=call.caller.account,
        caller=call.caller.id,
        key_id=call.caller.key.id if call.caller.key else None,
        about=about | ({"webhook": envelope.webhook} if envelope.webhook else {}),
        keep_seconds=KEEP_SECONDS,
    )
    return await service.jobs.add(job, [NewLine(1, "", given)], seconds=policy.ttl_seconds)


def _submit(service: Service, call: Call, job_id: str, policy: Policy) -> SyncJob:
    priority = Priority.BULK if policy.low_priority else Priority.INTERACTIVE
    call = replace(call, caller=replace(call.caller, deadline=math.inf))  # the policy has its deadlines
    return service.jobs.sync.submit(
        job_id,
        SyncJobRequest(
            work=partial(work, service, call, priority),
            owner=call.caller.account,
            num_bytes=len(call.body),
            priority=priority,
            timeout_seconds=policy.execution_seconds,
            ttl_seconds=policy.ttl_seconds,
            keep_seconds=KEEP_SYNC_SECONDS,
        ),
    )


def runpod_kind(service: Service) -> Kind:
    """Return what jobs of /run do: what the worker does with their input."""

    async def do(job: Job, line: Line, caller: Caller) -> Outcome:
        seconds = job.about["execution_seconds"]
        call = Call("POST", "/run", {"content-type": JSON}, line.request, caller=caller)
        try:
            async with asyncio.timeout(seconds):
                return Outcome(await work(service, call, Priority.BULK))
        except TimeoutError as error:
            raise DeadlineExceeded(f"not done within its time: {seconds:g} s to run") from error

    def refused(job: Job, line: Line, error: QuiverError) -> Outcome:
        del job, line
        return Outcome(failure_of(error), is_done=False)

    return Kind(do, refused, describe=told)


async def status(service: Service, call: Call) -> Reply:
    """Show a job as it stands."""
    return _encode(await _find(service, call, 0))


async def status_sync(service: Service, call: Call) -> Reply:
    """Show a job once it has ended, or after some time."""
    return _encode(await _find(service, call, _wait_seconds(call)))


async def _find(service: Service, call: Call, seconds: float) -> JobReply:
    """Return a job as it stands once it has ended, or after some time. Raises `UnknownJob`."""
    job_id, owner = call.params["id"], call.caller.account
    if service.jobs.sync.has(job_id, owner):
        return describe_sync(await service.jobs.sync.wait(job_id, seconds, owner))
    return await _waited(service, await _get(service, call), seconds)


async def _get(service: Service, call: Call) -> Job:
    return await service.jobs.get(call.params["id"], call.caller.account, KIND)


async def _waited(service: Service, job: Job, seconds: float) -> JobReply:
    if seconds:
        job = await service.jobs.wait(job, seconds)
    return describe(job, await service.jobs.line(job))


async def stream(service: Service, call: Call) -> Reply:
    """Show what of a job's output has not been read yet."""
    found, is_unread = await _find(service, call, 0), False
    if found.status == "COMPLETED":
        jobs, owner = service.jobs, call.caller.account
        if jobs.sync.has(found.id, owner):
            is_unread = jobs.sync.read_once(found.id, owner) is not None
        else:
            is_unread = await jobs.stream_once(await _get(service, call))
    # At `CANCELLED` the SDK would go on asking for ever.
    status = "FAILED" if found.status == "CANCELLED" else found.status
    return _encode(StreamReply(status, [Chunk(found.output)] if is_unread else []))


async def cancel(service: Service, call: Call) -> Reply:
    """Stop a job."""
    job_id, owner, jobs = call.params["id"], call.caller.account, service.jobs
    if jobs.sync.has(job_id, owner):
        status = describe_sync(jobs.sync.cancel(job_id, owner)).status
    else:
        status = (await _waited(service, await jobs.cancel(await _get(service, call)), 0)).status
    return _encode(JobReply(id=job_id, status=status))


async def retry(service: Service, call: Call) -> Reply:
    """Do a job that has failed once more."""
    job_id, owner, jobs = call.params["id"], call.caller.account, service.jobs
    if jobs.sync.has(job_id, owner):
        jobs.sync.retry(job_id, owner)
    else:
        await jobs.retry(await _get(service, call))
    return _encode(JobReply(id=job_id, status="IN_QUEUE"))


async def purge_queue(service: Service, call: Call) -> Reply:
    """Cancel the jobs that have not begun."""
    owner = call.caller.account
    removed = service.jobs.sync.purge(owner) + await service.jobs.purge(KIND, owner)
    return _encode(PurgeReply(removed, "completed"))


async def health(service: Service, call: Call) -> Reply:
    """Count jobs and workers."""
    kept, sync = await service.jobs.counts(KIND, call.caller.account), service.jobs.sync.counts
    loading, broken = service.is_loading(), service.fault() is not None
    able, busy = not (loading or broken), kept.running + sync.running > 0
    workers = WorkerCounts(
        idle=int(able and not busy),
        initializing=int(loading and not broken),
        ready=int(able),
        running=int(able and busy),
        throttled=0,
        unhealthy=int(broken),
    )
    jobs = JobCounts(
        completed=kept.completed + sync.completed,
        failed=kept.failed + sync.failed,
        in_progress=kept.running + sync.running,
        in_queue=kept.queued + sync.queued,
        retried=kept.retried + sync.retried,
    )
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


def _encode(reply: msgspec.Struct) -> Reply:
    return Reply(200, msgspec.json.encode(reply))


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error about a call; what is wrong with a job stands in its reply."""
    del status
    return msgspec.json.encode(ErrorReply(sentence(error)))


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
        if route.path.startswith(GATEWAY)
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
