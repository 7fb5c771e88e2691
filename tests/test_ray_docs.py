"""The commands of docs/scaling_ray.md, run as they stand there. `make test-ray` runs it; it needs the extra `ray`."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cluster import free_port
from server_process import clean_environment

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parent.parent / "docs" / "scaling_ray.md"
PATIENCE_SECONDS = 240


def example(words: str) -> list[str]:
    """Return the line of the page that begins with some words, as a command of this environment's."""
    (line,) = re.findall(rf"^quiver {re.escape(words)}.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [sys.executable, "-m", *line.split()]


def test_a_cluster_of_one_machine_starts_answers_and_ends(tmp_path):
    """The first command of the page serves, says nothing of a token, and leaves no process behind."""
    port = free_port()
    command = [*example("scale serve --model"), "--port", str(port), "--data-dir", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log, env=clean_environment())  # noqa: S603  our own
        try:
            reply = answered(f"http://127.0.0.1:{port}/v1/embeddings", server)
            processes = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            assert server.wait(120) == 0
        finally:
            server.kill()
    assert len(reply["data"][0]["embedding"]) == 384
    assert (tmp_path / "ray.token").read_bytes().hex() not in (tmp_path / "log").read_text()
    gone, left = psutil.wait_procs(processes, timeout=20)
    assert (left, len(gone) > 3) == ([], True)


def answered(url: str, server: subprocess.Popen) -> dict:
    """Ask until there is an answer."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            reply = httpx.post(url, json={"input": "hello"}, timeout=60)
            if reply.status_code == 200:
                return reply.json()
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("it never answered")


def test_files_go_through_a_cluster_of_one_machine(tmp_path):
    """The page's command for files, on a file of its name, writes a row for each line."""
    lines = [{"id": i, "text": f"an arrow of kind {i}"} for i in range(200)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    pq.write_table(pa.table({"id": [1000], "text": ["one more"]}), tmp_path / "more.parquet")
    command = [*example("embed corpus.jsonl"), "--data-dir", str(tmp_path)]
    done = subprocess.run(  # noqa: S603  our own
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=clean_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [row for file in (tmp_path / "vectors").glob("*.parquet") for row in pq.read_table(file)["id"].to_pylist()]
    assert sorted(rows) == [*range(200), 1000]
