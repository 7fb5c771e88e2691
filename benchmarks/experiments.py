"""`make experiments`: what would the hot path be with other parts? Each beside what is there, in turn, as a ratio of speeds.

The forward pass on one core, over full batches of the mixed workload: other forms of the activation and of the norms,
another batch size, ONNX Runtime's other settings, other allocators. Then how vectors are written as JSON, and how many
threads turn texts into tokens under load. What needs other code than a setting or another node of the graph was tried when
that code was written: docs/performance.md has it.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import orjson
import uvloop
from hot_path import full_batches, inputs_of
from onnx import NodeProto, helper
from rich.console import Console

from faults.load import Pool, embed
from quiver import config
from quiver.backends.sessions import session_options, share_arena
from quiver.bench.workload import Workload
from quiver.graphs import compile_graph
from quiver.graphs.builder import MICROSOFT, CompiledGraph
from quiver.graphs.heads import Head
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Found, resolve
from quiver.models.weights import Weights
from quiver.types import PackedBatch
from server_process import serving

NOW = "as it is"
ALLOCATORS = {"jemalloc": "libjemalloc.so.2", "tcmalloc": "libtcmalloc_minimal.so.4", "mimalloc": "libmimalloc.so.2"}
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
CLIENTS = 32
console = Console(width=120)

Nodes = Iterator[NodeProto]
Change = Callable[[NodeProto], Nodes | None]
"""Yields what stands in the place of a node; None: it stays."""


def tanh_gelu(node: NodeProto) -> Nodes | None:
    """GELU by tanh, which is another function: the vectors change in the fourth digit."""
    if node.op_type == "Gelu":
        return iter([helper.make_node("FastGelu", node.input, node.output, domain=MICROSOFT)])
    return None


def plain_gelu(node: NodeProto) -> Nodes | None:
    """GELU of ONNX's own operators."""
    return _plain_gelu(node.input[0], node.output[0]) if node.op_type == "Gelu" else None


def _plain_gelu(x: str, result: str) -> Nodes:
    constants = {"root": 2**-0.5, "one": 1.0, "half": 0.5}
    for name, value in constants.items():
        yield helper.make_node("Constant", [], [f"{result}/{name}"], value_float=value)
    steps = (("Mul", x, "root"), ("Erf", "0"), ("Add", "1", "one"), ("Mul", x, "2"), ("Mul", "3", "half"))
    for i, (kind, *given) in enumerate(steps):
        names = [x if name == x else f"{result}/{name}" for name in given]
        yield helper.make_node(kind, names, [result if i == len(steps) - 1 else f"{result}/{i}"])


def plain_norm(node: NodeProto) -> Nodes | None:
    """LayerNorm of ONNX's own operators."""
    return _plain_norm(node) if node.op_type == "LayerNormalization" else None


def _plain_norm(node: NodeProto) -> Nodes:
    x, scale, bias = node.input
    result, epsilon = node.output[0], next(a.f for a in node.attribute if a.name == "epsilon")
    yield helper.make_node("Constant", [], [f"{result}/eps"], value_float=epsilon)
    at = {name: f"{result}/{name}" for name in ("mean", "off", "square", "var", "safe", "std", "unit", "scaled")}
    yield helper.make_node("ReduceMean", [x], [at["mean"]], axes=[-1])
    yield helper.make_node("Sub", [x, at["mean"]], [at["off"]])
    yield helper.make_node("Mul", [at["off"], at["off"]], [at["square"]])
    yield helper.make_node("ReduceMean", [at["square"]], [at["var"]], axes=[-1])
    yield helper.make_node("Add", [at["var"], f"{result}/eps"], [at["safe"]])
    yield helper.make_node("Sqrt", [at["safe"]], [at["std"]])
    yield helper.make_node("Div", [at["off"], at["std"]], [at["unit"]])
    yield helper.make_node("Mul", [at["unit"], scale], [at["scaled"]])
    yield helper.make_node("Add", [at["scaled"], bias], [result])


def changed(graph: CompiledGraph, change: Change) -> bytes:
    """Return a graph's model with other nodes in the place of some."""
    model = onnx.load_from_string(graph.model)
    nodes = [new for node in model.graph.node for new in (change(node) or [node])]
    assert len(nodes) != len(model.graph.node) or nodes != list(model.graph.node), "nothing was changed"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute the same batches."""

    name: str
    change: Change | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of a session."""
    entries: Mapping[str, str] = field(default_factory=dict)
    is_optimised: bool = True
    """Else ONNX Runtime would put its own operators in the place of plain ones again."""
    shares_arena: bool = True


VARIANTS = (
    Variant(NOW),
    Variant("GELU by tanh (another function)", tanh_gelu),
    Variant("GELU of plain operators", plain_gelu, is_optimised=False),
    Variant("LayerNorm of plain operators", plain_norm, is_optimised=False),
    Variant("ONNX Runtime's own rewriting left out", is_optimised=False),
    Variant("an arena of its own", shares_arena=False),
    Variant("no arena", settings={"enable_cpu_mem_arena": False}, shares_arena=False),
    Variant("memory planned by shape", settings={"enable_mem_pattern": True}),
    Variant("denormal numbers as zero", entries={"session.set_denormal_as_zero": "1"}),
)


