"""The lines of jobs in the database: begun by one runner at a time, and written with the end of their job or not at all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.db.database import Database
from quiver.db.jobs import end_job
from quiver.db.tables import JOBS, LINES, RUNNERS
from quiver.job import CLOSING, JobState, Line, LineState, NewLine, Outcome

PACE = 0.002
"""Seconds by which each line of a job is due later than the one before: a large job leaves room for those after it."""
_READ_AHEAD = 256
"""Most results that are read at once."""


class Lines:
    """Gives lines to runners, and takes what came of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job_id: str, lines: Sequence[NewLine], *, now: float) -> None:
        """Put lines of a job into the queue."""
        if lines:
            await self._database.write(lambda connection: insert_lines(connection, job_id, lines, now))

    async def remove(self, job_id: str, *, at_most: int = 500) -> bool:
        """Remove some of a job's lines; tells whether there may be more."""
        some = select(LINES.c.id).where(LINES.c.job_id == job_id).limit(at_most)

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(delete(LINES).where(LINES.c.id.in_(some)))).rowcount == at_most

        return await self._database.write(work)

    async def claim(self, runner: str, *, max_lines: int, max_bytes: int, now: float) -> list[Line]:
        """Give a runner the lines that are due first; nobody else gets them while it is alive.

        The first one comes whatever its size.
        """
        are_open = select(JOBS.c.id).where(JOBS.c.state == JobState.OPEN)
        query = (
            select(LINES.c.id, LINES.c.request_bytes)
            .where(LINES.c.state == LineState.WAITING, LINES.c.not_before <= now, LINES.c.job_id.in_(are_open))
            .order_by(LINES.c.due)
            .limit(max_lines)
            .with_for_update(skip_locked=True, of=LINES)
        )

        async def work(connection: AsyncConnection) -> list[Line]:
            rows = [(row.id, row.request_bytes) for row in await connection.execute(query)]
            ids = first_of(rows, max_bytes)
            if not ids:
                return []
            begun = {"state": LineState.RUNNING, "runner": runner, "started_at": now, "attempts": LINES.c.attempts + 1}
            statement = update(LINES).where(LINES.c.id.in_(ids)).values(begun).returning(*_OF_A_LINE)
            found = [_line(row) for row in await connection.execute(statement)]
            return sorted(found, key=lambda line: ids.index(line.id))

        return await self._database.write(work)

    async def finish(self, runner: str, outcomes: Mapping[int, Outcome], *, now: float) -> list[str]:
        """Write what came of lines, as far as they are still the runner's; returns the jobs that have ended with them."""
        held = (
            select(LINES.c.id, LINES.c.job_id)
            .where(LINES.c.id.in_(list(outcomes)), LINES.c.runner == runner, LINES.c.state == LineState.RUNNING)
            .order_by(LINES.c.id)
            .with_for_update()
        )

        async def work(connection: AsyncConnection) -> list[str]:
            mine = [(row.id, row.job_id) for row in await connection.execute(held)]
            if mine:
                await connection.execute(_WRITE, [_written(line_id, outcomes[line_id]) for line_id, _ in mine])
            return await _count(connection, [(job_id, outcomes[line_id].is_done) for line_id, job_id in mine], now)

        return await self._database.write(work)

    async def are_waiting(self, *, now: float) -> bool:
        """Whether there is a line to begin; costs less than trying."""
        query = select(LINES.c.id).where(LINES.c.state == LineState.WAITING, LINES.c.not_before <= now).limit(1)

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(query)).first() is not None

        return await self._database.read(work)

    async def release(self, runner: str, lines: Mapping[int, float], *, was_attempt: bool) -> None:
        """Give lines back, each with the time before which nobody should begin it."""
        statement = (
            update(LINES)
            .where(LINES.c.id == bindparam("line_id"), LINES.c.runner == runner, LINES.c.state == LineState.RUNNING)
            .values(
                state=LineState.WAITING,
                runner=None,
                started_at=None,
                attempts=LINES.c.attempts - (0 if was_attempt else 1),
                not_before=bindparam("at"),
            )
        )
        rows = [{"line_id": line_id, "at": at} for line_id, at in lines.items()]
        await self._database.write(lambda connection: connection.execute(statement, rows))

    async def close(self, job_id: str, *, at_most: int = 500) -> list[Line]:
        """List lines of a job that are not done yet, to write why not."""
        query = (
            select(*_OF_A_LINE)
            .where(LINES.c.job_id == job_id, LINES.c.state.in_((LineState.WAITING, LineState.RUNNING)))
            .order_by(LINES.c.number)
            .limit(at_most)
        )
        return await self._database.read(lambda connection: _all_lines(connection, query))

    async def write_closed(self, outcomes: Mapping[int, Outcome], *, now: float) -> list[str]:
        """Write why lines were not done, whoever had begun them; returns the jobs that have ended with them."""
        left = (
            select(LINES.c.id, LINES.c.job_id)
            .where(LINES.c.id.in_(list(outcomes)), LINES.c.state.in_((LineState.WAITING, LineState.RUNNING)))
            .order_by(LINES.c.id)
            .with_for_update()
        )

        async def work(connection: AsyncConnection) -> list[str]:
            found = [(row.id, row.job_id) for row in await connection.execute(left)]
            if found:
                await connection.execute(_WRITE, [_written(line_id, outcomes[line_id]) for line_id, _ in found])
            return await _count(connection, [(job_id, False) for _, job_id in found], now)

        return await self._database.write(work)

    async def first(self, job_id: str) -> Line | None:
        """Return a job's first line as it stands."""
        query = select(*_OF_A_LINE).where(LINES.c.job_id == job_id).order_by(LINES.c.number).limit(1)
        lines = await self._database.read(lambda connection: _all_lines(connection, query))
        return lines[0] if lines else None

    async def results(
        self, job_id: str, state: LineState, *, after: int, max_bytes: int = 1 << 20
    ) -> list[tuple[int, bytes]]:
        """Return (number, result) of the next lines of a state; at least one, if there is any."""
        sizes = (
            select(LINES.c.number, LINES.c.result_bytes)
            .where(LINES.c.job_id == job_id, LINES.c.number > after, LINES.c.state == state)
            .order_by(LINES.c.number)
            .limit(_READ_AHEAD)
        )

        async def work(connection: AsyncConnection) -> list[tuple[int, bytes]]:
            numbers = first_of([(row.number, row.result_bytes) for row in await connection.execute(sizes)], max_bytes)
            query = (
                select(LINES.c.number, LINES.c.result)
                .where(LINES.c.job_id == job_id, LINES.c.number.in_(numbers))
                .order_by(LINES.c.number)
            )
            return [(row.number, bytes(row.result)) for row in await connection.execute(query)] if numbers else []

        return await self._database.read(work)

    # Who is alive

    async def beat(self, runner: str, *, until: float) -> None:
        """Say that a runner is alive."""

        async def work(connection: AsyncConnection) -> None:
            values = {"alive_until": until}
            if not (await connection.execute(update(RUNNERS).where(RUNNERS.c.id == runner).values(values))).rowcount:
                await connection.execute(insert(RUNNERS).values(id=runner, **values))

        await self._database.write(work)

    async def leave(self, runner: str) -> None:
        """Give back all that a runner has begun."""
        await self._database.write(lambda connection: connection.execute(delete(RUNNERS).where(RUNNERS.c.id == runner)))
        await self.take_back(now=0.0)

    async def take_back(self, *, now: float) -> int:
        """Put lines whose runner is gone into the queue again; returns how many those are."""
        alive = select(RUNNERS.c.id).where(RUNNERS.c.alive_until > now)
        lines = (
            update(LINES)
            .where(LINES.c.state == LineState.RUNNING, LINES.c.runner.not_in(alive))
            .values(state=LineState.WAITING, runner=None, started_at=None)
        )
        jobs = update(JOBS).where(JOBS.c.runner.is_not(None), JOBS.c.runner.not_in(alive)).values(runner=None)

        async def work(connection: AsyncConnection) -> int:
            await connection.execute(delete(RUNNERS).where(RUNNERS.c.alive_until <= now))
            await connection.execute(jobs)
            return (await connection.execute(lines)).rowcount

        return await self._database.write(work)


