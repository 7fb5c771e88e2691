"""OpenAI's files: what batches are made of, and what they give.

https://platform.openai.com/docs/api-reference/files
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from quiver.api.call import Call, Reply, Route
from quiver.api.forms import Form
from quiver.errors import InvalidInput
from quiver.job import Page, StoredFile
from quiver.service import Service

DAY_SECONDS = 24 * 3600.0
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
MIN_EXPIRY, MAX_EXPIRY = 3600, 2_592_000
MAX_FILES = 10_000
MAX_NAME = 255


class File(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One file."""

    id: str
    object: Literal["file"] = msgspec.field(default_factory=lambda: "file")
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = msgspec.field(default_factory=lambda: "processed")
    expires_at: int | None = None


class FilesReply(msgspec.Struct):
    """Reply of GET /v1/files; `first_id` and `last_id` are null where the list is empty."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedReply(msgspec.Struct):
    """Reply of DELETE /v1/files/{id}."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Upload(msgspec.Struct):
    """Body of POST /v1/files, a form: the file, what it is for, and when it may go."""

    file: bytes
    purpose: str


async def upload(service: Service, call: Call) -> Reply:
    """Keep a file."""
    jobs, now = service.jobs, time.time()
    form = Form(call, file_field="file", max_bytes=jobs.config.max_file_bytes)
    new = StoredFile(
        id=f"file-{uuid.uuid4().hex}", owner=call.caller.account, filename="", purpose="batch", created_at=now
    )
    kept = await jobs.keep(new, form.file())
    try:
        seconds = _expiry(form.fields, jobs.config.file_days * DAY_SECONDS)
        named = replace(kept, filename=_basename(form.filename or ""), purpose=_purpose(form.fields.get("purpose")))
        await jobs.complete(replace(named, expires_at=now + seconds))
    except InvalidInput:
        await jobs.remove(kept)
        raise
    return Reply(200, msgspec.json.encode(_file(replace(named, expires_at=now + seconds))))


def _purpose(given: str | None) -> str:
    if given not in PURPOSES:
        raise InvalidInput(f"purpose is one of {', '.join(PURPOSES)}", param="purpose")
    return given


def _basename(name: str) -> str:
    """Return the last part of what a client calls a file: it is a name to show, never a path."""
    return name.replace("\\", "/").rpartition("/")[2][:MAX_NAME] or "file"


def _expiry(fields: dict[str, str], usual: float) -> float:
    given = fields.get("expires_after[seconds]")
    if given is None:
        return usual
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise InvalidInput("expires_after counts from created_at alone", param="expires_after.anchor")
    return expiry_seconds(int(given) if given.isdecimal() and len(given) <= len(str(MAX_EXPIRY)) else None)


def expiry_seconds(given: int | None) -> float:
    """Check how long a file is to be kept. Raises `InvalidInput`."""
    if given is None or not MIN_EXPIRY <= given <= MAX_EXPIRY:
        raise InvalidInput(f"seconds is a number from {MIN_EXPIRY} to {MAX_EXPIRY}", param="expires_after.seconds")
    return float(given)


async def list_files(service: Service, call: Call) -> Reply:
    """List files, the newest first unless told otherwise."""
    page = read_page(call, most=MAX_FILES, usual=MAX_FILES)
    found = await service.jobs.files(
        call.caller.account, call.query.get("purpose"), replace(page, limit=page.limit + 1)
    )
    shown, first, last, more = cut_page([_file(file) for file in found], page)
    return Reply(200, msgspec.json.encode(FilesReply("list", shown, first, last, more)))


async def retrieve(service: Service, call: Call) -> Reply:
    """Show a file."""
    return Reply(200, msgspec.json.encode(_file(await _find(service, call))))


async def content(service: Service, call: Call) -> Reply:
    """Send what is in a file."""
    file = await _find(service, call)
    headers = {"content-length": str(file.num_bytes), "x-content-type-options": "nosniff"}
    return Reply(200, b"", "application/octet-stream", headers, parts=service.jobs.read(file))


async def delete(service: Service, call: Call) -> Reply:
    """Remove a file."""
    file = await _find(service, call)
    await service.jobs.remove(file)
    return Reply(200, msgspec.json.encode(DeletedReply(file.id, "file", deleted=True)))


async def _find(service: Service, call: Call) -> StoredFile:
    return await service.jobs.file(call.params["id"], call.caller.account)


def _file(file: StoredFile) -> File:
    expires_at = None if file.expires_at is None else int(file.expires_at)
    return File(
        id=file.id,
        bytes=file.num_bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        expires_at=expires_at,
    )


class HasId(Protocol):
    """Something in a list."""

    id: str


T = TypeVar("T", bound=HasId)


def read_page(call: Call, *, most: int, usual: int) -> Page:
    """Read which part of a list is asked for. Raises `InvalidInput`."""
    text, order = call.query.get("limit", str(usual)), call.query.get("order", "desc")
    if not (text.isdecimal() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise InvalidInput(f"limit is a number from 1 to {most}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidInput("order is asc or desc", param="order")
    return Page(int(text), call.query.get("after") or None, newest_first=order == "desc")


def cut_page(found: Sequence[T], page: Page) -> tuple[list[T], str | None, str | None, bool]:
    """Return what of a list is shown, the ids of its first and last, and whether there is more."""
    shown = list(found[: page.limit])
    ids: list[Any] = [shown[0].id, shown[-1].id] if shown else [None, None]
    return shown, ids[0], ids[1], len(found) > page.limit


FILES = (
    Route("POST", "/v1/files", upload, "Upload a file", Upload, File, is_queued=True, is_upload=True),
    Route("GET", "/v1/files", list_files, "List files", reply=FilesReply),
    Route("GET", "/v1/files/{id}", retrieve, "Show a file", reply=File),
    Route("GET", "/v1/files/{id}/content", content, "Send what is in a file", media_type="application/octet-stream"),
    Route("DELETE", "/v1/files/{id}", delete, "Remove a file", reply=DeletedReply),
)
