"""`make profile`: where does each microsecond of a request go, and each FLOP of a batch?

A batch: ONNX Runtime's own profiler tells how long each kind of node takes, and at what rate it computes. A request: the
server's own stages against what the client waits, and the processor time of the event loop's thread against all others
under load. With py-spy, the functions that the loop's thread is in, too.

This file is not called profile.py: beside other scripts it would stand in for the standard library's module.
"""

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import psutil
import uvloop
from rich.console import Console

from faults.load import Answer, Pool, embed
from quiver import config
from quiver.backends.gemm_probe import GemmProbe
from quiver.bench import idle_texts
from quiver.bench.workload import Workload
from quiver.engine import tokenizer
from quiver.engine.packing import pack
from quiver.graphs import compile_graph
from quiver.graphs.heads import Head
from quiver.graphs.rows import lay_rows
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Found, resolve
from quiver.models.weights import Weights
from quiver.types import Encoding, PackedBatch
from server_process import ServerProcess, serving

BATCH_TOKENS = 224
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"})
LOOK_AHEAD = 16
"""Waiting texts among which a batch finds one that still fits; the engine lets smaller ones pass, too."""
STAGE = re.compile(rb"([\w-]+);dur=([\d.]+)")
TOP_FUNCTIONS = 25
console = Console(width=140)


class Table(NamedTuple):
    """A table for the terminal and for docs/performance.md alike."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# A batch


@dataclass(slots=True)
class Share:
    """What all nodes of one kind took in all runs."""

    seconds: float = 0.0
    flops: float = 0.0
    calls: int = 0


def batch_table(found: Found, dtype: str, runs: int) -> Table:
    """Profile forward passes over full batches of the mixed workload, on one core."""
    batches = full_batches(found, runs)
    events, wall = profiled(found, dtype, batches)
    tokens, peak = sum(int(batch.cu_seqlens[-1]) for batch in batches), peak_flops(found)
    shares = shares_of(events)
    inside = sum(share.seconds for share in shares.values())
    rows = [
        [
            kind,
            f"{share.calls / len(batches):.0f}",
            f"{1e6 * share.seconds / tokens:.2f}",
            f"{share.seconds / wall:.1%}",
            f"{share.flops / share.seconds / 1e9:.0f}" if share.flops else "",
            f"{share.flops / share.seconds / peak:.0%}" if share.flops else "",
        ]
        for kind, share in sorted(shares.items(), key=lambda item: -item[1].seconds)
    ]
    rows.append(["between the nodes", "", f"{1e6 * (wall - inside) / tokens:.2f}", f"{1 - inside / wall:.1%}", "", ""])
    head = ["nodes", "in a batch", "µs a token", "of the time", "GFLOP/s", f"of the limit, {peak / 1e9:.0f}"]
    return Table(
        f"A batch of {tokens / len(batches):.0f} tokens, {dtype}, one core: {1e6 * wall / tokens:.1f} µs a token",
        head,
        rows,
    )


def full_batches(found: Found, count: int) -> list[PackedBatch]:
    """Fill batches with texts as they come, as far as there is room."""
    encode = tokenizer.load(found.files.path("tokenizer.json"), found.spec).encode
    waiting = list(encode(list(Workload(seed=3, size=16 * count).texts), truncate=True))
    return [pack(taken(waiting)) for _ in range(count)]


def taken(waiting: list[Encoding]) -> list[Encoding]:
    """Take the first, and of those behind it what still fits."""
    chosen, room = [waiting.pop(0)], BATCH_TOKENS
    room -= len(chosen[0])
    for at in reversed(range(min(LOOK_AHEAD, len(waiting)))):
        if len(waiting[at]) <= room:
            chosen.append(waiting.pop(at))
            room -= len(chosen[-1])
    return chosen


def profiled(found: Found, dtype: str, batches: Sequence[PackedBatch]) -> tuple[list[dict[str, Any]], float]:
    """Run batches with the profiler on; return its events of nodes, and the seconds of all runs."""
    spec, files = found.spec, found.files
    graph = compile_graph(files.json("config.json"), Weights(files), dtype, Head(kind=spec.kind, pooling=spec.pooling))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 3
        names = list(graph.weights)
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(graph.weights[name])) for name in names]
        options.add_external_initializers(names, values)
        session = ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
        for batch in batches:
            session.run(["result"], inputs_of(graph, batch))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    wall = sum(event["dur"] for event in events if event.get("name") == "model_run") / 1e6
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")], wall


def inputs_of(graph: Any, batch: PackedBatch) -> dict[str, Any]:
    """Give a graph what it asks for."""
    rows = lay_rows(batch.lengths, graph.key_block)
    given = {
        "ids": batch.ids, "positions": batch.positions, "type_ids": batch.type_ids,
        "firsts": batch.cu_seqlens[:-1], "lasts": batch.cu_seqlens[1:] - 1,
        "cells": rows.cells, "segments": rows.segments, "places": rows.places,
    }  # fmt: skip
    return {name: given[name] for name in graph.inputs}


def shares_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Share]:
    """Add up events by the kind of their node; products of two activations are those of attention."""
    shares: dict[str, Share] = defaultdict(Share)
    for event in events:
        told = event["args"]
        share = shares[kind_of(told)]
        share.seconds += event["dur"] / 1e6
        share.calls += 1
        share.flops += flops_of(told)
    return dict(shares)


def kind_of(told: Mapping[str, Any]) -> str:
    """Name a node's kind."""
    kind = str(told["op_name"])
    if kind not in PRODUCTS:
        return kind
    return f"{kind}, {'attention' if len(shapes(told, 'input')[0]) > 2 else 'linear layers'}"  # noqa: PLR2004


