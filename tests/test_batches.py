"""OpenAI's files and batches: openai's own package against a live server, and what is no batch."""

import asyncio
import contextlib
import json
import threading

import httpx
import numpy as np
import openai
import pytest

from conftest import listening
from fakes import LogitBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver.api.call import Call
from quiver.config import JobsConfig, ServerConfig

PATIENCE_SECONDS = 20
EMBEDDINGS = "/v1/embeddings"


def line(number, *, url=EMBEDDINGS, custom_id=None, method="POST", **body):
    """Write one line of a batch's file."""
    body = {"model": "hash", "input": f"text {number}"} | body
    return json.dumps({"custom_id": custom_id or f"line-{number}", "method": method, "url": url, "body": body})


def lines(*given):
    """Write a file of lines."""
    return "".join(f"{one}\n" for one in given).encode()


@contextlib.asynccontextmanager
async def speaking(model, **sections):
    """Return openai's client of a live server."""
    async with (
        listening(model, **sections) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


@pytest.fixture
async def client(url):
    """Return openai's client of a live server with the hash model."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def upload(client, data, **facts):
    """Upload a file for a batch."""
    return await client.files.create(file=("in.jsonl", data), purpose="batch", **facts)


async def begin(client, data, endpoint=EMBEDDINGS, **facts):
    """Upload a file and make a batch of it."""
    file = await upload(client, data)
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **facts)


async def ended(client, batch):
    """Poll a batch until it has ended, as its users do."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while batch.status not in {"completed", "failed", "expired", "cancelled"}:
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def read(client, file_id):
    """Return the lines of a file."""
    return [json.loads(one) for one in (await client.files.content(file_id)).text.splitlines()]


async def test_a_batch_from_its_file_to_its_output(client):
    """Upload, create, poll, download: each line has the reply that its call alone would have."""
    data = lines(*(line(i) for i in range(300)))
    batch = await begin(client, data, metadata={"for": "a test"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", EMBEDDINGS, "24h")
    assert (batch.status, batch.metadata, batch.errors) == ("validating", {"for": "a test"}, None)
    assert batch.expires_at - batch.created_at == 24 * 3600

    batch = await ended(client, batch)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (300, 300, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at

    output = await read(client, batch.output_file_id)
    assert [one["custom_id"] for one in output] == [f"line-{i}" for i in range(300)]
    assert len({one["id"] for one in output}) == len({one["response"]["request_id"] for one in output}) == 300
    for i, one in enumerate(output):
        assert list(one) == ["id", "custom_id", "response", "error"]
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        ids = byte_tokenizer().encode([f"text {i}"], truncate=False)[0].ids.tolist()
        assert np.array_equal(np.float32(one["response"]["body"]["data"][0]["embedding"]), hash_vector(ids))
    alone = await client.embeddings.create(model="hash", input="text 7", encoding_format="float")
    assert output[7]["response"]["body"]["data"][0]["embedding"] == alone.data[0].embedding

    file = await client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.bytes) == ("batch_output", len((await client.files.content(file.id)).content))
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)


async def test_what_fails_has_its_reply_in_the_error_file(client):
    """A line that a call would be refused for is refused there, with the same status and body; the others are done."""
    data = lines(line(0), line(1, input=[]), line(2, dimensions=99), line(3))
    batch = await ended(client, await begin(client, data))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 2)
    assert [one["custom_id"] for one in await read(client, batch.output_file_id)] == ["line-0", "line-3"]
    errors = await read(client, batch.error_file_id)
    assert [one["custom_id"] for one in errors] == ["line-1", "line-2"]
    for one, body in zip(errors, ({"input": []}, {"input": "text 2", "dimensions": 99}), strict=True):
        with pytest.raises(openai.BadRequestError) as alone:
            await client.embeddings.create(model="hash", **body)
        assert (one["error"], one["response"]["status_code"]) == (None, 400)
        assert one["response"]["body"]["error"] == {
            "message": alone.value.body["message"],
            "type": "invalid_request_error",
            "param": alone.value.param,
            "code": alone.value.code,
        }


async def test_nothing_but_failures_has_no_output_file(client):
    """Where no line succeeded, only the error file is there."""
    batch = await ended(client, await begin(client, lines(line(0, input=[]))))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert len(await read(client, batch.error_file_id)) == 1


async def test_a_batch_ranks():
    """The endpoint /v1/rerank goes through openai's package, too."""
    model = fake_model(LogitBackend(), kind="rerank", dimensions=1)
    async with listening(model) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
        given = {"query": "q", "documents": ["a", "b", "c"], "input": None}
        batch = await ended(client, await begin(client, lines(line(0, url="/v1/rerank", **given)), "/v1/rerank"))
        (output,) = await read(client, batch.output_file_id)
        async with httpx.AsyncClient() as http:
            alone = (await http.post(f"{url}/v1/rerank", json={"model": "hash", **given})).json()
    assert output["response"]["body"]["results"] == alone["results"]
    assert sorted(result["index"] for result in alone["results"]) == [0, 1, 2]


FAULTY = {
    "bad json": (lines(line(0), "{", line(2)), [("invalid_json_line", 2)]),
    "a duplicate": (lines(line(0), line(1, custom_id="line-0")), [("duplicate_custom_id", 2)]),
    "another endpoint": (lines(line(0), line(1, url="/v1/rerank")), [("mismatched_url", 2)]),
    "another method": (lines(line(0, method="GET")), [("invalid_method", 1)]),
    "mixed models": (lines(line(0), line(1, model="other")), [("mismatched_model", 2)]),
    "an unknown model": (lines(line(0, model="gpt-5"), line(1, model="gpt-5")), [("model_not_found", 1)]),
    "no custom_id": (lines('{"method": "POST", "url": "/v1/embeddings", "body": {}}'), [("invalid_request", 1)]),
    "no body": (lines('{"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}'), [("invalid_request", 1)]),
    "a body that is none": (lines(line(0)[:-1] + ', "body": 5}'), [("invalid_request", 1)]),
    "not utf-8": (lines(line(0)) + b'{"custom_id": "\xff"}\n', [("invalid_json_line", 2)]),
    "binary junk": (bytes(range(256)) * 50, [("invalid_json_line", n) for n in range(1, 52)]),
    "nothing": (b"", [("empty_file", None)]),
    "empty lines": (b"\n \n\r\n", [("empty_file", None)]),
    "several faults": (
        lines("[]", line(1), "5", line(3, custom_id="line-1")),
        [
            ("invalid_request", 1),
            ("invalid_request", 3),
            ("duplicate_custom_id", 4),
        ],
    ),
    "deep nesting": (lines(line(0)[:-2] + ', "x": ' + "[" * 100_000), [("invalid_json_line", 1)]),
}


@pytest.mark.parametrize("name", FAULTY)
async def test_a_file_that_is_no_batch_fails_it_with_the_line(client, name):
    """Each fault is told with its line, nothing of the file is done, and the next batch is."""
    data, faults = FAULTY[name]
    batch = await ended(client, await begin(client, data))
    assert batch.status == "failed"
    assert batch.failed_at >= batch.created_at
    assert [(error.code, error.line) for error in batch.errors.data] == faults
    assert all(error.message for error in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id, batch.request_counts.total) == (None, None, 0)
    assert (await ended(client, await begin(client, lines(line(0))))).status == "completed"


async def test_empty_lines_a_mark_and_no_last_newline_are_no_faults(client):
    """Editors leave such things."""
    data = b"\xef\xbb\xbf" + lines(line(0), "") + line(1).encode()
    batch = await ended(client, await begin(client, data))
    assert (batch.status, batch.request_counts.completed) == ("completed", 2)


async def test_too_many_lines_are_refused_with_the_first_that_is_too_many():
    """The file may have as many lines as the setting says, and not one more."""
    async with speaking(hash_model(), jobs=JobsConfig(max_batch_lines=3)) as client:
        fits = await ended(client, await begin(client, lines(*map(line, range(3)))))
        over = await ended(client, await begin(client, lines(*map(line, range(4)))))
    assert (fits.status, over.status) == ("completed", "failed")
    assert [(error.code, error.line) for error in over.errors.data] == [("too_many_requests", 4)]


NOT_BATCHES = {
    "no such file": ({"input_file_id": "file-none"}, 404, "input_file_id"),
    "another endpoint": ({"endpoint": "/v1/chat/completions"}, 400, "endpoint"),
    "another window": ({"completion_window": "1h"}, 400, "completion_window"),
    "many pairs": ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    "a long value": ({"metadata": {"a": "b" * 513}}, 400, "metadata[...]"),
    "a short life": (
        {"extra_body": {"output_expires_after": {"anchor": "created_at", "seconds": 5}}},
        400,
        "expires_after.seconds",
    ),
}


@pytest.mark.parametrize("name", NOT_BATCHES)
async def test_what_is_no_batch_is_refused_at_once(client, name):
    """The field is named, in OpenAI's shape."""
    given, status, field = NOT_BATCHES[name]
    usual = {"input_file_id": (await upload(client, lines(line(0)))).id, "endpoint": EMBEDDINGS}
    with pytest.raises(openai.APIStatusError) as refused:
        await client.batches.create(**{**usual, "completion_window": "24h", **given})
    assert (refused.value.status_code, refused.value.param) == (status, field)
    assert [batch.id async for batch in client.batches.list()] == []


class Held:
    """Lets the first batches of a model through, and holds the rest."""

    def __init__(self, free):
        self.left, self.opened = free, threading.Event()

    def __call__(self, _):
        """Be what a backend calls before each batch."""
        self.left -= 1
        if self.left < 0:
            self.opened.wait(10)


async def test_a_cancelled_batch_keeps_what_was_done():
    """Its output has the lines that were done, its error file the others with the reason."""
    held = Held(3)
    model = hash_model(lanes=1, batch_tokens=16, before=held)
    async with speaking(model, jobs=JobsConfig(job_lines=4)) as client:
        batch = await begin(client, lines(*map(line, range(50))))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while batch.request_counts.completed < 3:
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
        batch = await client.batches.cancel(batch.id)
        assert batch.status in {"cancelling", "cancelled"}
        held.opened.set()
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.cancelling_at <= batch.cancelled_at
        done, left = await read(client, batch.output_file_id), await read(client, batch.error_file_id)
        with pytest.raises(openai.BadRequestError, match="cancelled already"):
            await client.batches.cancel(batch.id)
    assert len(done) == batch.request_counts.completed >= 3
    assert sorted(one["custom_id"] for one in done + left) == sorted(f"line-{i}" for i in range(50))
    assert {(one["error"]["code"], one["response"]) for one in left} == {("batch_cancelled", None)}


async def test_lists_are_read_to_their_end(client):
    """Openai's own loops over pages see each once, the newest first, and stop."""
    files = [await upload(client, lines(line(i))) for i in range(5)]
    batches = [await ended(client, await begin(client, lines(line(i)))) for i in range(3)]
    assert [batch.id async for batch in client.batches.list(limit=1)] == [batch.id for batch in reversed(batches)]
    uploaded = [file.id async for file in client.files.list(purpose="batch", limit=2, order="asc")]
    assert len(uploaded) == len(set(uploaded)) == 8
    assert uploaded[:5] == [file.id for file in files]
    outputs = [file async for file in client.files.list(purpose="batch_output")]
    assert {file.id for file in outputs} == {batch.output_file_id for batch in batches}
    page = await client.files.list(limit=3)
    assert (page.has_more, len(page.data)) == (True, 3)


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "limit=-1", "order=up", "after=file-none"])
async def test_a_page_that_is_none_is_refused(url, query):
    """The parameter is named."""
    async with httpx.AsyncClient(base_url=url) as http:
        reply = await http.get(f"/v1/files?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])


async def test_a_file_may_say_when_it_goes(client):
    """As the request says, or after the setting's days."""
    usual = await upload(client, b"a")
    short = await upload(client, b"a", expires_after={"anchor": "created_at", "seconds": 3600})
    assert usual.expires_at - usual.created_at == 30 * 24 * 3600
    assert short.expires_at - short.created_at == 3600
    assert (short.filename, short.bytes, short.status) == ("in.jsonl", 1, "processed")


async def test_a_file_of_every_size_comes_back_to_the_byte(client):
    """Empty, one byte, at the edges of a part, and of several; a boundary in it is none."""
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_500_000):
        data = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
        data = (b"\r\n--boundary\r\n" + data)[:size]
        file = await upload(client, data)
        assert (await client.files.content(file.id)).content == data


