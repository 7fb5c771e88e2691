"""Durable jobs, the same over SQLite and a real PostgreSQL: each line is in the output once, whatever happens."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, update

from quiver import db
from quiver.config import JobsConfig
from quiver.db import Database
from quiver.db.tables import JOBS, LINES, PARTS
from quiver.errors import InvalidInput, LaneDied, Overloaded, UnknownFile, UnknownJob
from quiver.job import Job, JobCounts, JobState, Kind, Line, LineState, NewLine, Outcome, Page, StoredFile
from quiver.job_runner import GATHER_SECONDS, MAX_ATTEMPTS
from quiver.jobs import Jobs
from stores import database_url, opened

PATIENCE_SECONDS = 10.0
HOUR = 3600.0


class Work:
    """What lines do: says which were begun, waits where it is told to, raises what it is told to raise."""

    def __init__(self) -> None:
        self.begun: Counter[tuple[str, int]] = Counter()
        self.opened = asyncio.Event()
        self.opened.set()
        self.errors: list[Exception] = []
        self.some_begun = asyncio.Event()
        self.most = self.at_work = 0

    async def do(self, job: Job, line: Line, caller: object) -> Outcome:
        """Do a line."""
        del caller
        self.begun[job.id, line.number] += 1
        self.some_begun.set()
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await self.opened.wait()
            await asyncio.sleep(0)
        finally:
            self.at_work -= 1
        if self.errors:
            raise self.errors.pop(0)
        return Outcome(line.request.upper())

    def kind(self, **options: object) -> Kind:
        """Make a kind of jobs of it."""
        return Kind(self.do, refused, **options)


def refused(job, line, error):
    """Write a refusal."""
    del job
    return Outcome(f"{line.number} {error.code}".encode(), is_done=False)


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Name an empty database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield url


@contextlib.asynccontextmanager
async def server(url: str, work: Work, **options: object) -> AsyncIterator[Jobs]:
    """Be a server with two kinds of jobs: `small` ones, and `large` ones whose lines become files."""
    config = {name: options.pop(name) for name in ("job_lines", "file_days") if name in options}
    jobs = Jobs(JobsConfig(**config), url)
    jobs.kinds.update(small=work.kind(), large=work.kind(**options))
    async with jobs:
        yield jobs


async def submit(jobs: Jobs, number: int = 1, *, kind: str = "large", job_id: str = "a", **facts: object) -> Job:
    """Take a job of some lines."""
    about = {"output_file_id": f"out-{job_id}", "error_file_id": f"err-{job_id}"} if kind == "large" else {}
    job = Job(id=job_id, kind=kind, about={**about, **facts.pop("about", {})}, **facts)
    lines = [NewLine(i, f"line {i}", f"text {i}".encode()) for i in range(1, number + 1)]
    return await jobs.add(job, lines, seconds=facts.get("seconds", HOUR))


async def ended(jobs: Jobs, job: Job) -> Job:
    """Return a job once it has ended."""
    job = await jobs.wait(job, PATIENCE_SECONDS)
    assert job.state.has_ended, job
    return job


async def content(jobs: Jobs, file_id: str) -> list[str]:
    """Return the lines of a file."""
    parts = [part async for part in jobs.read(await jobs.file(file_id, ""))]
    return b"".join(parts).decode().splitlines()


async def until(is_so) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_each_line_is_in_the_output_once_and_in_order(url):
    """Of a job with more lines than are at work at once, no more are, and all are done."""
    work = Work()
    async with server(url, work, job_lines=16) as jobs:
        job = await ended(jobs, await submit(jobs, 200))
        assert (job.state, job.total, job.done, job.failed) == (JobState.COMPLETED, 200, 200, 0)
        assert await content(jobs, "out-a") == [f"TEXT {i}" for i in range(1, 201)]
        assert (await jobs.file("out-a", "")).num_bytes == sum(len(f"TEXT {i}\n") for i in range(1, 201))
        with pytest.raises(UnknownFile):
            await jobs.file("err-a", "")
    assert work.most <= 16
    assert set(work.begun.values()) == {1}


class OneByOne(Work):
    """Lines that end one after the other, those of a small job at once."""

    async def do(self, job: Job, line: Line, caller: object) -> Outcome:
        """Do a line."""
        if job.kind == "large":
            await asyncio.sleep(line.number / 100)
        return await super().do(job, line, caller)


def count_writes(jobs: Jobs) -> list[int]:
    """Note how many results are written at a time."""
    sizes, finish = [], jobs._open.store.lines.finish

    async def counted(runner, outcomes, **facts):
        sizes.append(len(outcomes))
        return await finish(runner, outcomes, **facts)

    jobs._open.store.lines.finish = counted
    return sizes


async def test_results_of_a_file_are_written_together(url):
    """Forty lines that end one after the other are not forty transactions, and all are written at the end."""
    async with server(url, OneByOne(), job_lines=40) as jobs:
        await ended(jobs, await submit(jobs, 1, job_id="first"))
        sizes = count_writes(jobs)
        job = await ended(jobs, await submit(jobs, 40))
    assert (job.done, sum(sizes)) == (40, 40)
    assert len(sizes) <= 4, sizes


async def test_what_is_no_files_is_written_at_once(url):
    """Whoever waits for a small job does not wait for the results of a large one that gather."""
    async with server(url, OneByOne(), job_lines=200) as jobs:
        large = await submit(jobs, 100, job_id="large")
        await asyncio.sleep(0.1)
        sizes, start = count_writes(jobs), time.monotonic()
        await ended(jobs, await submit(jobs, kind="small", job_id="small"))
        assert time.monotonic() - start < GATHER_SECONDS
        assert sum(sizes) < 50
        await jobs.cancel(large)


async def test_what_fails_is_in_a_file_of_its_own(url):
    """A refusal and an accident fail their lines, and no other."""
    work = Work()
    work.errors = [InvalidInput("no"), ValueError("secret detail")]
    async with server(url, work, job_lines=1) as jobs:
        job = await ended(jobs, await submit(jobs, 5))
        assert (job.done, job.failed) == (3, 2)
        assert await content(jobs, "err-a") == ["1 invalid_value", "2 internal_error"]
        assert await content(jobs, "out-a") == ["TEXT 3", "TEXT 4", "TEXT 5"]


async def test_a_line_for_which_there_is_no_room_waits(url):
    """An overload is no end, and no attempt: it is tried as often as it takes."""
    work = Work()
    work.errors = [Overloaded("full", retry_after_seconds=0.01) for _ in range(2 * MAX_ATTEMPTS)]
    async with server(url, work, job_lines=1) as jobs:
        job = await ended(jobs, await submit(jobs, 1))
    assert (job.done, job.failed) == (1, 0)
    assert work.begun["a", 1] == 2 * MAX_ATTEMPTS + 1


async def test_a_line_that_breaks_its_lane_is_given_up(url):
    """After some attempts it fails, and says so."""
    work = Work()
    work.errors = [LaneDied("broken") for _ in range(10)]
    async with server(url, work, job_lines=1) as jobs:
        job = await ended(jobs, await submit(jobs, 1))
        assert await content(jobs, "err-a") == ["1 engine_failure"]
    assert (job.done, job.failed) == (0, 1)
    assert work.begun["a", 1] == MAX_ATTEMPTS


async def test_a_server_that_stops_gives_its_lines_back(url):
    """The next one does them at once, and those that were written never again."""
    first, second = Work(), Work()
    async with server(url, first, job_lines=4) as jobs:
        await submit(jobs, 8)
        await until(lambda: len(first.begun) == 8)
        first.opened.clear()
        await submit(jobs, 8, job_id="b")
        await until(lambda: first.at_work == 4)
    start = time.perf_counter()
    async with server(url, second) as jobs:
        assert (await ended(jobs, await jobs.get("b", "", "large"))).done == 8
        assert await content(jobs, "out-b") == [f"TEXT {i}" for i in range(1, 9)]
    assert time.perf_counter() - start < 5, "it waited for a lease"
    assert {job_id for job_id, _ in second.begun} == {"b"}


async def bury(url: str) -> None:
    """Let the lines at work be those of a runner that is gone."""
    async with Database(url) as database:
        at_work = LINES.c.state == LineState.RUNNING
        await database.write(
            lambda c: c.execute(update(LINES).where(at_work, LINES.c.number <= 4).values(runner="gone"))
        )


async def test_what_a_dead_server_had_begun_is_done_by_another(url):
    """Its lines are taken up once it is known to be gone, and what it writes after that is not taken."""
    dead, alive = Work(), Work()
    dead.opened.clear()
    async with server(url, dead, job_lines=4) as one:
        job = await submit(one, 8)
        await until(lambda: len(dead.begun) == 4)
        async with server(url, alive) as other:
            await other.get("a", "", "large")
            await until(lambda: len(alive.begun) == 4)
            assert not (await other.wait(job, 0.2)).state.has_ended
            await bury(url)
            assert (await ended(other, job)).done == 8
            dead.opened.set()
            await asyncio.sleep(0.3)
            job = await other.get("a", "", "large")
            assert (job.done, job.failed) == (8, 0)
            assert await content(other, "out-a") == [f"TEXT {i}" for i in range(1, 9)]
    assert {number for _, number in dead.begun} | {number for _, number in alive.begun} == set(range(1, 9))
    assert all(alive.begun["a", number] == 1 for _, number in alive.begun)


async def test_two_servers_never_do_one_line_twice(url):
    """They share the lines of a job, and each is begun once."""
    works = [Work(), Work()]
    async with server(url, works[0], job_lines=8) as one, server(url, works[1], job_lines=8) as other:
        await other.files("", None, Page(1))
        job = await ended(one, await submit(one, 400))
    assert job.done == 400
    begun = works[0].begun + works[1].begun
    assert len(begun) == 400
    assert set(begun.values()) == {1}
    print(f"\nshared: {len(works[0].begun)} and {len(works[1].begun)} of 400 lines")  # noqa: T201  a figure


async def test_without_the_condition_a_line_would_be_done_twice(url):
    """Negative control: a line whose state another hand sets back is begun again, and the count shows it."""
    work = Work()
    work.opened.clear()
    async with server(url, work, job_lines=4) as jobs:
        await submit(jobs, 1)
        await until(lambda: work.at_work == 1)
        async with Database(url) as database:
            back = update(LINES).values(state=LineState.WAITING, runner=None)
            await database.write(lambda c: c.execute(back))
        await until(lambda: work.at_work == 2)
        work.opened.set()
        await ended(jobs, await jobs.get("a", "", "large"))
    assert work.begun["a", 1] == 2


async def test_a_small_job_does_not_wait_for_a_large_one(url):
    """It is done while most lines of the one before it wait."""
    work = Work()
    async with server(url, work, job_lines=4) as jobs:
        large = await submit(jobs, 3000)
        small = await ended(jobs, await submit(jobs, 1, kind="small", job_id="b"))
        assert small.done == 1
        assert (await jobs.get(large.id, "", "large")).done < 2900
        await jobs.cancel(large)
        await ended(jobs, large)


async def test_a_cancelled_job_keeps_what_was_done(url):
    """The lines that were not done are in the error file with the reason."""
    work = Work()
    async with server(url, work, job_lines=4) as jobs:
        job = await submit(jobs, 700)
        await until(lambda: len(work.begun) > 8)
        work.opened.clear()
        await until(lambda: work.at_work == 4)
        assert (await jobs.cancel(job)).state in {JobState.CANCELLING, JobState.CANCELLED}
        job = await ended(jobs, job)
        assert (job.state, job.done + job.failed, job.failed > 600) == (JobState.CANCELLED, 700, True)
        written = [*await content(jobs, "out-a"), *await content(jobs, "err-a")]
        assert len(written) == 700
        assert written[job.done] == f"{job.done + 1} stopping"
        assert work.at_work == 0


async def test_a_small_job_is_cancelled_at_once(url):
    """Its work is stopped, it has no output, and cancelling again changes nothing."""
    work = Work()
    work.opened.clear()
    async with server(url, work) as jobs:
        job = await submit(jobs, kind="small")
        await until(lambda: work.at_work == 1)
        assert (await jobs.cancel(job)).state is JobState.CANCELLED
        await until(lambda: work.at_work == 0)
        assert (await jobs.cancel(job)).state is JobState.CANCELLED
        assert (await jobs.line(job)).result is None


async def test_a_job_whose_time_runs_out_expires_with_what_it_has(url):
    """The rest of a large one is closed, a small one ends."""
    work = Work()
    async with server(url, work, job_lines=4) as jobs:
        await ended(jobs, await submit(jobs, job_id="before"))
        work.opened.clear()
        large = await jobs.add(
            Job(id="a", kind="large", about={"output_file_id": "out", "error_file_id": "err"}),
            [NewLine(i, "", b"x") for i in range(1, 7)],
            seconds=0.3,
        )
        small = await jobs.add(Job(id="b", kind="small"), [NewLine(1, "", b"x")], seconds=0.3)
        large, small = await ended(jobs, large), await ended(jobs, small)
        assert (large.state, large.failed, small.state) == (JobState.EXPIRED, 6, JobState.EXPIRED)
        assert await content(jobs, "err") == [f"{i} deadline_exceeded" for i in range(1, 7)]


async def test_a_failed_job_is_done_again(url):
    """Under the same id; one that has not failed is not."""
    work = Work()
    work.errors = [InvalidInput("once")]
    async with server(url, work) as jobs:
        job = await ended(jobs, await submit(jobs, kind="small"))
        assert job.failed == 1
        again = await ended(jobs, await jobs.retry(job))
        assert (again.done, again.failed, again.retries) == (1, 0, 1)
        with pytest.raises(InvalidInput, match="completed"):
            await jobs.retry(again)


async def test_a_purge_spares_what_runs(url):
    """Only jobs that wait are cancelled and counted; other owners' are not seen."""
    work = Work()
    work.opened.clear()
    async with server(url, work, job_lines=1) as jobs:
        await submit(jobs, kind="small")
        await until(lambda: work.at_work == 1)
        for name in "bc":
            await submit(jobs, kind="small", job_id=name)
        await submit(jobs, kind="small", job_id="theirs", owner="user 2")
        assert await jobs.counts("small", "") == JobCounts(queued=2, running=1)
        assert await jobs.purge("small", "") == 2
        assert await jobs.counts("small", "") == JobCounts(running=1)
        assert await jobs.counts("small", "user 2") == JobCounts(queued=1)
        work.opened.set()
        assert (await ended(jobs, await jobs.get("a", "", "small"))).done == 1
        assert await jobs.counts("small", "") == JobCounts(completed=1)


