"""One engine that does partitions, one after the other: what each of a cluster's actors holds."""

import asyncio
import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quiver.bulk.checkpoint import Checkpoint, Job, Paths
from quiver.bulk.chunks import Chunks
from quiver.bulk.command import BulkOptions, job_of
from quiver.bulk.embedders import Embedder, in_process
from quiver.bulk.lines import Wanted
from quiver.bulk.pipeline import Pipeline, Step
from quiver.bulk.writer import Writer
from quiver.config import Config
from quiver.errors import QuiverError, Refused
from quiver.scale import partitions
from quiver.scale.cores import Cores
from quiver.scale.partitions import Partition
from quiver.scale.storage import Location

Opening = Callable[[Config, Wanted], AbstractAsyncContextManager[Embedder]]
"""Loads what computes."""


def open_engine(config: Config, wanted: Wanted) -> AbstractAsyncContextManager[Embedder]:
    """Load the configured model in this process."""
    return in_process(config, wanted, lambda *_: None)


@dataclass(frozen=True, slots=True)
class Order:
    """What every partition of a run is done with."""

    options: BulkOptions
    output: Location
    vector: str
    """The digest that the vectors of the run began with; empty: none is done yet."""


class Done(msgspec.Struct, frozen=True):
    """What became of a partition; it stands beside its rows, and is written last."""

    number: int
    num_rows: int = 0
    num_bad: int = 0
    num_texts: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    vector: str = ""
    error: str = ""
    """Why it could not be done."""


class Worker:
    """An engine in this process; blocks while it works."""

    def __init__(self, config: Config, order: Order, opening: Opening = open_engine, cpus: float = 0.0) -> None:
        """Load the model. Raises what loading raises."""
        self._cores = Cores(math.ceil(cpus)) if cpus else None
        if self._cores:
            self._cores.pin()
        self._order = order
        self._runner = asyncio.Runner()
        self._opening = opening(config, order.options.wanted)
        self._embedder: Embedder = self._runner.run(_entered(self._opening))
        self._job: Job = self._runner.run(job_of(self._embedder, order.options, config, "parquet"))

    def do(self, partition: Partition) -> Done:
        """Embed a partition into a file of its own; what is wrong with it is told, not raised."""
        try:
            if self._order.vector not in ("", self._job.vector):
                raise Refused(
                    "the model gives other vectors than those the output was begun with: --overwrite starts anew"
                )
            return self._do(partition)
        except QuiverError as error:
            return Done(partition.number, error=error.message)

    def _do(self, partition: Partition) -> Done:
        folder = Path(tempfile.mkdtemp(prefix="quiver-part-"))
        try:
            return self._written(partition, Paths(folder / f"{partition.name}.parquet"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _written(self, partition: Partition, paths: Paths) -> Done:
        steps: list[Step] = []
        options = self._order.options
        chunks = Chunks(partitions.read(partition, options.columns))
        with closing(Writer(paths, Checkpoint(self._job), math.inf)) as writer:
            pipeline = Pipeline(
                self._embedder.embed,
                writer,
                max_flights=self._embedder.max_flights,
                skip_bad=options.skip_bad,
                on_step=steps.append,
            )
            self._runner.run(pipeline.run(chunks.next))
            state = writer.state
            if state.num_rows:
                writer.finish()
        if state.num_rows:
            self._order.output.below(f"{partition.name}.parquet").put(paths.output)
        if state.num_bad:
            self._order.output.below(f"{partition.name}.errors.jsonl").put(paths.errors)
        done = Done(
            partition.number,
            num_rows=state.num_rows,
            num_bad=state.num_bad,
            num_texts=sum(step.num_texts for step in steps),
            num_tokens=sum(step.num_tokens for step in steps),
            num_bytes=partition.num_bytes,
            vector=self._job.vector,
        )
        self._order.output.below(f"{partition.name}.json").write(msgspec.json.encode(done))
        return done


async def _entered(opening: AbstractAsyncContextManager[Any]) -> Any:
    return await opening.__aenter__()
