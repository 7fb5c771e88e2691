"""Jobs: each ends once, in its turn, and is known for a while."""

import asyncio
import contextlib

import pytest

from quiver.errors import InvalidInput, Overloaded, UnknownJob
from quiver.sync_jobs import JobState, SyncJobRequest, SyncJobs
from quiver.types import Priority

PATIENCE_SECONDS = 5


class Gate:
    """Work that says when it has begun, and waits to be let through."""

    def __init__(self, output=b"1"):
        self.begun, self.opened = asyncio.Event(), asyncio.Event()
        self.was_cancelled = False
        self._output = output

    async def __call__(self):
        """Wait, and give the output."""
        self.begun.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return self._output


def giving(output):
    """Make work that gives an output at once."""

    async def work():
        return output

    return work


def failing(*errors, then=b"1"):
    """Make work that raises one error after another, and then gives an output."""
    left = list(errors)

    async def work():
        if left:
            raise left.pop(0)
        return then

    return work


def states(jobs, *names):
    """Return the states of jobs."""
    return [jobs.get(name).state for name in names]


async def ended(jobs, name):
    """Return a job once it has ended."""
    job = await jobs.wait(name, PATIENCE_SECONDS)
    assert job.ended_at is not None
    return job


@pytest.fixture
async def jobs():
    """Return a place for jobs, closed at the end."""
    async with SyncJobs(max_running=1) as jobs:
        yield jobs


async def test_a_job_gives_its_output(jobs):
    """It waits, runs and ends, with the times of each."""
    work = Gate(b'{"a":1}')
    submitted = jobs.submit("a", SyncJobRequest(work=work))
    assert (submitted.state, submitted.delay_seconds, submitted.output) == (JobState.QUEUED, None, None)

    await work.begun.wait()
    running = jobs.get("a")
    assert (running.state, running.execution_seconds) == (JobState.RUNNING, None)
    assert running.delay_seconds >= 0

    work.opened.set()
    job = await ended(jobs, "a")
    assert (job.state, job.output, job.error) == (JobState.COMPLETED, b'{"a":1}', None)
    assert job.execution_seconds >= 0


async def test_waiting_ends_with_patience(jobs):
    """Who waits too short gets the job as it stands."""
    jobs.submit("a", SyncJobRequest(work=Gate()))
    assert (await jobs.wait("a", 0.01)).state is JobState.RUNNING


async def test_a_refusal_is_the_jobs_end(jobs):
    """What the work raises stands in the job."""
    jobs.submit("a", SyncJobRequest(work=failing(InvalidInput("no", param="input"))))
    job = await ended(jobs, "a")
    assert (job.state, job.error.message, job.error.param) == (JobState.FAILED, "no", "input")


async def test_an_accident_is_the_jobs_end_too(jobs, capsys):
    """What nobody expected is in the log, and only a sentence in the job."""
    jobs.submit("a", SyncJobRequest(work=failing(ValueError("secret detail"))))
    job = await ended(jobs, "a")
    assert (job.state, job.error.code) == (JobState.FAILED, "internal_error")
    assert "secret detail" not in job.error.message
    assert "secret detail" in capsys.readouterr().out


async def test_bulk_jobs_take_turns_in_their_order(jobs):
    """With room for one, the others wait, and begin in the order in which they came."""
    gates = {name: Gate() for name in "abc"}
    for name, gate in gates.items():
        jobs.submit(name, SyncJobRequest(work=gate))
    for i, (name, gate) in enumerate(gates.items()):
        await gate.begun.wait()
        assert states(jobs, *"abc") == [JobState.COMPLETED] * i + [JobState.RUNNING] + [JobState.QUEUED] * (2 - i)
        gate.opened.set()
        await ended(jobs, name)


async def test_an_interactive_job_waits_for_no_bulk_job(jobs):
    """It begins at once, whatever runs."""
    jobs.submit("bulk", SyncJobRequest(work=Gate()))
    jobs.submit("interactive", SyncJobRequest(work=giving(b"2"), priority=Priority.INTERACTIVE))
    assert (await ended(jobs, "interactive")).output == b"2"
    assert states(jobs, "bulk") == [JobState.RUNNING]


