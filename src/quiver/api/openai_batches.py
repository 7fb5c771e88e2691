"""OpenAI's batches: a file of calls in, a file of replies out.

https://platform.openai.com/docs/api-reference/batch
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

from quiver.api.batch_lines import Reader
from quiver.api.call import JSON, Call, Reply, Route, decode_json
from quiver.api.openai_files import DAY_SECONDS, cut_page, expiry_seconds, read_page
from quiver.errors import DeadlineExceeded, InvalidInput, QuiverError, UnknownFile, UnknownModel
from quiver.job import Fault, Job, JobState, Kind, Line, NewLine, Outcome, UnreadableLines
from quiver.service import Service
from quiver.types import Caller

KIND = "batch"
ENDPOINTS: Mapping[str, str] = {"/v1/embeddings": "/openai/v1/embeddings", "/v1/rerank": "/v1/rerank"}
"""Where a line of a batch for an endpoint is answered."""
WINDOW_SECONDS = DAY_SECONDS
MAX_BATCHES, USUAL_BATCHES = 100, 20
MAX_PAIRS = 16


class ExpiresAfter(msgspec.Struct):
    """How long the files that a batch gives are kept."""

    anchor: Literal["created_at"]
    seconds: int


class BatchBody(msgspec.Struct):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(msgspec.Struct):
    """What is wrong with a file, and where."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(msgspec.Struct):
    """All that is wrong with a file."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(msgspec.Struct):
    """Lines by what became of them."""

    total: int
    completed: int
    failed: int


class Batch(msgspec.Struct, kw_only=True):
    """One batch; times are Unix seconds."""

    id: str
    object: Literal["batch"] = msgspec.field(default_factory=lambda: "batch")
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchesReply(msgspec.Struct):
    """Reply of GET /v1/batches."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class LineReply(msgspec.Struct):
    """What was answered to a line."""

    status_code: int
    request_id: str
    body: Raw


class LineError(msgspec.Struct):
    """Why a line was not answered at all."""

    code: str
    message: str


class OutputLine(msgspec.Struct):
    """A line of the files that a batch gives."""

    id: str
    custom_id: str
    response: LineReply | None
    error: LineError | None


STATUSES = {
    JobState.READING: "validating",
    JobState.OPEN: "in_progress",
    JobState.CANCELLING: "cancelling",
    JobState.EXPIRING: "finalizing",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.EXPIRED: "expired",
}


async def create(service: Service, call: Call) -> Reply:
    """Take a batch; its file is read and checked behind the reply."""
    body = decode_json(call, BatchBody)
    if body.endpoint not in ENDPOINTS:
        raise InvalidInput(f"endpoint is {' or '.join(ENDPOINTS)}, not {body.endpoint[:64]!r}", param="endpoint")
    if body.completion_window != "24h":
        raise InvalidInput("completion_window is 24h", param="completion_window")
    if len(body.metadata or ()) > MAX_PAIRS:
        raise InvalidInput(f"metadata has at most {MAX_PAIRS} pairs", param="metadata")
    await _check_file(service, call.caller, body.input_file_id)
    given, days = body.output_expires_after, service.jobs.config.file_days
    about = msgspec.to_builtins(body) | {
        "output_file_id": f"file-{uuid.uuid4().hex}",
        "error_file_id": f"file-{uuid.uuid4().hex}",
        "output_seconds": expiry_seconds(given.seconds) if given else days * DAY_SECONDS,
    }
    job = Job(
        id=f"batch_{uuid.uuid4().hex}",
        kind=KIND,
        owner=call.caller.account,
        caller=call.caller.id,
        key_id=call.caller.key.id if call.caller.key else None,
        state=JobState.READING,
        about=about,
        keep_seconds=days * DAY_SECONDS,
    )
    return _encode(await service.jobs.add(job, seconds=WINDOW_SECONDS))


async def _check_file(service: Service, caller: Caller, file_id: str) -> None:
    try:
        file = await service.jobs.file(file_id, caller.account)
    except UnknownFile as error:
        raise UnknownFile(error.message, param="input_file_id") from error
    if file.purpose != "batch":
        raise InvalidInput(f"the file's purpose is {file.purpose}: upload it for batch", param="input_file_id")


async def list_batches(service: Service, call: Call) -> Reply:
    """List batches, the newest first."""
    page = read_page(call, most=MAX_BATCHES, usual=USUAL_BATCHES)
    found = await service.jobs.listed(KIND, call.caller.account, replace(page, limit=page.limit + 1))
    shown, first, last, more = cut_page([_batch(job) for job in found], page)
    return Reply(200, msgspec.json.encode(BatchesReply("list", shown, first, last, more)))