BOUNDARY = "frontier"


def form(*fields, end=True):
    """Write a form: (head, value)."""
    parts = "".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in fields
    )
    return (parts + (f"--{BOUNDARY}--\r\n" if end else "")).encode()


FILE = ('name="file"; filename="a.jsonl"', "{}")
PURPOSE = ('name="purpose"', "batch")
NOT_UPLOADS = {
    "no file": (form(PURPOSE), "file"),
    "no purpose": (form(FILE), "purpose"),
    "another purpose": (form(FILE, ('name="purpose"', "fun")), "purpose"),
    "two files": (form(FILE, FILE, PURPOSE), "file"),
    "cut": (form(FILE, PURPOSE, end=False), None),
    "cut in its file": (form(FILE, PURPOSE)[:90], None),
    "no form": (b"{}", None),
    "a long field": (form(PURPOSE, ('name="x"', "y" * 70_000), FILE), "x"),
    "many fields": (form(*[(f'name="x{i}"', "") for i in range(40)], FILE, PURPOSE), None),
    "a bad life": (form(FILE, PURPOSE, ('name="expires_after[seconds]"', "soon")), "expires_after.seconds"),
}


@pytest.mark.parametrize("name", NOT_UPLOADS)
async def test_what_is_no_upload_is_refused_and_leaves_nothing(url, name):
    """It is told in OpenAI's shape, and no file is listed."""
    data, field = NOT_UPLOADS[name]
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with httpx.AsyncClient(base_url=url) as http:
        reply = await http.post("/v1/files", content=data, headers=headers)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text
        assert (await http.get("/v1/files")).json() == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }


async def test_the_fields_of_a_form_come_in_any_order(url):
    """The purpose may stand behind the file, and a name may be a path of another system."""
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with httpx.AsyncClient(base_url=url) as http:
        named = ('name="file"; filename="C:\\dir\\näme.jsonl"', "{}")
        for fields in ((named, PURPOSE), (PURPOSE, named)):
            reply = await http.post("/v1/files", content=form(*fields), headers=headers)
            assert (reply.status_code, reply.json()["bytes"]) == (200, 2)


async def test_an_upload_without_a_form_is_told_what_to_send(url):
    """415, whatever else comes."""
    async with httpx.AsyncClient(base_url=url) as http:
        reply = await http.post("/v1/files", json={"file": "a"})
    assert (reply.status_code, "multipart/form-data" in reply.json()["error"]["message"]) == (415, True)


async def test_a_file_that_is_too_large_is_refused_while_it_comes():
    """Its sender reads 413, and the file is not kept; a body larger than any other request's is no reason."""
    server = ServerConfig(max_body_bytes=1000)
    async with speaking(hash_model(), server=server, jobs=JobsConfig(max_file_bytes=2_000_000)) as client:
        assert (await upload(client, b"x" * 2_000_000)).bytes == 2_000_000
        with pytest.raises(openai.APIStatusError) as refused:
            await upload(client, b"x" * 2_000_001)
        assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")
        assert len([file async for file in client.files.list()]) == 1


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(url):
    """What it had sent is gone, and the server serves the next."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    writer.write(head.encode() + b"Content-Length: 3000000\r\n\r\n" + form(FILE, end=False)[:-4] + b"x" * 2_000_000)
    await writer.drain()
    writer.close()
    await asyncio.sleep(0.5)
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/v1/files")).json()["data"] == []


async def test_files_and_batches_are_under_openais_own_prefix_too(parts):
    """As every API's paths are."""
    for path in ("/openai/v1/files", "/openai/v1/batches"):
        reply = await parts.api.receive(Call("GET", path))
        assert (reply.status, json.loads(reply.body)["data"]) == (200, [])
