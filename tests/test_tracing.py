"""Traces: what is told of a request, to whom, and that telling it is in nobody's way."""

import asyncio
import json
import logging
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from conftest import MINILM, assembled, listening
from fakes import hash_model
from otlp_collector import collecting, values
from quiver.api.call import Call
from quiver.config import Secret, ServerConfig
from quiver.errors import MissingExtra
from quiver.telemetry import tracing
from quiver.telemetry.observer import Exchange
from quiver.telemetry.traces import FLUSH_SECONDS, OtlpTracer
from server_process import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
STAGES = ["encode", "queue", "compute"]
EMBED = "/v1/embeddings"
NOBODY = "http://127.0.0.1:9"
"""Where nobody listens."""


@pytest.fixture(scope="module", autouse=True)
def nothing_goes_on():
    """Leave no thread behind that draws when to try again: Hypothesis takes that for a mistake of the next test."""
    yield
    wait_for_threads("last-spans", "OtelBatchSpanRecordProcessor")


def wait_for_threads(*names):
    """Wait until all threads of these names have ended."""
    for thread in threading.enumerate():
        if thread.name in names:
            thread.join(60)


@asynccontextmanager
async def traced(model=None, **server):
    """Assemble a server that sends traces to a collector; all of them are there once `parts` is left."""
    with collecting() as collector:
        config = ServerConfig(otlp_endpoint=collector.endpoint, **server)
        with tracing.tracer(config) as tracer:
            async with assembled(model, server=config, tracer=tracer) as parts:
                yield parts, collector, tracer


async def spans_of(call, model=None, **server):
    """Make one call; returns its reply and its spans by name."""
    async with traced(model, **server) as (parts, collector, tracer):
        reply = await parts.api.receive(call)
        await asyncio.to_thread(tracer.close)
        return reply, {span.name: span for span in collector.spans}


def embed(body, **headers):
    """Return a call that embeds."""
    given_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Call("POST", EMBED, given_headers, json.dumps(body).encode())


def fail(_):
    """Be a backend that cannot."""
    raise RuntimeError("no")


def all_bytes(collector):
    """Return what a collector was sent, as it came."""
    return b"".join(request.SerializeToString() for request in collector.requests)


def seconds(span):
    """Return how long a span took."""
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


# What is told


