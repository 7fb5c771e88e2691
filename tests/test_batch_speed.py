"""A batch is nearly as fast as one request with all of its texts, holds little, and leaves single requests alone.

`make bench-batch` measures the same with 50,000 lines and with the real model; here the machine may be busy, so that the
bounds are wide and the figures are printed.
"""

import itertools
import statistics
import threading
import time

import httpx
import pytest

from batching import begin, content, faults_of, until
from faults.servers import stub

SECONDS_PER_TOKEN = 0.0001
LANES, BATCH_TOKENS = 2, 512
BATCH_SECONDS = SECONDS_PER_TOKEN * BATCH_TOKENS
TEXTS = [f"text {i} " + "x" * (i % 60) for i in range(1200)]
MIN_RATIO = 0.7
MAX_RISE_BYTES = 100 << 20


@pytest.fixture
def server(tmp_path):
    """Run a stub whose lanes take their time."""
    with stub(lanes=LANES, behave={"seconds_per_token": SECONDS_PER_TOKEN}, data_dir=tmp_path) as server:
        yield server


def asked(url, is_over):
    """Return how long single requests take, one after the other, until something is over."""
    seconds = []
    with httpx.Client(base_url=url, timeout=30) as http:
        for i in itertools.count():
            if is_over():
                return seconds
            start = time.perf_counter()
            http.post("/v1/embeddings", json={"input": f"query {i}"}).raise_for_status()
            seconds.append(time.perf_counter() - start)
            time.sleep(0.02)
    return seconds


def test_a_batch_keeps_the_lanes_busy(server):
    """Its lines a second are those of the engine, or nearly; what the server holds hardly rises, and nothing is lost."""
    with httpx.Client(base_url=server.ready_url(), timeout=60) as http:
        until(http, begin(http, ["warm"]), lambda b: b["status"] == "completed")
        start, before = time.perf_counter(), server.resident_bytes()
        http.post("/v1/embeddings", json={"input": TEXTS}).raise_for_status()
        direct = len(TEXTS) / (time.perf_counter() - start)
        start = time.perf_counter()
        batch = until(http, begin(http, TEXTS), lambda b: b["status"] == "completed")
        rate, grown = len(TEXTS) / (time.perf_counter() - start), server.resident_bytes() - before
        assert faults_of(content(http, batch["output_file_id"]), len(TEXTS)) == ([], [])
    print(f"\n{rate:.0f} of {direct:.0f} texts/s: {rate / direct:.0%}; {grown >> 20} MiB more")  # noqa: T201
    assert rate > MIN_RATIO * direct
    assert grown < MAX_RISE_BYTES


def test_single_requests_wait_for_one_bulk_batch(server):
    """Beside a batch the median rises by less than one of its batches takes, and by more than nothing."""
    url, over = server.ready_url(), threading.Event()
    end = time.monotonic() + 2
    idle = asked(url, lambda: time.monotonic() > end)
    with httpx.Client(base_url=url, timeout=60) as http:
        batch_id = begin(http, TEXTS)
        until(http, batch_id, lambda b: b["request_counts"]["completed"] > 0)

        def wait():
            until(http, batch_id, lambda b: b["status"] == "completed", pause_seconds=0.1)
            over.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        beside = asked(url, over.is_set)
        waiting.join()
    more, p95 = statistics.median(beside) - statistics.median(idle), statistics.quantiles(beside, n=20)[-1]
    print(f"\nmedian + {more * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms; one batch {BATCH_SECONDS * 1000:.0f} ms")  # noqa: T201
    assert 0 < more < BATCH_SECONDS
