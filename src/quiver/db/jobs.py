"""Jobs in the database. Their lines are in `lines.py`, the files that they are made of and give in `files.py`."""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from sqlalchemy import RowMapping, and_, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.db.database import Database
from quiver.db.tables import FILES, JOBS, LINES
from quiver.errors import InvalidInput
from quiver.job import CLOSING, ENDS, Backlog, Job, JobCounts, JobState, LineState, Page, StoredFile

OUTPUTS = {"output_file_id": LineState.DONE, "error_file_id": LineState.FAILED}
"""What in `about` names a file that the lines of a state become, once their job has ended."""
WEBHOOK = "webhook"
"""What in `about` names an address that is to hear of the end."""


class JobRows:
    """What is kept of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job, also: Any = None) -> None:
        """Keep a new job; `also` is done in the same transaction."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(JOBS).values(_row(job)))
            if also:
                await also(connection)

        await self._database.write(work)

    async def get(self, job_id: str) -> Job | None:
        """Find a job."""
        found = await self._all(select(JOBS).where(JOBS.c.id == job_id))
        return found[0] if found else None

    async def find(self, job_ids: Collection[str]) -> list[Job]:
        """Find several jobs."""
        return await self._all(select(JOBS).where(JOBS.c.id.in_(job_ids))) if job_ids else []

    async def listed(self, kind: str | None, owner: str | None, page: Page) -> list[Job]:
        """List jobs by their age; of any kind or owner, where none is named. Raises `InvalidInput`."""
        query = select(JOBS)
        query = query if kind is None else query.where(JOBS.c.kind == kind)
        query = query if owner is None else query.where(JOBS.c.owner == owner)
        return await self._all(await paged(self._database, query, JOBS, page))

    async def in_state(self, *states: JobState) -> Sequence[Job]:
        """List the jobs that are in one of some states, the oldest first."""
        return await self._all(select(JOBS).where(JOBS.c.state.in_(states)).order_by(JOBS.c.created_at, JOBS.c.id))

    async def move(self, job_id: str, *states: JobState, to: JobState, **values: Any) -> Job | None:
        """Bring a job from one of some states to another; None where it was in none of them."""
        of_it = and_(JOBS.c.id == job_id, JOBS.c.state.in_(states))
        statement = update(JOBS).where(of_it).values(state=to, **_encoded(values)).returning(JOBS)
        return await self._one(statement)

    async def take(self, job_id: str, state: JobState, runner: str) -> bool:
        """Let one runner alone read or close a job's lines."""
        free = and_(JOBS.c.id == job_id, JOBS.c.state == state, JOBS.c.runner.is_(None))
        return await self._one(update(JOBS).where(free).values(runner=runner).returning(JOBS)) is not None

    async def end(self, job_id: str, *states: JobState, to: JobState, now: float) -> bool:
        """End a job that is in one of some states at once, with what its lines have given until now."""

        async def work(connection: AsyncConnection) -> bool:
            of_it = and_(JOBS.c.id == job_id, JOBS.c.state.in_(states))
            found = (await connection.execute(select(JOBS.c.id).where(of_it).with_for_update())).one_or_none()
            if found is None:
                return False
            left = and_(LINES.c.job_id == job_id, LINES.c.state.in_((LineState.WAITING, LineState.RUNNING)))
            await connection.execute(update(LINES).where(left).values(state=LineState.FAILED, runner=None))
            await end_job(connection, job_id, to, now)
            return True

        return await self._database.write(work)

    async def cancel(self, job: Job, *, now: float) -> bool:
        """Stop a job that has not ended; tells whether it has by that. Otherwise its lines are closed first."""
        if not job.gives_files:
            return await self.end(job.id, JobState.OPEN, to=JobState.CANCELLED, now=now)
        if await self.move(job.id, JobState.OPEN, to=JobState.CANCELLING, closing_at=now):
            return False
        values = {"closing_at": now, "ended_at": now, "keep_until": now + job.keep_seconds, "runner": None}
        return await self.move(job.id, JobState.READING, to=JobState.CANCELLED, **values) is not None

    async def again(self, job_id: str, *, now: float, expires_at: float) -> Job | None:
        """Put the failed lines of a job that has ended into the queue once more."""
        failed = and_(LINES.c.job_id == job_id, LINES.c.state == LineState.FAILED)
        anew = {"state": LineState.WAITING, "due": now, "not_before": 0.0, "attempts": 0, "started_at": None}
        values = {
            "state": JobState.OPEN,
            "created_at": now,
            "ended_at": None,
            "closing_at": None,
            "keep_until": None,
            "expires_at": expires_at,
            "failed": 0,
            "retries": JOBS.c.retries + 1,
            "was_streamed": False,
        }

        async def work(connection: AsyncConnection) -> Job | None:
            of_it = and_(JOBS.c.id == job_id, JOBS.c.state.in_(ENDS))
            row = (
                (await connection.execute(update(JOBS).where(of_it).values(values).returning(JOBS))).mappings().first()
            )
            if row:
                await connection.execute(update(LINES).where(failed).values(result=None, result_bytes=0, **anew))
            return _job(row) if row else None

        return await self._database.write(work)

    async def counts(self, kind: str, owner: str) -> JobCounts:
        """Count jobs of one line each."""
        running = select(LINES.c.job_id).where(LINES.c.state == LineState.RUNNING)
        facts = (JOBS.c.id.in_(running).label("runs"), (JOBS.c.failed > 0).label("has_failed"))
        each = select(JOBS.c.state, *facts, JOBS.c.retries).where(JOBS.c.kind == kind, JOBS.c.owner == owner).subquery()
        groups = (each.c.state, each.c.runs, each.c.has_failed)
        query = select(*groups, func.count(), func.sum(each.c.retries)).group_by(*groups)
        rows = await self._database.read(lambda connection: _rows(connection, query))
        found = {"": 0, "queued": 0, "running": 0, "completed": 0, "failed": 0, "retried": 0}
        for state, runs, has_failed, number, retries in rows:
            found[_counted(JobState(state), runs=runs, has_failed=has_failed)] += number
            found["retried"] += int(retries)
        del found[""]
        return JobCounts(**found)

    async def backlog(self) -> Backlog:
        """Count what is to be done; looks at every job that has not ended, and at no line that waits."""
        run = select(LINES.c.job_id, func.count().label("number")).where(LINES.c.state == LineState.RUNNING)
        runs = run.group_by(LINES.c.job_id).subquery()
        running = func.coalesce(runs.c.number, 0)
        waiting = JOBS.c.total - JOBS.c.done - JOBS.c.failed - running
        since = case((waiting > 0, JOBS.c.created_at))
        query = (
            select(func.count(), func.sum(waiting), func.sum(running), func.min(since))
            .select_from(JOBS.outerjoin(runs, runs.c.job_id == JOBS.c.id))
            .where(JOBS.c.state.not_in(ENDS))
        )
        ((jobs, num_waiting, num_running, oldest_at),) = await self._database.read(lambda c: _rows(c, query))
        return Backlog(jobs, int(num_waiting or 0), int(num_running or 0), oldest_at)

    async def waiting(self, kind: str, owner: str) -> list[str]:
        """List the jobs of one line each that nobody has begun."""
        begun = select(LINES.c.job_id).where(LINES.c.state != LineState.WAITING)
        query = select(JOBS.c.id).where(
            JOBS.c.kind == kind, JOBS.c.owner == owner, JOBS.c.state == JobState.OPEN, JOBS.c.id.not_in(begun)
        )
        return [row.id for row in await self._database.read(lambda connection: _rows(connection, query))]

    async def stream_once(self, job_id: str) -> bool:
        """Whether nobody has read a job's output as a stream before; from now on, somebody has."""
        unread = and_(JOBS.c.id == job_id, JOBS.c.was_streamed.is_(False))
        return await self._one(update(JOBS).where(unread).values(was_streamed=True).returning(JOBS)) is not None

    # Time

    async def need_chores(self, *, now: float) -> bool:
        """Whether a job is to be read, closed, ended, told of or forgotten, or a file; each part of it is in an index."""
        begins_or_ends = JOBS.c.state.in_((JobState.READING, *CLOSING))
        is_over = and_(JOBS.c.state == JobState.OPEN, JOBS.c.expires_at <= now)
        times = (JOBS.c.keep_until <= now, JOBS.c.call_at <= now, FILES.c.expires_at <= now)
        query = select(or_(*(exists().where(condition) for condition in (begins_or_ends, is_over, *times))))
        ((found,),) = await self._database.read(lambda connection: _rows(connection, query))
        return bool(found)

    async def overdue(self, now: float) -> list[Job]:
        """List the jobs whose time has run out."""
        query = select(JOBS).where(JOBS.c.state.in_((JobState.READING, JobState.OPEN)), JOBS.c.expires_at <= now)
        return await self._all(query)

    async def outlived(self, now: float) -> list[Job]:
        """List the jobs that are not to be known any longer."""
        return await self._all(select(JOBS).where(JOBS.c.keep_until <= now).limit(100))

    async def remove(self, job_id: str) -> None:
        """Forget a job whose lines are gone."""
        await self._database.write(lambda connection: connection.execute(delete(JOBS).where(JOBS.c.id == job_id)))

    async def has_call(self, *, now: float) -> bool:
        """Whether a webhook is due; costs less than taking it."""
        query = select(JOBS.c.id).where(JOBS.c.call_at <= now).limit(1)
        return bool(await self._database.read(lambda connection: _rows(connection, query)))

    async def due_call(self, *, now: float, again_at: float) -> tuple[Job, int] | None:
        """Take a job whose webhook is due, and how often it was called before; if nothing comes of that, it is due again."""
        first = select(JOBS.c.id).where(JOBS.c.call_at <= now).limit(1).with_for_update(skip_locked=True)
        statement = (
            update(JOBS).where(JOBS.c.id.in_(first)).values(call_at=again_at, calls=JOBS.c.calls + 1).returning(JOBS)
        )

        async def work(connection: AsyncConnection) -> tuple[Job, int] | None:
            row = (await connection.execute(statement)).mappings().first()
            return (_job(row), row["calls"]) if row else None

        return await self._database.write(work)

    async def called(self, job_id: str) -> None:
        """Call a job's webhook no more."""
        statement = update(JOBS).where(JOBS.c.id == job_id).values(call_at=None)
        await self._database.write(lambda connection: connection.execute(statement))

    async def _one(self, statement: Any) -> Job | None:
        async def work(connection: AsyncConnection) -> Job | None:
            row = (await connection.execute(statement)).mappings().first()
            return _job(row) if row else None

        return await self._database.write(work)

    async def _all(self, query: Any) -> list[Job]:
        async def work(connection: AsyncConnection) -> list[Job]:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

        return await self._database.read(work)


