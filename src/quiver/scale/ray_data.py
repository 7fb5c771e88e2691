"""`quiver embed --ray`: partitions through Ray Data, over actors that each hold an engine.

    plan ──> partitions that are not done ──> map_batches: an actor reads one, computes it, writes part-NNNNN ──> progress

Rows never pass through the cluster: an actor reads what it computes, so the object store holds nothing but the names of
partitions, and a partition that an actor died at is done anew, whole, by another. Its file appears whole or not at all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import structlog

from quiver.bulk.command import BulkOptions
from quiver.bulk.display import Display, Rates
from quiver.bulk.lines import BadLine
from quiver.bulk.pipeline import Step
from quiver.config import Config
from quiver.errors import EngineError, Refused
from quiver.scale import cluster, partitions, plan
from quiver.scale.bulk_worker import Done, Opening, Order, Worker, open_engine
from quiver.scale.partitions import Partition
from quiver.scale.plan import Placement
from quiver.scale.storage import Location

log = structlog.get_logger(__name__)
PLAN = "plan.json"


class Plan(msgspec.Struct):
    """What a run was begun with: partitions mean the same only while all of this is the same."""

    model: str
    dimensions: int | None
    prompt_name: str | None
    normalize: bool | None
    truncate: bool
    text_column: str
    id_column: str | None
    files: list[str]
    partitions: list[tuple[str, int, int, int]]
    """File, start, stop and bytes of each."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a run shows itself."""

    name: str
    on_done: Callable[[Done], None]


class Doer:
    """What Ray Data makes an actor of."""

    def __init__(self, config: Config, order: Order, opening: Opening, cpus: float) -> None:
        self._worker = Worker(config, order, opening, cpus)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Do the partitions of a batch, which is one."""
        names = list(batch)
        rows = zip(*(batch[name].tolist() for name in names), strict=True)
        done = [asdict_of(self._worker.do(Partition(**dict(zip(names, row, strict=True))))) for row in rows]
        return {name: [row[name] for row in done] for name in done[0]}


def asdict_of(done: Done) -> dict[str, Any]:
    """Return a row of Ray Data's."""
    return msgspec.structs.asdict(done)


def embed(
    files: Sequence[str],
    output: str,
    options: BulkOptions,
    config: Config,
    opening: Opening = open_engine,
    on_done: Callable[[Done], None] = lambda _: None,
) -> int:
    """Embed files into a folder of Parquet files; returns its rows. Raises why it could not, and can be run again."""
    folder = Location(output)
    if options.overwrite:
        for name in folder.names():
            folder.below(name).remove()
    parts, ready = _begun(files, folder, options, config)
    left = [part for part in parts if part.number not in ready]
    if ready:
        log.info("going on", output=output, partitions=len(parts), done=len(ready))
    done = list(ready.values())
    if left:
        placement = plan.placements(config)[0]
        vector = next((one.vector for one in done), "")
        running = _run(left, plan.for_model(config, placement), Order(options, folder, vector), opening, placement)
        done += _shown(running, parts, done, Seen(output, on_done))
    rows, bad = sum(one.num_rows for one in done), sum(one.num_bad for one in done)
    if not rows:
        raise BadLine(f"there is no text to embed in {', '.join(files)}")
    log.info("done", output=output, rows=rows, bad_lines=bad, partitions=len(parts))
    return rows


def _begun(
    files: Sequence[str], folder: Location, options: BulkOptions, config: Config
) -> tuple[list[Partition], dict[int, Done]]:
    """Return all partitions and those that an earlier run has done. Raises `Refused` where that was another run."""
    parts = partitions.cut(files, options.form)
    wanted = Plan(
        model=config.models.model[0],
        dimensions=options.wanted.dimensions,
        prompt_name=options.wanted.prompt_name,
        normalize=options.wanted.normalize,
        truncate=config.engine.truncate,
        text_column=options.columns.text,
        id_column=options.columns.id,
        files=list(files),
        partitions=[(part.file, part.start, part.stop, part.num_bytes) for part in parts],
    )
    names = folder.names()
    if PLAN not in names:
        if names:
            raise Refused(f"{folder.uri} holds other files: give an empty folder, or --overwrite")
        folder.below(PLAN).write(msgspec.json.encode(wanted))
        return parts, {}
    _check(folder, msgspec.json.decode(folder.below(PLAN).read(), type=Plan), wanted)
    markers = {f"{part.name}.json": part.number for part in parts}
    found = [name for name in names if name in markers]
    return parts, {markers[n]: msgspec.json.decode(folder.below(n).read(), type=Done) for n in found}


def _check(folder: Location, begun: Plan, wanted: Plan) -> None:
    for name in Plan.__struct_fields__:
        old, new = getattr(begun, name), getattr(wanted, name)
        if old != new:
            what = "the files are not the same" if name == "partitions" else f"{name} was {old!r} and is {new!r}"
            raise Refused(f"{folder.uri} was begun differently: {what}; --overwrite starts anew")


def _run(
    left: Sequence[Partition], config: Config, order: Order, opening: Opening, placement: Placement
) -> Iterator[Done]:
    """Have partitions done by as many actors as there may be."""
    import ray  # noqa: PLC0415  it reads its settings when it is imported

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    most = max(1, min(placement.max_replicas, len(left)))
    rows = ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left))
    doing = rows.map_batches(
        Doer,
        fn_constructor_args=(config, order, opening, placement.cpus),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(placement.min_replicas, most), max_size=most),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus or None,
    )
    try:
        for row in doing.iter_rows():
            yield Done(**row)
    except ray.exceptions.RayError as error:
        raise EngineError(f"the cluster could not go on: {_first_line(error)}; run the same command again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _shown(running: Iterator[Done], parts: Sequence[Partition], ready: Sequence[Done], seen: "Seen") -> list[Done]:
    """Show how far a run is, and collect what is done. Raises `BadLine` where a partition could not be."""
    rates = Rates(sum(one.num_bytes for one in ready), sum(part.num_bytes for part in parts))
    done, done_bytes = [], rates.done_bytes
    with Display(rates, seen.name) as display:
        for one in running:
            if one.error:
                raise BadLine(f"{one.error} (the partitions that are done stay; mend it and run again)")
            done.append(one)
            seen.on_done(one)
            done_bytes += one.num_bytes
            display(Step(one.num_rows + one.num_bad, one.num_texts, one.num_tokens, done_bytes))
    return done


def command(files: Sequence[str], output: str, options: BulkOptions, config: Config) -> None:
    """Join the cluster, embed, and leave it. Raises `SetupError`, `Refused` or `EngineError`."""
    cluster.check_installed()
    partitions.cut(files, options.form)  # what cannot be read is said before anything is started
    one_model = replace(config, models=replace(config.models, model=config.models.model[:1]))
    cluster.join(one_model)
    import ray  # noqa: PLC0415  see above

    try:
        cluster.check_room(one_model)
        embed(files, output, options, one_model)
    finally:
        ray.shutdown()
