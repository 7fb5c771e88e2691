"""Watching a process for growth: what it holds every few seconds, and the slope of that, robust against outliers."""

import asyncio
import re
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

from faults.load import Pool, embed, get


@dataclass(slots=True)
class Samples:
    """What a process held, by time."""

    seconds: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)

    def take(self, process: psutil.Process, start: float, tasks: int) -> None:
        """Look at the process now; it tells its tasks itself."""
        self.tasks.append(tasks)
        with process.oneshot():
            self.seconds.append(time.perf_counter() - start)
            self.rss.append(process.memory_info().rss)
            self.descriptors.append(process.num_fds())
            self.threads.append(process.num_threads())

    @property
    def growth(self) -> float:
        """How much RSS grows over the last two thirds, as a share of its median there."""
        first = len(self.rss) // 3
        seconds, rss = np.array(self.seconds[first:]), np.array(self.rss[first:], float)  # (N,)
        return theil_sen(seconds, rss) * float(seconds[-1] - seconds[0]) / float(np.median(rss))


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """Return the median slope between all pairs of points: a few outliers do not move it."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


async def watch(
    process: psutil.Process, pool: Pool, *, every: float, seconds: float, samples: Samples | None = None
) -> Samples:
    """Take samples for a while."""
    samples, start = samples or Samples(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        metrics = (await pool.ask(get("/metrics"), patience=60)).body.decode()
        found = re.search(r"^quiver_loop_tasks (\d+)", metrics, re.MULTILINE)
        assert found, "the server does not tell its tasks"
        samples.take(process, start, int(found[1]))
        await asyncio.sleep(every)
    return samples


async def random_load(
    pool: Pool, texts: tuple[str, ...], *, clients: int, seconds: float, seed: int = 0
) -> dict[int, int]:
    """Ask in all shapes until the time is up: batches of 1 to 64, both forms, and now and then something wrong.

    Returns how many had each status.
    """
    rng, counts, end = np.random.default_rng(seed), dict[int, int](), time.perf_counter() + seconds

    def request() -> bytes:
        chance = rng.random()
        if chance < 0.02:
            return embed([""], model="nobody/knows")
        if chance < 0.05:
            return get("/metrics")
        count = int(rng.choice([1, 1, 1, 2, 8, rng.integers(1, 65)]))
        form = str(rng.choice(["float", "base64"]))
        return embed([texts[i] for i in rng.integers(0, len(texts), count)], encoding_format=form)

    async def client() -> None:
        while time.perf_counter() < end:
            answer = await pool.ask(request(), patience=60)
            counts[answer.status] = counts.get(answer.status, 0) + 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return counts
