"""What tests and measurements of batches share: a batch over plain HTTP, and what its output lacks or holds twice."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx

PATIENCE_SECONDS = 60.0
Batch = dict[str, Any]


def lines_of(texts: Iterable[str], **body: Any) -> Iterator[bytes]:
    """Write a batch's file, one line for each text."""
    for i, text in enumerate(texts):
        row = {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/embeddings", "body": {"input": text, **body}}
        yield json.dumps(row).encode() + b"\n"


def begin(http: httpx.Client, texts: Iterable[str], **body: Any) -> str:
    """Upload a file and make a batch of it; returns its id."""
    form: Any = {"files": {"file": ("in.jsonl", b"".join(lines_of(texts, **body)))}, "data": {"purpose": "batch"}}
    file = http.post("/v1/files", **form).raise_for_status().json()
    given = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    return str(http.post("/v1/batches", json=given).raise_for_status().json()["id"])


def until(
    http: httpx.Client,
    batch_id: str,
    is_so: Callable[[Batch], bool],
    *,
    seconds: float = PATIENCE_SECONDS,
    pause_seconds: float = 0.02,
) -> Batch:
    """Poll a batch until something is so."""
    end = time.monotonic() + seconds
    while True:
        batch: Batch = http.get(f"/v1/batches/{batch_id}").json()
        if is_so(batch):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(pause_seconds)


def content(http: httpx.Client, file_id: str) -> str:
    """Read a file."""
    return http.get(f"/v1/files/{file_id}/content").raise_for_status().text


def faults_of(output: str, number: int) -> tuple[list[int], list[str]]:
    """Say what an output lacks, and what it holds more than once."""
    times = Counter(json.loads(line)["custom_id"] for line in output.splitlines())
    lacking = [i for i in range(number) if not times[f"line-{i}"]]
    return lacking, [line for line, count in times.items() if count > 1]
