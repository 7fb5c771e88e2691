"""Results that were computed before: their keys, both tiers, and what is in flight."""

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from fakes import hash_vector
from fault_proxy import FAULTS, Fault, FaultProxy
from quiver.engine import cache as caching
from quiver.engine.cache import Cache, Keys, Memory, Origin, load_secret
from quiver.errors import DeadlineExceeded, InferenceFailed
from quiver.remote import Remote
from quiver.types import Encoding, Floats
from stores import REDIS, added, redis_prefix

SECRET = b"secret"
KEYS = Keys(SECRET)
ORIGIN = Origin(scope="", model="m", revision="r", backend="onnx", dtype="float32", pooling="cls", kind="embed")

WORDS = st.text(max_size=4)
ORIGINS = st.builds(Origin, **{f.name: WORDS for f in fields(Origin)})
IDS = st.lists(st.integers(0, 3), max_size=4)


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    """Draw a short encoding of few ids, so that two are often alike."""
    ids = draw(IDS)
    types = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    flags = {name: draw(st.booleans()) for name in ("truncated", "per_token", "unscaled")}
    return Encoding(np.array(ids, np.int64), None if types is None else np.array(types, np.int64), **flags)


def value_of(encoding: Encoding) -> object:
    """Return an encoding as something that compares."""
    types = None if encoding.type_ids is None else tuple(encoding.type_ids)
    return (tuple(encoding.ids), types, encoding.truncated, encoding.per_token, encoding.unscaled)


def key_of(text: str, origin: Origin = ORIGIN) -> bytes:
    """Return the key of a text whose bytes are its ids."""
    return KEYS.of(origin, [Encoding(np.frombuffer(text.encode(), np.uint8).astype(np.int64))])[0]


def vector_of(text: str) -> Floats:
    """Return the result of a text."""
    return hash_vector(list(text.encode()))


@pytest.fixture
async def prefix() -> AsyncIterator[str]:
    """Name keys of this test's own in Redis."""
    async with redis_prefix() as prefix:
        yield prefix


@dataclass
class Work:
    """Computes results, notes for whom, and waits or fails when told to."""

    texts: Sequence[str]
    done: list[str] = field(default_factory=list)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.may_end.set()

    async def __call__(self, places: Sequence[int]) -> Sequence[Floats]:
        """Compute some of the texts."""
        self.begun.set()
        await self.may_end.wait()
        if self.error:
            raise self.error
        self.done += [self.texts[i] for i in places]
        return [vector_of(self.texts[i]) for i in places]

    @property
    def keys(self) -> list[bytes]:
        """The keys of the texts."""
        return [key_of(text) for text in self.texts]


def memory_cache(**bounds: int) -> Cache:
    """Make a cache without Redis."""
    return Cache(KEYS, Memory(**bounds))


def assert_right(results: Sequence[Floats], texts: Sequence[str]) -> None:
    """Hold each result against its text, bit for bit."""
    assert len(results) == len(texts)
    for result, text in zip(results, texts, strict=True):
        assert np.array_equal(result, vector_of(text))


# Keys and values


@given(ORIGINS, ORIGINS, encodings(), encodings())
def test_keys_are_alike_only_where_everything_is(one, other, first, second):
    """Two inputs have one key if all their fields are equal, and another if any differs."""
    alike = one == other and value_of(first) == value_of(second)
    assert (KEYS.of(one, [first]) == KEYS.of(other, [second])) == alike


@given(ORIGINS, encodings(), st.data())
def test_changing_any_field_changes_the_key(origin, encoding, data):
    """Scope, model, revision, backend, dtype, pooling, kind, prompt, ids, types, truncation, form: each counts."""
    (key,) = KEYS.of(origin, [encoding])
    for f in fields(Origin):
        other = data.draw(WORDS.filter(lambda word, f=f: word != getattr(origin, f.name)))
        assert KEYS.of(replace(origin, **{f.name: other}), [encoding]) != [key]
    for name in ("truncated", "per_token", "unscaled"):
        assert KEYS.of(origin, [replace(encoding, **{name: not getattr(encoding, name)})]) != [key]
    types = encoding.type_ids
    changed = [
        replace(encoding, ids=np.append(encoding.ids, 0), type_ids=None if types is None else np.append(types, 0)),
        replace(encoding, type_ids=np.zeros_like(encoding.ids) if types is None else None),
    ]
    if len(encoding):
        changed.append(replace(encoding, ids=encoding.ids + 1))
    if types is not None and len(types):
        changed.append(replace(encoding, type_ids=1 - types))
    assert all(KEYS.of(origin, [other]) != [key] for other in changed)


