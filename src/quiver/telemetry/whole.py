"""The figures of several processes as those of one server: what is counted adds up, and nothing of it is ever taken back.

A process tells its figures as a snapshot. Of one that has ended only what it had counted still matters.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Labels = tuple[tuple[str, str], ...]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One line of a metric."""

    name: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric with all its lines."""

    name: str
    help: str
    type: str
    samples: tuple[Sample, ...]

    @property
    def is_counted(self) -> bool:
        """Whether its lines only ever rise."""
        return self.type in {"counter", "histogram"}


Snapshot = Sequence[Family]
LEAST = frozenset({"quiver_batch_invariant", "process_start_time_seconds", "process_max_fds"})
"""Of these the least of all processes is shown: what holds for the server only if it holds for each of them."""
MOST = frozenset({"quiver_download_bytes"})
"""Of these the largest: all processes show the same thing."""


def snapshot_of(metrics: Iterable[Metric]) -> Snapshot:
    """Return metrics as they stand now."""
    return tuple(
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            tuple(Sample(s.name, tuple(s.labels.items()), float(s.value)) for s in metric.samples),
        )
        for metric in metrics
    )


def encoded(snapshot: Snapshot) -> bytes:
    """Write a snapshot for another process."""
    return msgspec.msgpack.encode(snapshot)


def decoded(data: bytes) -> Snapshot:
    """Read what another process has written. Raises `ValueError` for what is cut short."""
    return msgspec.msgpack.decode(data, type=tuple[Family, ...])


def together(living: Sequence[Snapshot], ended: Sequence[Snapshot] = ()) -> Snapshot:
    """Put snapshots together, line by line; of processes that have ended only what they had counted."""
    counted = [[family for family in snapshot if family.is_counted] for snapshot in ended]
    families: dict[str, list[Family]] = {}
    for snapshot in (*living, *counted):
        for family in snapshot:
            families.setdefault(family.name, []).append(family)
    return tuple(_joined(same) for same in families.values())


def _joined(same: Sequence[Family]) -> Family:
    first = same[0]
    lines: dict[tuple[str, Labels], float] = {}
    for sample in (sample for family in same for sample in family.samples):
        key, value = (sample.name, sample.labels), sample.value
        lines[key] = _sum(first.name, sample.name, lines[key], value) if key in lines else value
    if first.type == "histogram":  # the bounds of one are the bounds of all: lines stay in their order
        lines = dict(_by_labels(lines))
    return Family(first.name, first.help, first.type, tuple(Sample(*key, value) for key, value in lines.items()))


def _sum(family: str, name: str, one: float, other: float) -> float:
    if family in LEAST or name.endswith("_created"):
        return min(one, other)
    return max(one, other) if family in MOST else one + other


def _by_labels(lines: Mapping[tuple[str, Labels], float]) -> Iterator[tuple[tuple[str, Labels], float]]:
    """Keep the lines of one histogram together, where processes have come to know its labels in another order."""
    groups: dict[Labels, list[tuple[tuple[str, Labels], float]]] = {}
    for key, value in lines.items():
        labels = tuple(label for label in key[1] if label[0] != "le")
        groups.setdefault(labels, []).append((key, value))
    for group in groups.values():
        yield from group


@dataclass(frozen=True, slots=True)
class Found(Collector):
    """Metrics that were collected already."""

    metrics: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self.metrics


def exposition(snapshot: Snapshot) -> bytes:
    """Write a snapshot in Prometheus's text format."""
    return written([_metric(family) for family in snapshot])


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.help, family.type)
    for sample in family.samples:
        metric.add_sample(sample.name, dict(sample.labels), sample.value)
    return metric


def written(metrics: Sequence[Metric]) -> bytes:
    """Write metrics in Prometheus's text format; its library gives counters' names an ending that TEI's do not have."""
    return re.sub(rb"(?m)^# (HELP|TYPE) (te_\w+)_total ", rb"# \1 \2 ", generate_latest(Found(metrics)))
