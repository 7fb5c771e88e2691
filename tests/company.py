"""The same inputs alone and in any company: are the vectors the same, bit by bit?"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quiver.engine.model import Model
from quiver.engine.packing import Budget
from quiver.engine.scheduler import Bounds, Scheduler
from quiver.engine.waiting import Capacity
from quiver.engine.watchdog import Watchdog
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Encoding, Priority

CLIENTS = 32


def alone(model: Model, encodings: Sequence[Encoding]) -> np.ndarray:
    """Compute each input in a forward pass of its own; (B, H)."""
    with ThreadPoolExecutor(model.backend.lanes) as lanes:
        return np.concatenate(list(lanes.map(lambda encoding: model.compute([encoding]), encodings)))


async def in_company(model: Model, encodings: Sequence[Encoding], *, seed: int) -> np.ndarray:
    """Compute inputs through a scheduler, asked for by 32 callers at once in random order and portions; (B, H)."""
    scheduler = Scheduler(
        "test",
        model.compute,
        Bounds(Budget(model.backend.batch_tokens), model.backend.lanes, Capacity(10_000_000)),
        observer=Observer(),
        watchdog=Watchdog(stall_seconds=60),
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(encodings))
    vectors = np.empty((len(encodings), model.spec.dimensions), np.float32)

    async def client(number: int) -> None:
        mine = order[number::CLIENTS]
        while len(mine):
            portion, mine = np.split(mine, [rng.integers(1, 9)])
            vectors[portion] = await scheduler.submit(
                [encodings[i] for i in portion],
                caller=Caller(f"client {number}"),
                priority=Priority.INTERACTIVE,
            )

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    await asyncio.to_thread(scheduler.close)
    return vectors


async def are_bit_identical(model: Model, lengths: Sequence[int], *, seed: int) -> bool:
    """Compute random tokens of these lengths alone and among 32 callers' others, and compare all bits."""
    rng = np.random.default_rng(seed)
    encodings = [Encoding(rng.integers(0, model.backend.vocab_size, length)) for length in lengths]
    lone = await asyncio.to_thread(alone, model, encodings)
    return np.array_equal(await in_company(model, encodings, seed=seed + 1), lone)
