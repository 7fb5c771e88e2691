"""The metrics of other systems: their names, types, labels and buckets, and that their numbers are those of our own."""

import re
import time
from contextlib import asynccontextmanager

import pytest

from fakes import LogitBackend, byte_tokenizer, fake_model, hash_model
from quiver import config
from quiver.config import CacheConfig, EngineConfig, ServerConfig
from quiver.errors import QuiverError
from quiver.telemetry.families import FAMILIES, TEI_FAILURES
from quiver.telemetry.observer import CANCELLED, Observer
from seen_metrics import number, samples_of, served

COUNTER, GAUGE = ("counter", None), ("gauge", None)
GEOMETRIC = [1.5e-5 * 1.5**n for n in range(35)]
DURATION = ("histogram", GEOMETRIC)
HTTP = ("histogram", [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10])
OWN = ("histogram", [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300])
BY_METHOD, OF_HTTP, BY_MODEL = {"method"}, {"endpoint", "method", "status"}, {"model", "status"}


def powers(number):
    """Return a histogram's type with so many powers of two."""
    return ("histogram", [2**n for n in range(number)])


TIMES = [f"{stage}duration" for stage in ("", "tokenization_", "queue_", "inference_")]
DOCUMENTED = {
    "tei": {
        "te_request_count": (COUNTER, BY_METHOD),
        "te_request_success": (COUNTER, BY_METHOD),
        "te_request_failure": (COUNTER, {"err"}),
        **{f"te_{of}_{part}": (COUNTER, set()) for of in ("embed", "predict") for part in ("count", "success")},
        **{f"te_{of}_{part}": (DURATION, set()) for of in ("request", "embed", "predict") for part in TIMES},
        "te_request_input_length": (powers(20), set()),
        "te_batch_next_size": (powers(13), set()),
        "te_batch_next_tokens": (powers(21), set()),
        "te_queue_size": (GAUGE, set()),
    },
    "inference": {
        "inference_http_requests_total": (COUNTER, OF_HTTP),
        "inference_http_requests_duration_seconds": (HTTP, OF_HTTP),
        "inference_embed_requests_total": (COUNTER, BY_MODEL),
        "inference_embed_duration_seconds": (OWN, BY_MODEL),
        "inference_embed_items_total": (COUNTER, {"model"}),
        "inference_embed_per_item_duration_seconds": (OWN, {"model"}),
        "inference_rerank_requests_total": (COUNTER, BY_MODEL),
        "inference_rerank_duration_seconds": (OWN, BY_MODEL),
        "inference_rerank_documents_total": (COUNTER, {"model"}),
    },
    "fastembed": {
        "fastembed_requests_total": (COUNTER, {"status"}),
        "fastembed_request_latency_seconds": (OWN, set()),
        "fastembed_inference_latency_seconds": (OWN, set()),
        "fastembed_cache_hits_total": (COUNTER, set()),
    },
}
"""Name -> type with its buckets, and labels: as each system's document or source has them."""
WRONG = byte_tokenizer().encode(["?"], truncate=False)[0].ids[0]


def fails(batch):
    """Be a backend that takes a while, and cannot compute `?`."""
    time.sleep(0.01)
    if WRONG in batch.ids:
        raise RuntimeError("it cannot")


@asynccontextmanager
async def showing(*families, model=None, **sections):
    """Run a server with some families; yields a client, and what returns its metrics."""
    sections = {"server": ServerConfig(metrics_families=families), **sections}
    async with served(model or hash_model(before=fails), **sections) as (_, http):

        async def shown():
            return (await http.get("/metrics")).text

        yield http, shown


async def embed(http, *texts, path="/v1/embeddings", **body):
    """Embed some texts."""
    return await http.post(path, json={"input": list(texts), **body})


async def met(*families):
    """Return what two servers show that have embedded and reranked, well and badly."""
    reranker = fake_model(LogitBackend(before=fails), kind="rerank", dimensions=1)
    shown = []
    for model, path, good, bad in (
        (None, "/embed", {"inputs": ["a", "b"]}, {"inputs": "?"}),
        (reranker, "/tei/rerank", {"query": "a", "texts": ["b", "c"]}, {"query": "?", "texts": ["b"]}),
    ):
        async with showing(*families, model=model) as (http, show):
            assert (await http.post(path, json=good)).status_code == 200
            assert not (await http.post(path, json=bad)).is_success
            shown.append(await show())
    return shown


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_family_has_the_names_types_labels_and_buckets_of_its_system(family):
    """All that its document names, and nothing else of that prefix."""
    text = "".join(await met(family))
    prefix = next(iter(DOCUMENTED[family])).partition("_")[0]
    types = dict(re.findall(rf"^# TYPE ({prefix}_\w+) (\w+)$", text, re.MULTILINE))
    assert types == {name: kind for name, ((kind, _), _) in DOCUMENTED[family].items()}
    for name, ((kind, buckets), labels) in DOCUMENTED[family].items():
        series = re.findall(rf"^({name}(?:_bucket|_sum|_count)?)(?:\{{(.*)\}})? ", text, re.MULTILINE)
        assert {n.removeprefix(name) for n, _ in series} == ({"_bucket", "_sum", "_count"} if buckets else {""}), name
        assert {label for _, given in series for label in re.findall(r'(\w+)="', given)} - {"le"} == labels, name
        if kind == "histogram":
            found = dict.fromkeys(re.search(r'le="(.*?)"', given)[1] for n, given in series if n.endswith("_bucket"))
            assert list(map(float, found)) == pytest.approx([*buckets, float("inf")]), name


