"""Bulk runs that let a server compute: the same vectors, and patience where the server asks for it."""

import asyncio
import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from conftest import listening
from quiver.bulk import BulkOptions, Wanted, run_bulk
from quiver.bulk.embedders import at_server
from quiver.bulk.lines import BadLine
from quiver.bulk.remote import MAX_TRIES, Server, pause_seconds
from quiver.config import Config, ModelsConfig, Secret, ServerConfig
from quiver.errors import ConfigError, InferenceFailed, InvalidInput, Refused, Unavailable
from test_bulk import corpus, directly, texts_of, vectors_of

HASH = ModelsConfig(model=("test/hash",))


async def bulk_at(url, file, output, *, wanted=None, config=None, max_requests=4, **options):
    """Run with a server; returns how far it came."""
    wanted, config = wanted or Wanted(), config or Config(models=HASH)
    options = BulkOptions(files=(file,), output=output, url=url, wanted=wanted, max_requests=max_requests, **options)
    return await run_bulk(options, config, at_server(config, wanted, url, max_requests))


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(dimensions=8)])
async def test_a_server_gives_the_same_vectors(tmp_path, url, wanted):
    """A live server's vectors, by OpenAI's route, are those of the engine, bit for bit."""
    output = tmp_path / "out.npy"
    state = await bulk_at(f"{url}/v1", corpus(tmp_path / "in.jsonl", texts_of(1000)), output, wanted=wanted)
    assert state.num_rows == 1000
    np.testing.assert_array_equal(vectors_of(output), await directly(texts_of(1000), dimensions=wanted.dimensions))


async def test_a_key_is_shown(tmp_path):
    """The key goes to the server; without it the run ends at once, and no line is said to be bad."""
    file, output = corpus(tmp_path / "in.jsonl", texts_of(10)), tmp_path / "out.npy"
    async with listening(server=ServerConfig(api_key=Secret("k"))) as url:
        with pytest.raises(Refused, match="refuses: 401") as refused:
            await bulk_at(f"{url}/v1", file, output, skip_bad=True)
        assert not isinstance(refused.value, InvalidInput | BadLine)
        config = Config(models=HASH, server=ServerConfig(api_key=Secret("k")))
        assert (await bulk_at(f"{url}/v1", file, output, config=config)).num_rows == 10


async def test_a_model_that_is_not_served(tmp_path, url):
    """The server's own words say which model it does not have."""
    config = Config(models=ModelsConfig(model=("another",)))
    with pytest.raises(Refused, match=r"refuses: 404 .*another"):
        await bulk_at(f"{url}/v1", corpus(tmp_path / "in.jsonl", ["a"]), tmp_path / "out.npy", config=config)


async def test_a_text_that_the_server_refuses(tmp_path, url):
    """It is found among those that it was sent with, and left out alone."""
    file, output = corpus(tmp_path / "in.jsonl", [*texts_of(300), "x" * 600, *texts_of(300)]), tmp_path / "out.npy"
    with pytest.raises(BadLine, match=r"in\.jsonl:301: the text has 600 tokens"):
        await bulk_at(f"{url}/v1", file, output)
    state = await bulk_at(f"{url}/v1", file, output, skip_bad=True)
    assert (state.num_rows, state.num_bad) == (600, 1)
    np.testing.assert_array_equal(vectors_of(output), await directly(texts_of(300) * 2))


class Moody:
    """A server that gives the answers of a script, in turn, and then good ones; counts requests, also those at once."""

    def __init__(self, *script, seconds=0.0):
        self.script = list(script)
        self.requests = []
        self.running = self.most = 0
        self.seconds = seconds
        self.lock = threading.Lock()
        moody = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                moody.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler):
        """Answer one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append((handler.path, body))
            self.running += 1
            self.most = max(self.most, self.running)
            step = self.script.pop(0) if self.script else None
        threading.Event().wait(self.seconds)
        with self.lock:
            self.running -= 1
        if step == "cut":
            handler.close_connection = True
            return
        status, headers, reply = step or (200, {}, self.good(body["input"]))
        payload = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": len(payload)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(payload)

    @staticmethod
    def good(texts):
        """Give each text its length, backwards, so that the order must be mended."""
        vectors = [base64.b64encode(np.float32([len(text), 1]).tobytes()).decode() for text in texts]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
        return {"data": data[::-1], "usage": {"prompt_tokens": len(texts)}}

    @contextlib.contextmanager
    def running_server(self):
        """Serve."""
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()


def error(status, message="no", code=None, **headers):
    """Return an answer that is an error of OpenAI's."""
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {
        "error": {"message": message, "code": code}
    }  # fmt: skip