def test_every_field_of_an_encoding_is_in_the_key():
    """A new one must be thought of: it could change a result."""
    assert {f.name for f in fields(Encoding)} == {"ids", "type_ids", "truncated", "per_token", "unscaled"}


def test_a_field_does_not_run_into_the_next():
    """Letters that move from one to the other change the key."""
    ends = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")]
    made = {key_of("x", replace(ORIGIN, model=model, revision=revision)) for model, revision in ends}
    assert len(made) == len(ends)


def test_another_secret_makes_other_keys():
    """Who does not know it can neither tell nor plant what a text's key is."""
    assert Keys(b"other").of(ORIGIN, [Encoding(np.arange(3))]) != KEYS.of(ORIGIN, [Encoding(np.arange(3))])


@pytest.mark.parametrize("shape", [(), (1,), (384,), (0, 8), (7, 8)])
def test_a_value_gives_back_its_bits(shape):
    """A vector, weights, or a vector for each token: shape and bits are those that were put in."""
    result = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    back = KEYS.unpack(key_of("a"), KEYS.pack(key_of("a"), result))
    assert back.shape == shape
    assert np.array_equal(back, result)


def test_a_damaged_value_is_a_miss():
    """Any byte that differs, any end that is missing, another's value, or noise."""
    key, result = key_of("a"), vector_of("a")
    value = KEYS.pack(key, result)
    damaged = [value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :] for i in range(len(value))]
    cut = [value[:i] for i in range(len(value))]
    assert all(KEYS.unpack(key, bad) is None for bad in [*damaged, *cut, value + b"\0", b"", None])
    assert KEYS.unpack(key_of("b"), value) is None
    assert KEYS.unpack(key, Keys(b"other").pack(key, result)) is None


def test_a_secret_is_made_once(tmp_path):
    """Servers of one data directory have the same; nobody else can read it."""
    path = tmp_path / "below" / "cache.secret"
    secrets = {load_secret(path) for _ in range(3)}
    assert len(secrets) == 1
    assert len(secrets.pop()) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


# Memory


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 9)), max_size=60),
    st.integers(0, 4),
    st.integers(0, 80),
)
def test_memory_is_the_model(steps, max_entries, max_bytes):
    """It holds what was used last, within both bounds, and counts its bytes right."""
    memory, model = Memory(max_entries=max_entries, max_bytes=max_bytes), []
    for is_put, name, size in steps:
        key = b"%d" % name
        held = next((entry for entry in model if entry[0] == key), None)
        if is_put and 4 * size <= max_bytes and max_entries:
            model = [entry for entry in model if entry is not held] + [(key, size)]
            while len(model) > max_entries or sum(4 * n for _, n in model) > max_bytes:
                model.pop(0)
        elif not is_put and held:
            model = [entry for entry in model if entry is not held] + [held]
        if is_put:
            memory.put(key, np.ones(size, np.float32))
        else:
            result = memory.get(key)
            assert (None if result is None else len(result)) == (held[1] if held else None)
        assert (len(memory), memory.num_bytes) == (len(model), sum(4 * n for _, n in model))