def flops_of(told: Mapping[str, Any]) -> float:
    """Count the operations of a matrix product; of anything else, none."""
    if told["op_name"] not in PRODUCTS:
        return 0.0
    return 2.0 * float(np.prod(shapes(told, "output")[0])) * shapes(told, "input")[0][-1]


def shapes(told: Mapping[str, Any], side: str) -> list[list[int]]:
    """Return the shapes of a node's inputs or outputs."""
    return [shape for one in told[f"{side}_type_shape"] for shape in one.values()]


def peak_flops(found: Found) -> float:
    """Measure what one core reaches in a block's matrix products and nothing else, in float32."""
    shape = found.files.json("config.json")
    return GemmProbe(shape["hidden_size"], shape["intermediate_size"], cores=1).measure(1.0)


# A request


async def idle_table(url: str, texts: Mapping[str, Sequence[str]]) -> Table:
    """Hold what a lone client waits against the server's own stages, in microseconds (p50)."""
    rows = []
    async with Pool(url) as pool:
        for label, some in texts.items():
            answers = [await pool.ask(embed([text], encoding_format="base64")) for text in some]
            columns = zip(*(stages_of(answer) for answer in answers), strict=True)
            rows.append([label, *(f"{statistics.median(column):,.0f}" for column in columns)])
    head = [
        "text",
        "waited",
        "tokens",
        "waiting for a lane and computing",
        "all else of the call",
        "HTTP, loop and socket",
    ]
    return Table("An idle server: microseconds of a request (p50)", head, rows)


def stages_of(answer: Answer) -> tuple[float, ...]:
    """Return the microseconds of a request: all of it, and its parts."""
    stage = {name.decode(): 1e3 * float(milliseconds) for name, milliseconds in STAGE.findall(answer.head)}
    waited, rest = 1e6 * answer.seconds, stage["total"] - stage["encode"] - stage["compute"]
    return waited, stage["encode"], stage["compute"], rest, waited - stage["total"]


