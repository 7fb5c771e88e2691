"""A full disk: uploads are refused, lines wait, requests are answered, and nothing that was written is lost."""

import shutil
import time

import httpx
import pytest

from batching import begin, content, faults_of, until
from faults.servers import STUB, importable
from server_process import serving

LIMIT_BYTES = 3_000_000
"""Largest file that the servers of these tests may write: it stands in for a disk's end."""

pytestmark = pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit sets the limit")


def cramped(tmp_path, **settings):
    """Run a stub whose files cannot grow beyond the limit."""
    command = ("prlimit", f"--fsize={LIMIT_BYTES}", *STUB)
    given = [f"--set={name}={value}" for name, value in {"data_dir": tmp_path, **settings}.items()]
    return serving(*given, command=command, PYTHONPATH=importable())


def roomy(tmp_path):
    """Run a stub that has all the room it wants."""
    return serving(f"--set=data_dir={tmp_path}", command=STUB, PYTHONPATH=importable())


def upload(http, data):
    """Upload a file."""
    return http.post("/v1/files", files={"file": ("a.jsonl", data)}, data={"purpose": "user_data"})


def test_an_upload_that_does_not_fit_is_refused_and_nothing_else_is_lost(tmp_path):
    """It is 503 with a code of its own; a file from before is whole, and a request is answered."""
    with cramped(tmp_path) as server, httpx.Client(base_url=server.ready_url(), timeout=30) as http:
        small = upload(http, b"a" * 100_000).raise_for_status().json()
        refused = upload(http, b"b" * 8_000_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_full"), refused.text
        assert refused.headers["retry-after"]
        assert content(http, small["id"]) == "a" * 100_000
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert [file["id"] for file in http.get("/v1/files").json()["data"]] == [small["id"]]


def test_the_lines_of_a_batch_wait_for_room(tmp_path):
    """Where its results do not fit it stands still; with room again it goes on, and is whole in the end."""
    number = 6000
    with cramped(tmp_path) as server, httpx.Client(base_url=server.ready_url(), timeout=30) as http:
        batch_id = begin(http, [f"text {i}" for i in range(number)])
        server.wait_for("the database is away")
        stuck = http.get(f"/v1/batches/{batch_id}").json()["request_counts"]["completed"]
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        time.sleep(0.5)
    with roomy(tmp_path) as server, httpx.Client(base_url=server.ready_url(), timeout=30) as http:
        batch = until(http, batch_id, lambda b: b["status"] == "completed")
        assert faults_of(content(http, batch["output_file_id"]), number) == ([], [])
    assert stuck < number, "negative control: everything fitted"


def test_with_room_the_same_upload_is_taken(tmp_path):
    """Negative control: it is the disk that refuses it."""
    with roomy(tmp_path) as server, httpx.Client(base_url=server.ready_url(), timeout=30) as http:
        assert upload(http, b"b" * 8_000_000).json()["bytes"] == 8_000_000