async def test_no_family_is_shown_that_is_not_asked_for():
    """Without the setting, `/metrics` has our own names alone."""
    async with showing() as (http, shown):
        await embed(http, "a")
        names = {sample.name.partition("_")[0] for sample in samples_of(await shown())}
    assert names == {"quiver", "process"}


@pytest.mark.parametrize(
    ("preset", "families"),
    [
        ("tei", ("tei",)),
        ("ai-embedding-inference-server", ("tei",)),
        ("embedding-inference-api", ("inference",)),
        ("fastembed-query-api", ("fastembed",)),
        ("infinity", ()),
    ],
)
def test_presets_set_the_families_of_their_systems(preset, families):
    """A dashboard of the system goes on where its preset is chosen."""
    assert config.load(preset=preset, env={}, flags={}).server.metrics_families == families


# TEI


async def test_tei_counts_what_was_done():
    """Requests by the number of their inputs, inputs, tokens and batches; what failed by what was wrong."""
    limits = EngineConfig(max_client_batch_size=3)
    async with showing("tei", engine=limits) as (http, shown):
        for inputs in ("abc", ["abc", "de"], ["a"], "?", "a" * 600, ["a"] * 4):
            await http.post("/embed", json={"inputs": inputs, "truncate": False})
        text = await shown()
    assert number(text, "te_request_success", {"method": "single"}) == 2
    assert number(text, "te_request_success", {"method": "batch"}) == 1
    failures = {s.labels["err"]: s.value for s in samples_of(text) if s.name == "te_request_failure"}
    assert failures == {"inference": 1, "tokenization": 1, "batch_size": 1}
    assert number(text, "te_request_count") == 3 + 3
    assert (number(text, "te_embed_count"), number(text, "te_embed_success")) == (6, 4)
    assert number(text, "te_predict_count") == 0
    assert number(text, "te_request_input_length_sum") == 3 + 3 + 2 + 1
    assert number(text, "te_request_input_length_bucket", {"le": "2.0"}) == 2
    for ours, theirs in (
        ("quiver_batch_inputs", "te_batch_next_size"),
        ("quiver_batch_tokens", "te_batch_next_tokens"),
    ):
        for part in ("sum", "count"):
            assert number(text, f"{theirs}_{part}") == number(text, f"{ours}_{part}") > 0
        buckets = [s for s in samples_of(text) if s.name == f"{theirs}_bucket"]
        assert {s.labels["le"]: s.value for s in buckets} == {
            s.labels["le"]: s.value
            for s in samples_of(text)
            if s.name == f"{ours}_bucket" and s.labels["le"] in {b.labels["le"] for b in buckets}
        }


async def test_tei_tells_texts_from_pairs():
    """What a reranker reads is predicted, not embedded."""
    model = fake_model(LogitBackend(), kind="rerank", dimensions=1)
    async with showing("tei", model=model) as (http, shown):
        assert (await http.post("/tei/rerank", json={"query": "a", "texts": ["b", "c"]})).status_code == 200
        text = await shown()
    assert (number(text, "te_predict_success"), number(text, "te_predict_duration_count")) == (2, 2)
    assert number(text, "te_embed_count") == 0


async def test_teis_times_add_up():
    """Of a request and of an input, the three parts are the whole; one that waits for the other waits for a pass."""
    model = hash_model(lanes=1, batch_tokens=1, before=lambda _: time.sleep(0.05))
    async with showing("tei", model=model) as (http, shown):
        await http.post("/embed", json={"inputs": ["a", "b"]})
        text = await shown()
    for of, times in (("request", 1), ("embed", 2)):
        whole, *parts = (number(text, f"te_{of}_{part}_sum") for part in TIMES)
        assert sum(parts) == pytest.approx(whole, rel=0.02)
        assert {number(text, f"te_{of}_{part}_count") for part in TIMES} == {times}
    assert number(text, "te_embed_queue_duration_sum") == pytest.approx(0.05, abs=0.03)
    assert number(text, "te_request_duration_sum") == pytest.approx(0.1, abs=0.05)


