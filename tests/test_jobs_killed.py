"""kill -9 in the middle of jobs: after a restart each line is in the output exactly once."""

import json
import signal
from collections import Counter

import httpx
import pytest
from sqlalchemy import func, select

from batching import begin, content, faults_of, until
from faults.servers import stub
from quiver.db import Database
from quiver.db.tables import LINES
from quiver.job import LineState
from stores import database_url

NUM_LINES = 1500
SLOW = {"seconds_per_token": 0.002}
"""So slow that what is at work takes longer than to write what is done: each kill finds lines at work."""


@pytest.fixture(params=["sqlite", "postgresql"])
async def settings(request, tmp_path):
    """Return the settings of servers that come one after another: a directory, and a database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield {"data_dir": str(tmp_path), "database_url": url, "job_lines": 64}


def texts(number):
    """Return as many texts."""
    return [f"text {i}" for i in range(number)]


def cancel(http, batch_id):
    """Stop a batch."""
    http.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
    until(http, batch_id, lambda b: b["status"] == "cancelled")


def ask(http, path, **body):
    """Call RunPod's API."""
    reply = http.post(path, json=body) if body else http.get(path, timeout=90)
    return reply.raise_for_status().json()


def kill(server):
    """End a server as the kernel does when memory is short."""
    server.signal(signal.SIGKILL)
    assert server.ended() == -signal.SIGKILL


async def states(url):
    """Count the lines of the database by state."""
    async with Database(url) as database:
        query = select(LINES.c.state, func.count()).group_by(LINES.c.state)

        async def work(connection):
            return {LineState(row[0]): row[1] for row in await connection.execute(query)}

        return Counter(await database.read(work))


async def test_a_batch_outlives_kill_9(settings):
    """Killed twice while lines are at work, it is whole in the end: nothing lacks, nothing is there twice."""
    at_work, batch_id, done = [], None, 0
    for _ in range(2):
        with stub(behave=SLOW, **settings) as server, httpx.Client(base_url=server.ready_url()) as http:
            batch_id = batch_id or begin(http, texts(NUM_LINES))
            batch = until(http, batch_id, lambda b: b["request_counts"]["completed"] > done + 150)  # noqa: B023
            done = batch["request_counts"]["completed"]
            kill(server)
        at_work.append((await states(settings["database_url"]))[LineState.RUNNING])
    with stub(**settings) as server, httpx.Client(base_url=server.ready_url()) as http:
        batch = until(http, batch_id, lambda b: b["status"] == "completed")
        output = content(http, batch["output_file_id"])
    print(f"\nkilled with {at_work} lines at work; in the output: {len(output.splitlines())} of {NUM_LINES}")  # noqa: T201
    assert any(at_work), "no kill came in the middle"
    assert faults_of(output, NUM_LINES) == ([], [])
    assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}


async def test_a_batch_outlives_kill_9_while_its_file_is_read(settings):
    """Killed right after it was taken, it is read again from the beginning, and no line of the first reading is left."""
    with stub(**settings) as server, httpx.Client(base_url=server.ready_url()) as http:
        batch_id = begin(http, texts(20_000))
        kill(server)
    assert (await states(settings["database_url"])).total() < 20_000, "the kill came too late"
    with stub(**settings) as server, httpx.Client(base_url=server.ready_url()) as http:
        batch = until(http, batch_id, lambda b: b["status"] == "in_progress" and b["request_counts"]["total"])
        assert batch["request_counts"]["total"] == 20_000
        cancel(http, batch_id)
    assert (await states(settings["database_url"])).total() == 20_000


async def test_runpods_jobs_outlive_kill_9(settings):
    """What /run has taken is done after the restart, and what was done before is still there."""
    with stub(behave=SLOW, **settings) as server, httpx.Client(base_url=server.ready_url()) as http:
        jobs = [ask(http, "/run", input={"input": f"text {i}"})["id"] for i in range(30)]
        first = ask(http, f"/status-sync/{jobs[0]}")
        kill(server)
    with stub(**settings) as server, httpx.Client(base_url=server.ready_url()) as http:
        assert ask(http, f"/status/{jobs[0]}") == first
        replies = [ask(http, f"/status-sync/{job}") for job in jobs]
        assert {reply["status"] for reply in replies} == {"COMPLETED"}


@pytest.mark.parametrize(("output", "faults"), [("1 2", ([0], [])), ("0 1 2 1", ([], ["line-1"])), ("0 1 2", ([], []))])
def test_a_line_that_lacks_or_is_there_twice_would_be_seen(output, faults):
    """Negative control of the count."""
    text = "\n".join(json.dumps({"custom_id": f"line-{i}"}) for i in output.split())
    assert faults_of(text, 3) == faults
