"""What the server is doing now: counters and states; whoever asks twice has rates."""

import time
from collections import Counter

import msgspec

from quiver.admin.office import Office, written
from quiver.api.call import LOCAL, Call, Reply
from quiver.service import Service
from quiver.types import ModelStatus

LATENCY = "quiver_request_seconds_bucket"
REQUESTS = "quiver_requests_total"
REFUSED = "quiver_refused_requests_total"
TOKENS = "quiver_tokens_total"
OWN = "admin"
"""The dialect whose requests are not work."""


class Download(msgspec.Struct):
    """How far a file is."""

    file: str
    done_bytes: int
    total_bytes: int


class ModelRow(msgspec.Struct, kw_only=True):
    """One model: what it is, what it is doing, what waits for it."""

    id: str
    kind: str
    state: str
    error: str
    description: str
    aliases: list[str]
    dimensions: int
    max_tokens: int
    backend: str
    dtype: str
    prompts: list[str]
    batch_invariant: bool
    disk_bytes: int
    lanes: int
    busy_lanes: int
    waiting_inputs: int
    waiting_tokens: int
    capacity_tokens: int
    wait_seconds: float
    tokens: float
    """Read since the start."""
    downloads: list[Download]


class Histogram(msgspec.Struct):
    """How many requests took at most so many seconds, since the start; the last bound is infinity, written as null."""

    bounds: list[float]
    counts: list[float]


class DialectRow(msgspec.Struct):
    """Requests that one API has answered, by their status: 2, 4 or 5 hundred and something."""

    dialect: str
    answered: float
    refused: float
    failed: float


class MemoryRow(msgspec.Struct):
    """Bytes of the process and the machine."""

    resident: int
    limit: int
    total: int
    available: int


class StatusReply(msgspec.Struct, kw_only=True):
    """Reply of GET /api/status."""

    unix: float
    started_at: float
    version: str
    state: str
    is_short_of_memory: bool
    models: list[ModelRow]
    latency: Histogram
    dialects: list[DialectRow]
    turned_away: float
    """Requests that were refused before their body was read."""
    figures: dict[str, float]
    """Of the cache and of repeated replies, each summed up."""
    places_taken: int
    places: int
    """0: no bound."""
    body_bytes: int
    memory: MemoryRow


async def show_status(office: Office, service: Service, call: Call) -> Reply:
    """Show what the server is doing now, and what it has counted."""
    places = office.admission.places
    memory = service.memory(LOCAL)  # the guard has looked at the key
    reply = StatusReply(
        unix=time.time(),
        started_at=office.started_at,
        version=service.version,
        state=_state(service),
        is_short_of_memory=office.admission.memory_is_short,
        models=_models(service),
        latency=_latency(office, service),
        dialects=_dialects(office, service),
        turned_away=sum(each.value for each in service.observer.samples(REFUSED)),
        figures={figure.name: sum(figure.values.values()) for read in office.figures for figure in read()},
        places_taken=places.taken if places else 0,
        places=places.limit if places else 0,
        body_bytes=office.admission.num_bytes,
        memory=MemoryRow(memory.resident_bytes, memory.limit_bytes, memory.total_bytes, memory.available_bytes),
    )
    del call
    return written(reply)


def _state(service: Service) -> str:
    if service.fault():
        return "failed"
    if service.stopping:
        return "stopping"
    return "starting" if service.is_loading() else "ok"


def _models(service: Service) -> list[ModelRow]:
    tokens = {each.labels["model"]: each.value for each in service.observer.samples(TOKENS)}
    return [_model(service, status, tokens.get(status.id, 0.0)) for status in service.models()]


def _model(service: Service, status: ModelStatus, tokens: float) -> ModelRow:
    queue, activity = service.queue(status.id), service.activity(status.id)
    return ModelRow(
        id=status.id,
        kind=status.kind,
        state=status.state,
        error=status.error,
        description=status.description,
        aliases=list(status.aliases),
        dimensions=status.dimensions,
        max_tokens=status.max_tokens,
        backend=status.backend,
        dtype=status.dtype,
        prompts=list(status.prompts),
        batch_invariant=status.batch_invariant,
        disk_bytes=status.num_bytes,
        lanes=activity.lanes,
        busy_lanes=activity.busy_lanes,
        waiting_inputs=queue.inputs,
        waiting_tokens=queue.tokens,
        capacity_tokens=queue.capacity_tokens,
        wait_seconds=queue.seconds,
        tokens=tokens,
        downloads=[Download(p.file, p.done_bytes, p.total_bytes) for p in status.downloads],
    )


def _latency(office: Office, service: Service) -> Histogram:
    """Add up the routes that compute."""
    counts: Counter[float] = Counter()
    for each in service.observer.samples(LATENCY):
        if each.labels["route"] in office.work:
            counts[float(each.labels["le"])] += each.value  # type: ignore[assignment]
    bounds = sorted(counts)
    return Histogram(bounds, [counts[bound] for bound in bounds])


def _dialects(office: Office, service: Service) -> list[DialectRow]:
    rows: dict[str, DialectRow] = {}
    for each in service.observer.samples(REQUESTS):
        if each.labels["route"] not in office.work or each.labels["dialect"] == OWN:
            continue
        row = rows.setdefault(each.labels["dialect"], DialectRow(each.labels["dialect"], 0, 0, 0))
        match each.labels["status"][0]:
            case "4":
                row.refused += each.value
            case "5":
                row.failed += each.value
            case _:
                row.answered += each.value
    return sorted(rows.values(), key=lambda row: -(row.answered + row.refused + row.failed))