async def test_a_job_is_its_owners(url):
    """To everybody else it does not exist, and neither do its files."""
    async with server(url, Work()) as jobs:
        await ended(jobs, await submit(jobs, owner="user 1"))
        assert (await jobs.file("out-a", "user 1")).owner == "user 1"
        for ask in (
            jobs.get("a", "user 2", "large"),
            jobs.get("a", "user 1", "small"),
            jobs.get("x" * 99, "", "large"),
        ):
            with pytest.raises(UnknownJob):
                await ask
        with pytest.raises(UnknownFile):
            await jobs.file("out-a", "user 2")
        assert await jobs.listed("large", "user 2", Page(10)) == []


async def test_what_has_ended_long_ago_is_forgotten(url):
    """The job goes with its lines and its files; one that is younger stays."""
    async with server(url, Work()) as jobs:
        await ended(jobs, await submit(jobs, 3, keep_seconds=0.2))
        await ended(jobs, await submit(jobs, 3, job_id="b"))
        await asyncio.sleep(2.5)
        with pytest.raises(UnknownJob):
            await jobs.get("a", "", "large")
        with pytest.raises(UnknownFile):
            await jobs.file("out-a", "")
        assert (await jobs.get("b", "", "large")).done == 3
    async with Database(url) as database:
        left = await database.read(lambda c: all_of(c, select(LINES.c.job_id).distinct()))
    assert left == [("b",)]