async def embed_once(moody):
    """Ask for two texts."""
    with Server(moody.url, "", {"model": "m"}, 2) as server:
        return await server.embed(["a", "bcd"])


@pytest.mark.parametrize(
    "trouble",
    [error(429, Retry_After="0"), error(503, Retry_After="0"), (502, {"Retry-After": 0}, b"<html>"), "cut"],
)
async def test_trouble_that_passes(trouble):
    """A server that is busy, away or cuts the connection is asked again, and its answer is put in order."""
    with Moody(trouble, trouble).running_server() as moody:
        found = await embed_once(moody)
    assert found.rows.tolist() == [[1, 1], [3, 1]]
    assert found.num_tokens == 2
    assert [path for path, _ in moody.requests] == ["/v1/embeddings"] * 3


@pytest.mark.parametrize(
    ("answer", "kind", "complaint"),
    [
        (error(400, "input 0 is bad"), InvalidInput, "input 0 is bad"),
        (error(500, "it breaks", "inference_error"), InferenceFailed, "it breaks"),
        (error(401, "who?"), Refused, "refuses: 401 who?"),
        (error(429, "no money", "insufficient_quota"), Refused, "refuses: 429 no money"),
        (error(429, "later", Retry_After="86400"), Unavailable, "come back in 86,400 s: run the same command then"),
        ((200, {}, b"{}"), Refused, "the server's reply is not OpenAI's"),
        ((200, {}, {"data": []}), Refused, "the server's reply is not OpenAI's"),
        ((200, {}, {"data": [{"index": 0, "embedding": [1.0]}]}), Refused, "answered 1 texts instead of 2"),
    ],
)
async def test_trouble_that_does_not_pass(answer, kind, complaint):
    """What asking again would not mend is told at once, as what it is."""
    with Moody(answer).running_server() as moody, pytest.raises(kind, match=complaint):
        await embed_once(moody)
    assert len(moody.requests) == 1


async def test_patience_ends():
    """A server that never answers is given up, with its last words."""
    trouble = [error(503, "still busy", Retry_After="0")] * (MAX_TRIES + 1)
    with (
        Moody(*trouble).running_server() as moody,
        pytest.raises(Unavailable, match="8 times, at last with: 503 still"),
    ):
        await embed_once(moody)
    assert len(moody.requests) == MAX_TRIES


def test_pauses():
    """The server's word holds, in seconds or as a date; without one, pauses double up to a bound, by chance shorter."""
    assert pause_seconds(1, "7") == 7
    assert pause_seconds(1, "Wed, 21 Oct 2015 07:28:10 GMT", now=1445412480.0) == 10
    assert pause_seconds(1, "Wed, 21 Oct 2015 07:28:10 GMT", now=1445412500.0) == 0
    for attempt, longest in ((1, 0.5), (3, 2.0), (5, 8.0), (12, 30.0)):
        assert longest / 2 <= pause_seconds(attempt, "") <= longest
        assert longest / 2 <= pause_seconds(attempt, "soon") <= longest


async def test_requests_at_once_are_bounded(tmp_path):
    """As many requests as are allowed are at work at once, each with a chunk, and the model is named."""
    with Moody(seconds=0.1).running_server() as moody:
        file = corpus(tmp_path / "in.jsonl", texts_of(1500))
        await bulk_at(moody.url, file, tmp_path / "out.npy", max_requests=3)
    assert moody.most == 3
    assert [len(body["input"]) for _, body in moody.requests[:2]] == [1, 256]
    assert {body["model"] for _, body in moody.requests} == {"test/hash"}
    assert {body["encoding_format"] for _, body in moody.requests} == {"base64"}


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://localhost/v1", "http://", "http://localhost:http/v1"])
async def test_an_address_that_is_none(url):
    """What is no base URL is said to be none."""
    with pytest.raises(ConfigError, match="is no base URL of a server"):
        Server(url, "", {}, 1)


async def test_scaling_is_the_servers():
    """OpenAI's route has no word for it, so asking for it is a mistake, not a wish that nobody fulfils."""
    with pytest.raises(ConfigError, match="--normalize is for the engine in this process"):
        async with at_server(Config(), Wanted(normalize=True), "http://localhost:1/v1", 1):
            await asyncio.sleep(0)
