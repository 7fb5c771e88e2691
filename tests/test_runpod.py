"""RunPod's job API: jobs that run behind a reply, and replies that say all that went wrong with them."""

import asyncio
import json
import threading

import numpy as np
import pytest

from conftest import assembled, kill_lanes
from fakes import HashBackend, LogitBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver import app
from quiver.api.call import Call
from quiver.config import Config, EngineConfig, JobsConfig, ModelsConfig, Secret, ServerConfig
from quiver.engine.model import WarmUp
from quiver.engine.scoring import sigmoid
from quiver.types import Pair

ENDPOINT = "/v2/any-endpoint"


async def ask(parts, path, body=None, *, method="POST", **query):
    """Send a body straight into the API; returns status and decoded reply."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    reply = await parts.api.receive(Call(method, path, {"content-type": "application/json"}, raw, query))
    return reply.status, json.loads(reply.body)


async def get(parts, path, **query):
    """Ask with GET; returns the decoded reply of a success."""
    status, reply = await ask(parts, path, method="GET", **query)
    assert status == 200, reply
    return reply


async def submit(parts, given, *, base="", **around):
    """Take a job with /run; returns its id."""
    status, reply = await ask(parts, f"{base}/run", {"input": given, **around})
    assert (status, reply["status"]) == (200, "IN_QUEUE")
    return reply["id"]


def ids_of(text):
    """Return the token ids that the byte tokenizer gives a text or a pair."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids.tolist()


class Lane:
    """Holds a model's only lane until it is let go; knows the length of each batch that was computed."""

    def __init__(self):
        self.busy, self.opened, self.computed = threading.Event(), threading.Event(), []

    def __call__(self, batch):
        """Be what a backend calls before each batch."""
        self.computed.append(len(batch.ids))
        self.busy.set()
        assert self.opened.wait(10)

    def model(self, **options):
        """Make a model with this lane."""
        return hash_model(lanes=1, before=self, **options)


@pytest.fixture
def lane():
    """Return a lane that is let go at the end, whatever happens."""
    lane = Lane()
    yield lane
    lane.opened.set()


