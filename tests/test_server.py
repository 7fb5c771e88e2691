"""The server as a process: start, signals, and what it says when it cannot serve."""

import contextlib
import json
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import checkpoints
from hub_server import Hub, Repository
from quiver import app
from quiver.config import Config, ModelsConfig
from quiver.errors import LoadError
from server_process import serving

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
EX_CONFIG = 78
READY_SECONDS = 6.0
"""Twice the promise, for a machine that does something else meanwhile."""
RESIDENT_BYTES = 450e6
AT_ONCE_SECONDS = 3.0
WORDS = "so packed runs of words in arrival order fill one core and no padding exists in the engine "
LONG_TEXT = WORDS * 11


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the directory of a tiny random model."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "tiny", "bert")


@pytest.fixture(scope="module")
def server(tiny):
    """Run a server of the default model and a tiny one."""
    with serving("--model", MINILM, "--model", str(tiny)) as server:
        yield server


@pytest.fixture(scope="module")
def url(server):
    """Return where it listens, ready."""
    return server.ready_url()


class SlowHub(Hub):
    """A hub that holds weights back until it is told to send them."""

    def __init__(self, repositories):
        self.asked, self.released = threading.Event(), threading.Event()
        super().__init__(repositories)

    def _handler(self):
        hub = self

        class Handler(super()._handler()):
            def _spoil(self, repository, name, content):
                if name.endswith(".safetensors"):
                    hub.asked.set()
                    hub.released.wait(20)
                return super()._spoil(repository, name, content)

            def _send(self, status, headers, body):
                with contextlib.suppress(ConnectionError):  # the server may have gone
                    super()._send(status, headers, body)

        return Handler


@pytest.fixture
def loading(tiny, tmp_path):
    """Run a server whose model is on its way: the hub, and the server."""
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    with SlowHub({"org/tiny": Repository(files)}) as hub:
        places = ("--hub-endpoint", hub.url, "--hub-cache", str(tmp_path / "cache"), "--data-dir", str(tmp_path))
        try:
            with serving("--model", "org/tiny", *places) as server:
                yield hub, server
        finally:
            hub.released.set()


def embed(url, *, texts=("a",), **body):
    """Ask for vectors."""
    return httpx.post(f"{url}/v1/embeddings", json={"input": list(texts), **body}, timeout=60)


def dimensions_of(reply):
    """Return how long the first vector of a reply is."""
    assert reply.status_code == 200, reply.text
    return len(reply.json()["data"][0]["embedding"])


@contextlib.contextmanager
def busy(url, *, texts):
    """Send a request that keeps the server at work; yields its future once inputs are waiting."""
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(embed, url, texts=[f"{i} {LONG_TEXT}" for i in range(texts)])
        while not re.search(r"^quiver_waiting_tokens\{.*\} [1-9]", httpx.get(f"{url}/metrics").text, re.MULTILINE):
            assert not asking.done(), "the request was over before it could be seen"
            time.sleep(0.02)
        yield asking


def assert_clean(server):
    """Check that it said nothing but lines of the log, which are JSON where nobody reads along, and no traceback."""
    for line in server.lines:
        assert json.loads(line)["event"], line
        assert "Traceback" not in line


def assert_told(reply):
    """Check that a client whose request was cut short reads why, in the shape of its API."""
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "stopping")
    assert "retry-after" in reply.headers


# Start


def test_the_default_model_is_ready_soon_in_little_memory(capsys):
    """With the default model alone, the server is ready and small."""
    with serving() as server:
        url = server.ready_url()
        seconds = time.perf_counter() - server.started
        assert dimensions_of(embed(url)) == 384
        resident = server.resident_bytes()
    with capsys.disabled():
        print(f" (ready after {seconds:.2f} s, {resident / 1e6:.0f} MB resident) ", end="")  # noqa: T201  the figures
    assert seconds < READY_SECONDS
    assert resident < RESIDENT_BYTES