def test_teis_words_stand_for_errors_that_there_are():
    """Each code that is translated is one of ours, and each translation one of TEI's."""

    def codes(kind):
        return {kind.code}.union(*(codes(below) for below in kind.__subclasses__()))

    assert set(TEI_FAILURES) <= codes(QuiverError) | {CANCELLED}
    known = {"validation", "batch_size", "model_type", "tokenization", "inference", "overloaded", "dropped"}
    assert set(TEI_FAILURES.values()) <= known


# Embedding Inference API


async def test_inference_counts_by_model():
    """Requests and texts by model, as success or error; HTTP by endpoint, without those who watch."""
    async with showing("inference") as (http, shown):
        for texts in (["a", "b", "c"], ["?"]):
            await http.post("/api/embed/batch", json={"texts": texts, "model": "hash"})
        await http.get("/health")
        await shown()
        text = await shown()
    model = {"model": "test/hash"}
    assert number(text, "inference_embed_requests_total", model | {"status": "success"}) == 1
    assert number(text, "inference_embed_requests_total", model | {"status": "error"}) == 1
    assert number(text, "inference_embed_items_total", model) == 3
    took = number(text, "inference_embed_duration_seconds_sum", model | {"status": "success"})
    assert number(text, "inference_embed_per_item_duration_seconds_sum", model) == pytest.approx(took / 3)
    endpoints = {s.labels["endpoint"] for s in samples_of(text) if s.name == "inference_http_requests_total"}
    assert endpoints == {"/api/embed/batch"}
    assert number(text, "inference_http_requests_total", {"method": "POST", "status": "200"}) == 1


async def test_a_clients_own_method_is_no_label():
    """Whatever it writes there is one and the same label."""
    observer = Observer()
    observer.also_as(FAMILIES["inference"]())
    for method in ("BREW", "WHEN", "get"):
        with observer.exchange(method, {}) as exchange:
            exchange.status = 405
    text = observer.exposition().decode()
    assert number(text, "inference_http_requests_total", {"method": "_OTHER"}) == 3
    assert "BREW" not in text


# FastEmbed Query API


async def test_fastembed_reads_our_own():
    """Requests by status, their time and the model's, and hits: of single results, and of whole replies."""
    async with showing("fastembed", cache=CacheConfig()) as (http, shown):
        for text in ("a", "a", "b", ""):
            await http.post("/fastembed_query/v1/embed", json={"text": text})
        await http.get("/health")
        await shown()
        text = await shown()
    assert number(text, "fastembed_requests_total", {"status": "200"}) == 3
    assert number(text, "fastembed_requests_total") == number(text, "fastembed_request_latency_seconds_count") == 4
    assert number(text, "fastembed_cache_hits_total") == 1
    assert number(text, "fastembed_inference_latency_seconds_count") == 3
    assert number(text, "fastembed_inference_latency_seconds_sum") == number(
        text, "quiver_stage_seconds_sum", {"stage": "compute"}
    )


# All


async def test_a_reply_that_is_given_again_counts_everywhere():
    """Byte for byte the same as one before, it is a request with its inputs in every family."""
    async with showing(*FAMILIES, cache=CacheConfig()) as (http, shown):
        for _ in range(5):
            assert (await embed(http, "a", "b", encoding_format="base64")).status_code == 200
        text = await shown()
    assert number(text, "quiver_repeated_inputs_total") == 6  # three replies: the test is about something
    assert number(text, "te_request_success") == 5
    assert number(text, "te_embed_success") == number(text, "te_embed_duration_count") == 10
    assert number(text, "inference_embed_requests_total", {"status": "success"}) == 5
    assert number(text, "inference_embed_items_total") == 10
    assert number(text, "inference_http_requests_total") == 5
    assert number(text, "fastembed_requests_total") == 5
    assert number(text, "fastembed_cache_hits_total") == 8


async def test_buckets_of_every_histogram_rise():
    """No bucket holds less than the one below it, the last holds as many as were counted."""
    num_series = 0
    for text in await met(*FAMILIES):
        series = {}
        for sample in samples_of(text):
            if sample.name.endswith("_bucket"):
                labels = {name: value for name, value in sample.labels.items() if name != "le"}
                series.setdefault((sample.name, *labels.items()), []).append(sample.value)
        for (name, *labels), values in series.items():
            assert values == sorted(values)
            assert values[-1] == number(text, name.replace("_bucket", "_count"), dict(labels))
        num_series += len(series)
    assert num_series > 60
