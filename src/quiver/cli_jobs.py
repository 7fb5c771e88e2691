"""The commands of jobs: batches and RunPod jobs in the database, whichever server does their lines.

SQLAlchemy is imported when one of them runs: no other command waits for it.
"""

import time
from typing import Annotated, Any

import typer

from quiver.cli_database import WHERE, opened_database
from quiver.cli_settings import Command, run_async, with_settings
from quiver.cli_values import moment, say, show
from quiver.config import Config
from quiver.errors import UnknownJob
from quiver.job import Job, Page

jobs = typer.Typer(no_args_is_help=True, help="Look at batches and RunPod jobs, and stop them.")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as its API gave it.")]


@jobs.command("list", cls=Command)
@with_settings(*WHERE)
def list_jobs(
    *,
    kind: Annotated[str, typer.Option(help="Only batch, or only runpod.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 50,
    as_json: AsJson = False,
    settings: Config,
) -> None:
    """List jobs, the newest first."""
    show([_line(job) for job in run_async(_list(settings, kind, limit))], as_json=as_json)


async def _list(settings: Config, kind: str, limit: int) -> list[Job]:
    from quiver.db import JobRows  # noqa: PLC0415  late, as the head of this file says

    async with opened_database(settings) as opened:
        return await JobRows(opened).listed(kind or None, None, Page(limit))


@jobs.command("show", cls=Command)
@with_settings(*WHERE)
def show_job(job_id: JobId, *, as_json: AsJson = False, settings: Config) -> None:
    """Show a job: its counts, its times, and what was wrong with its file."""
    job = run_async(_find(settings, job_id))
    facts = _line(job) | {name: moment(getattr(job, name)) for name in ("opened_at", "closing_at", "expires_at")}
    facts |= {name: job.about.get(name) for name in ("endpoint", "input_file_id", "output_file_id", "error_file_id")}
    if as_json:
        show([facts | {"errors": job.about.get("errors", [])}], as_json=True)
        return
    show([{"fact": name, "value": value} for name, value in facts.items() if value is not None], as_json=False)
    for fault in job.about.get("errors", []):
        say(f"line {fault['line']}: {fault['code']}: {fault['message']}")


async def _find(settings: Config, job_id: str) -> Job:
    from quiver.db import JobRows  # noqa: PLC0415  late, as the head of this file says

    async with opened_database(settings) as opened:
        job = await JobRows(opened).get(job_id)
    if job is None:
        raise UnknownJob(f"there is no job {job_id!r}: `quiver jobs list` shows those that there are")
    return job


@jobs.command("cancel", cls=Command)
@with_settings(*WHERE)
def cancel_job(job_id: JobId, *, settings: Config) -> None:
    """Stop a job; what is done of it is kept. A server of the same database closes its lines within seconds."""
    job = run_async(_cancel(settings, job_id))
    say(f"{job.id} is {job.state}: {job.done} of {job.total} lines are done.")


async def _cancel(settings: Config, job_id: str) -> Job:
    from quiver.db import JobRows  # noqa: PLC0415  late, as the head of this file says

    job = await _find(settings, job_id)
    async with opened_database(settings) as opened:
        await JobRows(opened).cancel(job, now=time.time())
    return await _find(settings, job_id)


def _line(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "state": str(job.state),
        "lines": job.total,
        "done": job.done,
        "failed": job.failed,
        "owner": job.owner or None,
        "created": moment(job.created_at),
        "ended": moment(job.ended_at),
    }
