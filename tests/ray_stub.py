"""What a cluster's processes load in the place of a model: the hash backend, in one that is as slow as it is told."""

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from fakes import HashBackend, fake_model
from quiver import app
from quiver.app import App
from quiver.bulk.embedders import Embedder, on_engine
from quiver.bulk.lines import Wanted
from quiver.config import CacheConfig, Config
from quiver.engine.model import WarmUp
from quiver.types import PackedBatch

MODEL = "test/hash"
SECONDS_PER_TOKEN = 5e-5


def slowly(batch: PackedBatch) -> None:
    """Take a model's time."""
    time.sleep(SECONDS_PER_TOKEN * len(batch.ids))


async def load_hash(parts: App) -> None:
    """Serve the hash model under the name that is configured."""
    name = parts.config.models.model[0]
    model = fake_model(HashBackend(lanes=1, batch_tokens=512, before=slowly))
    model = replace(model, spec=replace(model.spec, id=name, aliases=()))
    parts.engine.replicas.add(name, model, WarmUp(tokens_per_second=1 / SECONDS_PER_TOKEN))


@contextlib.asynccontextmanager
async def open_hash(config: Config, wanted: Wanted) -> AsyncIterator[Embedder]:
    """Compute with the hash model, as fast as it is."""
    parts = app.build(replace(config, cache=CacheConfig(cache_entries=0)))
    async with parts.engine:
        parts.engine.replicas.add(MODEL, fake_model(HashBackend(lanes=1, batch_tokens=4096)), WarmUp())
        yield on_engine(parts.engine, MODEL, wanted, batch_tokens=4096)
