"""The client's batches, against a server that does what OpenAI documents."""

import json

import numpy as np
import pytest

from client_servers import cuts, says, scripted
from clients_both import BOTH
from openai_batches import OpenAI, vector_of
from quiver.client import BatchFailed, NotFound, TimedOut, Unreachable, batches
from quiver.client.core import Core, Settings
from quiver.client.steps import Response

TEXTS = [f"text {'x' * (i % 7)}" for i in range(100)]


@pytest.fixture(params=BOTH, ids=["blocking", "asynchronous"])
def opened(request):
    """Return what opens each of the clients."""
    return request.param


def changed(texts, **at):
    """Return texts with some of them changed, by their place."""
    return [at.get(f"n{i}", text) for i, text in enumerate(texts)]


async def test_texts_go_in_and_vectors_come_out(opened):
    """(B, D) float32 in the order of the texts, though the output file has none; `progress` saw each state."""
    seen = []
    with scripted(OpenAI()) as (url, _):
        async with opened(url) as client:
            batch = await client.batches.create((text for text in TEXTS), metadata={"of": "test"})
            done = await client.batches.wait(batch, progress=seen.append)
            vectors = await client.batches.results(done)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [vector_of(text) for text in TEXTS]
    assert [batch.status for batch in seen] == ["validating", "in_progress", "in_progress", "finalizing", "completed"]
    assert (done.counts.total, done.counts.completed, done.counts.failed) == (4, 4, 0)
    assert done.metadata == {"of": "test", "num_texts": "100"}


async def test_what_is_said_of_the_texts_is_in_every_line(opened):
    """Model, dimensions and purpose; `truncate` is always there, so that no other API is meant at that path."""
    fake = OpenAI()
    with scripted(fake) as (url, _):
        async with opened(url, model="m") as client:
            await client.batches.create(TEXTS, dimensions=2, input_type="document")
    lines = [json.loads(line) for line in fake.files["file-0"].splitlines()]
    assert [len(line["body"].pop("input")) for line in lines] == [32, 32, 32, 4]
    assert len({line["custom_id"] for line in lines}) == 4
    said = {"model": "m", "dimensions": 2, "input_type": "document", "truncate": None, "encoding_format": "base64"}
    assert all(line["body"] == said for line in lines)


async def test_texts_without_vectors_are_told(opened):
    """By their places and with the reasons; with `partial`, their rows are NaN and all others there."""
    texts = changed(TEXTS, n40="too long!", n99="late?")
    with scripted(OpenAI()) as (url, _):
        async with opened(url) as client:
            done = await client.batches.wait(await client.batches.create(texts))
            with pytest.raises(BatchFailed) as failure:
                await client.batches.results(done)
            vectors = await client.batches.results(done, partial=True)
    for part in ("36 of its 100 texts", "texts 32 to 63: too long", "texts 96 to 99: it was too late"):
        assert part in str(failure.value)
    assert failure.value.batch.counts.failed == 2
    is_missing = np.isnan(vectors).all(axis=1)
    assert np.flatnonzero(is_missing).tolist() == [*range(32, 64), *range(96, 100)]
    assert vectors[~is_missing].tolist() == [vector_of(text) for text in np.array(texts)[~is_missing].tolist()]


@pytest.mark.parametrize(
    ("status", "why"), [("failed", "failed: line 3 is no JSON"), ("expired", "expired"), ("cancelled", "cancelled")]
)
async def test_a_batch_that_ends_otherwise_is_an_error(opened, status, why):
    """Waiting for it raises why; what was done of one that was stopped may still be had."""
    with scripted(OpenAI(states=("validating", status))) as (url, _):
        async with opened(url) as client:
            batch = await client.batches.create(changed(TEXTS, n0="late?"))
            with pytest.raises(BatchFailed, match=f"is {why}$") as failure:
                await client.batches.wait(batch)
            found = await client.batches.results(failure.value.batch, partial=True)
    assert np.isnan(found).all(axis=1).sum() == (100 if status == "failed" else 32)


async def test_one_that_goes_on_is_waited_for_no_longer_than_told(opened):
    """Then it is `TimedOut`, and the batch goes on; its results are not there yet."""
    with scripted(OpenAI(states=("in_progress",))) as (url, _):
        async with opened(url) as client:
            batch = await client.batches.create(["a"])
            with pytest.raises(TimedOut):
                await client.batches.wait(batch, timeout=0.7)
            with pytest.raises(BatchFailed, match="is in_progress"):
                await client.batches.results(batch, partial=True)
            assert (await client.batches.get(batch.id)).status == "in_progress"


async def test_batches_are_listed_page_by_page(opened):
    """All of them, the youngest first, or only so many."""
    fake = OpenAI()
    with scripted(fake) as (url, script):
        async with opened(url) as client:
            for _ in range(5):
                await client.batches.create(["a"])
            ids = [batch.id for batch in await client.batches.list()]
            some = [batch.id for batch in await client.batches.list(limit=2)]
    assert ids == [f"batch_{i}" for i in (4, 3, 2, 1, 0)]
    assert some == ids[:2]
    assert script.seen[-1].path == "/v1/batches?limit=2"


def test_a_list_ends_with_its_last_page():
    """The next page is asked for after the last batch, until the server says that there is no more."""

    def page(*ids, has_more):
        data = [{"id": each, "status": "completed"} for each in ids]
        return Response(200, {}, json.dumps({"data": data, "has_more": has_more}).encode())

    plan = batches.list_(Core(Settings(url="http://a")))
    paths = [next(plan).request.path, plan.send(page("b1", "b2", has_more=True)).request.path]
    with pytest.raises(StopIteration) as done:
        plan.send(page("b3", has_more=False))
    assert paths == ["/v1/batches?limit=100", "/v1/batches?limit=100&after=b2"]
    assert [batch.id for batch in done.value.value] == ["b1", "b2", "b3"]


async def test_a_batch_is_stopped(opened):
    """The server says that it stops; one that is unknown is `NotFound`."""
    with scripted(OpenAI()) as (url, _):
        async with opened(url) as client:
            batch = await client.batches.create(["a"])
            assert (await client.batches.cancel(batch)).status == "cancelling"
            with pytest.raises(NotFound, match="No such object"):
                await client.batches.get("batch_99")


async def test_no_batch_is_made_twice(opened):
    """A connection that is cut while a batch is made is an error, for it may be there; a refusal is tried again."""
    with scripted(cuts) as (url, script):
        async with opened(url) as client:
            with pytest.raises(Unreachable):
                await client.batches.create(["a"])
    assert len(script.seen) == 1
    with scripted(says(429, {}, retry_after_ms="10"), OpenAI()) as (url, script):
        async with opened(url) as client:
            assert (await client.batches.create(["a"])).id == "batch_0"
    assert len(script.seen) == 3


async def test_a_batch_of_nothing_is_refused(opened):
    """Nothing is sent for it."""
    with scripted(OpenAI()) as (url, script):
        async with opened(url) as client:
            with pytest.raises(ValueError, match="at least one text"):
                await client.batches.create([])
    assert script.seen == []


async def test_a_batch_of_others_is_not_misread(opened):
    """Without the client's own mark, nobody knows which vector is whose."""
    fake = OpenAI(states=("completed",))
    with scripted(fake) as (url, _):
        async with opened(url) as client:
            batch = await client.batches.create(["a"])
            fake.batches[0]["metadata"] = {}
            with pytest.raises(BatchFailed, match="not made by this client"):
                await client.batches.results(batch)