async def end_job(connection: AsyncConnection, job_id: str, state: JobState, now: float) -> None:
    """End a job within a transaction: its lines are files from now on, and its webhook is due."""
    row = (await connection.execute(select(JOBS).where(JOBS.c.id == job_id))).mappings().one()
    about = msgspec.json.decode(row["about"])
    for name, of_state in OUTPUTS.items():
        if name in about:
            await _make_file(connection, row, about, about[name], of_state, now)
    values = {
        "state": state,
        "ended_at": now,
        "keep_until": now + row["keep_seconds"],
        "runner": None,
        "call_at": now if about.get(WEBHOOK) else None,
        "calls": 0,
    }
    await connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(values))


async def _make_file(
    connection: AsyncConnection, row: RowMapping, about: dict[str, Any], file_id: str, state: LineState, now: float
) -> None:
    of_it = and_(LINES.c.job_id == row["id"], LINES.c.state == state)
    query = select(func.count(), func.coalesce(func.sum(LINES.c.result_bytes), 0)).where(of_it)
    number, size = (await connection.execute(query)).one()
    if number:
        seconds = about.get("output_seconds")
        file = StoredFile(
            id=file_id,
            owner=row["owner"],
            filename=f"{row['id']}_{'output' if state is LineState.DONE else 'error'}.jsonl",
            purpose="batch_output",
            num_bytes=int(size) + number,
            created_at=now,
            expires_at=now + seconds if seconds else None,
            job_id=row["id"],
            line_state=state,
        )
        values = {name: getattr(file, name) for name in StoredFile.__dataclass_fields__}
        await connection.execute(insert(FILES).values(**values, is_whole=True))


