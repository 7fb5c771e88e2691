"""A slow start: probes never flap, and downloads show how far they really are, while a hub sends a model drop by drop."""

import threading
import time

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save

import checkpoints
from hub_server import Hub, Repository
from seen_metrics import number
from server_process import serving

NAME, WEIGHTS = "org/slow", "model.safetensors"
PIECE_BYTES, PAUSE_SECONDS = 2 << 20, 0.05
PADDING_BYTES = 48 << 20
"""The client tells of its progress each 10 MB."""
PROBE_SECONDS, AFTER_SECONDS, PATIENCE_SECONDS = 0.1, 1.0, 120.0
CALL = {"jsonrpc": "2.0", "id": 1, "params": []}


class DrippingHub(Hub):
    """A hub that sends weights in pieces, with a pause after each, and knows how much it has sent."""

    def __init__(self, repositories):
        self.num_sent = 0
        super().__init__(repositories)

    def _handler(self):
        hub = self

        class Handler(super()._handler()):
            def _send(self, status, headers, body):
                if len(body) < PADDING_BYTES:
                    super()._send(status, headers, body)
                    return
                super()._send(status, headers, b"")
                for begin in range(0, len(body), PIECE_BYTES):
                    self.wfile.write(body[begin : begin + PIECE_BYTES])
                    hub.num_sent = begin + PIECE_BYTES  # of the last piece, more than there is
                    time.sleep(PAUSE_SECONDS)

        return Handler


@pytest.fixture
def files(tmp_path):
    """Make the files of a tiny model, with a tensor among its weights that makes them large and that nobody reads."""
    folder = checkpoints.make(tmp_path / "model", "bert")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weights = load_file(folder / WEIGHTS) | {"padding": np.zeros(PADDING_BYTES // 4, np.float32)}
    return files | {WEIGHTS: save(weights, {"format": "pt"})}


class Prober:
    """Asks again and again, on a thread of its own, until it is told to stop."""

    def __init__(self, ask):
        self.seen = []
        self._ask, self._stopping = ask, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        with httpx.Client(timeout=20) as http:
            while not self._stopping.is_set():
                self.seen.append(self._ask(http))
                time.sleep(PROBE_SECONDS)

    def close(self):
        """Stop asking."""
        self._stopping.set()
        self._thread.join()


def steps(seen):
    """Return what was seen, each run of the same once."""
    return [value for i, value in enumerate(seen) if i == 0 or seen[i - 1] != value]


def rpc(http, url, method):
    """Call a method by JSON-RPC."""
    return http.post(f"{url}/rpc", json=CALL | {"method": method}).json()["result"]


def in_all(status):
    """Return what model is said to be on its way, and how far its weights are."""
    return [
        (model["id"], model["state"], file["done_bytes"], file["total_bytes"])
        for model in status["models"]
        for file in model["downloads"]
        if file["file"] == WEIGHTS
    ]


def test_probes_do_not_flap_and_progress_is_real(files, tmp_path):
    """Live throughout, ready once and for all; all forms say the same, and bytes are those that the hub has sent."""
    size = len(files[WEIGHTS])
    with DrippingHub({NAME: Repository(files)}) as hub:
        places = ("--hub-endpoint", hub.url, "--hub-cache", str(tmp_path / "cache"), "--data-dir", str(tmp_path))
        with serving("--model", NAME, *places, NO_PROXY="*") as server:
            url = server.url()

            def health(http):
                reply = http.get(f"{url}/health")
                return reply.status_code, reply.json()["status"]

            def progress(http):
                status, health = rpc(http, url, "status"), http.get(f"{url}/health").json()
                return in_all(status), in_all(health), hub.num_sent

            probers = {
                "live": Prober(lambda http: http.get(f"{url}/health/live").status_code),
                "ready": Prober(lambda http: http.get(f"{url}/health/ready").status_code),
                "health": Prober(health),
                "rpc": Prober(lambda http: tuple(rpc(http, url, "health").values())),
                "progress": Prober(progress),
            }
            try:
                ends = time.monotonic() + PATIENCE_SECONDS
                while 200 not in probers["ready"].seen and time.monotonic() < ends:
                    time.sleep(PROBE_SECONDS)
                time.sleep(AFTER_SECONDS)
            finally:
                for prober in probers.values():
                    prober.close()
            metrics = httpx.get(f"{url}/metrics").text
    seen = {name: steps(prober.seen) for name, prober in probers.items()}
    assert seen["live"] == [200]
    assert seen["ready"] == [503, 200]
    assert seen["health"] == [(503, "starting"), (200, "ok")]
    assert seen["rpc"] == [("starting", False), ("ok", True)]
    told = [(*file, sent) for *forms, sent in probers["progress"].seen for form in forms for file in form]
    assert {(name, total) for name, _, _, total, _ in told} == {(NAME, size)}
    assert steps([state for _, state, *_ in told]) in (["downloading"], ["downloading", "loading"])
    assert {done for _, state, done, *_ in told if state == "loading"} <= {size}
    done = [done for _, _, done, _, _ in told]
    assert done == sorted(done)
    assert len({each for each in done if 0 < each < size}) >= 3
    assert all(done <= sent for _, _, done, _, sent in told)
    for name in ("quiver_download_bytes", "quiver_download_size_bytes"):
        assert number(metrics, name, {"file": WEIGHTS, "model": NAME}) == size