async def test_a_request_is_a_span_and_its_stages_are_its_children():
    """It belongs to the trace that the client names, and says what was asked for and what it came to."""
    async with traced(otlp_service_name="s3-embedding.server") as (parts, collector, tracer):
        reply = await parts.api.receive(embed({"input": ["abc", "de"], "model": "hash"}, traceparent=TRACEPARENT))
        await asyncio.to_thread(tracer.close)
        spans = {span.name: span for span in collector.spans}
        assert collector.resource["service.name"] == "s3-embedding.server"
    assert sorted(spans) == sorted([f"POST {EMBED}", *STAGES])
    request = spans[f"POST {EMBED}"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert {spans[stage].parent_span_id for stage in STAGES} == {request.span_id}
    assert request.kind == request.SPAN_KIND_SERVER
    assert request.status.code == request.status.STATUS_CODE_UNSET
    tokens = json.loads(reply.body)["usage"]["total_tokens"]
    assert values(request.attributes) == {
        "http.request.method": "POST",
        "http.route": EMBED,
        "http.response.status_code": 200,
        "quiver.dialect": "openai",
        "quiver.model": "test/hash",
        "quiver.inputs": 2,
        "quiver.tokens": tokens,
    }


async def test_stages_follow_one_another_within_the_request():
    """Each begins where the one before ends, also where inputs take turns at one lane."""
    model = hash_model(lanes=1, batch_tokens=4, before=lambda _: time.sleep(0.01))
    before = time.time_ns()
    _, spans = await spans_of(embed({"input": ["abcd"] * 8}), model)
    after = time.time_ns()
    encode, queue, compute = (spans[stage] for stage in STAGES)
    request = spans[f"POST {EMBED}"]
    near = 1_000_000
    assert abs(encode.end_time_unix_nano - queue.start_time_unix_nano) < near
    assert abs(queue.end_time_unix_nano - compute.start_time_unix_nano) < near
    assert before - near < request.start_time_unix_nano <= encode.start_time_unix_nano + near
    assert compute.end_time_unix_nano - near <= request.end_time_unix_nano < after + near
    assert seconds(queue) < 0.04  # the first input's, not the mean of all
    assert seconds(compute) > 0.079


async def test_stages_add_up_to_what_the_client_measures():
    """Over HTTP, of a request of some hundred milliseconds that waits for the half of it, they are within 5 % of it."""
    with collecting() as collector:
        config, measured = ServerConfig(otlp_endpoint=collector.endpoint), {}
        model = hash_model(lanes=1, batch_tokens=1, before=lambda _: time.sleep(0.06))
        with tracing.tracer(config) as tracer:
            async with listening(model, server=config, tracer=tracer) as url, httpx.AsyncClient(base_url=url) as http:
                for number in range(1, 8):
                    first = asyncio.create_task(http.post(EMBED, json={"input": "b"}))
                    await asyncio.sleep(0.01)
                    start, trace = time.perf_counter(), f"{number:032x}"
                    await http.post(EMBED, json={"input": "a"}, headers={"traceparent": f"00-{trace}-{PARENT}-01"})
                    measured[trace] = time.perf_counter() - start
                    await first
        spans = [span for span in collector.wait_for(8 * len(measured)) if span.name in STAGES]
    stages = {trace: [seconds(span) for span in spans if span.trace_id.hex() == trace] for trace in measured}
    assert {len(parts) for parts in stages.values()} == {3}
    ratios = [sum(stages[trace]) / measured[trace] for trace in measured]
    assert max(ratios) < 1
    assert max(ratios) > 0.95  # the best of some: the machine is not ours alone
    assert statistics.median(min(parts[1:]) for parts in stages.values()) > 0.03  # waiting and computing both count


SECRET = "secret-words-of-a-caller"  # noqa: S105  no secret


@pytest.mark.parametrize("before", [fail, lambda _: None], ids=["fails", "answers"])
async def test_nothing_of_a_callers_words_is_told(before):
    """Texts, keys, names and paths that a client chose are in no span, whether it is answered, refused or fails."""
    calls = [
        embed({"input": [SECRET]}, authorization="Bearer key"),
        embed({"input": SECRET, "model": SECRET}, authorization="Bearer key"),
        embed({"input": SECRET, "dimensions": SECRET, "user": SECRET}, authorization="Bearer key"),
        embed({"input": SECRET}, authorization=f"Bearer {SECRET}", user_agent=SECRET, x_request_id=SECRET),
        Call("GET", f"/{SECRET}", query={"q": SECRET}),
        Call("GET", f"/v1/models/{SECRET}", {"authorization": "Bearer key"}),
        Call(SECRET, EMBED),
    ]
    async with traced(hash_model(before=before), api_key=Secret("key")) as (parts, collector, tracer):
        statuses = [(await parts.api.receive(call)).status for call in calls]
        await asyncio.to_thread(tracer.close)
        sent = all_bytes(collector)
        assert len([span for span in collector.spans if span.name not in STAGES]) == len(calls)
    assert statuses == [500 if before is fail else 200, 404, 400, 401, 404, 404, 405]
    assert SECRET.encode() not in sent
    assert EMBED.encode() in sent


async def test_words_that_are_told_are_found():
    """Negative control: where a span does hold them, they are among the bytes."""
    async with traced() as (_, collector, tracer):
        with tracer.tracing(Exchange("GET", route=SECRET), {}):
            pass
        await asyncio.to_thread(tracer.close)
        assert SECRET.encode() in all_bytes(collector)


@pytest.mark.parametrize(
    ("call", "model", "status", "error", "is_fault"),
    [
        (embed({"input": "a", "model": "other"}), {}, 404, "model_not_found", False),
        (embed({"input": []}), {}, 400, "invalid_value", False),
        (Call("GET", "/nowhere"), {}, 404, "not_found", False),
        (embed({"input": "a"}), {"before": fail}, 500, "inference_error", True),
        (Call("POST", "/tei/v1/embeddings", body=b"{}"), {}, 422, "422", False),
    ],
    ids=["unknown model", "no input", "no route", "a fault", "written by the dialect itself"],
)
async def test_errors_are_marked(call, model, status, error, is_fault):
    """Each is named by its code; only one that is not the client's own makes the span a failed one."""
    reply, spans = await spans_of(call, hash_model(**model))
    (span,) = [span for name, span in spans.items() if name not in STAGES]
    assert reply.status == values(span.attributes)["http.response.status_code"] == status
    assert values(span.attributes)["error.type"] == error
    assert (span.status.code == span.status.STATUS_CODE_ERROR) == is_fault


async def test_a_request_whose_client_leaves_is_told():
    """It has its span, with no status, and says that it was given up."""
    async with traced(hash_model(before=lambda _: time.sleep(0.2))) as (parts, collector, tracer):
        answering = asyncio.create_task(parts.api.receive(embed({"input": "a"})))
        await asyncio.sleep(0.05)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        await asyncio.to_thread(tracer.close)
        (span,) = collector.spans
    assert values(span.attributes)["error.type"] == "cancelled"
    assert "http.response.status_code" not in values(span.attributes)


async def test_a_jobs_work_belongs_to_the_request_that_brought_it():
    """What is computed after the reply has the reply's span for its parent, and no later request's."""
    async with traced() as (parts, collector, tracer):
        body = b'{"input": {"input": "abc"}}'
        reply = await parts.api.receive(Call("POST", "/run", {"traceparent": TRACEPARENT}, body))
        await parts.api.receive(Call("GET", f"/status-sync/{json.loads(reply.body)['id']}"))
        await parts.api.receive(Call("GET", "/v1/models"))
        await asyncio.to_thread(tracer.close)
        spans = {span.name: span for span in collector.spans}
    assert {spans[name].trace_id.hex() for name in ["POST /run", *STAGES]} == {TRACE}
    assert {spans[stage].parent_span_id for stage in STAGES} == {spans["POST /run"].span_id}
    assert spans["GET /v1/models"].trace_id.hex() != TRACE


# Whose trace it is


async def test_a_trace_that_is_not_sampled_is_not_sent():
    """The client's flag counts: of two requests, the one with the flag arrives."""
    async with traced() as (parts, collector, tracer):
        for trace, flag in ((TRACE, "00"), (TRACE[::-1], "01")):
            await parts.api.receive(embed({"input": "a"}, traceparent=f"00-{trace}-{PARENT}-{flag}"))
        await asyncio.to_thread(tracer.close)
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE[::-1]}
        assert len(collector.spans) == 4