def test_the_port_answers_while_the_model_loads(loading):
    """Live at once, `starting` and not_ready with a time to come back until the model is there, then ready."""
    hub, server = loading
    url = server.url()
    assert hub.asked.wait(10)

    assert httpx.get(f"{url}/health/live").status_code == 200
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    (model,) = health.json()["models"]
    assert (model["id"], model["state"], model["error"]) == ("org/tiny", "downloading", "")
    assert "config.json" in {file["file"] for file in model["downloads"] if file["done_bytes"] == file["total_bytes"]}
    for reply in (embed(url), embed(url, model="org/tiny"), httpx.get(f"{url}/health/ready")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert int(reply.headers["retry-after"]) >= 1

    hub.released.set()
    server.wait_for("ready")
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    assert dimensions_of(embed(url)) == 48


def rpc(url, method, *params):
    """Call a method by JSON-RPC and return its result, or its error."""
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
    reply = httpx.post(f"{url}/rpc", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json().get("result") or reply.json()["error"]


def test_both_forms_of_health_say_the_same_during_a_slow_start(loading):
    """`starting` and nothing else until the model is there, then `ok` and nothing else; RPC shows how far files are."""
    hub, server = loading
    url, seen = server.url(), []

    def look():
        word = httpx.get(f"{url}/health").json()["status"]
        seen.append((rpc(url, "health")["status"], word, rpc(url, "health")["models_ready"]))

    assert hub.asked.wait(10)
    for _ in range(20):
        look()
    assert set(seen) == {("starting", "starting", False)}
    status = rpc(url, "status")
    (model,) = status["models"]
    assert (status["status"], model["id"], model["state"]) == ("starting", "org/tiny", "downloading")
    assert "config.json" in {file["file"] for file in model["downloads"] if file["done_bytes"] == file["total_bytes"]}
    error = rpc(url, "embed", ["a"])
    assert (error["code"], error["data"]["code"]) == (-32021, "not_ready")
    assert error["data"]["retry_after_ms"] > 0

    hub.released.set()
    server.wait_for("ready")
    seen.clear()
    for _ in range(20):
        look()
    assert set(seen) == {("ok", "ok", True)}
    assert rpc(url, "embed", ["a"])["dimensions"] == 48


def test_each_model_answers_to_its_names(url):
    """Id and aliases in any case reach their model, no name reaches the first, and an unknown one is 404."""
    for name in (None, MINILM, "all-MiniLM-L6-v2", MINILM.lower(), ""):
        assert dimensions_of(embed(url, model=name)) == 384
    assert dimensions_of(embed(url, model="tiny")) == 48
    reply = embed(url, model="tin")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [(model["id"], model["dimensions"]) for model in listed] == [(MINILM, 384), ("tiny", 48)]


# Stop


def test_sigterm_drains():
    """Running requests are answered, new connections are refused meanwhile, and the process exits with 0."""
    with serving() as server:
        url = server.ready_url()
        with busy(url, texts=240) as asking:  # who connects just when the port is closed tries again after a second
            server.signal(signal.SIGTERM)
            server.wait_for("stopping")
            refused = time.perf_counter() + AT_ONCE_SECONDS
            while time.perf_counter() < refused:
                try:
                    httpx.get(f"{url}/health/live")
                except (httpx.ConnectError, httpx.ReadError):  # refused, or reset in the queue of the closing listener
                    break
            else:
                raise AssertionError("a stopping server still accepts connections")
            assert not asking.done(), "the request was over before the signal: it proves nothing"
            reply = asking.result(30)
        assert dimensions_of(reply) == 384
        assert len(reply.json()["data"]) == 240
        assert server.ended() == 0
        assert_clean(server)


def test_a_second_sigterm_ends_at_once():
    """Who asks twice does not wait for the running requests; their clients are told."""
    with serving() as server:
        url = server.ready_url()
        with busy(url, texts=400) as asking:
            server.signal(signal.SIGTERM)
            server.wait_for("stopping")
            server.signal(signal.SIGTERM)
            assert server.ended(within_seconds=AT_ONCE_SECONDS) == 0
            assert_told(asking.result(5))
        assert_clean(server)


def test_a_drain_has_an_end():
    """Requests that run for longer than `drain_seconds` are told, and do not keep the server up; its end is clean."""
    with serving("--drain-seconds", "1") as server:
        url = server.ready_url()
        with busy(url, texts=400) as asking:
            server.signal(signal.SIGTERM)
            server.wait_for("stopping")
            start = time.perf_counter()
            assert server.ended(within_seconds=1 + AT_ONCE_SECONDS) == 0
            assert time.perf_counter() - start > 0.9
            assert_told(asking.result(5))
        assert_clean(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_server(loading, number):
    """A server that still downloads stops at the first signal, with 0; nobody waits for the hub."""
    hub, server = loading
    server.url()
    assert hub.asked.wait(10)
    server.signal(number)
    assert server.ended(within_seconds=AT_ONCE_SECONDS) == 0
    assert_clean(server)


def test_sigint_ends_an_idle_server(tiny):
    """Ctrl-C is a clean end: exit code 0, no traceback, also with a client that keeps its connection."""
    with serving("--model", str(tiny)) as server, httpx.Client(base_url=server.ready_url()) as http:
        assert http.get("/health").status_code == 200
        server.signal(signal.SIGINT)
        assert server.ended(within_seconds=AT_ONCE_SECONDS) == 0
        assert_clean(server)


# What it cannot serve


def corrupt(folder):
    """Put another file in the place of the weights."""
    (folder / "model.safetensors").write_bytes(b"not weights at all" * 1000)


def truncate(folder):
    """Cut the weights short."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_architecture(folder):
    """Call the architecture by a name that nobody knows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt-17"}), encoding="utf-8")


def remove(name):
    """Return what deletes a file."""
    return lambda folder: (folder / name).unlink()


def garble(name):
    """Return what makes a file no JSON."""
    return lambda folder: (folder / name).write_text("{", encoding="utf-8")


def assert_refuses(server, *words):
    """Check that it ends with EX_CONFIG after one line that says all of `words`; other lines are the log's JSON."""
    assert server.ended() == EX_CONFIG, server.lines
    said = [line for line in server.lines if not line.startswith("{")]
    assert len(said) == 1, server.lines
    assert said[0].startswith("quiver: ")
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (corrupt, ["model.safetensors", "corrupt"]),
        (truncate, ["model.safetensors", "cut short"]),
        (remove("model.safetensors"), ["model.safetensors", "missing"]),
        (remove("tokenizer.json"), ["tokenizer.json", "missing"]),
        (remove("config.json"), ["config.json"]),
        (garble("tokenizer.json"), ["tokenizer.json", "not a tokenizer"]),
        (garble("config.json"), ["config.json", "not JSON"]),
        (rename_architecture, ["config.json", "'gpt-17'", "bert"]),
    ],
    ids=lambda part: getattr(part, "__qualname__", "").partition(".")[0] or None,
)
def test_a_broken_model_is_one_line(tiny, tmp_path, damage, words):
    """The server names the file and says what is wrong with it, and exits with EX_CONFIG."""
    folder = shutil.copytree(tiny, tmp_path / "broken")
    damage(folder)
    with serving("--model", str(folder)) as server:
        assert_refuses(server, str(folder), *words)


def test_a_wrong_hash_is_one_line(tiny, tmp_path):
    """Weights that are not those of the catalogue are refused, with both hashes and their file."""
    folder = shutil.copytree(tiny, tmp_path / "models" / MINILM)
    with serving("--data-dir", str(tmp_path)) as server:
        assert_refuses(server, str(folder / "model.safetensors"), "SHA-256", "53aa51172d142c89")


def test_a_broken_second_model_is_one_line(tiny, tmp_path):
    """A server of two models, one of them broken, does not stay up half."""
    with serving("--model", str(tiny), "--model", str(tmp_path / "nowhere")) as server:
        assert_refuses(server, str(tmp_path / "nowhere"), "not a directory")


def test_a_model_that_is_named_twice_is_one_line(tiny):
    """Under whichever of its names: loaded twice it would take its memory twice, and one copy would never be asked."""
    with serving("--model", str(tiny), "--model", f"{tiny}/../{tiny.name}") as server:
        assert_refuses(server, "tiny", "once")


def test_a_port_in_use_is_one_line(tiny):
    """The server names address and port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving("--model", str(tiny), "--port", str(port)) as server:
            assert_refuses(server, "127.0.0.1", str(port), "in use")


async def test_a_model_that_failed_says_so(tmp_path):
    """Until the process has ended, its state is `failed`, with the reason."""
    name = str(tmp_path / "nowhere")
    parts = app.build(Config(models=ModelsConfig(model=(name,))))
    async with parts.engine:
        with pytest.raises(LoadError) as refusal:
            await parts.engine.load(lambda *_: None)
        status = parts.service.model("nowhere")
        assert (status.state, status.error) == ("failed", refusal.value.message)