def test_what_is_kept_is_nobody_s_to_change():
    """A row is copied out of its batch, which it would hold in memory, and cannot be written to."""
    batch, memory = np.ones((4, 8), np.float32), Memory()
    kept = memory.put(b"a", batch[1])
    batch[:] = 7
    assert kept.base is None
    assert np.array_equal(memory.get(b"a"), np.ones(8, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2


# In flight


async def test_a_text_is_computed_once():
    """The second time it comes from memory, bit for bit, and is said to."""
    cache, work = memory_cache(), Work(["a", "b"])
    first = await cache.look_up(work.keys, work)
    again = Work(["b", "c", "a"])
    second = await cache.look_up(again.keys, again)
    assert_right(first.results, work.texts)
    assert_right(second.results, again.texts)
    assert (first.cached, second.cached) == ([False, False], [True, False, True])
    assert again.done == ["c"]
    assert (cache.counts.memory_hits, cache.counts.misses) == (2, 3)


async def test_a_text_that_stands_twice_is_computed_once():
    """Within one request, too."""
    cache, work = memory_cache(), Work(["a", "b", "a", "a"])
    found = await cache.look_up(work.keys, work)
    assert_right(found.results, work.texts)
    assert work.done == ["a", "b"]
    assert not any(found.cached)


@pytest.mark.parametrize("max_entries", [0, 10])
async def test_identical_texts_in_flight_are_computed_once(max_entries):
    """Of many requests at one time one computes, whether or not there is memory for the result."""
    cache, work = memory_cache(max_entries=max_entries), Work(["a", "b"])
    work.may_end.clear()
    waiting = [asyncio.create_task(cache.look_up(work.keys, work)) for _ in range(50)]
    await work.begun.wait()
    work.may_end.set()
    for found in await asyncio.gather(*waiting):
        assert_right(found.results, work.texts)
    assert work.done == ["a", "b"]
    assert cache.counts.joined == 98


async def test_who_joins_survives_the_one_who_computes():
    """If that one fails or goes away, the others compute for themselves, and only its own error is its own."""
    cache, fails, goes, joins = memory_cache(), Work(["a"]), Work(["b"]), Work(["a", "b"])
    for work in (fails, goes):
        work.may_end.clear()
    fails.error = InferenceFailed("not this one")
    failing, going = (asyncio.create_task(cache.look_up(work.keys, work)) for work in (fails, goes))
    await asyncio.gather(fails.begun.wait(), goes.begun.wait())
    joining = [asyncio.create_task(cache.look_up(joins.keys, joins)) for _ in range(3)]
    await asyncio.sleep(0)
    going.cancel()
    fails.may_end.set()
    with pytest.raises(InferenceFailed):
        await failing
    for found in await asyncio.gather(*joining):
        assert_right(found.results, joins.texts)
    assert sorted(joins.done) == ["a", "b"]
    assert not cache._flights


async def test_who_joins_may_go_alone():
    """A client that gives up takes neither the computation nor the others along."""
    cache, work = memory_cache(), Work(["a"])
    work.may_end.clear()
    computing, staying, going = (asyncio.create_task(cache.look_up(work.keys, work)) for _ in range(3))
    await work.begun.wait()
    going.cancel()
    await asyncio.sleep(0)
    work.may_end.set()
    for task in (computing, staying):
        assert_right((await task).results, ["a"])


async def test_two_who_need_each_other_s_texts_both_end():
    """Each computes its own before it waits for the other's."""
    cache, one, other = memory_cache(), Work(["a", "b"]), Work(["b", "a"])
    first = Work(["a"])
    first.may_end.clear()
    holding = asyncio.create_task(cache.look_up(first.keys, first))
    await first.begun.wait()
    both = [asyncio.create_task(cache.look_up(work.keys, work)) for work in (one, other)]
    await asyncio.sleep(0)
    first.may_end.set()
    async with asyncio.timeout(5):
        for found, work in zip(await asyncio.gather(*both), (one, other), strict=True):
            assert_right(found.results, work.texts)
        await holding


async def test_the_urgent_do_not_wait_for_the_patient():
    """A query computes its text itself where only a bulk job is about to; another bulk job joins that one."""
    cache, bulk, query = memory_cache(), Work(["a"]), Work(["a"])
    bulk.may_end.clear()
    waiting = [asyncio.create_task(cache.look_up(bulk.keys, bulk, urgent=False)) for _ in range(2)]
    await bulk.begun.wait()
    assert_right((await cache.look_up(query.keys, query)).results, ["a"])
    bulk.may_end.set()
    for found in await asyncio.gather(*waiting):
        assert_right(found.results, ["a"])
    assert (query.done, bulk.done) == (["a"], ["a"])


async def test_who_joins_waits_no_longer_than_it_may():
    """Its own patience counts, not that of the one who computes."""
    cache, work = memory_cache(), Work(["a"])
    work.may_end.clear()
    computing = asyncio.create_task(cache.look_up(work.keys, work))
    await work.begun.wait()
    with pytest.raises(DeadlineExceeded):
        await cache.look_up(work.keys, work, timeout_seconds=0.05)
    work.may_end.set()
    assert_right((await computing).results, ["a"])


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5), min_size=1, max_size=12), st.data())
def test_whatever_happens_every_result_is_its_text_s(requests, data):
    """Requests that share texts, some cancelled and some failing, in a cache too small: no result is another's."""
    doom = [data.draw(st.sampled_from(["", "", "cancel", "fail"])) for _ in requests]

    async def check() -> None:
        cache = memory_cache(max_entries=3)
        works = [
            Work(texts, error=InferenceFailed("") if d == "fail" else None)
            for texts, d in zip(requests, doom, strict=True)
        ]
        tasks = [
            asyncio.create_task(cache.look_up(work.keys, work, urgent=bool(i % 3))) for i, work in enumerate(works)
        ]
        await asyncio.sleep(0)
        for task, d in zip(tasks, doom, strict=True):
            if d == "cancel":
                task.cancel()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome, work, d in zip(outcomes, works, doom, strict=True):
            if not isinstance(outcome, BaseException):
                assert_right(outcome.results, work.texts)
            assert d or not isinstance(outcome, BaseException)
        assert not cache._flights

    asyncio.run(check())