def session_of(graph: CompiledGraph, variant: Variant) -> ort.InferenceSession:
    """Start a session of one thread."""
    options = session_options(threads=1)
    if variant.shares_arena:
        share_arena(options)
    for name, value in variant.settings.items():
        setattr(options, name, value)
    for name, value in variant.entries.items():
        options.add_session_config_entry(name, value)
    if not variant.is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names = list(graph.weights)
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(graph.weights[name])) for name in names]
    options.add_external_initializers(names, values)
    model = changed(graph, variant.change) if variant.change else graph.model
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def seconds_of(session: ort.InferenceSession, graph: CompiledGraph, batches: Sequence[PackedBatch]) -> float:
    """Time one pass over all batches."""
    start = time.perf_counter()
    for batch in batches:
        session.run(["result"], inputs_of(graph, batch))
    return time.perf_counter() - start


def forward_ratios(found: Found, rounds: int, num_batches: int) -> dict[str, float]:
    """Let all variants take turns; return each one's speed, as a multiple of what is there."""
    graph = graph_of(found)
    batches = full_batches(found, num_batches)
    sessions = {variant.name: session_of(graph, variant) for variant in VARIANTS}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        seconds_of(session, graph, batches[:2])
    for _ in range(rounds):
        for name, session in random.sample(list(sessions.items()), len(sessions)):
            taken[name].append(seconds_of(session, graph, batches))
    return {name: statistics.median(np.divide(taken[NOW], seconds)) for name, seconds in taken.items()}


def graph_of(found: Found) -> CompiledGraph:
    """Compile the default model in float32."""
    head = Head(kind=found.spec.kind, pooling=found.spec.pooling)
    return compile_graph(found.files.json("config.json"), Weights(found.files), "float32", head)


def allocator_ratios(rounds: int, num_batches: int) -> dict[str, float]:
    """Let processes with other allocators take turns."""
    ways = {NOW: {}, "MALLOC_ARENA_MAX=1": {"MALLOC_ARENA_MAX": "1"}}
    ways |= {
        name: {"LD_PRELOAD": str(LIBRARIES / file)} for name, file in ALLOCATORS.items() if (LIBRARIES / file).exists()
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, env in ways.items():
            command = [sys.executable, __file__, "--time", str(num_batches)]
            done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)  # noqa: S603
            taken[name].append(float(done.stdout))
    return {name: statistics.median(np.divide(taken[NOW], seconds)) for name, seconds in taken.items()}


def json_microseconds(rounds: int) -> dict[str, float]:
    """Time the ways to write one vector of 384 numbers."""
    vector = np.random.default_rng(0).standard_normal(384).astype(np.float32)
    ways: dict[str, Callable[[], object]] = {
        "orjson, shortest form of float32 (as it is)": lambda: orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY),
        "orjson, a list of float64": lambda: orjson.dumps(vector.tolist()),
        "msgspec, a list of float64": lambda: msgspec.json.encode(vector.tolist()),
        "json of the standard library": lambda: json.dumps(vector.tolist()),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, write in ways.items():
            start = time.perf_counter()
            for _ in range(200):
                write()
            found[name].append((time.perf_counter() - start) / 200 * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


async def encoder_ratios(rounds: int, seconds: float) -> dict[str, float]:
    """Let servers with other numbers of tokenising threads take turns under load."""
    texts = Workload(seed=4, size=2048).texts
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(rounds):
        for threads, seen in rates.items():
            with serving("--cache-entries", "0", "--encoders", str(threads)) as server:
                seen.append(await rate(await asyncio.to_thread(server.ready_url), texts, seconds))
    middle = np.median(rates[2])
    return {f"{threads} threads": float(np.median(seen) / middle) for threads, seen in rates.items()}


async def rate(url: str, texts: Sequence[str], seconds: float) -> float:
    """Return texts a second of a closed load."""
    turns, count, end = itertools.cycle(texts), 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal count
        while time.perf_counter() < end:
            answer = await pool.ask(embed([next(turns)], encoding_format="base64"))
            assert answer.status == 200, answer  # noqa: PLR2004
            count += 1

    async with Pool(url) as pool:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return count / seconds


def show(title: str, unit: str, rows: Mapping[str, float]) -> None:
    """Print a table as Markdown."""
    console.print(f"\n### {title}\n\n| | {unit} |\n| --- | --- |", markup=False, highlight=False)
    for name, value in rows.items():
        console.print(f"| {name} | {value:.2f} |", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Measure and print, as Markdown."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7, help="of each variant (default: 7)")
    arguments.add_argument("--batches", type=int, default=24, help="in a round (default: 24)")
    arguments.add_argument("--time", type=int, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    name = config.DEFAULT_MODEL
    found = resolve(name, Catalogue.load().find(name), config.load(env={}, flags={}).models, lambda *_: None)
    if options.time:  # in a process of its own, with another allocator
        graph, batches = graph_of(found), full_batches(found, options.time)
        session = session_of(graph, VARIANTS[0])
        seconds_of(session, graph, batches[:2])
        print(min(seconds_of(session, graph, batches) for _ in range(3)))
        return
    show("The forward pass", "speed, of what is there", forward_ratios(found, options.rounds, options.batches))
    show("Allocators", "speed, of what is there", allocator_ratios(options.rounds, options.batches))
    show("A vector as JSON", "µs", json_microseconds(options.rounds * 5))
    show("Threads that tokenise, 32 clients", "speed, of two", uvloop.run(encoder_ratios(3, 5.0)))


if __name__ == "__main__":
    main()