async def retrieve(service: Service, call: Call) -> Reply:
    """Show a batch."""
    return _encode(await _find(service, call))


async def cancel(service: Service, call: Call) -> Reply:
    """Stop a batch; what is done by then is in its files."""
    job = await _find(service, call)
    if job.state.has_ended:
        raise InvalidInput(f"the batch is {STATUSES[job.state]} already", param="id")
    return _encode(await service.jobs.cancel(job))


async def _find(service: Service, call: Call) -> Job:
    return await service.jobs.get(call.params["id"], call.caller.account, KIND)


def _encode(job: Job) -> Reply:
    return Reply(200, msgspec.json.encode(_batch(job)))


def _batch(job: Job) -> Batch:
    about, ended = job.about, _seconds(job.ended_at)
    has_files = job.state.has_ended
    faults = [BatchError(**fault) for fault in about.get("errors", ())]
    state = job.state
    return Batch(
        id=job.id,
        endpoint=about["endpoint"],
        model=about.get("model"),
        errors=BatchErrors("list", faults) if faults else None,
        input_file_id=about["input_file_id"],
        completion_window=about["completion_window"],
        status=STATUSES[state],
        output_file_id=about["output_file_id"] if has_files and job.done else None,
        error_file_id=about["error_file_id"] if has_files and job.failed else None,
        created_at=int(job.created_at),
        in_progress_at=_seconds(job.opened_at),
        expires_at=int(job.expires_at),
        finalizing_at=_seconds(job.closing_at)
        if job.closing_at and not _was_cancelled(state)
        else _after(state, ended),
        completed_at=ended if state is JobState.COMPLETED else None,
        failed_at=ended if state is JobState.FAILED else None,
        expired_at=ended if state is JobState.EXPIRED else None,
        cancelling_at=_seconds(job.closing_at) if _was_cancelled(state) else None,
        cancelled_at=ended if state is JobState.CANCELLED else None,
        request_counts=RequestCounts(job.total, job.done, job.failed),
        metadata=about.get("metadata"),
    )


def _after(state: JobState, ended: int | None) -> int | None:
    return ended if state in (JobState.COMPLETED, JobState.EXPIRED) else None


def _was_cancelled(state: JobState) -> bool:
    return state in (JobState.CANCELLING, JobState.CANCELLED)


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


def batch_kind(do: Callable[[Call], Awaitable[Reply]], service: Service) -> Kind:
    """Return what batches do: each line is a call, answered as if it had come alone."""

    async def do_line(job: Job, line: Line, caller: Caller) -> Outcome:
        path = ENDPOINTS[job.about["endpoint"]]
        reply = await do(Call("POST", path, {"content-type": JSON}, line.request, peer=job.caller, caller=caller))
        request_id = f"req_{uuid.uuid4().hex}"
        response = LineReply(reply.status, request_id, Raw(reply.body))
        return _written(job, line, response, None, is_done=reply.status < 400)  # noqa: PLR2004  HTTP's

    async def read(job: Job, parts: AsyncIterator[bytes]) -> AsyncIterator[Sequence[NewLine]]:
        reader = Reader(job.about["endpoint"], service.jobs.config.max_batch_lines)
        checked = False
        async for lines in reader.lines(parts):
            if not checked:
                _check_model(service, reader.model)
                checked = True
            yield lines

    return Kind(do_line, _refused, read)


def _check_model(service: Service, model: str | None) -> None:
    try:
        service.model(model)
    except UnknownModel as error:
        raise UnreadableLines([Fault("model_not_found", error.message, 1, "body.model")]) from error


def _refused(job: Job, line: Line, error: QuiverError) -> Outcome:
    code = error.code
    if job.state is JobState.CANCELLING:
        code = "batch_cancelled"
    elif job.state is JobState.EXPIRING or isinstance(error, DeadlineExceeded):
        code = "batch_expired"
    return _written(job, line, None, LineError(code, error.message), is_done=False)


def _written(job: Job, line: Line, response: LineReply | None, error: LineError | None, *, is_done: bool) -> Outcome:
    line_id = f"batch_req_{job.id.removeprefix('batch_')}{line.number:06d}"
    return Outcome(msgspec.json.encode(OutputLine(line_id, line.custom_id, response, error)), is_done)


BATCHES = (
    Route("POST", "/v1/batches", create, "Do the calls of a file", BatchBody, Batch),
    Route("GET", "/v1/batches", list_batches, "List batches", reply=BatchesReply),
    Route("GET", "/v1/batches/{id}", retrieve, "Show a batch", reply=Batch),
    Route("POST", "/v1/batches/{id}/cancel", cancel, "Stop a batch", reply=Batch),
)
