"""Work that outlasts a request: jobs made of lines, which are done in the bulk lane and survive a restart.

    dialect ──> Jobs ──> database <── JobRunner    does lines
                  │          ▲ <───── JobKeeper    reads files, ends, tells, forgets
                  └──> SyncJobs                    jobs whose client waits: in memory

The database is opened by the first who needs it: a server that never sees a job has none.
"""

import asyncio
import contextvars
import importlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog

from quiver import webhook
from quiver.config import JobsConfig
from quiver.errors import DatabaseDown, DatabaseError, InvalidInput, UnknownFile, UnknownJob
from quiver.job import ENDS, Backlog, Job, JobCounts, JobState, Kind, Line, LineState, NewLine, Page, StoredFile
from quiver.sync_jobs import SyncJobs
from quiver.telemetry.observer import Figure

if TYPE_CHECKING:
    from quiver.job_keeper import JobKeeper
    from quiver.job_runner import JobRunner, Store

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""How often a job is looked at that another server may be doing."""
OPEN_SECONDS = 5.0
"""How long after a failure the database is tried again by a server that has started."""
LOOK_SECONDS = 0.5
"""How long the metrics wait for the database."""
SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is once the database is open."""

    store: "Store"
    runner: "JobRunner"
    keeper: "JobKeeper"
    work: asyncio.Task[None]
    database: Any