# Redis


async def test_servers_share_results(prefix):
    """What one computed the other finds, bit for bit, and keeps in its own memory; it is gone after a day."""
    work, nothing = Work(["a", "b"]), Work(["a", "b"])
    async with Remote(REDIS, call_seconds=1.0) as one, Remote(REDIS, call_seconds=1.0) as other:
        async with Cache(KEYS, Memory(), one, prefix=prefix) as cache:
            await cache.look_up(work.keys, work)
        async with Cache(KEYS, Memory(), other, prefix=prefix) as cache:
            for _ in range(2):
                found = await cache.look_up(nothing.keys, nothing)
                assert_right(found.results, work.texts)
                assert found.cached == [True, True]
            assert (cache.counts.remote_hits, cache.counts.memory_hits, nothing.done) == (2, 2, [])
        names = await one.call(lambda client: client.keys(f"{prefix}*"))
        left = [await one.call(lambda client, name=name: client.ttl(name)) for name in names]
    assert len(left) == 2
    assert all(caching.TTL_SECONDS - 60 < seconds <= caching.TTL_SECONDS for seconds in left)
    assert not any(name[-1:] == b"a" and len(name) < 40 for name in names)


@pytest.mark.parametrize(
    "spoil", [lambda _: b"", lambda _: b"noise" * 99, lambda v: v[:-1], lambda v: v[:40] + b"\xff" + v[41:]]
)
async def test_a_spoilt_value_is_computed_again_and_replaced(prefix, spoil: Callable[[bytes], bytes]):
    """It is never served, it is counted, and the next server finds a good one."""
    work, again = Work(["a"]), Work(["a"])
    async with Remote(REDIS, call_seconds=1.0) as shared:
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            await cache.look_up(work.keys, work)
        (name,) = await shared.call(lambda client: client.keys(f"{prefix}*"))
        good = await shared.call(lambda client: client.get(name))
        await shared.call(lambda client: client.set(name, spoil(good)))
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            assert_right((await cache.look_up(again.keys, again)).results, ["a"])
            assert (again.done, cache.counts.damaged) == (["a"], 1)
        assert await shared.call(lambda client: client.get(name)) == good