async def test_a_job_for_which_there_is_no_room_now_waits(jobs):
    """An overload is no end for a job: it is tried again until there is room."""
    full = [Overloaded("full", retry_after_seconds=0.02) for _ in range(3)]
    jobs.submit("a", SyncJobRequest(work=failing(*full)))
    assert (await jobs.wait("a", 0.01)).state is JobState.QUEUED
    assert (await ended(jobs, "a")).state is JobState.COMPLETED


@pytest.mark.parametrize("limits", [{"timeout_seconds": 0.02}, {"ttl_seconds": 0.02}])
async def test_a_job_that_takes_too_long_is_stopped(jobs, limits):
    """Past its time to run or to live it has timed out, and its work is cancelled."""
    work = Gate()
    jobs.submit("a", SyncJobRequest(work=work, **limits))
    job = await ended(jobs, "a")
    assert (job.state, job.error.code) == (JobState.TIMED_OUT, "deadline_exceeded")
    assert work.was_cancelled


async def test_a_job_that_waits_too_long_never_runs(jobs):
    """The time to live counts while a job waits, the time to run does not."""
    running, late, patient = Gate(), Gate(), Gate()
    jobs.submit("running", SyncJobRequest(work=running))
    jobs.submit("late", SyncJobRequest(work=late, ttl_seconds=0.02))
    jobs.submit("patient", SyncJobRequest(work=patient, timeout_seconds=0.02))
    assert (await ended(jobs, "late")).state is JobState.TIMED_OUT
    assert states(jobs, "running", "patient") == [JobState.RUNNING, JobState.QUEUED]
    assert not late.begun.is_set()


async def test_a_cancelled_job_stops(jobs):
    """Running or waiting, it is cancelled at once, and the next one begins."""
    running, waiting, next_one = Gate(), Gate(), Gate()
    for name, gate in (("running", running), ("waiting", waiting), ("next", next_one)):
        jobs.submit(name, SyncJobRequest(work=gate))
    await running.begun.wait()

    assert jobs.cancel("waiting").state is JobState.CANCELLED
    assert jobs.cancel("running").state is JobState.CANCELLED
    await next_one.begun.wait()
    assert running.was_cancelled
    assert not waiting.begun.is_set()


async def test_work_that_does_not_heed_changes_nothing(jobs, capsys):
    """A cancelled job stays cancelled, whatever its work still gives."""
    begun, gone_on = asyncio.Event(), asyncio.Event()

    async def stubborn():
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        gone_on.set()
        return b"1"

    jobs.submit("a", SyncJobRequest(work=stubborn))
    await begun.wait()
    jobs.cancel("a")
    await gone_on.wait()
    await asyncio.sleep(0)
    assert (jobs.get("a").state, jobs.get("a").output, jobs.counts.completed) == (JobState.CANCELLED, None, 0)
    assert capsys.readouterr().out == ""


async def test_a_job_that_has_ended_is_not_cancelled(jobs):
    """Its output stays."""
    jobs.submit("a", SyncJobRequest(work=giving(b"1")))
    await ended(jobs, "a")
    assert (jobs.cancel("a").state, jobs.get("a").output) == (JobState.COMPLETED, b"1")


async def test_a_purge_spares_what_runs(jobs):
    """Only jobs that wait are cancelled, and counted."""
    for name in "abc":
        jobs.submit(name, SyncJobRequest(work=Gate()))
    await jobs.wait("a", 0.01)
    assert jobs.purge() == 2
    assert states(jobs, *"abc") == [JobState.RUNNING, JobState.CANCELLED, JobState.CANCELLED]


async def test_a_failed_job_is_done_again(jobs):
    """Under the same id, its past forgotten."""
    jobs.submit("a", SyncJobRequest(work=failing(InvalidInput("no"), then=b"2")))
    await ended(jobs, "a")
    again = jobs.retry("a")
    assert (again.id, again.state, again.error) == ("a", JobState.QUEUED, None)
    assert (await ended(jobs, "a")).output == b"2"
    with pytest.raises(InvalidInput, match="completed"):
        jobs.retry("a")