async def test_only_a_part_of_the_traces_is_sent_where_that_is_asked_for():
    """Of none of its own, a server still sends those that its clients do."""
    async with traced(otlp_sample_ratio=0.0) as (parts, collector, tracer):
        await parts.api.receive(embed({"input": "a"}))
        await parts.api.receive(embed({"input": "a"}, traceparent=TRACEPARENT))
        await asyncio.to_thread(tracer.close)
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "no",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}",
    ],
)
async def test_an_invalid_parent_is_none(traceparent):
    """The request begins a trace of its own."""
    _, spans = await spans_of(embed({"input": "a"}, traceparent=traceparent))
    request = spans[f"POST {EMBED}"]
    assert not request.parent_span_id
    assert request.trace_id.hex() != TRACE
    assert {spans[stage].trace_id for stage in STAGES} == {request.trace_id}


ANY_HEADER = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=600)


@given(ANY_HEADER | st.just(TRACEPARENT), ANY_HEADER)
@settings(max_examples=200, deadline=None)
def test_no_header_is_in_the_way(heard, traceparent, tracestate):
    """Whatever a client writes into them, its request is followed, and nothing of it is logged."""
    logged = Logged()
    logging.getLogger("opentelemetry").addHandler(logged)
    try:
        with heard.tracing(Exchange("GET"), {"traceparent": traceparent, "tracestate": tracestate}):
            pass
    finally:
        logging.getLogger("opentelemetry").removeHandler(logged)
    assert logged.records == []