async def load_table(server: ServerProcess, url: str, clients: int, seconds: float) -> tuple[Table, str]:
    """Load the server, and split its processor time among the loop's thread and all others."""
    texts, process, count = Workload(seed=4, size=2048).texts, psutil.Process(server.process.pid), 0
    requests = (embed([texts[i % len(texts)]], encoding_format="base64") for i in range(1 << 30))
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client() -> None:
        nonlocal count
        while loop.time() < end:
            answer = await pool.ask(next(requests))
            assert answer.status == 200, answer  # noqa: PLR2004
            count += 1

    async with Pool(url) as pool:
        before = thread_seconds(process)
        sampled = asyncio.create_task(sampled_stacks(process.pid, seconds))
        await asyncio.gather(*(client() for _ in range(clients)))
        spent = Counter(thread_seconds(process))
        spent.subtract(before)
        folded = await sampled
    rows = [[name, f"{1e6 * cpu / count:,.0f}", f"{cpu / seconds:.2f}"] for name, cpu in spent.most_common()]
    title = f"Under load, {clients} clients: processor time of {count / seconds:.0f} requests a second"
    return Table(title, ["thread", "µs a request", "cores"], rows), folded


def thread_seconds(process: psutil.Process) -> dict[str, float]:
    """Return the processor time of the loop's thread, which is the first, and of all others."""
    spent: Counter[str] = Counter()
    for thread in process.threads():
        name = "the event loop" if thread.id == process.pid else "lanes, encoders and all others"
        spent[name] += thread.user_time + thread.system_time
    return dict(spent)


def py_spy() -> str | None:
    """Find py-spy beside this interpreter, or on the PATH."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


async def sampled_stacks(pid: int, seconds: float) -> str:
    """Let py-spy look at the stacks, if it is installed; return them folded."""
    if not (spy := py_spy()):
        return ""
    command = (spy, "record", "--pid", str(pid), "--duration", f"{max(1, seconds):.0f}", "--threads", "--format", "raw")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stacks"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = await asyncio.create_subprocess_exec(*command, "--output", str(file), **quiet)
        await process.wait()
        return file.read_text(encoding="utf-8") if file.exists() else ""


def functions_table(folded: str, pid: int) -> Table:
    """Count in which functions the loop's thread was found, on top and anywhere on its stack."""
    alone, within, total = Counter[str](), Counter[str](), 0
    for line in folded.splitlines():
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";")
        if not frames[0].startswith(f"thread ({pid})"):  # the loop runs in the first thread
            continue
        names = [re.sub(r":\d+\)$", ")", frame) for frame in frames[1:]] or frames
        total += int(times)
        alone[names[-1]] += int(times)
        within.update(dict.fromkeys(names, int(times)))
    rows = [
        [f"`{name}`", f"{alone[name] / total:.1%}", f"{within[name] / total:.1%}"]
        for name, _ in alone.most_common(TOP_FUNCTIONS)
    ]
    return Table("Where the loop's thread is found when it works", ["function", "itself", "with all it calls"], rows)


async def request_tables(options: argparse.Namespace) -> list[Table]:
    """Measure a server of the defaults, without its cache."""
    texts = idle_texts(config.load(env={}, flags={}))
    with serving("--cache-entries", "0") as server:
        url = await asyncio.to_thread(server.ready_url)
        async with Pool(url) as pool:
            for text in Workload(seed=5, size=64).texts:
                await pool.ask(embed([text]))
        idle = await idle_table(url, texts)
        load, folded = await load_table(server, url, options.clients, options.seconds)
    return [idle, load, *([functions_table(folded, server.process.pid)] if folded else [])]


def main() -> None:
    """Measure and print, as Markdown."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=200, help="forward passes to profile (default: 200)")
    arguments.add_argument("--clients", type=int, default=32, help="of the load (default: 32)")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of the load (default: 10)")
    options = arguments.parse_args()
    name = config.DEFAULT_MODEL
    found = resolve(name, Catalogue.load().find(name), config.load(env={}, flags={}).models, lambda *_: None)
    for dtype in ("float32", "int8"):
        console.print(str(batch_table(found, dtype, options.runs)), markup=False, highlight=False, soft_wrap=True)
    for table in uvloop.run(request_tables(options)):
        console.print(str(table), markup=False, highlight=False, soft_wrap=True)
    if not py_spy():
        console.print("Install py-spy to see in which functions the event loop's thread is.")


if __name__ == "__main__":
    main()
