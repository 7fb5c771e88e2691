"""The metrics of the systems that Quiver stands in for, by their own names, for dashboards that exist already.

What our own metrics tell in the same buckets is read from them when it is asked for. The rest is counted here once more,
and only where a family is configured: TEI has buckets of its own, and others tell by model or method what we do not.
It is counted on the event loop alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from quiver.config import MetricsFamily
from quiver.telemetry.observer import CANCELLED, SECONDS, Canonical, Exchange, Family, Work
from quiver.telemetry.series import Counts, Spread, single, summed
from quiver.types import Kind, Timings

_WATCHERS = ("/health", "/metrics", "/swagger-ui", "/docs")
"""Paths of those who watch a server: these systems leave them out."""


def is_use(route: str) -> bool:
    """Tell whether a request at a route is one of those that these systems count."""
    return not route.startswith(_WATCHERS)


def samples(canonical: Canonical, name: str) -> Sequence[Sample]:
    """Return all that one of our own metrics holds."""
    return canonical[name].samples if name in canonical else ()


def total(canonical: Canonical, name: str) -> float:
    """Return the sum of one of our own counters or gauges."""
    return sum(sample.value for sample in samples(canonical, name))


class Deaf:
    """A family that need not hear of anything: each has what it does hear of instead."""

    def answered(self, exchange: Exchange, seconds: float) -> None:
        """Hear of a request that was answered."""

    def computed(self, work: Work) -> None:
        """Hear of what was computed."""

    def repeated(self, model: str, inputs: int, seconds: float) -> None:
        """Hear of a reply that was given again, byte for byte."""

    def failed(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        """Hear of inputs for which there are no results."""


class FastEmbed(Deaf):
    """FastEmbed Query API's: four names, all of them read from our own."""

    def metrics(self, canonical: Canonical) -> Iterator[Metric]:
        """Yield them as they stand."""
        requests = Counts("fastembed_requests_total", "Requests by the status of their reply.", "status")
        for sample in samples(canonical, "quiver_requests"):
            if is_use(sample.labels["route"]):
                requests.add(sample.value, sample.labels["status"])
        yield requests.metric()
        latency = (s for s in samples(canonical, "quiver_request_seconds") if is_use(s.labels["route"]))
        yield summed("fastembed_request_latency_seconds", "Time from routing to reply.", SECONDS, latency)
        compute = (s for s in samples(canonical, "quiver_stage_seconds") if s.labels["stage"] == "compute")
        yield summed("fastembed_inference_latency_seconds", "Time that the model computes.", SECONDS, compute)
        hits = total(canonical, "quiver_cache_hits") + total(canonical, "quiver_repeated_inputs")
        yield single("fastembed_cache_hits_total", "counter", "Texts whose vectors were known.", hits)


