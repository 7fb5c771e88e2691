"""Work that nobody waits for any more is not done, and leaves nothing behind."""

import asyncio
import random
import time

import numpy as np
import psutil
import pytest

from faults.load import Pool, embed
from faults.servers import descriptors, stub, waiting_tokens
from faults.stub import ids_of, vector_of

EMPTY_SECONDS = 1.0
SLOW = {"seconds_per_token": 0.0005}
"""Half a millisecond a token: what the clients below ask for takes a minute."""


async def storm(pool, *, clients, share, seed, size=4):
    """Send requests, and cut a share of them off at random times; returns the answers of the others with their texts."""
    rng = random.Random(seed)  # noqa: S311  repeatable on purpose

    async def client(number):
        line = await pool.open()
        texts = [f"{seed} {number} {i} " + "x" * rng.randint(1, 60) for i in range(size)]
        back = asyncio.get_running_loop().create_future()
        line.send(embed(texts), lambda answer: back.done() or back.set_result(answer))
        if rng.random() < share:
            await asyncio.wait({back}, timeout=rng.uniform(0, 0.5))
            line.cut(reset=rng.random() < 0.5)
            await back
            return None
        answer = await asyncio.wait_for(back, 60)
        line.cut()
        return texts, answer

    return [got for got in await asyncio.gather(*(client(number) for number in range(clients))) if got]


async def seconds_until_empty(pool, *, within_seconds):
    """Return after how long nothing waits for a lane any more."""
    start = time.perf_counter()
    while (left := await waiting_tokens(pool)) > 0:
        seconds = time.perf_counter() - start
        assert seconds < within_seconds, f"{left} tokens still wait after {seconds:.1f} s"
        await asyncio.sleep(0.02)
    return time.perf_counter() - start


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.faults)])
async def test_half_of_the_clients_leave(rounds):
    """Those who stay get their own vectors, the queue is empty a second after the last of them, and no descriptor is left."""
    with stub() as server:
        async with Pool(server.ready_url()) as pool:
            assert await waiting_tokens(pool) == 0
            before = descriptors(server)
            for seed in range(rounds):
                stayed = await storm(pool, clients=200, share=0.5, seed=seed)
                await seconds_until_empty(pool, within_seconds=EMPTY_SECONDS)
                assert len(stayed) > 60
                for texts, answer in stayed:
                    assert answer.status == 200
                    right = [vector_of("stub/a", ids) for ids in ids_of(texts)]
                    assert np.array_equal([np.float32(item["embedding"]) for item in answer.json()["data"]], right)
            await asyncio.sleep(0.2)
            assert descriptors(server) <= before + 2


async def test_everyone_leaves():
    """A minute of waiting work whose clients have all gone is dropped within a second, and the next client is served."""
    with stub(behave=SLOW, max_wait_seconds=600) as server:
        async with Pool(server.ready_url()) as pool:
            process = psutil.Process(server.process.pid)
            await storm(pool, clients=200, share=1.0, seed=0, size=12)
            seconds = await seconds_until_empty(pool, within_seconds=EMPTY_SECONDS)
            assert seconds < EMPTY_SECONDS
            answer = await pool.ask(embed(["next"]))
            assert answer.status == 200
            assert answer.seconds < EMPTY_SECONDS
            assert process.num_threads() < 40


async def test_work_that_is_still_wanted_is_seen_to_wait():
    """Negative control: with nobody gone, the same load does not vanish, and the detector says so."""
    with stub(behave=SLOW, max_wait_seconds=600) as server:
        async with Pool(server.ready_url()) as pool:
            staying = asyncio.create_task(storm(pool, clients=100, share=0.0, seed=0, size=12))
            await asyncio.sleep(0.5)
            with pytest.raises(AssertionError, match="still wait"):
                await seconds_until_empty(pool, within_seconds=EMPTY_SECONDS)
            staying.cancel()
            await asyncio.wait({staying})
