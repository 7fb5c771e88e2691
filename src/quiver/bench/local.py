"""The same model in this process: what a server is held against, and the tokenizer that measures texts."""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from quiver import app
from quiver.backends.sessions import cores
from quiver.bench.limit import Embed, Limits, ModelShape
from quiver.bench.workload import exact_texts
from quiver.config import CacheConfig, Config
from quiver.engine import tokenizer
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Found, resolve
from quiver.types import Caller, EmbedRequest

IDLE_TOKENS = (6, 20, 50)
IDLE_TEXTS = 64


def local_limits(settings: Config) -> Limits:
    """Return what to hold a server of these settings against, on its own machine."""
    shape = _found(settings).files.json("config.json")
    return Limits(
        ModelShape(shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]),
        cores=cores(),
        direct=lambda: _direct(settings),
    )


def idle_texts(settings: Config) -> Mapping[str, Sequence[str]]:
    """Return distinct texts of exact lengths, for the latency of a server that has nothing else to do."""
    found = _found(settings)
    encode = tokenizer.load(found.files.path("tokenizer.json"), found.spec).encode
    count = lambda text: len(encode([text], truncate=False)[0])  # noqa: E731  one line beside its only use
    return {f"{n} tokens": exact_texts(n, IDLE_TEXTS, count) for n in IDLE_TOKENS}


def _found(settings: Config) -> Found:
    name = settings.models.model[0]
    return resolve(name, Catalogue.load().find(name), settings.models, lambda *_: None)


@contextlib.asynccontextmanager
async def _direct(settings: Config) -> AsyncIterator[Embed]:
    settings = replace(settings, cache=CacheConfig(cache_entries=0))  # what is known costs nothing, and tells nothing
    async with app.build(settings).engine as engine:
        await engine.load(lambda *_: None)

        async def embed(texts: Sequence[str]) -> int:
            return (await engine.embed(EmbedRequest(inputs=texts), Caller("bench"))).usage.num_tokens

        yield embed