@pytest.mark.parametrize("base", ["", ENDPOINT, "/runpod", f"/runpod{ENDPOINT}"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_job_is_followed_from_the_queue_to_its_output(lane, base, method):
    """Under each path that clients use, and with both methods, a job's state is told until its output is there."""
    async with assembled(lane.model()) as parts:
        job = await submit(parts, {"input": "to be"}, base=base)
        _, waiting = await ask(parts, f"{base}/status/{job}", method=method)
        await asyncio.to_thread(lane.busy.wait)
        _, running = await ask(parts, f"{base}/status/{job}", method=method)
        lane.opened.set()
        _, done = await ask(parts, f"{base}/status-sync/{job}", method=method)

    assert (waiting["id"], "output" in waiting) == (job, False)
    assert waiting["status"] in {"IN_QUEUE", "IN_PROGRESS"}
    assert running == {"delayTime": running["delayTime"], "id": job, "status": "IN_PROGRESS", "workerId": "quiver"}
    assert list(done) == ["delayTime", "executionTime", "id", "output", "status", "workerId"]
    assert (done["id"], done["status"]) == (job, "COMPLETED")
    assert all(type(done[key]) is int and done[key] >= 0 for key in ("delayTime", "executionTime"))
    vector = done["output"]["data"][0]["embedding"]
    assert np.array_equal(np.float32(vector), hash_vector(ids_of("to be")))


async def test_run_and_runsync_give_one_output(parts):
    """The same input has the same output either way, wrapped or not."""
    given = {"model": "hash", "input": ["to be", "or not"]}
    _, wrapped = await ask(parts, "/runsync", {"input": given})
    _, bare = await ask(parts, "/runsync", given)
    later = await get(parts, f"/status-sync/{await submit(parts, given)}")
    assert wrapped["output"] == bare["output"] == later["output"]
    assert wrapped["id"].startswith("sync-")
    assert not later["id"].startswith("sync-")


async def test_a_result_has_its_own_index_score_and_document():
    """Whatever the order by relevance, index and document are those of the text that has the score."""
    documents = [f"document {i}" for i in range(40)]
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        _, reply = await ask(parts, "/runsync", {"input": {"query": "q", "docs": documents, "return_docs": True}})

    results = reply["output"]["results"]
    logits = np.stack([6 * hash_vector(ids_of(Pair("q", document)))[:1] for document in documents])
    scores = [result["relevance_score"] for result in results]
    assert sorted(result["index"] for result in results) == list(range(40))
    assert [result["index"] for result in results] != list(range(40))
    assert scores == sorted(scores, reverse=True)
    for result in results:
        assert result["document"] == documents[result["index"]]
        assert np.float32(result["relevance_score"]) == sigmoid(logits)[result["index"], 0]


async def test_a_long_text_is_cut(parts):
    """The worker's model reads what it can of a text; nothing fails."""
    _, reply = await ask(parts, "/runsync", {"input": {"input": "a" * 10_000}})
    assert (reply["status"], reply["output"]["usage"]["total_tokens"]) == ("COMPLETED", 512)


async def test_a_reply_does_not_wait_for_ever(lane):
    """After `wait` milliseconds /runsync answers with the id to ask for, and the job goes on."""
    async with assembled(lane.model()) as parts:
        status, reply = await ask(parts, "/runsync", {"input": {"input": "to be"}}, wait="1000")
        assert (status, reply["status"]) == (200, "IN_PROGRESS")
        lane.opened.set()
        assert (await get(parts, f"/status-sync/{reply['id']}"))["status"] == "COMPLETED"


@pytest.mark.parametrize("wait", ["", "soon", "-5", "1e3", "9" * 5000, "0"])
async def test_whatever_patience_is_said_a_job_that_is_done_is_answered(parts, wait):
    """A time that is none, or out of bounds, is no reason to fail."""
    status, reply = await ask(parts, "/runsync", {"input": {"input": "to be"}}, wait=wait)
    assert (status, reply["status"]) == (200, "COMPLETED")


async def test_a_client_that_leaves_takes_its_job_along(lane):
    """When /runsync's client has gone, what its job still has to compute is not computed."""
    async with assembled(lane.model()) as parts:
        first = await submit(parts, {"input": "a"})
        await asyncio.to_thread(lane.busy.wait)
        waiting = asyncio.create_task(ask(parts, "/runsync", {"input": {"input": "b" * 77}}))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        lane.opened.set()
        await get(parts, f"/status-sync/{first}")
        await ask(parts, "/runsync", {"input": {"input": "ccc"}})
    assert lane.computed == [1, 3]


async def test_a_cancelled_job_is_computed_no_more(lane):
    """Its state is told at once, and its inputs leave the queue."""
    async with assembled(lane.model()) as parts:
        first = await submit(parts, {"input": "a"})
        await asyncio.to_thread(lane.busy.wait)
        second = await submit(parts, {"input": "b" * 77})
        await asyncio.sleep(0.1)
        assert await ask(parts, f"/cancel/{second}") == (200, {"id": second, "status": "CANCELLED"})
        lane.opened.set()
        assert (await get(parts, f"/status-sync/{first}"))["status"] == "COMPLETED"
        assert (await get(parts, f"/status/{second}"))["status"] == "CANCELLED"
    assert lane.computed == [1]


async def test_an_interactive_request_goes_before_a_bulk_job(lane):
    """Whatever a job still has to compute, all of a request of any API comes first."""
    async with assembled(lane.model(batch_tokens=100)) as parts:
        job = await submit(parts, {"input": ["x" * 90] * 20})
        await asyncio.to_thread(lane.busy.wait)
        asked = asyncio.create_task(ask(parts, "/v1/embeddings", {"input": ["a" * 60] * 5}))
        await asyncio.sleep(0.1)
        lane.opened.set()
        await asked
        await get(parts, f"/status-sync/{job}")
    assert lane.computed == [90, *[60] * 5, *[90] * 19]


async def test_a_job_waits_where_a_request_is_refused(lane):
    """A full engine is no end for a job: it goes back to the queue and is done when there is room."""
    async with assembled(lane.model(), engine=EngineConfig(max_waiting_tokens=100)) as parts:
        jobs = [await submit(parts, {"input": "a" * 90})]
        await asyncio.to_thread(lane.busy.wait)
        jobs += [await submit(parts, {"input": letter * 90}) for letter in "bc"]
        async with asyncio.timeout(5):
            while (await get(parts, f"{ENDPOINT}/health"))["jobs"]["inQueue"] != 1:  # noqa: ASYNC110  a queue has no event
                await asyncio.sleep(0.01)
        assert (await ask(parts, "/v1/embeddings", {"input": "d" * 90}))[0] == 429
        lane.opened.set()
        for job in jobs:
            assert (await get(parts, f"/status-sync/{job}"))["status"] == "COMPLETED"


async def test_an_output_is_streamed_once(parts):
    """The SDK reads until nothing is left of a job that has ended: the output comes once, then nothing."""
    job = await submit(parts, {"input": "to be"})
    output = (await get(parts, f"/status-sync/{job}"))["output"]
    assert await get(parts, f"/stream/{job}") == {"status": "COMPLETED", "stream": [{"output": output}]}
    assert await get(parts, f"/stream/{job}") == {"status": "COMPLETED", "stream": []}
    assert (await get(parts, f"/status/{job}"))["output"] == output


@pytest.mark.parametrize("given", [{"model": "other", "input": "a"}, {}])
async def test_a_stream_of_nothing_ends(lane, given):
    """Of a job that failed or was cancelled nothing comes, and the state is one at which the SDK stops asking."""
    async with assembled(lane.model()) as parts:
        job = await submit(parts, given)
        await get(parts, f"/status-sync/{job}")
        assert await get(parts, f"/stream/{job}") == {"status": "FAILED", "stream": []}
        job = await submit(parts, {"input": "a"})
        await ask(parts, f"/cancel/{job}")
        assert await get(parts, f"/stream/{job}") == {"status": "FAILED", "stream": []}


async def test_a_failed_job_says_why_wherever_clients_look():
    """The reason stands beside the state and in the output, the only part that the SDK hands out."""

    def explode(_):
        raise ValueError("secret detail")

    async with assembled(hash_model(before=explode)) as parts:
        status, reply = await ask(parts, "/runsync", {"input": {"input": "a"}})
    assert (status, reply["status"]) == (200, "FAILED")
    assert reply["output"] == {
        "object": "error",
        "message": reply["error"],
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert "secret detail" not in reply["error"]


async def test_a_failed_job_is_retried():
    """The same id with the same input, once what stood in the way has gone."""
    left = [ValueError("once")]

    def explode_once(_):
        if left:
            raise left.pop()

    async with assembled(hash_model(lanes=1, before=explode_once)) as parts:
        job = await submit(parts, {"input": "a"})
        assert (await get(parts, f"/status-sync/{job}"))["status"] == "FAILED"
        assert await ask(parts, f"/retry/{job}") == (200, {"id": job, "status": "IN_QUEUE"})
        assert (await get(parts, f"/status-sync/{job}"))["status"] == "COMPLETED"
        status, reply = await ask(parts, f"/retry/{job}")
        assert status == 400
        assert "completed" in reply["error"]
        assert (await get(parts, f"{ENDPOINT}/health"))["jobs"]["retried"] == 1


async def test_a_job_past_its_time_has_timed_out(lane):
    """Its policy's limit ends a job as TIMED_OUT, with the reason; a request's deadline is none for jobs."""
    async with assembled(lane.model(), server=ServerConfig(timeout_seconds=0.05)) as parts:
        _, reply = await ask(parts, "/runsync", {"input": {"input": "a"}, "policy": {"executionTimeout": 5000}})
        lane.opened.set()
    assert (reply["status"], reply["output"]["code"]) == ("TIMED_OUT", 504)
    assert "5 s to run" in reply["error"]


@pytest.mark.parametrize("places", [1, 3, 15])
async def test_the_last_place_is_given_too(lane, places):
    """A job begins as long as there is a place for it, though none of the others has ended."""
    async with assembled(lane.model(), jobs=JobsConfig(job_lines=places)) as parts:
        for number in range(places):
            await submit(parts, {"input": "a"})
            await until_at_work(parts, number + 1)
        lane.opened.set()


async def until_at_work(parts, number):
    """Wait until so many jobs have begun."""
    async with asyncio.timeout(30):
        while (await get(parts, f"{ENDPOINT}/health"))["jobs"]["inProgress"] != number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_purge_leaves_what_runs(lane):
    """Jobs that wait for their turn are cancelled, and health counts what is left."""
    async with assembled(lane.model(), jobs=JobsConfig(job_lines=3)) as parts:
        running = [await submit(parts, {"input": "a"}) for _ in range(3)]
        await until_at_work(parts, 3)
        waiting = [await submit(parts, {"input": "b"}) for _ in range(3)]
        await asyncio.to_thread(lane.busy.wait)
        health = await get(parts, f"{ENDPOINT}/health")
        assert health["jobs"] == {"completed": 0, "failed": 0, "inProgress": 3, "inQueue": 3, "retried": 0}
        assert (health["workers"]["idle"], health["workers"]["running"]) == (0, 1)
        assert await ask(parts, f"{ENDPOINT}/purge-queue") == (200, {"removed": 3, "status": "completed"})
        lane.opened.set()
        states = [(await get(parts, f"/status-sync/{job}"))["status"] for job in [*running, *waiting]]
    assert states == ["COMPLETED"] * 3 + ["CANCELLED"] * 3


async def test_openais_api_is_whole_under_an_endpoint(parts):
    """Its replies are those of /openai/v1, errors included."""
    calls = [
        ("POST", "/v1/embeddings", {"input": "a"}),
        ("POST", "/v1/embeddings", {"input": 5}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/test/hash", None),
        ("GET", "/v1/models/no/such", None),
    ]
    for method, path, body in calls:
        expected = await ask(parts, f"/openai{path}", body, method=method)
        assert await ask(parts, f"{ENDPOINT}/openai{path}", body, method=method) == expected


async def test_a_load_balancer_hears_when_to_send(tmp_path):
    """Ping is 204 with no body while models load, 200 once they compute, 503 when a lane has died."""

    def die(_):
        raise SystemExit

    loading = app.build(Config(models=ModelsConfig(model=("test/hash",), data_dir=tmp_path)))
    async with loading.engine, loading.service.jobs:
        reply = await loading.api.receive(Call("GET", "/ping"))
        assert (reply.status, reply.body) == (204, b"")
        workers = (await get(loading, f"{ENDPOINT}/health"))["workers"]
        assert (workers["initializing"], workers["ready"]) == (1, 0)
    async with assembled(hash_model(lanes=1, before=die)) as parts:
        await kill_lanes(parts)
        assert (await parts.api.receive(Call("GET", "/ping"))).status == 503
        workers = (await get(parts, f"{ENDPOINT}/health"))["workers"]
        assert (workers["unhealthy"], workers["ready"]) == (1, 0)


async def test_a_job_waits_for_models_that_load(tmp_path):
    """A job that comes too early is done as soon as its model is there."""
    parts = app.build(Config(models=ModelsConfig(model=("test/hash",), data_dir=tmp_path)))
    async with parts.engine, parts.service.jobs:
        job = await submit(parts, {"input": "a"})
        await asyncio.sleep(0.05)
        assert (await get(parts, f"/status/{job}"))["status"] in {"IN_QUEUE", "IN_PROGRESS"}
        parts.engine.replicas.add("test/hash", hash_model(), WarmUp())
        assert (await get(parts, f"/status-sync/{job}"))["status"] == "COMPLETED"


async def test_a_key_is_asked_for_everything_but_ping():
    """Without it a call is 401 in RunPod's shape."""
    async with assembled(server=ServerConfig(api_key=Secret("k3y"))) as parts:
        for path in ("/run", "/runsync", f"{ENDPOINT}/runsync", "/purge-queue", f"{ENDPOINT}/cancel/a"):
            status, reply = await ask(parts, path, {"input": {"input": "a"}})
            assert (status, list(reply)) == (401, ["error"])
        assert (await get(parts, "/ping")) == {"status": "healthy"}


NOT_JOBS = {
    "no body": b"",
    "no object": b"[]",
    "no json": b'{"input": ',
    "a lone surrogate": b'{"input": {"input": "\\ud800"}}',
    "2,000-deep nesting": b'{"input":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "a policy that is no object": b'{"input": {}, "policy": 5}',
    "a time that is no number": b'{"input": {}, "policy": {"ttl": "1h"}}',
}


@pytest.mark.parametrize("name", NOT_JOBS)
@pytest.mark.parametrize("path", ["/run", "/runsync"])
async def test_what_is_no_job_is_refused(parts, path, name):
    """A body that cannot be read is 400 with a sentence, and leaves no job behind."""
    status, reply = await ask(parts, path, NOT_JOBS[name])
    assert (status, list(reply)) == (400, ["error"]), reply
    assert reply["error"]
    counts = (await get(parts, f"{ENDPOINT}/health"))["jobs"]
    assert (counts["inQueue"], counts["inProgress"], counts["failed"]) == (0, 0, 0)


FAILING = {
    "invalid utf-8": b'{"input": "\xff\xfe"}',
    "nothing": {},
    "null": {"input": None},
    "a number": {"input": 5},
    "an object": {"input": {"text": "a"}},
    "token ids": {"input": [[1, 2]]},
    "an empty list": {"input": []},
    "too many": {"input": ["a"] * 2049},
    "an unknown model": {"input": "a", "model": "../../etc/passwd"},
    "too many dimensions": {"input": "a", "dimensions": 33},
    "negative dimensions": {"input": "a", "dimensions": -1},
    "an unknown form": {"input": "a", "encoding_format": "hex"},
    "docs of objects": {"query": "q", "docs": [{"text": "a"}]},
    "no docs": {"query": "q", "docs": []},
    "an unknown route": {"openai_route": "/v1/rerank", "openai_input": {"input": "a"}},
    "a route without its input": {"openai_route": "/v1/embeddings"},
}


@pytest.mark.parametrize("name", FAILING)
async def test_bad_input_fails_the_job_with_the_reason(parts, name):
    """The call is fine, the job has FAILED with the worker's error object, and the next one is done."""
    given = FAILING[name]
    raw = given if isinstance(given, bytes) else json.dumps(given).encode()
    status, reply = await ask(parts, "/runsync", b'{"input": %b}' % raw)
    assert (status, reply["status"]) == (200, "FAILED"), reply
    assert reply["error"]
    assert reply["output"]["object"] == "error"
    assert (reply["output"]["type"], reply["output"]["code"]) == ("BadRequestError", 400)
    assert (await ask(parts, "/runsync", {"input": {"input": "a"}}))[1]["status"] == "COMPLETED"


async def test_the_model_of_a_job_is_any_name_that_is_served():
    """Ids, aliases and no name at all."""
    async with assembled(fake_model(HashBackend())) as parts:
        for given in ({"model": "test/hash"}, {"model": "HASH"}, {"model": ""}, {"model": None}, {}):
            _, reply = await ask(parts, "/runsync", {"input": {"input": "a", **given}})
            assert (reply["status"], reply["output"]["model"]) == ("COMPLETED", "test/hash")
