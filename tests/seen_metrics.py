"""What a server's metrics say, as tests ask for it."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx

from conftest import assembled
from quiver.api.server import HttpServer
from quiver.app import App
from quiver.engine.model import Model


@contextlib.asynccontextmanager
async def served(model: Model | None = None, **sections: Any) -> AsyncIterator[tuple[App, httpx.AsyncClient]]:
    """Run a server with one model; yields its parts and a client."""
    async with assembled(model, **sections) as parts:
        config = replace(parts.config.server, port=0, drain_seconds=2.0, drain_delay_seconds=0)
        server = HttpServer(parts.main, config, parts.config.tls)
        running = asyncio.create_task(server.run_until_stopped())
        try:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                yield parts, http
        finally:
            server.stop()
            await running


SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="(.*?)"')


@dataclass(frozen=True)
class Sample:
    """One line: a name, labels and a number."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples_of(text: str) -> list[Sample]:
    """Read every sample of an exposition as it stands; the client library's own reader renames counters."""
    return [Sample(name, dict(LABEL.findall(labels)), float(value)) for name, labels, value in SAMPLE.findall(text)]


def number(text: str, name: str, labels: Mapping[str, str] | None = None) -> float:
    """Return the sum of a metric's samples, all or those with some labels; there must be one."""
    wanted = (labels or {}).items()
    found = [s.value for s in samples_of(text) if s.name == name and wanted <= s.labels.items()]
    assert found, f"{name} {labels} is not shown"
    return sum(found)
