"""Counters and histograms that are counted on one thread: adding a number many times costs what adding it once does."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

ENDLESS = "+Inf"


class Counts:
    """A counter, by the values of its labels."""

    def __init__(self, name: str, meaning: str, *labels: str) -> None:
        self._name, self._meaning, self._labels = name, meaning, labels
        self._numbers: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, number: float, *values: str) -> None:
        """Count up."""
        self._numbers[values] = self._numbers.get(values, 0.0) + number

    def metric(self) -> Metric:
        """Write it as Prometheus has it."""
        metric = Metric(self._name.removesuffix("_total"), self._meaning, "counter")
        for values, number in self._numbers.items():
            metric.add_sample(self._name, dict(zip(self._labels, values, strict=True)), number)
        return metric


class Spread:
    """A histogram, by the values of its labels."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float], *labels: str) -> None:
        self._name, self._meaning, self._bounds, self._labels = name, meaning, bounds, labels
        self._counts: dict[tuple[str, ...], list[float]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        if not labels:
            self.add(0.0, times=0)

    def add(self, number: float, *values: str, times: float = 1) -> None:
        """Count a number that was seen so often."""
        if (counts := self._counts.get(values)) is None:
            counts = self._counts[values] = [0.0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, number)] += times
        self._sums[values] = self._sums.get(values, 0.0) + times * number

    def metric(self) -> Metric:
        """Write it as Prometheus has it."""
        metric = Metric(self._name, self._meaning, "histogram")
        for values, counts in self._counts.items():
            labels, total = dict(zip(self._labels, values, strict=True)), 0.0
            for bound, count in zip((*map(floatToGoString, self._bounds), ENDLESS), counts, strict=True):
                total += count
                metric.add_sample(f"{self._name}_bucket", labels | {"le": bound}, total)
            metric.add_sample(f"{self._name}_count", labels, total)
            metric.add_sample(f"{self._name}_sum", labels, self._sums[values])
        return metric


def summed(name: str, meaning: str, bounds: Sequence[float], samples: Iterable[Sample]) -> Metric:
    """Write a histogram that adds up others, at bounds that all of them have."""
    totals, total = dict.fromkeys((*map(floatToGoString, bounds), ENDLESS), 0.0), 0.0
    for sample in samples:
        if (bound := sample.labels.get("le")) in totals:
            totals[bound] += sample.value
        elif sample.name.endswith("_sum"):
            total += sample.value
    metric = Metric(name, meaning, "histogram")
    for bound, number in totals.items():
        metric.add_sample(f"{name}_bucket", {"le": bound}, number)
    metric.add_sample(f"{name}_count", {}, totals[ENDLESS])
    metric.add_sample(f"{name}_sum", {}, total)
    return metric


def single(name: str, kind: str, meaning: str, number: float) -> Metric:
    """Write a metric that is one number."""
    metric = Metric(name.removesuffix("_total"), meaning, kind)
    metric.add_sample(name, {}, number)
    return metric
