"""Jobs of accounts: they are their owner's alone, count towards its quota, and end with its key."""

import asyncio
import json

from desk import get, post, staffed
from quiver.job import Job, NewLine

RUN = b'{"input": {"input": ["a", "b"]}}'
OUTPUTS = {"output_file_id": "out", "error_file_id": "err", "endpoint": "/v1/embeddings"}


async def test_a_job_is_its_owners_and_counts_once(tmp_path):
    """Another user does not find it, and its inputs are in the ledger of whoever sent it."""
    async with staffed(tmp_path) as (parts, desk):
        mine, theirs = await desk.key(), await desk.key(email="bob@b.c")
        assert (await post(parts, "/run", body=RUN)).status == 401
        job = json.loads((await post(parts, "/run", mine, RUN)).body)["id"]
        assert json.loads((await get(parts, f"/status-sync/{job}", mine)).body)["status"] == "COMPLETED"
        for path in (f"/status/{job}", f"/stream/{job}", f"/status-sync/{job}"):
            assert (await get(parts, path, theirs)).status == 404
        assert (await post(parts, f"/cancel/{job}", theirs, b"")).status == 404
        async with asyncio.timeout(10):
            while not (totals := await desk.totals()):  # noqa: ASYNC110  the ledger is a second behind
                await asyncio.sleep(0.1)
    assert [(total.email, total.requests, total.embeddings) for total in totals] == [("ann@b.c", 1, 2)]


async def test_a_job_whose_key_has_ended_is_done_no_more(tmp_path):
    """Its lines are refused, and say so; with a good key the same lines are done."""
    async with staffed(tmp_path) as (parts, desk):
        keys = [await desk.key(), await desk.key()]
        await desk.revoke(keys[1])
        results = []
        for number, key in enumerate(keys):
            about = {name: f"{value}{number}" if name.endswith("_id") else value for name, value in OUTPUTS.items()}
            job = Job(id=f"batch_{number}", kind="batch", key_id=key.split("_")[1], about=about)
            job = await parts.service.jobs.add(job, [NewLine(1, "x", b'{"input": "a"}')], seconds=60)
            job = await parts.service.jobs.wait(job, 10)
            results.append((job.done, job.failed))
        error = json.loads((await parts.service.jobs.line(job)).result)["error"]
    assert results == [(1, 0), (0, 1)]
    assert error["code"] == "invalid_api_key"
