"""`make bench-bulk`: what do files cost? Bulk runs against the engine alone, in turn, and their memory.

The engine alone gets the same texts in the same requests, so many at once, and drops the vectors. A bulk run reads them
from JSON lines and writes each format. Prints texts a second of both, and the median of their ratios.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from conftest import assembled
from fakes import hash_model
from quiver.bench.workload import stream
from quiver.bulk import BulkOptions, Wanted, run_bulk
from quiver.bulk.chunks import MAX_LINES
from quiver.bulk.embedders import Embedder, in_process, on_engine
from quiver.config import Config
from quiver.types import PackedBatch

FORMS = ("npy", "jsonl", "parquet")
MIB = 1 << 20
LANE_TOKENS_PER_SECOND = 50_000
"""Of each of two lanes: some 4,000 of the texts below a second, ten times what MiniLM does on two cores."""


@asynccontextmanager
async def hash_embedder(tokens_per_second: float = 0.0) -> AsyncIterator[Embedder]:
    """Compute with a model that costs next to nothing, or is as fast as a graphics card; the rest is Quiver's own."""

    def take_time(batch: PackedBatch) -> None:
        if tokens_per_second:
            time.sleep(len(batch.ids) / tokens_per_second)

    async with assembled(hash_model(batch_tokens=2048, before=take_time)) as parts:
        yield on_engine(parts.engine, "test/hash", Wanted())


class Cost(NamedTuple):
    """What so many lines took."""

    seconds: float
    cpu_seconds: float


@contextmanager
def counting(costs: list[Cost]) -> Iterator[None]:
    """Note what is done in here."""
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    costs.append(Cost(time.perf_counter() - start, time.process_time() - cpu_start))


async def directly(embedder: Embedder, texts: Sequence[str]) -> None:
    """Ask the engine alone."""
    requests = iter([texts[i : i + MAX_LINES] for i in range(0, len(texts), MAX_LINES)])

    async def ask() -> None:
        for request in requests:
            await embedder.embed(request)

    await asyncio.gather(*(ask() for _ in range(embedder.max_flights)))


async def in_bulk(embedder: Embedder, file: Path, output: Path) -> None:
    """Do a bulk run, from the first byte read to the output's name."""
    await run_bulk(BulkOptions(files=(file,), output=output, overwrite=True), Config(), nullcontext(embedder))


async def compare(name: str, embedder: Embedder, texts: Sequence[str], rounds: int) -> None:
    """Print the rates of both, in turn, for each format."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        await directly(embedder, texts[:1000])
        for form in FORMS:
            alone: list[Cost] = []
            bulk: list[Cost] = []
            for _ in range(rounds):
                with counting(alone):
                    await directly(embedder, texts)
                with counting(bulk):
                    await in_bulk(embedder, file, Path(folder) / f"out.{form}")
            rates = [len(texts) / statistics.median(cost.seconds for cost in costs) for costs in (alone, bulk)]
            share = statistics.median(a.seconds / b.seconds for a, b in zip(alone, bulk, strict=True))
            cpu = statistics.median(
                (b.cpu_seconds - a.cpu_seconds) / len(texts) for a, b in zip(alone, bulk, strict=True)
            )
            print(
                f"{name:8} {form:8} {len(texts):7,} lines  engine {rates[0]:8,.0f}/s  bulk {rates[1]:8,.0f}/s  "
                f"{share:6.1%}, {cpu * 1e6:5.1f} us more of a core a line",
                flush=True,
            )


def memory(counts: Sequence[int]) -> None:
    """Print the largest memory of runs of ever more lines, each in a process of its own."""
    script = Path(__file__).parent.parent / "tests" / "bulk_process.py"
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            file, output = Path(folder) / f"{count}.jsonl", Path(folder) / f"{count}.npy"
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(f'{{"text": "the text of line {i}"}}\n' for i in range(count))
            asked = json.dumps({"files": [str(file)], "output": str(output), "sync_seconds": 1.0})
            words = (sys.executable, str(script), "run", asked)
            done = subprocess.run(words, capture_output=True, check=True)  # noqa: S603  our own script
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{count:9,} lines: at most {found['bytes'] / MIB:6.1f} MiB, {count / found['seconds']:8,.0f}/s",
                flush=True,
            )


async def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000, help="for the hash model")
    parser.add_argument("--minilm-lines", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=("MiniLM", "hash", "paced"))
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    texts = [f"a short text of line {i}" for i in range(options.lines)]
    speeds = {"paced": LANE_TOKENS_PER_SECOND, "hash": 0.0}
    for name, speed in [(name, speeds[name]) for name in options.models if name in speeds]:
        async with hash_embedder(speed) as embedder:
            await compare(name, embedder, texts, options.rounds)
    if "MiniLM" in options.models:
        async with in_process(Config(), Wanted(), lambda *_: None) as embedder:
            texts = list(itertools.islice(stream(7), options.minilm_lines))
            await compare("MiniLM", embedder, texts, options.rounds)
    if not options.no_memory:
        memory((50_000, 100_000, 200_000))


if __name__ == "__main__":
    asyncio.run(main())