async def paged(database: Database, query: Any, table: Any, page: Page) -> Any:
    """Cut a list by age to one page. Raises `InvalidInput` where it should begin after something unknown."""
    columns = (table.c.created_at, table.c.id)
    if page.after is not None:
        found = await database.read(
            lambda connection: _rows(connection, select(*columns).where(table.c.id == page.after))
        )
        if not found:
            raise InvalidInput(f"there is nothing with the id {page.after!r} to go on after", param="after")
        at, last = found[0]
        older, same = columns[0] < at, and_(columns[0] == at, columns[1] < last)
        if not page.newest_first:
            older, same = columns[0] > at, and_(columns[0] == at, columns[1] > last)
        query = query.where(or_(older, same))
    order = [column.desc() if page.newest_first else column for column in columns]
    return query.order_by(*order).limit(page.limit)


async def _rows(connection: AsyncConnection, query: Any) -> Sequence[Any]:
    return (await connection.execute(query)).all()


def _counted(state: JobState, *, runs: bool, has_failed: bool) -> str:
    if not state.has_ended:
        return "running" if runs else "queued"
    if state is JobState.CANCELLED:
        return ""
    return "completed" if state is JobState.COMPLETED and not has_failed else "failed"


def _encoded(values: dict[str, Any]) -> dict[str, Any]:
    return values | ({"about": msgspec.json.encode(values["about"])} if "about" in values else {})


def _row(job: Job) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in _NAMES}
    return {**_encoded(values), "was_streamed": False, "calls": 0}


def _job(row: RowMapping) -> Job:
    values = {name: row[name] for name in _NAMES}
    return Job(**{**values, "state": JobState(row["state"]), "about": msgspec.json.decode(row["about"])})


_NAMES = tuple(field for field in Job.__dataclass_fields__)
