"""Jobs, whose ever they are: what `quiver jobs` does, by JSON."""

from typing import Any

import msgspec

from quiver.admin.office import Office, written
from quiver.api.call import Call, Reply
from quiver.job import Job, Page
from quiver.service import Service

PAGE_JOBS = 50


class JobRow(msgspec.Struct, kw_only=True):
    """A job: how far it is, and when it began and ends; times are Unix seconds."""

    id: str
    kind: str
    state: str
    has_ended: bool
    owner: str
    total: int
    done: int
    failed: int
    retries: int
    created_at: float
    ended_at: float | None


class JobDetail(JobRow, kw_only=True):
    """A job with what is known of it beside."""

    opened_at: float | None
    closing_at: float | None
    expires_at: float
    facts: dict[str, str]
    errors: list[dict[str, Any]]
    """What was wrong with its file."""


class JobsReply(msgspec.Struct):
    """Reply of GET /api/jobs: a page of them, the newest first."""

    jobs: list[JobRow]
    after: str | None
    """What `?after=` takes to go on; null at the end."""


async def list_jobs(office: Office, service: Service, call: Call) -> Reply:
    """List jobs of every kind and owner, the newest first."""
    del office
    found = await service.jobs.all(Page(PAGE_JOBS + 1, call.query.get("after") or None))
    shown = found[:PAGE_JOBS]
    return written(JobsReply([_row(job) for job in shown], shown[-1].id if len(found) > PAGE_JOBS else None))


async def show_job(office: Office, service: Service, call: Call) -> Reply:
    """Show a job."""
    del office
    return written(_detail(await service.jobs.find(call.params["id"])))


async def cancel_job(office: Office, service: Service, call: Call) -> Reply:
    """Stop a job; what is done of it is kept."""
    del office
    job = await service.jobs.find(call.params["id"])
    return written(_detail(await service.jobs.cancel(job)))


FACTS = ("endpoint", "model", "input_file_id", "output_file_id", "error_file_id")
"""What is shown of that which a job's kind keeps."""


def _facts(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "state": str(job.state),
        "has_ended": job.state.has_ended,
        "owner": job.owner,
        "total": job.total,
        "done": job.done,
        "failed": job.failed,
        "retries": job.retries,
        "created_at": job.created_at,
        "ended_at": job.ended_at,
    }


def _row(job: Job) -> JobRow:
    return JobRow(**_facts(job))


def _detail(job: Job) -> JobDetail:
    return JobDetail(
        **_facts(job),
        opened_at=job.opened_at,
        closing_at=job.closing_at,
        expires_at=job.expires_at,
        facts={name: str(job.about[name]) for name in FACTS if job.about.get(name)},
        errors=list(job.about.get("errors") or ()),
    )
