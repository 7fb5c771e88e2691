"""What the metrics say is what was done, and every expression of the dashboard and of the alerts finds what it asks for."""

import asyncio
import json
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from fakes import byte_tokenizer, hash_model
from hub_machine import NAME, beside_a_hub
from quiver.config import CacheConfig, EngineConfig, ServerConfig
from quiver.telemetry.observer import MAX_UNCOUNTED, Observer, Work
from quiver.types import Timings
from seen_metrics import number, samples_of, served

DEPLOY = Path(__file__).parent.parent / "deploy"
EMBED, RUN = "/v1/embeddings", "/run"
PROMETHEUS_OWN, SCRAPED = {"up"}, {"instance", "job"}
"""What Prometheus itself knows of each server, and the labels that it adds to all that it reads there."""
WORDS = {"and", "or", "unless", "bool"}
GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()(?:\s*\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


# Counting comes behind the reply


def timings():
    """Return times of some stages."""
    return Timings(encode=0.1, compute=0.3, total=0.4, queue=0.0, first=0.1, start=0.0)


def test_what_was_noted_is_counted_by_the_time_that_somebody_reads():
    """Whoever reads sees each request, each batch and all that they computed, however few there were."""
    observer = Observer()
    with observer.exchange("POST", {}) as exchange:
        exchange.status = 200
        observer.batch_computed("m", 3, 40, 0.2)
        observer.inputs_computed(Work("m", "embed", ["a", "bc"], 3, timings()))
    names = ("quiver_requests_total", "quiver_batch_tokens_sum", "quiver_tokens_total", "quiver_request_inputs_sum")
    assert sorted(sample.value for sample in observer.samples(*names)) == [1, 2, 3, 40]
    assert b'quiver_tokens_total{model="m"} 3.0' in observer.exposition()


def test_few_events_are_kept_and_no_large_request_is():
    """What is not counted yet stays small where nobody ever reads: in number, and in what it holds."""

    class Inputs(list):
        """What a weak reference may point to."""

    observer, many = Observer(), Inputs(["a"] * 1000)
    is_held = weakref.ref(many)
    for _ in range(1000):
        observer.batch_computed("m", 3, 40, 0.2)
    observer.inputs_computed(Work("m", "embed", many, 1000, timings()))
    del many
    assert is_held() is None
    assert not observer._uncounted
    for _ in range(1000):
        with observer.exchange("POST", {}) as exchange:
            exchange.status = 200
    assert len(observer._uncounted) < MAX_UNCOUNTED
    assert [sample.value for sample in observer.samples("quiver_requests_total")] == [1000]


# What the files ask for


def dashboard():
    """Read the dashboard."""
    return json.loads((DEPLOY / "grafana" / "quiver.json").read_text(encoding="utf-8"))


def rules():
    """Read the rules of alerts."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """List every expression of both files."""
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [*panels, *(rule["expr"] for rule in rules())]


def asked_of(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield each metric that an expression reads, with its (label, operator, value)s."""
    bare = re.sub(r"\[[^\]]*\]", " ", GROUPED.sub(" ", expression))
    for name, matchers in SELECTOR.findall(bare):
        if name not in WORDS:
            yield name, MATCHER.findall(matchers)


def faults_of(expression: str, shown: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """Find what an expression asks for that a server does not show: metrics, labels, and values of labels."""
    asked = [(name, matchers) for name, matchers in asked_of(expression) if name not in PROMETHEUS_OWN]
    labels = {label for name, _ in asked for series in shown.get(name, ()) for label in series} | SCRAPED
    grouped = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    yield from (f"no metric has the label {label}" for label in grouped - labels)
    for name, matchers in asked:
        if name not in shown:
            yield f"{name} is not shown"
            continue
        for label, operator, value in matchers:
            values = {series.get(label) for series in shown[name]}
            if label not in SCRAPED and values == {None}:
                yield f"{name} has no label {label}"
            elif label not in SCRAPED and operator == "=" and value not in values:
                yield f"{name} is never {label}={value}"


FATAL, WRONG = (encoding.ids[0] for encoding in byte_tokenizer().encode(["!", "?"], truncate=False))


def fails(batch):
    """Be a backend that cannot compute `?`, and whose lane `!` ends."""
    if FATAL in batch.ids:
        raise SystemExit
    if WRONG in batch.ids:
        raise RuntimeError("it cannot")


async def met_everything(**places):
    """Return what a server shows that has met everything: its cache, faults, downloads, jobs and refusals."""
    model, models = hash_model(before=fails), {"allow_models": (NAME,), **places}
    async with served(model, models=models, cache=CacheConfig()) as (parts, http):
        for text in ("a", "a", "a", "?", "!"):
            await http.post(EMBED, json={"input": text})
        assert (await http.post(EMBED, json={"input": "a", "model": NAME})).status_code == 503
        for way in (RUN, "/runsync"):
            await http.post(way, json={"input": {"input": "a"}})
        parts.admission.memory_is_short = True
        assert (await http.post(EMBED, json={"input": "b"})).status_code == 429
        parts.admission.memory_is_short = False
        return (await http.get("/metrics")).text


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """Return the labels of every series by its name, of a server that has met everything."""
    with pytest.MonkeyPatch.context() as patch, beside_a_hub(tmp_path_factory.mktemp("hub"), patch) as machine:
        config = machine.config
        places = {name: getattr(config, name) for name in ("hub_endpoint", "hub_cache", "hub_token")}
        text = asyncio.run(met_everything(**places))
    found: dict[str, list[dict[str, str]]] = {}
    for sample in samples_of(text):
        found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_finds_what_it_asks_for(shown, expression):
    """Each metric, label and value in it is there once a server has met what it is about."""
    assert list(asked_of(expression))
    assert list(faults_of(expression, shown)) == []


@pytest.mark.parametrize(
    "expression",
    [
        "sum(rate(quiver_request_total[5m]))",
        "rate(quiver_requests_total[5m]) / rate(quiver_request_second_count[5m])",
        'quiver_models{stage="ready"}',
        'quiver_models{state="redy"}',
        "sum by (modell) (quiver_waiting_inputs)",
        "histogram_quantile(0.9, sum by (le) (rate(quiver_request_seconds[5m])))",
    ],
)
def test_an_expression_that_asks_for_another_thing_is_found_out(shown, expression):
    """Negative control: a wrong metric, label, value or kind is seen."""
    assert list(faults_of(expression, shown))


def test_every_alert_says_what_to_do():
    """Each has a name of its own, a severity, and sentences about what it is and what to do."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_panels_of_the_dashboard_do_not_overlap():
    """Each has its own id and place, and reads the data source that its user chooses."""
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    targets = [target for panel in panels for target in panel.get("targets", ())]
    assert {target["datasource"]["uid"] for target in targets} == {"${datasource}"}


# What was done


class Held:
    """Holds every forward pass until it is let go."""

    def __init__(self):
        self.busy, self.opened = threading.Event(), threading.Event()

    def __call__(self, batch):
        """Be what a backend calls before each batch."""
        del batch
        self.busy.set()
        assert self.opened.wait(20)


@pytest.fixture
def held():
    """Return what holds forward passes, and lets them go at the end, whatever happens."""
    held = Held()
    yield held
    held.opened.set()


async def test_what_waits_and_runs_is_shown(held):
    """How many inputs and tokens wait, since when, and how many lanes are busy; nothing once all is done."""
    model = hash_model(lanes=2, batch_tokens=4, before=held)
    async with served(model) as (_, http):
        asking = asyncio.create_task(http.post(EMBED, json={"input": ["abcd"] * 5}))
        await asyncio.to_thread(held.busy.wait)
        await asyncio.sleep(0.5)
        busy = (await http.get("/metrics")).text
        held.opened.set()
        assert (await asking).status_code == 200
        idle = (await http.get("/metrics")).text
    assert number(busy, "quiver_waiting_inputs") == 3
    assert number(busy, "quiver_waiting_tokens") == 12
    assert 0.4 < number(busy, "quiver_waiting_seconds") < 5
    assert (number(busy, "quiver_busy_lanes"), number(busy, "quiver_lanes")) == (2, 2)
    assert number(busy, "quiver_requests_at_work") == 2  # this one, and the one that asks
    for name in ("quiver_waiting_inputs", "quiver_waiting_tokens", "quiver_waiting_seconds", "quiver_busy_lanes"):
        assert number(idle, name) == 0
    assert number(idle, "quiver_batch_inputs_count") == number(idle, "quiver_batch_tokens_count") == 5
    assert number(idle, "quiver_batch_inputs_sum") == 5
    assert number(idle, "quiver_batch_tokens_sum") == 20


async def test_errors_are_counted_by_their_codes():
    """What a request ends with, what it is refused with before it is read, and a client that leaves."""
    model = hash_model(before=fails)
    async with served(model, engine=EngineConfig(max_client_batch_size=2)) as (parts, http):
        for given in ("?", "a" * 600, ["a"] * 3):
            assert (await http.post(EMBED, json={"input": given})).status_code >= 400
        parts.admission.memory_is_short = True
        assert (await http.post(EMBED, json={"input": "a"})).status_code == 429
        text = (await http.get("/metrics")).text
    assert number(text, "quiver_memory_short") == 1
    failed = {s.labels["error"]: s.value for s in samples_of(text) if s.name == "quiver_failed_requests_total"}
    assert failed == {"inference_error": 1, "context_length_exceeded": 1, "too_many_inputs": 1}
    assert number(text, "quiver_refused_requests_total", {"error": "overloaded"}) == 1


async def test_a_client_that_leaves_is_counted(held):
    """Its request ends as cancelled, and is at work no longer."""
    async with served(hash_model(before=held)) as (_, http):
        with pytest.raises(httpx.ReadTimeout):
            await http.post(EMBED, json={"input": "a"}, timeout=0.3)
        for _ in range(500):
            text = (await http.get("/metrics")).text
            if number(text, "quiver_requests_at_work") == 1:
                break
            await asyncio.sleep(0.02)
    assert number(text, "quiver_failed_requests_total", {"error": "cancelled"}) == 1


async def test_no_series_of_births_is_shown():
    """The library's `…_created` would be one line more for each series, of use to nobody."""
    async with served(server=ServerConfig(metrics_families=("tei", "inference", "fastembed"))) as (parts, _):
        text = parts.service.observer.exposition().decode()
    assert "_created" not in text
