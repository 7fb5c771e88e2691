"""What a client measures, what its trace says and what the metrics say are one and the same, within a twentieth."""

import asyncio
import statistics
import time

import pytest

from fakes import hash_model
from otlp_collector import collecting
from quiver.config import ServerConfig
from quiver.telemetry import tracing
from seen_metrics import number, served

EMBED = "/v1/embeddings"
PASS_SECONDS = 0.3
STAGES = ("encode", "queue", "compute")
NEAR = 0.05


def seconds(span):
    """Return how long a span took."""
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


async def counted(http):
    """Return the seconds that the metrics have of each stage, and of requests to embed."""
    text = (await http.get("/metrics")).text
    stages = {stage: number(text, "quiver_stage_seconds_sum", {"stage": stage}) for stage in STAGES}
    return stages | {"request": number(text, "quiver_request_seconds_sum", {"route": EMBED})}


async def waits_for_a_pass(http, trace):
    """Ask while the only lane is busy; return what the client measures, and what the metrics count for it."""
    first = asyncio.create_task(http.post(EMBED, json={"input": "b"}))
    await asyncio.sleep(PASS_SECONDS / 2)
    start = time.perf_counter()
    second = asyncio.create_task(
        http.post(EMBED, json={"input": "a"}, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    )
    await first
    before = await counted(http)
    await second
    measured = time.perf_counter() - start
    after = await counted(http)
    return measured, {name: after[name] - before[name] for name in before}


async def test_client_trace_and_metrics_agree():
    """Of requests that wait and compute for some tenths of a second, half of them at least on a busy machine."""
    found = []
    with collecting() as collector:
        config = ServerConfig(otlp_endpoint=collector.endpoint)
        model = hash_model(lanes=1, batch_tokens=1, before=lambda _: time.sleep(PASS_SECONDS))
        with tracing.tracer(config) as tracer:
            async with served(model, server=config, tracer=tracer) as (_, http):
                await http.post(EMBED, json={"input": "c"})
                for number_of in range(1, 6):
                    trace = f"{number_of:032x}"
                    found.append((trace, *await waits_for_a_pass(http, trace)))
    spans = {trace: [s for s in collector.spans if s.trace_id.hex() == trace] for trace, *_ in found}
    off = {"stages": [], "request": [], "metrics of stages": [], "metrics of requests": [], "trace": []}
    for trace, measured, metrics in found:
        told = {span.name: seconds(span) for span in spans[trace]}
        assert set(told) == {*STAGES, f"POST {EMBED}"}
        off["stages"].append(sum(told[stage] for stage in STAGES) / measured)
        off["request"].append(told[f"POST {EMBED}"] / measured)
        off["metrics of stages"].append(sum(metrics[stage] for stage in STAGES) / measured)
        off["metrics of requests"].append(metrics["request"] / measured)
        off["trace"] += [metrics[stage] / told[stage] for stage in ("queue", "compute")]
    medians = {name: statistics.median(ratios) for name, ratios in off.items()}
    assert medians == {name: pytest.approx(1, abs=NEAR) for name in off}


async def test_another_measure_would_not_agree():
    """Negative control: a client that counts a fifth of a pass more than there was is off by more."""
    async with served(hash_model(before=lambda _: time.sleep(PASS_SECONDS))) as (_, http):
        start = time.perf_counter()
        await http.post(EMBED, json={"input": "a"})
        await asyncio.sleep(PASS_SECONDS / 5)
        measured = time.perf_counter() - start
        metrics = await counted(http)
    assert sum(metrics[stage] for stage in STAGES) / measured < 1 - NEAR
