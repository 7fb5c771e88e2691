"""Texts embedded in the background, by OpenAI's files and batches: each verb as a plan.

https://platform.openai.com/docs/api-reference/batch
"""

import itertools
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from quiver.client.core import Core, object_of, post, understanding
from quiver.client.errors import BadReply, BatchFailed
from quiver.client.results import Batch, Floats, read_batch
from quiver.client.steps import Pause, Plan, Request
from quiver.client.verbs import listed, vectors_of

FILES = "/v1/files"
BATCHES = "/v1/batches"
ENDPOINT = "/v1/embeddings"
INPUTS_PER_LINE = 32
"""One text that cannot be embedded fails its whole line; each line alone costs as much to handle as some texts."""
PAGE = 100
FIRST_POLL_SECONDS = 0.5
LONGEST_POLL_SECONDS = 15.0
SHOWN_FAILURES = 3
NUM_TEXTS = "num_texts"
"""What says in a batch's metadata how many texts it has."""
CUSTOM_ID = re.compile(r"texts-(\d+)-(\d+)")
"""Which texts a line holds: from, and up to but without."""


def create(  # noqa: PLR0913  each is a field of the request
    core: Core,
    texts: Iterable[str],
    *,
    model: str | None = None,
    dimensions: int | None = None,
    input_type: str | None = None,
    prompt_name: str | None = None,
    truncate: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Plan[Batch]:
    """Begin to embed texts in the background; what may be said of them is what `embed` takes.

    `metadata` comes back with the batch. Raises `QuiverError`; a connection that is cut is not tried again, so that
    no batch is made twice.
    """
    deadline = core.deadline(timeout)
    options = {
        "model": model or core.settings.model,
        "dimensions": dimensions,
        "input_type": input_type,
        "prompt_name": prompt_name,
    }
    said = {name: value for name, value in options.items() if value is not None}
    given = listed(texts)
    lines = _lines(given, {**said, "truncate": truncate})  # always there: with it, no other API is meant
    response = yield from core.exchange(_upload("".join(lines).encode()), deadline)
    with understanding(response):
        file_id = object_of(response)["id"]
    fields = {
        "input_file_id": file_id,
        "endpoint": ENDPOINT,
        "completion_window": "24h",
        "metadata": {**(metadata or {}), NUM_TEXTS: str(len(given))},
    }
    return (yield from _batch(core, _once(post(BATCHES, **fields)), deadline))


def _lines(texts: Sequence[str], options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a batch's file, each with some of the texts."""
    if not texts:
        raise ValueError("a batch needs at least one text")
    for start in range(0, len(texts), INPUTS_PER_LINE):
        some = texts[start : start + INPUTS_PER_LINE]
        line = {
            "custom_id": f"texts-{start}-{start + len(some)}",
            "method": "POST",
            "url": ENDPOINT,
            "body": {"input": some, "encoding_format": "base64", **options},
        }
        yield json.dumps(line) + "\n"


def _upload(content: bytes) -> Request:
    """Make the request that sends a batch's file, as a form of two fields."""
    mark = f"quiver-{secrets.token_hex(16)}"
    head = (
        f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="texts.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    body = b"%b%b\r\n--%b--\r\n" % (head.encode(), content, mark.encode())
    return Request("POST", FILES, body, f"multipart/form-data; boundary={mark}", is_repeatable=False)


def _once(request: Request) -> Request:
    return Request(request.method, request.path, request.body, request.content_type, is_repeatable=False)


def _batch(core: Core, request: Request, deadline: float) -> Plan[Batch]:
    response = yield from core.exchange(request, deadline)
    with understanding(response):
        return read_batch(object_of(response))


def get(core: Core, batch: Batch | str, *, timeout: float | None = None) -> Plan[Batch]:
    """Return a batch as it stands now. Raises `NotFound` or another `QuiverError`."""
    return (yield from _batch(core, Request("GET", _path(batch)), core.deadline(timeout)))


def cancel(core: Core, batch: Batch | str, *, timeout: float | None = None) -> Plan[Batch]:
    """Stop a batch; what is embedded by then may still be fetched. Raises `QuiverError`."""
    return (yield from _batch(core, Request("POST", f"{_path(batch)}/cancel"), core.deadline(timeout)))


def list_(core: Core, *, limit: int | None = None, timeout: float | None = None) -> Plan[list[Batch]]:
    """List batches, the youngest first: all of them, or at most `limit`. Raises `QuiverError`."""
    deadline, found = core.deadline(timeout), list[Batch]()
    wanted = math.inf if limit is None else limit
    while len(found) < wanted:
        query = {"limit": str(int(min(PAGE, wanted - len(found))))} | ({"after": found[-1].id} if found else {})
        response = yield from core.exchange(Request("GET", f"{BATCHES}?{urlencode(query)}"), deadline)
        with understanding(response):
            told = object_of(response)
            page = [read_batch(each) for each in told["data"]]
        found += page
        if not page or not told.get("has_more"):
            break
    return found


def wait(
    core: Core,
    batch: Batch | str,
    *,
    progress: Callable[[Batch], object] = lambda _: None,
    timeout: float | None = None,
) -> Plan[Batch]:
    """Return a batch once it is completed; `progress` is called with it whenever it has been asked for.

    Without a `timeout` it waits for as long as that takes. Raises `BatchFailed` if the batch ends otherwise, and
    `TimedOut` while it goes on.
    """
    ends, pause = math.inf if timeout is None else core.deadline(timeout), FIRST_POLL_SECONDS
    for _ in itertools.count():
        now = yield from _batch(core, Request("GET", _path(batch)), min(ends, core.deadline(None)))
        progress(now)
        if now.has_ended:
            break
        yield Pause(min(pause * (0.75 + core.chance() / 2), max(0.0, core.seconds_left(ends))))
        pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
    if now.status != "completed":
        why = "; ".join(now.errors)
        raise BatchFailed(f"the batch {now.id} is {now.status}" + (f": {why}" if why else ""), now)
    return now


def results(core: Core, batch: Batch | str, *, partial: bool = False, timeout: float | None = None) -> Plan[Floats]:
    """Return the vectors of a batch that has ended, (B, D) float32 in the order of its texts.

    A text that has no vector raises `BatchFailed`; with `partial`, its row is NaN instead.
    """
    deadline = core.deadline(timeout)
    now = yield from _batch(core, Request("GET", _path(batch)), deadline)
    vectors: dict[int, Floats] = {}
    failures = list[str]()
    for start, stop, told in (yield from _read_lines(core, (now.output_file_id, now.error_file_id), deadline)):
        if isinstance(told, str):
            failures.append(f"texts {start} to {stop - 1}: {told}")
        else:
            vectors[start] = told
    num_texts = _num_texts(now)
    missing = num_texts - sum(map(len, vectors.values()))
    if not now.has_ended or (missing and not partial):
        shown = "; ".join([f"{missing} of its {num_texts} texts have no vector", *failures[:SHOWN_FAILURES]])
        raise BatchFailed(f"the batch {now.id} is {now.status}: {shown}", now)
    return _joined(vectors, num_texts)


def _num_texts(batch: Batch) -> int:
    if not (told := batch.metadata.get(NUM_TEXTS, "")).isdigit():
        raise BatchFailed(
            f"the batch {batch.id} was not made by this client: it does not say how many texts it has", batch
        )
    return int(told)


def _read_lines(
    core: Core, file_ids: Sequence[str | None], deadline: float
) -> Plan[list[tuple[int, int, Floats | str]]]:
    """Return which texts each line was for, and their vectors, or why there are none."""
    lines = list[tuple[int, int, Floats | str]]()
    for file_id in filter(None, file_ids):
        response = yield from core.exchange(Request("GET", f"{FILES}/{quote(file_id)}/content"), deadline)
        with understanding(response):
            lines += [_line(json.loads(line)) for line in response.body.splitlines() if line.strip()]
    return lines


def _line(told: Mapping[str, Any]) -> tuple[int, int, Floats | str]:
    place = CUSTOM_ID.fullmatch(told["custom_id"])
    if place is None:
        raise BadReply(f"the batch was not made by this client: a line is called {told['custom_id']!r}")
    start, stop = int(place[1]), int(place[2])
    reply = told.get("response")
    if reply and reply["status_code"] == 200:  # noqa: PLR2004  HTTP's OK
        return start, stop, vectors_of(reply["body"], stop - start)
    error = told.get("error") or (reply or {}).get("body", {}).get("error") or {}
    return start, stop, str(error.get("message") or error.get("code") or "no reason was given")


def _joined(vectors: Mapping[int, Floats], num_texts: int) -> Floats:
    """Put the lines' vectors into one array, NaN where there are none."""
    width = max((part.shape[1] for part in vectors.values()), default=0)
    found = np.full((num_texts, width), np.nan, np.float32)
    for start, part in vectors.items():
        found[start : start + len(part)] = part
    return found


def _path(batch: Batch | str) -> str:
    return f"{BATCHES}/{quote(batch if isinstance(batch, str) else batch.id)}"