async def test_an_output_is_read_once(jobs):
    """The first to ask after the end gets it, nobody before or later does, and it stays with the job."""
    work = Gate(b"3")
    jobs.submit("a", SyncJobRequest(work=work))
    assert jobs.read_once("a") is None
    work.opened.set()
    await ended(jobs, "a")
    assert [jobs.read_once("a"), jobs.read_once("a"), jobs.get("a").output] == [b"3", None, b"3"]


async def test_a_job_is_forgotten_in_time(jobs):
    """Once it has ended, it is known for as long as was asked, and no longer."""
    jobs.submit("short", SyncJobRequest(work=giving(b"1"), keep_seconds=0.02))
    jobs.submit("long", SyncJobRequest(work=giving(b"1")))
    await ended(jobs, "long")
    assert states(jobs, "short") == [JobState.COMPLETED]
    await asyncio.sleep(0.05)
    with pytest.raises(UnknownJob):
        jobs.get("short")
    assert states(jobs, "long") == [JobState.COMPLETED]


async def test_a_job_that_is_done_again_is_known_as_long_again(jobs):
    """The time counts from its last end."""
    jobs.submit("a", SyncJobRequest(work=failing(InvalidInput("no")), keep_seconds=0.5))
    await ended(jobs, "a")
    await asyncio.sleep(0.3)
    jobs.retry("a")
    await ended(jobs, "a")
    await asyncio.sleep(0.3)
    assert states(jobs, "a") == [JobState.COMPLETED]


async def test_what_ended_longest_ago_gives_way():
    """At the greatest number, ended jobs are forgotten in their order, and jobs that run never."""
    async with SyncJobs(max_jobs=3) as jobs:
        jobs.submit("running", SyncJobRequest(work=Gate()))
        for name in "abc":
            jobs.submit(name, SyncJobRequest(work=giving(b"1")))
            await ended(jobs, name)
        with pytest.raises(UnknownJob):
            jobs.get("a")
        assert states(jobs, "running", "b", "c") == [JobState.RUNNING, JobState.COMPLETED, JobState.COMPLETED]


async def test_too_many_jobs_are_refused():
    """Where nothing has ended that could give way, a job is not taken."""
    async with SyncJobs(max_jobs=2) as jobs:
        for name in "ab":
            jobs.submit(name, SyncJobRequest(work=Gate()))
        with pytest.raises(Overloaded):
            jobs.submit("c", SyncJobRequest(work=Gate()))
        jobs.cancel("a")
        jobs.submit("c", SyncJobRequest(work=Gate()))


async def test_memory_is_bounded():
    """Inputs and outputs together stay within the bound: old outputs give way, then a job is not taken."""
    async with SyncJobs(max_bytes=100) as jobs:
        jobs.submit("a", SyncJobRequest(work=giving(b"x" * 40), num_bytes=10))
        await ended(jobs, "a")
        jobs.submit("b", SyncJobRequest(work=giving(b"x" * 50), num_bytes=10))
        await ended(jobs, "b")
        with pytest.raises(UnknownJob):
            jobs.get("a")
        jobs.submit("c", SyncJobRequest(work=Gate(), num_bytes=90))
        with pytest.raises(Overloaded):
            jobs.submit("d", SyncJobRequest(work=Gate(), num_bytes=20))


async def test_jobs_are_counted(jobs):
    """Those that wait and run now, those that have ended since the start."""
    jobs.submit("a", SyncJobRequest(work=giving(b"1")))
    jobs.submit("b", SyncJobRequest(work=failing(InvalidInput("no"))))
    jobs.submit("c", SyncJobRequest(work=Gate(), timeout_seconds=0.01))
    await ended(jobs, "c")
    jobs.submit("d", SyncJobRequest(work=Gate()))
    jobs.submit("e", SyncJobRequest(work=Gate()))
    await jobs.wait("d", 0.01)
    counts = jobs.counts
    assert (counts.queued, counts.running, counts.completed, counts.failed, counts.retried) == (1, 1, 1, 2, 0)
    jobs.retry("b")
    assert jobs.counts.retried == 1


async def test_closing_stops_everything():
    """No work goes on, and no job is known any more."""
    running = Gate()
    async with SyncJobs() as jobs:
        jobs.submit("a", SyncJobRequest(work=running))
        await running.begun.wait()
    assert running.was_cancelled
    with pytest.raises(UnknownJob):
        jobs.get("a")