async def test_a_value_moved_under_another_key_is_a_miss(prefix):
    """Who can write to Redis cannot give one text the vector of another."""
    work, again = Work(["a", "b"]), Work(["a", "b"])
    async with Remote(REDIS, call_seconds=1.0) as shared:
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            await cache.look_up(work.keys, work)
        one, other = await shared.call(lambda client: client.keys(f"{prefix}*"))
        values = await shared.call(lambda client: client.mget([one, other]))
        await shared.call(lambda client: client.mset({one: values[1], other: values[0]}))
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            assert_right((await cache.look_up(again.keys, again)).results, work.texts)
        assert sorted(again.done) == ["a", "b"]


async def test_a_big_request_reads_and_writes_in_parts(prefix):
    """Thousands of texts go to Redis and come back."""
    work, again = Work([f"text {i}" for i in range(1500)]), Work([f"text {i}" for i in range(1500)])
    async with Remote(REDIS, call_seconds=1.0) as shared:
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            await cache.look_up(work.keys, work)
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            assert_right((await cache.look_up(again.keys, again)).results, work.texts)
            assert cache.counts.remote_hits + len(again.done) == 1500
            assert cache.counts.remote_hits >= caching._TOGETHER


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_redis_stops_no_request(fault, prefix):
    """Whatever is wrong with it every result is right, few requests feel it, and it is used again once it is well."""
    url = make_url(REDIS)
    async with FaultProxy(url.host, url.port or 6379) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with Remote(through) as shared, Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            await shared.warm_up()
            before = [await computed(cache, f"before {i}") for i in range(600)]
            await proxy.break_down(fault)
            during = [await computed(cache, f"during {i}") for i in range(600)]
            assert added(before, during) < 0.025
            assert shared.is_down
            await proxy.break_down(Fault.NONE)
            await back_in_use(cache, shared)
            assert cache.counts.damaged == 0


async def computed(cache: Cache, text: str) -> float:
    """Look up a text that is nowhere; returns the seconds that it took."""
    start, work = time.perf_counter(), Work([text])
    assert_right((await cache.look_up(work.keys, work)).results, [text])
    return time.perf_counter() - start


async def back_in_use(cache: Cache, shared: Remote) -> None:
    """Look up texts until Redis has the last one."""
    async with asyncio.timeout(10):
        for i in itertools.count():
            await computed(cache, f"after {i}")
            await asyncio.sleep(0.05)
            if not shared.is_down and await cache._read([key_of(f"after {i}")], [0]):
                return


async def test_cancelled_requests_mix_nothing_up(prefix):
    """Requests that go away in the middle of a reply leave none to the next one on the same connection."""
    texts = [f"text {i}" for i in range(40)]
    async with Remote(REDIS, call_seconds=1.0) as shared:
        async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
            work = Work(texts)
            await cache.look_up(work.keys, work)
        for round_ in range(40):
            async with Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
                works = [Work(texts[i : i + 5]) for i in range(0, 40, 5)]
                tasks = [asyncio.create_task(cache.look_up(work.keys, work)) for work in works]
                for _ in range(round_ % 12):
                    await asyncio.sleep(0)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for task, work in list(zip(tasks, works, strict=True))[1::2]:
                    assert_right(task.result().results, work.texts)
                assert cache.counts.damaged == 0


async def test_hits_are_fast(prefix):
    """A text costs at most 0.05 ms from memory and 0.8 ms from Redis beside us, key included."""
    work = Work(["how to reset a password"])
    encoding = [Encoding(np.arange(12))]
    async with Remote(REDIS) as shared, Cache(KEYS, Memory(), shared, prefix=prefix) as cache:
        await shared.warm_up()

        async def look_up() -> float:
            start = time.perf_counter()
            await cache.look_up(KEYS.of(ORIGIN, encoding), work)
            return time.perf_counter() - start

        await look_up()
        memory = [await look_up() for _ in range(500)]
        await cache._writer
        redis = []
        for _ in range(300):
            cache.memory = Memory()
            redis.append(await look_up())
    assert cache.counts.remote_hits >= 290
    assert statistics.median(memory) < 0.05e-3
    assert statistics.median(redis) < 0.8e-3
