"""One run from its options to its output: what is there already, what is left to do, and how it ends."""

import asyncio
import hashlib
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from quiver.bulk import checkpoint
from quiver.bulk.checkpoint import Checkpoint, Job, Paths
from quiver.bulk.chunks import Chunks
from quiver.bulk.display import Display, Rates
from quiver.bulk.embedders import PROBE, SERVER_FLIGHTS, Embedder, at_server, in_process
from quiver.bulk.files import naming
from quiver.bulk.lines import BadLine, Columns, Wanted
from quiver.bulk.pipeline import Pipeline
from quiver.bulk.sinks import GROWING, form_of
from quiver.bulk.sources import STDIN, Corpus
from quiver.bulk.writer import SYNC_SECONDS, Writer
from quiver.config import Config
from quiver.errors import ConfigError, QuiverError, Refused
from quiver.models.hub import Progress

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOptions:
    """What a run is asked for."""

    files: tuple[Path, ...]
    output: Path
    form: str | None = None
    """Of the files; None goes by each one's suffix."""
    output_form: str | None = None
    columns: Columns = field(default_factory=Columns)
    wanted: Wanted = field(default_factory=Wanted)
    skip_bad: bool = False
    overwrite: bool = False
    url: str = ""
    max_requests: int = SERVER_FLIGHTS
    """Requests at once, of a run with `url`."""
    sync_seconds: float = SYNC_SECONDS
    """How much work a kill may cost."""

    @property
    def paths(self) -> Paths:
        """The files beside the output."""
        return Paths(self.output)


async def run_bulk(
    options: BulkOptions, settings: Config, opening: AbstractAsyncContextManager[Embedder]
) -> Checkpoint:
    """Embed files into a file; one that was interrupted goes on where it was. Raises why it could not.

    What computes is opened once it is clear that there is something to do.
    """
    form, paths = form_of(options.output, options.output_form), options.paths
    corpus = Corpus(options.files, options.form, options.columns)
    _check_paths(options)
    begun = _begun(options)
    if begun and begun.finished:
        with naming(paths.output):
            checkpoint.finish(paths, grows=begun.job.output_form in GROWING)
        log.info("was finished already", output=str(options.output), rows=begun.num_rows)
        return begun
    async with opening as embedder:
        job = await job_of(embedder, options, settings, form)
        if begun:
            checkpoint.check(paths, begun.job, job)
        state = await embed_corpus(corpus, embedder, begun or Checkpoint(job), options)
    log.info("done", output=str(options.output), rows=state.num_rows, bad_lines=state.num_bad)
    if state.num_bad:
        log.warning("bad lines were left out", lines=state.num_bad, see=str(paths.errors))
    return state


async def embed_corpus(corpus: Corpus, embedder: Embedder, start: Checkpoint, options: BulkOptions) -> Checkpoint:
    """Do what is left behind `start`. Raises `BadLine`, `OutputFailed`, and what the embedder raises."""
    chunks = Chunks(corpus, lambda: corpus.done_bytes)
    await asyncio.to_thread(chunks.skip, start.place)
    if start.place.num_lines:
        log.info("going on", output=str(options.output), lines=start.place.num_lines, rows=start.num_rows)

    with closing(Writer(options.paths, start, options.sync_seconds)) as writer:
        rates = Rates(corpus.done_bytes, corpus.total_bytes)
        with Display(rates, options.output.name) as display:
            pipeline = Pipeline(
                embedder.embed, writer, max_flights=embedder.max_flights, skip_bad=options.skip_bad, on_step=display
            )
            await pipeline.run(chunks.next)
        if not writer.state.num_rows:
            writer.discard()
            raise BadLine(f"there is no text to embed in {', '.join(map(str, options.files))}")
        writer.finish()
        return writer.state


def embedder_for(options: BulkOptions, settings: Config, progress: Progress) -> AbstractAsyncContextManager[Embedder]:
    """Return what computes: the engine in this process, or the server of `url`. Raises `ConfigError`."""
    if options.url:
        return at_server(settings, options.wanted, options.url, options.max_requests)
    return in_process(settings, options.wanted, progress)


def how_to_go_on(options: BulkOptions) -> str:
    """Tell what is left of a run that was interrupted."""
    try:
        begun = checkpoint.read(options.paths)
    except (QuiverError, OSError):
        begun = None
    if begun is None:
        return "interrupted before anything was written"
    done = f"{begun.place.num_lines:,} lines are done, in {options.paths.part}"
    return f"interrupted: {done}; run the same command again, and it goes on there"


def _check_paths(options: BulkOptions) -> None:
    if options.files.count(STDIN) > 1:
        raise ConfigError("standard input can be read only once")
    for file in options.files:
        if file != STDIN and options.output.exists() and file.samefile(options.output):
            raise ConfigError(f"{file} would be read and written: give another output")


def _begun(options: BulkOptions) -> Checkpoint | None:
    """Return where an earlier run was; None begins anew. Raises `Refused` where that would write over an output."""
    with naming(options.output):
        if options.overwrite:
            checkpoint.discard(options.paths)
        begun = checkpoint.read(options.paths)
        if begun is None and options.output.exists() and not options.overwrite:
            raise Refused(f"{options.output} is there already: give another output, or --overwrite")
    return begun


async def job_of(embedder: Embedder, options: BulkOptions, settings: Config, form: str) -> Job:
    """Find out by one text what the vectors are like, and whether all that is asked for is possible."""
    (probe,) = (await embedder.embed([PROBE])).rows
    digest = hashlib.blake2b(probe.astype("<f4").tobytes(), digest_size=16).hexdigest()
    return Job(
        output_form=form,
        model=embedder.model,
        vector=digest if embedder.is_exact else "",
        dimensions=len(probe),
        prompt_name=options.wanted.prompt_name,
        normalize=options.wanted.normalize,
        truncate=settings.engine.truncate,
        has_ids=options.columns.id is not None,
    )
