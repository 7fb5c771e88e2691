"""What jobs need beside their lines being done: lines are read from files, time runs out, ends are told, the old is forgotten."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import structlog

from quiver.errors import Closed, DeadlineExceeded, QuiverError
from quiver.job import CLOSING, Fault, Job, JobState, Kind, UnreadableLines
from quiver.job_runner import POLL_SECONDS, JobRunner, Store, patiently

log = structlog.get_logger(__name__)

CALL_SECONDS = 10.0
"""How long after a webhook that failed it is tried again."""
MAX_CALLS = 3
_BROKEN = Fault("internal_error", "the server failed while it read the file; its log says why")

Call = Callable[[str, bytes], Awaitable[bool]]
"""Tells an address something; returns whether it was taken."""


class JobKeeper:
    """Does the chores of one server's jobs."""

    def __init__(
        self, store: Store, kinds: Mapping[str, Kind], runner: JobRunner, on_ended: Callable[[str], None]
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._runner = runner
        self._on_ended = on_ended
        self._has_chores = asyncio.Event()
        self._call: Call | None = None

    def call_with(self, call: Call) -> None:
        """Tell webhooks by this."""
        self._call = call

    def wake(self) -> None:
        """Look for chores now."""
        self._has_chores.set()

    async def run(self) -> None:
        """Do what is due until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look())
            for chore in (self._expire, self._close, self._read, self._forget, self._tell):
                tasks.create_task(self._again_and_again(chore))

    async def _look(self) -> None:
        """Ask now and then whether there is anything to do: one question for all chores."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if await patiently(lambda: self._store.jobs.need_chores(now=time.time()), "looking for chores"):
                self.wake()

    async def _again_and_again(self, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            await patiently(chore, "jobs' chores")
            await self._has_chores.wait()
            await asyncio.sleep(0)
            self._has_chores.clear()

    async def _expire(self) -> None:
        """End jobs whose time has run out."""
        now = time.time()
        for job in await self._store.jobs.overdue(now):
            if job.gives_files and job.state is JobState.OPEN:
                await self._store.jobs.move(job.id, JobState.OPEN, to=JobState.EXPIRING, closing_at=now)
                self._has_chores.set()
            elif await self._store.jobs.end(job.id, JobState.READING, JobState.OPEN, to=JobState.EXPIRED, now=now):
                self._on_ended(job.id)
            self._runner.drop(job.id)

    async def _close(self) -> None:
        """Write of lines that nobody will do why that is."""
        for job in await self._store.jobs.in_state(*CLOSING):
            self._runner.drop(job.id)
            error = _why(job)
            while lines := await self._store.lines.close(job.id):
                refuse = self._kinds[job.kind].refuse
                outcomes = {line.id: refuse(job, line, error) for line in lines}
                for ended in await self._store.lines.write_closed(outcomes, now=time.time()):
                    self._on_ended(ended)

    async def _read(self) -> None:
        """Make lines of the files of jobs that begin."""
        for job in await self._store.jobs.in_state(JobState.READING):
            if await self._store.jobs.take(job.id, JobState.READING, self._runner.id):
                await self._read_lines(job)

    async def _read_lines(self, job: Job) -> None:
        while await self._store.lines.remove(job.id):
            pass  # somebody began to read it, and ended
        try:
            total = await self._add_lines(job)
        except UnreadableLines as error:
            await self._fail(job, error.faults)
        except QuiverError:
            raise
        except Exception:
            log.exception("a file could not be read", job=job.id)
            await self._fail(job, [_BROKEN])
        else:
            values = {"total": total, "opened_at": time.time(), "runner": None}
            if await self._store.jobs.move(job.id, JobState.READING, to=JobState.OPEN, **values):
                self._runner.wake()

    async def _add_lines(self, job: Job) -> int:
        read, total = self._kinds[job.kind].read, 0
        if read is None:
            return 0
        async for lines in read(job, self._parts(str(job.about.get("input_file_id")))):
            await self._store.lines.add(job.id, lines, now=job.created_at)
            total += len(lines)
        return total

    async def _parts(self, file_id: str) -> AsyncIterator[bytes]:
        file = await self._store.files.get(file_id)
        if file is None:
            raise UnreadableLines([Fault("file_not_found", f"the file {file_id!r} is not there any more")])
        async for part in self._store.files.read(file):
            yield part

    async def _fail(self, job: Job, faults: Sequence[Fault]) -> None:
        errors = [{"code": f.code, "message": f.message, "param": f.param, "line": f.line} for f in faults]
        now = time.time()
        await self._store.jobs.move(
            job.id,
            JobState.READING,
            to=JobState.FAILED,
            about=job.about | {"errors": errors},
            ended_at=now,
            keep_until=now + job.keep_seconds,
            runner=None,
        )
        while await self._store.lines.remove(job.id):
            pass
        self._on_ended(job.id)

    async def _forget(self) -> None:
        """Remove what is not to be known any longer."""
        now = time.time()
        for file in await self._store.files.outlived(now):
            await self._store.files.remove(file.id)
        for job in await self._store.jobs.outlived(now):
            for file in await self._store.files.of_job(job.id):
                await self._store.files.remove(file.id)
            while await self._store.lines.remove(job.id):
                pass
            await self._store.jobs.remove(job.id)

    async def _tell(self) -> None:
        """Tell webhooks of ends."""
        now = time.time()
        while self._call and await self._store.jobs.has_call(now=now):
            due = await self._store.jobs.due_call(now=now, again_at=now + CALL_SECONDS)
            if due is None:
                return
            job, calls = due
            if await self._told(job) or calls >= MAX_CALLS:
                await self._store.jobs.called(job.id)

    async def _told(self, job: Job) -> bool:
        describe = self._kinds[job.kind].describe
        if describe is None or self._call is None:
            return True
        return await self._call(str(job.about["webhook"]), describe(job, await self._store.lines.first(job.id)))


def _why(job: Job) -> QuiverError:
    if job.state is JobState.CANCELLING:
        return Closed("the job was cancelled before this line was done")
    return DeadlineExceeded("the job's time ran out before this line was done")