_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Buckets of Prometheus's own library for Rust, which that system's HTTP server has; the others are ours, all of them."""
_RERANK: frozenset[Kind] = frozenset({"rerank"})
_EMBED: frozenset[Kind] = frozenset({"embed", "sparse", "multi_vector"})
_SUCCESS, _ERROR = "success", "error"


class Inference(Deaf):
    """Embedding Inference API's: HTTP by endpoint, embedding and reranking by model."""

    def __init__(self) -> None:
        of_http, by_model = ("endpoint", "method", "status"), ("model", "status")
        self._http = Counts("inference_http_requests_total", "HTTP requests.", *of_http)
        self._http_seconds = Spread(
            "inference_http_requests_duration_seconds", "Time from routing to reply.", _HTTP_SECONDS, *of_http
        )
        self._embed = Counts("inference_embed_requests_total", "Requests to embed: success or error.", *by_model)
        self._embed_seconds = Spread(
            "inference_embed_duration_seconds", "Time to embed all texts of a request.", SECONDS, *by_model
        )
        self._items = Counts("inference_embed_items_total", "Texts that were embedded.", "model")
        self._item_seconds = Spread(
            "inference_embed_per_item_duration_seconds", "The same, for each of its texts.", SECONDS, "model"
        )
        self._rerank = Counts("inference_rerank_requests_total", "Requests to rerank: success or error.", *by_model)
        self._rerank_seconds = Spread(
            "inference_rerank_duration_seconds", "Time to rerank all documents of a request.", SECONDS, *by_model
        )
        self._documents = Counts("inference_rerank_documents_total", "Documents that were reranked.", "model")

    def answered(self, exchange: Exchange, seconds: float) -> None:
        """Count an HTTP request, but for those of who watches the server."""
        if is_use(exchange.route):
            labels = (exchange.route, exchange.method, str(exchange.status))
            self._http.add(1, *labels)
            self._http_seconds.add(seconds, *labels)

    def computed(self, work: Work) -> None:
        """Count what one request embedded or reranked."""
        self._done(work.model, work.kind, len(work.encodings), work.timings.total)

    def repeated(self, model: str, inputs: int, seconds: float) -> None:
        """Count what a request embedded that came before."""
        self._done(model, "embed", inputs, seconds)

    def _done(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        self._count(model, kind, _SUCCESS, seconds)
        if kind in _RERANK:
            self._documents.add(inputs, model)
        elif kind in _EMBED:
            self._items.add(inputs, model)
            self._item_seconds.add(seconds / max(1, inputs), model)

    def failed(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        """Count what one request did not get."""
        del inputs
        self._count(model, kind, _ERROR, seconds)

    def _count(self, model: str, kind: Kind, status: str, seconds: float) -> None:
        if kind in _RERANK:
            self._rerank.add(1, model, status)
            self._rerank_seconds.add(seconds, model, status)
        elif kind in _EMBED:
            self._embed.add(1, model, status)
            self._embed_seconds.add(seconds, model, status)

    def metrics(self, canonical: Canonical) -> Iterator[Metric]:
        """Yield them as they stand."""
        del canonical
        counted: Iterable[Counts | Spread] = vars(self).values()
        return (each.metric() for each in counted)


TEI_SECONDS = tuple(1e-5 * 1.5**n for n in range(1, 36))
TEI_INPUT_TOKENS = tuple(2**n for n in range(20))
TEI_BATCH_INPUTS = tuple(2**n for n in range(13))
TEI_BATCH_TOKENS = tuple(2**n for n in range(21))
"""TEI's buckets."""
TEI_FAILURES: Mapping[str, str] = {
    "invalid_request": "validation",
    "invalid_value": "validation",
    "model_not_found": "validation",
    "too_many_inputs": "batch_size",
    "context_length_exceeded": "tokenization",
    "overloaded": "overloaded",
    "deadline_exceeded": "overloaded",
    "out_of_memory": "inference",
    "inference_error": "inference",
    "non_finite_output": "inference",
    "engine_failure": "inference",
    "engine_stalled": "inference",
    CANCELLED: "dropped",
}
"""What TEI calls our errors; those that it does not count (a wrong key, no JSON) are not counted."""
_STAGES = (("", "in all"), ("tokenization_", "to tokens"), ("queue_", "until a lane"), ("inference_", "from then on"))
_PREDICT: frozenset[Kind] = frozenset({"rerank", "classify"})
_LONE, _MANY = "single", "batch"


class _Durations:
    """The four times of a request, or of each of its inputs."""

    def __init__(self, of: str, what: str) -> None:
        self._spreads = [
            Spread(f"te_{of}_{stage}duration", f"Seconds of {what}: {meaning}.", TEI_SECONDS)
            for stage, meaning in _STAGES
        ]

    def add(self, total: float, tokenization: float, queue: float, inference: float, *, times: int = 1) -> None:
        """Count the times of something that took them so often."""
        for spread, seconds in zip(self._spreads, (total, tokenization, queue, inference), strict=True):
            spread.add(seconds, times=times)

    def metrics(self) -> Iterator[Metric]:
        """Write all four."""
        return (spread.metric() for spread in self._spreads)


class _Inputs:
    """Texts that are embedded, or for which a model predicts something."""

    def __init__(self, of: str) -> None:
        self._asked = Counts(f"te_{of}_count", f"Inputs to {of}.")
        self._done = Counts(f"te_{of}_success", f"Inputs to {of} that have their result.")
        self._durations = _Durations(of, f"an input to {of}")

    def ask(self, inputs: int) -> None:
        """Count inputs that will have no result."""
        self._asked.add(inputs)

    def finish(self, inputs: int, timings: Timings, waits: Sequence[float] = ()) -> None:
        """Count inputs with their results: those that waited for a lane, and those whose results were known."""
        self._asked.add(inputs)
        self._done.add(inputs)
        for wait in waits:
            self._durations.add(timings.total, timings.encode, wait, timings.compute - wait)
        self._durations.add(timings.encode, timings.encode, 0.0, 0.0, times=inputs - len(waits))

    def metrics(self) -> Iterator[Metric]:
        """Write all of them."""
        yield self._asked.metric()
        yield self._done.metric()
        yield from self._durations.metrics()


class Tei(Deaf):
    """Text Embeddings Inference's; its counters have no `_total`."""

    def __init__(self) -> None:
        self._success = Counts("te_request_success", "Requests with one input (single), or more.", "method")
        self._durations = _Durations("request", "a request")
        self._inputs = {of: _Inputs(of) for of in ("embed", "predict")}
        self._lengths = Spread("te_request_input_length", "Tokens of an input.", TEI_INPUT_TOKENS)

    def computed(self, work: Work) -> None:
        """Count what one request had computed."""
        inputs, timings = len(work.encodings), work.timings
        self._success.add(1, _method(inputs))
        self._durations.add(timings.total, timings.encode, timings.queue, timings.compute - timings.queue)
        self._of(work.kind).finish(inputs, timings, work.waits)
        for encoding in work.encodings:
            self._lengths.add(len(encoding))

    def repeated(self, model: str, inputs: int, seconds: float) -> None:
        """Count what a request embedded that came before."""
        del model
        self._success.add(1, _method(inputs))
        self._durations.add(seconds, 0.0, 0.0, 0.0)
        self._of("embed").finish(inputs, Timings())

    def failed(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        """Count what one request did not get."""
        del model, seconds
        self._of(kind).ask(inputs)

    def _of(self, kind: Kind) -> _Inputs:
        return self._inputs["predict" if kind in _PREDICT else "embed"]

    def metrics(self, canonical: Canonical) -> Iterator[Metric]:
        """Yield them as they stand."""
        asked = Counts("te_request_count", "The same, and those that failed, as single.", "method")
        failures = Counts("te_request_failure", "Requests that failed, by what was wrong.", "err")
        for name in ("quiver_failed_requests", "quiver_refused_requests"):
            for sample in samples(canonical, name):
                if err := TEI_FAILURES.get(sample.labels["error"]):
                    failures.add(sample.value, err)
                    asked.add(sample.value, _LONE)
        success = self._success.metric()
        for sample in success.samples:
            asked.add(sample.value, sample.labels["method"])
        yield from (success, asked.metric(), failures.metric(), *self._durations.metrics())
        for inputs in self._inputs.values():
            yield from inputs.metrics()
        yield self._lengths.metric()
        of_batches = samples(canonical, "quiver_batch_inputs")
        yield summed("te_batch_next_size", "Inputs of a forward pass.", TEI_BATCH_INPUTS, of_batches)
        of_batches = samples(canonical, "quiver_batch_tokens")
        yield summed("te_batch_next_tokens", "Tokens of a forward pass.", TEI_BATCH_TOKENS, of_batches)
        waiting = total(canonical, "quiver_waiting_inputs")
        yield single("te_queue_size", "gauge", "Inputs that wait for a lane.", waiting)


def _method(inputs: int) -> str:
    return _LONE if inputs == 1 else _MANY


FAMILIES: Mapping[MetricsFamily, Callable[[], Family]] = {"tei": Tei, "inference": Inference, "fastembed": FastEmbed}
"""By what the setting `metrics_families` calls them."""
