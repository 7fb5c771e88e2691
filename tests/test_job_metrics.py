"""What the metrics say of jobs: lines that wait, run and have ended, and how old the oldest is, the same over SQLite and PostgreSQL."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from fakes import hash_model
from fault_proxy import Fault, FaultProxy
from quiver.config import AccountsConfig, JobsConfig, Secret
from seen_metrics import number, samples_of, served
from stores import database_url, postgres

WAITING, RUNNING = {"state": "waiting"}, {"state": "running"}
DONE, FAILED = {"how": "done"}, {"how": "failed"}


class Held:
    """Holds every forward pass until it is let go."""

    def __init__(self):
        self.busy, self.opened = threading.Event(), threading.Event()

    def __call__(self, batch):
        """Be what a backend calls before each batch."""
        del batch
        self.busy.set()
        assert self.opened.wait(60)


@pytest.fixture
def held():
    """Return what holds forward passes, and lets them go at the end, whatever happens."""
    held = Held()
    yield held
    held.opened.set()


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path):
    """Name an empty database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield url


def sections(url):
    """Return settings of a server with a database, that does two lines at a time."""
    return {"accounts": AccountsConfig(database_url=Secret(url)), "jobs": JobsConfig(job_lines=2)}


async def shown(http):
    """Return what the metrics say now."""
    return (await http.get("/metrics")).text


async def submit(http, *texts, way="/run", **more):
    """Submit a job for each text."""
    for text in texts:
        assert (await http.post(way, json={"input": {"input": text}, **more})).status_code == 200


async def shows(http, name, labels, wanted):
    """Wait until a metric is there and has a value; return all that the metrics say then."""
    async with asyncio.timeout(60):
        while True:
            text, asked = await shown(http), (labels or {}).items()
            found = [s.value for s in samples_of(text) if s.name == name and asked <= s.labels.items()]
            if found and sum(found) == wanted:
                return text
            await asyncio.sleep(0.05)


async def test_lines_are_shown_while_they_wait_run_and_end(held, url):
    """Of five, two run and three wait, and their age is told; once all have ended it is known how: one out of time."""
    async with served(hash_model(before=held), **sections(url)) as (_, http):
        none = await shows(http, "quiver_jobs", None, 0)
        start = time.time()
        await submit(http, "a", policy={"executionTimeout": 5000})
        await submit(http, "b", "c", "d", "e")
        busy = await shows(http, "quiver_job_lines", RUNNING, 2)
        await asyncio.sleep(0.3)
        age, elapsed = number(await shown(http), "quiver_job_oldest_seconds"), time.time() - start
        await shows(http, "quiver_job_lines_ended_total", FAILED, 1)
        held.opened.set()
        idle = await shows(http, "quiver_job_lines_ended_total", None, 5)
    assert number(none, "quiver_job_lines") == 0
    assert (number(busy, "quiver_jobs"), number(busy, "quiver_job_lines", WAITING)) == (5, 3)
    assert 0.3 <= age <= elapsed
    assert number(idle, "quiver_jobs") == number(idle, "quiver_job_lines") == 0
    assert number(idle, "quiver_job_oldest_seconds") == 0
    assert number(idle, "quiver_job_lines_ended_total", DONE) == 4
    assert number(idle, "quiver_job_lines_ended_total", FAILED) == 1


async def test_every_server_of_a_database_shows_what_it_holds(held, url):
    """The backlog is everybody's, what has ended is counted by who did it."""
    async with served(hash_model(before=held), **sections(url)) as (_, one):
        await submit(one, "a", "b", "c")
        await asyncio.to_thread(held.busy.wait)
        async with served(hash_model(before=held), **sections(url)) as (_, other):
            text = await shows(other, "quiver_job_lines", RUNNING, 3)
            held.opened.set()
            await shows(other, "quiver_jobs", None, 0)
            ends = [number(await shown(http), "quiver_job_lines_ended_total", DONE) for http in (one, other)]
    assert number(text, "quiver_job_lines", WAITING) == 0
    assert sorted(ends) == [1, 2]


async def test_jobs_whose_clients_wait_are_shown(held):
    """They are told apart: they live in memory, and end with the process."""
    async with served(hash_model(before=held)) as (_, http):
        asking = asyncio.create_task(submit(http, "a", way="/runsync"))
        busy = await shows(http, "quiver_sync_jobs", RUNNING, 1)
        held.opened.set()
        await asking
        idle = await shown(http)
    assert number(busy, "quiver_job_lines") == 0
    assert number(idle, "quiver_sync_jobs") == 0
    assert number(idle, "quiver_sync_jobs_ended_total", {"how": "completed"}) == 1


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.BLACK_HOLE])
async def test_a_database_that_is_away_holds_no_scrape_up(fault):
    """What it would say is left out, soon, and all else is shown; once it is back, so is its part."""
    async with postgres() as there, FaultProxy("127.0.0.1", there.port or 5432) as proxy:
        through = there.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with served(**sections(through)) as (_, http):
            await submit(http, "a")
            await shows(http, "quiver_job_lines_ended_total", DONE, 1)
            await proxy.break_down(fault)
            start = time.perf_counter()
            away = await shown(http)
            seconds = time.perf_counter() - start
            await proxy.break_down(Fault.NONE)
            await shows(http, "quiver_jobs", None, 0)
    assert not {"quiver_jobs", "quiver_job_lines", "quiver_job_oldest_seconds"} & {s.name for s in samples_of(away)}
    assert number(away, "quiver_job_lines_ended_total", DONE) == 1
    assert seconds < 3