async def all_of(connection, query):
    """Return all rows."""
    return [tuple(row) for row in await connection.execute(query)]


async def parts_of(*parts: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    """Yield the parts of a file, and break where told to."""
    for part in parts:
        yield part
    if error:
        raise error


def a_file(name: str = "file-a", **facts: object) -> StoredFile:
    """Describe a file."""
    return StoredFile(**{"id": name, "filename": "in.jsonl", "purpose": "batch", "created_at": time.time(), **facts})


async def test_a_file_comes_back_part_by_part(url):
    """What was kept is read as it was, and removed with all its parts."""
    async with server(url, Work()) as jobs:
        kept = await jobs.keep(a_file(), parts_of(*[bytes([i]) * 1000 for i in range(20)]))
        with pytest.raises(UnknownFile):
            await jobs.file("file-a", "")  # nobody sees it before it is complete
        await jobs.complete(kept)
        found = await jobs.file("file-a", "")
        assert found.num_bytes == 20_000
        assert [part async for part in jobs.read(found)] == [bytes([i]) * 1000 for i in range(20)]
        await jobs.remove(found)
        with pytest.raises(UnknownFile):
            await jobs.file("file-a", "")
    async with Database(url) as database:
        assert await database.read(lambda c: all_of(c, select(PARTS.c.number))) == []


async def test_a_file_that_does_not_come_whole_leaves_nothing(url):
    """Whatever breaks it, its parts are gone."""
    async with server(url, Work()) as jobs:
        with pytest.raises(InvalidInput):
            await jobs.keep(a_file(), parts_of(b"a", b"b", error=InvalidInput("cut")))
    async with Database(url) as database:
        assert await database.read(lambda c: all_of(c, select(PARTS.c.number))) == []


async def test_lists_are_paged_without_gap_or_repetition(url):
    """Page after page, either way, each file comes once in the order of its age, equals included."""
    now = time.time()
    async with server(url, Work()) as jobs:
        for i in range(9):
            await jobs.complete(await jobs.keep(a_file(f"file-{i}", created_at=now + i // 2), parts_of()))
        for newest_first in (True, False):
            seen, after = [], None
            while found := await jobs.files("", None, Page(2, after, newest_first=newest_first)):
                seen += [file.id for file in found]
                after = seen[-1]
            assert seen == sorted((f"file-{i}" for i in range(9)), reverse=newest_first)
        with pytest.raises(InvalidInput, match="go on after"):
            await jobs.files("", None, Page(2, "no such"))


async def test_a_job_of_a_file_is_read_before_it_is_done(url):
    """Lines come out of the file in groups, and none is begun before all of them are good."""
    work = Work()

    async def read(job, parts):
        text = b"".join([part async for part in parts])
        for start in range(0, len(text), 3):
            assert not work.begun
            yield [
                NewLine(start + i + 1, "", text[start + i : start + i + 1]) for i in range(len(text[start : start + 3]))
            ]
        del job

    async with server(url, work, read=read) as jobs:
        await jobs.complete(await jobs.keep(a_file(), parts_of(b"abcd", b"efg")))
        about = {"input_file_id": "file-a", "output_file_id": "out", "error_file_id": "err"}
        job = await jobs.add(Job(id="a", kind="large", state=JobState.READING, about=about), seconds=HOUR)
        job = await ended(jobs, job)
        assert (job.state, job.total, job.done) == (JobState.COMPLETED, 7, 7)
        assert await content(jobs, "out") == list("ABCDEFG")


async def test_a_server_that_never_sees_a_job_opens_no_database(tmp_path):
    """Asking for what is not there, or counting, makes none; taking a job does."""
    jobs = Jobs(JobsConfig(), db.sqlite_url(tmp_path))
    jobs.kinds.update(small=Work().kind())
    async with jobs:
        assert await jobs.counts("small", "") == JobCounts()
        with pytest.raises(UnknownJob):
            await jobs.get("a", "", "small")
        assert list(tmp_path.iterdir()) == []
        await submit(jobs, kind="small")
        assert (tmp_path / "quiver.db").exists()


async def test_a_database_that_comes_late_is_waited_for(tmp_path):
    """Jobs that were left are done once it can be opened, and the server lives meanwhile."""
    url = db.sqlite_url(tmp_path)
    async with opened(url) as database:
        rows = db.JobRows(database)
        await rows.add(replace(Job(id="a", kind="small"), total=1, expires_at=time.time() + HOUR))
        await db.Lines(database).add("a", [NewLine(1, "", b"x")], now=time.time())
    async with server(url, Work()) as jobs:
        assert (await ended(jobs, await jobs.get("a", "", "small"))).done == 1
    async with Database(url) as database:
        assert await database.read(lambda c: all_of(c, select(JOBS.c.state))) == [("completed",)]
