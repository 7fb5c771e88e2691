"""Who computes: the engine in this process, or a server."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from quiver import app
from quiver.backends.sessions import cores
from quiver.bulk.lines import Vectors, Wanted
from quiver.bulk.pipeline import Embed
from quiver.bulk.remote import Server
from quiver.config import CacheConfig, Config
from quiver.engine.verbs import Verbs
from quiver.errors import ConfigError
from quiver.models.hub import Progress
from quiver.types import Caller, Priority

MIN_FLIGHTS = 4
CHUNK_TOKENS = 2000
"""Of a chunk of short texts."""
BATCHES = 4
"""That so many are on their way keeps a graphics card busy, whose batches are larger than a chunk."""
SERVER_FLIGHTS = 8
PROBE = "quiver"
"""A text that is embedded before all others: it shows whether everything that is asked for is possible, and what comes
of it."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """Something that computes, and how much of it at once."""

    model: str
    embed: Embed
    max_flights: int
    is_exact: bool
    """Whether a text's vector has the same bits in each run."""


@asynccontextmanager
async def in_process(settings: Config, wanted: Wanted, progress: Progress) -> AsyncIterator[Embedder]:
    """Load the model and compute here. Raises what loading raises."""
    engine = app.build(_unbounded(settings)).engine
    async with engine:
        await engine.load(progress)
        status = engine.replicas.statuses[0]
        yield on_engine(engine, settings.models.model[0], wanted, batch_tokens=status.batch_tokens)


def on_engine(engine: Verbs, model: str, wanted: Wanted, *, batch_tokens: int = 0) -> Embedder:
    """Compute with an engine whose models are loaded: in the bulk lane, with so many chunks that no lane waits."""
    caller = Caller("bulk")

    async def embed(texts: Sequence[str]) -> Vectors:
        embeddings = await engine.embed(wanted.request(texts, Priority.BULK), caller)
        return Vectors(embeddings.vectors, embeddings.usage.num_tokens)

    flights = max(MIN_FLIGHTS, 2 * cores(), BATCHES * batch_tokens // CHUNK_TOKENS)
    return Embedder(model, embed, flights, is_exact=True)


def _unbounded(settings: Config) -> Config:
    """Nobody else is here to be protected, and what comes twice the window finds."""
    engine = replace(
        settings.engine,
        max_waiting_tokens=sys.maxsize,
        max_waiting_inputs=0,
        max_wait_seconds=0.0,
        max_client_batch_size=max(settings.engine.max_client_batch_size, 2048),
    )
    return replace(settings, engine=engine, cache=CacheConfig(cache_entries=0))


@asynccontextmanager
async def at_server(settings: Config, wanted: Wanted, url: str, max_flights: int) -> AsyncIterator[Embedder]:
    """Let a server compute. Raises `ConfigError`."""
    if wanted.normalize is not None:
        raise ConfigError("--normalize is for the engine in this process: with --url the server decides")
    model = settings.models.model[0]
    body: dict[str, object] = {"model": model, "encoding_format": "base64"}
    body |= {"dimensions": wanted.dimensions} if wanted.dimensions is not None else {}
    body |= {"prompt_name": wanted.prompt_name} if wanted.prompt_name is not None else {}
    body |= {"truncate": True} if settings.engine.truncate else {}
    with Server(url, settings.server.api_key.reveal(), body, max_flights) as server:
        yield Embedder(model, server.embed, max_flights, is_exact=False)
