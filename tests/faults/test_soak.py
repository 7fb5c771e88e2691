"""A server that has run for long holds no more than one that has just begun; `make soak` looks for longer."""

import asyncio

import numpy as np
import psutil
import pytest

from faults.load import Pool, embed, get
from faults.servers import STUB, importable, stub
from faults.soaking import Samples, random_load, theil_sen, watch
from quiver.bench.workload import Workload
from server_process import serving

MAX_GROWTH = 0.02
CLIENTS = 8
SPARE = 6
"""How many a pool of threads that starts them as they are needed may still bring, or tasks that happen to be at work."""
TEXTS = Workload(size=400).texts
SHORT = tuple(text[:80] for text in TEXTS)


async def soaked(server, texts, *, warm, seconds, every):
    """Load a server for a while and watch it; returns samples and statuses."""
    async with Pool(server.ready_url()) as pool:
        await random_load(pool, texts, clients=CLIENTS, seconds=warm)
        process = psutil.Process(server.process.pid)
        load = random_load(pool, texts, clients=CLIENTS, seconds=seconds, seed=1)
        return await asyncio.gather(watch(process, pool, every=every, seconds=seconds), load)


def assert_flat(samples, *, growth):
    """Check that memory does not grow, and that nothing else is held for good."""
    assert samples.growth < growth, f"RSS grows by {samples.growth:.1%}"
    third = len(samples.rss) // 3
    for held in (samples.threads, samples.descriptors, samples.tasks):
        assert max(held[-third:]) <= max(held[:third]) + SPARE


@pytest.mark.faults
async def test_memory_stays_where_it_is(capsys):
    """After a minute of random shapes, the default model's server grows no more, in bytes, threads or descriptors."""
    with serving() as server:
        samples, statuses = await soaked(server, TEXTS, warm=20, seconds=70, every=0.5)
    with capsys.disabled():
        print(f" (RSS {samples.rss[-1] / 1e6:.0f} MB, {samples.growth:+.2%}; {statuses}) ", end="")  # noqa: T201
    assert set(statuses) <= {200, 404}
    assert_flat(samples, growth=MAX_GROWTH)


async def test_the_stub_s_memory_stays_where_it_is():
    """Nothing between the socket and the lane keeps what it has answered."""
    with stub() as server:
        samples, _ = await soaked(server, SHORT, warm=3, seconds=6, every=0.1)
    assert_flat(samples, growth=2 * MAX_GROWTH)


async def test_a_leak_is_found_out():
    """Negative control: a model that keeps 40 kB of each batch fails, as do threads or descriptors that stay."""
    with stub(behave={"leak_bytes": 40_000}) as server:
        samples, _ = await soaked(server, SHORT, warm=2, seconds=5, every=0.1)
    with pytest.raises(AssertionError, match="RSS grows"):
        assert_flat(samples, growth=2 * MAX_GROWTH)
    steady = [100] * 30
    rising, times = list(range(30)), [float(i) for i in range(30)]
    for held in ((rising, steady, steady), (steady, rising, steady), (steady, steady, rising)):
        with pytest.raises(AssertionError):
            assert_flat(Samples(times, steady, *held), growth=MAX_GROWTH)


def test_the_slope_is_robust():
    """A burst in the middle is no growth, and a steady rise is seen exactly."""
    x = np.arange(60.0)
    assert theil_sen(x, 3 * x + 5) == pytest.approx(3)
    y = np.full(60, 7.0)
    y[20:25] = 1000
    assert theil_sen(x, y) == 0


# Few descriptors


async def test_a_server_out_of_descriptors_serves_on():
    """With more connections than it may hold, those that it holds are served, it does not spin, and it recovers."""
    limited = ("bash", "-c", 'ulimit -n 80; exec "$@"', "stub", *STUB)
    with serving(command=limited, PYTHONPATH=importable()) as server:
        url, process = server.ready_url(), psutil.Process(server.process.pid)
        async with Pool(url) as pool:
            first = await pool.open()
            crowd = [await pool.open() for _ in range(150)]
            await asyncio.sleep(0.3)
            back = asyncio.get_running_loop().create_future()
            first.send(embed(["held"]), back.set_result)
            assert (await asyncio.wait_for(back, 5)).status == 200
            before = sum(process.cpu_times()[:2])
            await asyncio.sleep(1.0)
            assert sum(process.cpu_times()[:2]) - before < 0.5, "it spins"
            for line in crowd:
                line.cut(reset=True)
            await asyncio.sleep(1.5)
        async with Pool(url) as pool:
            assert (await pool.ask(embed(["after"]), patience=5)).status == 200
            assert (await pool.ask(get("/health/ready"))).status == 200