class Jobs:
    """Owns the jobs of one server; used on one event loop, and closed before what their lines are done with."""

    def __init__(self, config: JobsConfig, database_url: str) -> None:
        """Without a database none are taken."""
        self.config = config
        self.kinds: dict[str, Kind] = {}
        """What the jobs of each kind do; complete before the first is taken."""
        self.sync = SyncJobs()
        self._url = database_url
        self._opening = asyncio.Lock()
        self._open: _Open | None = None
        self._first: asyncio.Task[None] | None = None
        self._ends: dict[str, set[asyncio.Event]] = {}
        self._backlog: Backlog | None = None
        """None where it is not known."""

    # Jobs

    async def add(self, job: Job, lines: Sequence[NewLine] = (), *, seconds: float) -> Job:
        """Take a job that is of use for some time; it is on disk when this returns. Raises `DatabaseDown`."""
        from quiver.db.lines import insert_lines  # noqa: PLC0415  a server without jobs needs no database

        opened, now = await self._opened(), time.time()
        job = replace(job, created_at=now, expires_at=now + seconds, total=len(lines))
        if lines:
            opened.runner.remember(job.id, contextvars.copy_context())
        also = partial(insert_lines, job_id=job.id, lines=lines, now=now) if lines else None
        await opened.store.jobs.add(job, also)
        (opened.runner if lines else opened.keeper).wake()
        return job

    async def get(self, job_id: str, owner: str, kind: str) -> Job:
        """Find an owner's job. Raises `UnknownJob`."""
        job = await self.find(job_id)
        if (job.owner, job.kind) != (owner, kind):
            raise UnknownJob(f"there is no job {job_id!r}: it never was, or ended too long ago")
        return job

    async def listed(self, kind: str, owner: str, page: Page) -> list[Job]:
        """List an owner's jobs. Raises `InvalidInput`."""
        if page.after is None and not self._has_database():
            return []
        return await (await self._opened()).store.jobs.listed(kind, owner, page)

    async def find(self, job_id: str) -> Job:
        """Find a job, whose ever it is. Raises `UnknownJob`."""
        job = await (await self._opened()).store.jobs.get(job_id[:64]) if self._has_database() else None
        if job is None:
            raise UnknownJob(f"there is no job {job_id!r}: it never was, or ended too long ago")
        return job

    async def all(self, page: Page) -> list[Job]:
        """List jobs of every kind and owner. Raises `InvalidInput`."""
        if page.after is None and not self._has_database():
            return []
        return await (await self._opened()).store.jobs.listed(None, None, page)

    async def line(self, job: Job) -> Line | None:
        """Return the line of a job that has one."""
        return await (await self._opened()).store.lines.first(job.id)

    async def wait(self, job: Job, seconds: float) -> Job:
        """Return a job once it has ended, or as it stands after some time. Raises `UnknownJob`."""
        end, told = time.monotonic() + seconds, asyncio.Event()
        self._ends.setdefault(job.id, set()).add(told)
        try:
            while True:
                job = await self.get(job.id, job.owner, job.kind)
                if job.state.has_ended or (left := end - time.monotonic()) <= 0:
                    return job
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, POLL_SECONDS)):
                        await told.wait()
        finally:
            self._ends[job.id].discard(told)
            if not self._ends[job.id]:
                del self._ends[job.id]

    async def cancel(self, job: Job) -> Job:
        """Stop a job that has not ended."""
        opened, now = await self._opened(), time.time()
        if await opened.store.jobs.cancel(job, now=now):
            self._tell(job.id)
        opened.runner.drop(job.id)
        opened.keeper.wake()
        return await self.get(job.id, job.owner, job.kind)

    async def retry(self, job: Job) -> Job:
        """Do what of a job has failed once more. Raises `InvalidInput` where nothing has."""
        opened, now = await self._opened(), time.time()
        may = job.state is JobState.EXPIRED or (job.state in ENDS and job.failed > 0)
        again = (
            await opened.store.jobs.again(job.id, now=now, expires_at=now + job.expires_at - job.created_at)
            if may
            else None
        )
        if again is None or job.state is JobState.CANCELLED:
            raise InvalidInput(f"the job has not failed, it is {job.state}: submit it anew")
        opened.runner.wake()
        return again

    async def purge(self, kind: str, owner: str) -> int:
        """Cancel jobs of one line that nobody has begun; returns how many those were."""
        if not self._has_database():
            return 0
        opened, now = await self._opened(), time.time()
        waiting = await opened.store.jobs.waiting(kind, owner)
        ended = [await opened.store.jobs.end(j, JobState.OPEN, to=JobState.CANCELLED, now=now) for j in waiting]
        for job_id in waiting:
            self._tell(job_id)
        return sum(ended)

    async def counts(self, kind: str, owner: str) -> JobCounts:
        """Count jobs of one line."""
        if not self._has_database():
            return JobCounts()
        return await (await self._opened()).store.jobs.counts(kind, owner)

    async def stream_once(self, job: Job) -> bool:
        """Whether nobody has read a job's output as a stream before."""
        return await (await self._opened()).store.jobs.stream_once(job.id)

    # Metrics

    async def look(self) -> None:
        """Read how much is to be done; a database that does not say so at once leaves it unknown."""
        self._backlog = None if self._has_database() else Backlog()
        if self._open:
            with suppress(TimeoutError, DatabaseDown):
                async with asyncio.timeout(LOOK_SECONDS):
                    self._backlog = await self._open.store.jobs.backlog()

    def figures(self) -> Sequence[Figure]:
        """Tell what was to be done at the last look, and what this server has done."""
        found, ended = self._backlog, self._open.runner.ended if self._open else Counter[LineState]()
        jobs: dict[str, float] = {"": found.jobs} if found else {}
        lines: dict[str, float] = {"waiting": found.waiting, "running": found.running} if found else {}
        age: dict[str, float] = {"": max(0.0, time.time() - (found.oldest_at or math.inf))} if found else {}
        ends = {"done": ended[LineState.DONE], "failed": ended[LineState.FAILED]}
        return (
            Figure("quiver_jobs", "Jobs of the database that have not ended.", jobs),
            Figure("quiver_job_lines", "Lines of these jobs.", lines, "state"),
            Figure("quiver_job_oldest_seconds", "Age of the oldest of these jobs of which a line waits.", age),
            Figure("quiver_job_lines_ended", "Lines that this server has done.", ends, "how", counted=True),
            *self.sync.figures(),
        )

    # Files

    async def keep(self, file: StoredFile, parts: AsyncIterator[bytes]) -> StoredFile:
        """Keep a file while it comes, part by part; what does not come whole leaves nothing behind.

        What is not known before the end (its name, its purpose) is read from `parts` by whoever yields them.
        """
        files = (await self._opened()).store.files
        await files.begin(file)
        size = number = 0
        try:
            async for part in parts:
                await files.append(file.id, number, part)
                size, number = size + len(part), number + 1
        except BaseException:
            with suppress(DatabaseDown):
                await asyncio.shield(files.remove(file.id))
            raise
        return replace(file, num_bytes=size)

    async def complete(self, file: StoredFile) -> None:
        """Let a file that was kept be seen."""
        await (await self._opened()).store.files.complete(file)

    async def file(self, file_id: str, owner: str) -> StoredFile:
        """Find an owner's file. Raises `UnknownFile`."""
        file = await (await self._opened()).store.files.get(file_id[:64]) if self._has_database() else None
        if file is None or file.owner != owner:
            raise UnknownFile(f"there is no file {file_id!r}", param="id")
        return file

    async def files(self, owner: str, purpose: str | None, page: Page) -> list[StoredFile]:
        """List an owner's files. Raises `InvalidInput`."""
        if page.after is None and not self._has_database():
            return []
        return await (await self._opened()).store.files.listed(owner, purpose, page)

    async def read(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Yield a file's bytes in parts."""
        async for part in (await self._opened()).store.files.read(file):
            yield part

    async def remove(self, file: StoredFile) -> None:
        """Remove a file."""
        await (await self._opened()).store.files.remove(file.id)

    # Life

    async def __aenter__(self) -> Self:
        if self._has_database():
            self._first = asyncio.create_task(self._open_at_last())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._first:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        async with self._opening:
            if opened := self._open:
                opened.work.cancel()
                await asyncio.gather(opened.work, return_exceptions=True)
                await opened.database.close()
                self._open = None
        await self.sync.close()

    def _has_database(self) -> bool:
        """Whether there may be jobs that another life of this server has left."""
        if not self._url:
            return False
        return (
            self._open is not None or not self._url.startswith(SQLITE) or Path(self._url.removeprefix(SQLITE)).exists()
        )

    async def _open_at_last(self) -> None:
        """Take up what was left, as soon as the database is there."""
        while True:
            try:
                await self._opened()
            except (DatabaseDown, DatabaseError) as error:
                log.warning("jobs wait for the database", error=error.message)
                await asyncio.sleep(OPEN_SECONDS)
            else:
                return

    async def _opened(self) -> _Open:
        if not self._url:
            raise DatabaseDown(
                "jobs, batches and files are not taken here: the operator may set database_url to PostgreSQL"
            )
        if self._open is None:
            async with self._opening:
                if self._open is None:
                    self._open = await self._open_now()
        return self._open

    async def _open_now(self) -> _Open:
        # A server without jobs needs no database. What comes with it takes a second to import: not on the loop's time.
        await asyncio.to_thread(importlib.import_module, "quiver.job_keeper")
        from quiver import db  # noqa: PLC0415
        from quiver.job_keeper import JobKeeper  # noqa: PLC0415
        from quiver.job_runner import JobRunner, Store  # noqa: PLC0415

        database = db.Database(self._url, read_seconds=db.WRITE_SECONDS)
        try:
            await db.upgrade(database)
        except BaseException:
            await database.close()
            raise
        lines = db.Lines(database)
        store = Store(db.JobRows(database), lines, db.Files(database, lines), db.Accounts(database).find_key)
        runner = JobRunner(store, self.kinds, self._tell, max_lines=self.config.job_lines)
        keeper = JobKeeper(store, self.kinds, runner, self._tell)
        if self.config.webhooks:
            keeper.call_with(partial(webhook.post, allow_private=self.config.webhooks_private))
        # Nothing of the request at hand belongs to what is done from now on.
        work = asyncio.create_task(_both(runner, keeper), context=contextvars.Context())
        return _Open(store, runner, keeper, work, database)

    def _tell(self, job_id: str) -> None:
        """Tell those who wait for a job that it has ended."""
        for told in self._ends.get(job_id, ()):
            told.set()
        if self._open:
            self._open.keeper.wake()


async def _both(runner: "JobRunner", keeper: "JobKeeper") -> None:
    """Run both until cancelled; an accident of either begins both anew."""
    while True:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(runner.run())
                tasks.create_task(keeper.run())
        except* Exception:
            log.exception("an accident among jobs")
        await asyncio.sleep(OPEN_SECONDS)