class Logged(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        """Keep a record."""
        self.records.append(record)


@pytest.fixture(scope="module")
def heard():
    """Return a tracer whose collector takes what comes."""
    with collecting() as collector, tracing.tracer(ServerConfig(otlp_endpoint=collector.endpoint)) as tracer:
        yield tracer


# In nobody's way


@pytest.fixture
def hasty(monkeypatch):
    """Let spans be sent at once, and given up soon."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")


def free_port():
    """Return a port at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def test_a_missing_collector_is_logged_once(hasty):
    """Not for each span or batch; once it is there, that is said too, and spans arrive."""
    del hasty
    port = free_port()
    config = ServerConfig(otlp_endpoint=f"http://127.0.0.1:{port}")
    with ExitStack() as later, capture_logs() as logs, tracing.tracer(config) as tracer:
        async with assembled(server=config, tracer=tracer) as parts:

            async def ask_until(event):
                while event not in [line["event"] for line in logs]:
                    assert (await parts.api.receive(embed({"input": "a"}))).status == 200
                    await asyncio.sleep(0.05)

            async with asyncio.timeout(30):
                await ask_until("nobody takes the traces: they are dropped until someone does")
                for _ in range(40):
                    await parts.api.receive(embed({"input": "a"}))
                    await asyncio.sleep(0.05)
                collector = later.enter_context(collecting(port))
                await ask_until("traces are taken again")
                assert collector.spans
    told = [(line["log_level"], line["endpoint"]) for line in logs]
    assert told == [("warning", config.otlp_endpoint), ("info", config.otlp_endpoint)]


async def test_a_collector_that_hangs_holds_nobody_up():
    """Requests take no longer, what waits to be sent is bounded, and the end comes in its time."""
    with collecting() as collector:
        collector.answering.clear()
        tracer = OtlpTracer(ServerConfig(otlp_endpoint=collector.endpoint))
        async with assembled(tracer=tracer) as parts:
            for _ in range(1000):  # 4,000 spans: twice what may wait
                assert (await parts.api.receive(embed({"input": "a"}))).status == 200
            assert await asyncio.to_thread(collector.asked.wait, 20)
            start = time.perf_counter()
            assert (await parts.api.receive(embed({"input": "a"}))).status == 200
            assert time.perf_counter() - start < 0.5
        start = time.perf_counter()
        with capture_logs() as logs:
            await asyncio.to_thread(tracer.close)
        assert time.perf_counter() - start < FLUSH_SECONDS + 1
        assert [line["event"] for line in logs] == ["the last traces were not sent in time"]
        collector.answering.set()
        await asyncio.to_thread(wait_for_threads, "last-spans")


def test_a_stopping_server_sends_its_last_spans():
    """The process is told its collector by the names of other systems, and ends with 0, its spans delivered."""
    with collecting() as collector:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "HF_HUB_OFFLINE": "1"}
        with serving("--model", MINILM, "--otlp-service-name", "mine", **env) as server:
            url = server.ready_url()
            reply = httpx.post(f"{url}{EMBED}", json={"input": "a"}, headers={"traceparent": TRACEPARENT})
            assert reply.status_code == 200
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
        assert {span.name for span in collector.spans if span.trace_id.hex() == TRACE} == {f"POST {EMBED}", *STAGES}
        assert collector.resource["service.name"] == "mine"


IMPORTED = """
import sys
from quiver import app
from quiver.config import Secret, ServerConfig
from quiver.telemetry import tracing
from quiver.telemetry.observer import Exchange
with tracing.tracer(ServerConfig(**{settings})) as tracer:
    print(tracer is not None, any(name.split(".")[0] in ("opentelemetry", "grpc") for name in sys.modules))
"""


@pytest.mark.parametrize(
    ("given_settings", "is_on"),
    [({}, False), ({"otlp_endpoint": NOBODY, "otlp_traces": False}, False), ({"otlp_endpoint": NOBODY}, True)],
    ids=["not set", "switched off", "on"],
)
def test_nothing_is_imported_where_traces_are_off(given_settings, is_on):
    """A server without a collector pays nothing for the packages, installed or not; one with a collector has them."""
    code = IMPORTED.format(settings=given_settings)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert ran.stdout.split() == [str(is_on)] * 2


@pytest.mark.parametrize("package", ["opentelemetry", "opentelemetry.sdk.trace", "grpc"])
def test_a_missing_extra_is_named_at_the_start(package, monkeypatch):
    """Where traces are to be sent and a package is not installed, the server does not start, and says what to install."""
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "quiver.telemetry.traces"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(MissingExtra, match=r"pip install 'quiver\[otel\]'"),
        tracing.tracer(ServerConfig(otlp_endpoint=NOBODY)),
    ):
        pass