_OF_A_LINE = (
    LINES.c.id,
    LINES.c.job_id,
    LINES.c.number,
    LINES.c.custom_id,
    LINES.c.request,
    LINES.c.attempts,
    LINES.c.state,
    LINES.c.started_at,
    LINES.c.result,
)
_WRITE = (
    update(LINES)
    .where(LINES.c.id == bindparam("line_id"))
    .values(
        state=bindparam("new_state"),
        result=bindparam("new_result"),
        result_bytes=bindparam("new_bytes"),
        runner=None,
    )
)


async def insert_lines(connection: AsyncConnection, job_id: str, lines: Sequence[NewLine], now: float) -> None:
    """Put lines into the queue, within a transaction."""
    await connection.execute(
        insert(LINES),
        [
            {
                "job_id": job_id,
                "number": line.number,
                "custom_id": line.custom_id,
                "state": LineState.WAITING,
                "due": now + line.number * PACE,
                "not_before": 0.0,
                "attempts": 0,
                "request_bytes": len(line.request),
                "request": line.request,
                "result_bytes": 0,
            }
            for line in lines
        ],
    )


def first_of(rows: Sequence[tuple[int, int]], max_bytes: int) -> list[int]:
    """Return the keys of the first rows of (key, bytes) that fit together; at least one."""
    keys: list[int] = []
    size = 0
    for key, num_bytes in rows:
        size += num_bytes
        if keys and size > max_bytes:
            break
        keys.append(key)
    return keys


def _written(line_id: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "line_id": line_id,
        "new_state": LineState.DONE if outcome.is_done else LineState.FAILED,
        "new_result": outcome.result,
        "new_bytes": len(outcome.result),
    }


async def _count(connection: AsyncConnection, ended: Sequence[tuple[str, bool]], now: float) -> list[str]:
    """Count lines of (job, is done) that have ended, and end the jobs that have no more."""
    done, failed, ends = Counter(j for j, ok in ended if ok), Counter(j for j, ok in ended if not ok), []
    for job_id in sorted({job_id for job_id, _ in ended}):
        more = {"done": JOBS.c.done + done[job_id], "failed": JOBS.c.failed + failed[job_id]}
        columns = (JOBS.c.state, JOBS.c.done, JOBS.c.failed, JOBS.c.total)
        statement = update(JOBS).where(JOBS.c.id == job_id).values(more).returning(*columns)
        job = (await connection.execute(statement)).one_or_none()
        if job is not None and job.done + job.failed >= job.total and not JobState(job.state).has_ended:
            state = CLOSING.get(JobState(job.state), JobState.COMPLETED)
            await end_job(connection, job_id, state, now)
            ends.append(job_id)
    return ends


async def _all_lines(connection: AsyncConnection, query: Any) -> list[Line]:
    return [_line(row) for row in await connection.execute(query)]


def _line(row: Any) -> Line:
    result = None if row.result is None else bytes(row.result)
    values = (row.id, row.job_id, row.number, row.custom_id, bytes(row.request), row.attempts)
    return Line(*values, LineState(row.state), row.started_at, result)
