"""Jobs as an operator types them: by the real command, over SQLite and a real PostgreSQL."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quiver import db
from quiver.cli import cli
from quiver.errors import DatabaseError, UnknownJob
from quiver.job import Job, JobState, NewLine
from stores import database_url, opened

BATCH = {"endpoint": "/v1/embeddings", "input_file_id": "file-a", "output_file_id": "out", "error_file_id": "err"}


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Name a database of each kind with a batch, a job, and a batch whose file is none."""
    async with database_url(request.param, tmp_path) as url:
        async with opened(url) as database:
            rows, now = db.JobRows(database), time.time()
            end = now + 3600
            fault = {"code": "invalid_json_line", "message": "the line is not JSON", "param": None, "line": 7}
            for job in (
                Job(id="batch_a", kind="batch", about=BATCH, total=2, created_at=now, expires_at=end),
                Job(id="job-u1", kind="runpod", total=1, created_at=now + 1, expires_at=end),
                Job(
                    id="batch_b",
                    kind="batch",
                    about=BATCH | {"errors": [fault]},
                    state=JobState.FAILED,
                    created_at=now + 2,
                    ended_at=now + 3,
                    expires_at=end,
                ),
            ):
                await rows.add(job)
            await db.Lines(database).add("job-u1", [NewLine(1, "", b"{}")], now=now)
        yield url


def typed(url: str, *words: str) -> Any:
    """Run a command in this process; what it raises is raised here."""
    result = CliRunner().invoke(cli, ["jobs", *words], env={"DATABASE_URL": url}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_jobs_are_listed_the_newest_first(url):
    """As a table, as JSON, and of one kind alone."""
    lines = [json.loads(line) for line in typed(url, "list", "--json").stdout.splitlines()]
    assert [line["id"] for line in lines] == ["batch_b", "job-u1", "batch_a"]
    assert (lines[2]["state"], lines[2]["lines"], lines[2]["ended"]) == ("open", 2, None)
    table = typed(url, "list", "--kind", "batch", "--limit", "1").stdout
    assert ("batch_b" in table, "batch_a" in table, "job-u1" in table) == (True, False, False)


def test_a_job_is_shown_with_what_was_wrong_with_its_file(url):
    """Facts on standard output, faults with their lines beside it."""
    shown = typed(url, "show", "batch_b")
    assert "/v1/embeddings" in shown.stdout
    assert "line 7: invalid_json_line: the line is not JSON" in shown.stderr
    (line,) = typed(url, "show", "batch_b", "--json").stdout.splitlines()
    assert json.loads(line)["errors"][0]["line"] == 7


def test_jobs_are_stopped(url):
    """A batch closes its lines first, a job of one line has ended at once; one that has ended stays as it is."""
    assert "batch_a is cancelling: 0 of 2 lines are done" in typed(url, "cancel", "batch_a").stderr
    assert "job-u1 is cancelled" in typed(url, "cancel", "job-u1").stderr
    assert "batch_b is failed" in typed(url, "cancel", "batch_b").stderr


@pytest.mark.parametrize("word", ["show", "cancel"])
def test_a_job_that_there_is_not_is_said_so(url, word):
    """With the command that lists those that there are."""
    with pytest.raises(UnknownJob, match="jobs list"):
        typed(url, word, "batch_none")


def test_where_nothing_is_nothing_is_made(tmp_path):
    """Asking makes no database."""
    with pytest.raises(DatabaseError, match="there is no database"):
        typed(db.sqlite_url(tmp_path), "list")
    assert list(tmp_path.iterdir()) == []
