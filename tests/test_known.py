"""A server that has seen a text before: the same bits, no forward pass, and nobody else's business."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from conftest import assembled
from fakes import HashBackend, LogitBackend, TokenBackend, fake_model, hash_model
from quiver.accounts import ApiKey, Tier, User
from quiver.api.call import Call
from quiver.bench.workload import Workload
from quiver.config import CacheConfig, Secret
from quiver.engine.model import WarmUp
from quiver.types import Caller, ClassifyRequest, EmbedRequest, Priority, RerankRequest
from stores import REDIS, redis_prefix

CACHE = CacheConfig()
ME = Caller("me")


def counting(**facts):
    """Return a model and a list of the number of inputs in each of its forward passes."""
    passes = []
    backend = HashBackend(before=lambda batch: passes.append(len(batch.lengths)))
    return (fake_model(backend, **facts), passes)


def holder(user_id):
    """Return someone with a key of one user."""
    user = User(user_id, f"{user_id}@a.example", Tier("free"))
    return Caller(f"k{user_id}", key=ApiKey(id=f"k{user_id}", prefix="qv", hash="", user=user))


async def embed(parts, *texts, caller=ME, **options):
    """Embed texts."""
    return await parts.engine.embed(EmbedRequest(inputs=texts, **options), caller)  # nothing is counted here


async def test_what_is_known_is_computed_once(parts_with_cache):
    """A second request costs no forward pass, has the same bits, and says what was known."""
    parts, passes = parts_with_cache
    first = await embed(parts, "a", "b")
    again = await embed(parts, "b", "c", "a")
    assert (first.usage.cached, again.usage.cached) == ((), (0, 2))
    assert sum(passes) == 3
    np.testing.assert_array_equal(again.vectors[[2, 0]], first.vectors)
    assert again.usage.num_tokens == 3


@pytest.fixture
async def parts_with_cache():
    """Return a server's parts around a model that counts, and its counts."""
    model, passes = counting()
    async with assembled(model, cache=CACHE) as parts:
        yield parts, passes


async def test_a_cached_reply_has_the_bits_of_an_uncached_one(minilm):
    """The real model, a hundred texts, some of them known, whatever is made of the vectors afterwards."""
    texts = [*Workload(size=96).texts]
    forms = ({}, {"dimensions": 128}, {"normalize": False}, {"prompt": "query: "})
    async with assembled(minilm) as plain, assembled(minilm, cache=CACHE) as cached:
        await embed(cached, *texts[::3])
        for form in forms:
            wanted = (await embed(plain, *texts, **form)).vectors
            for _ in range(2):
                np.testing.assert_array_equal((await embed(cached, *texts, **form)).vectors, wanted)


async def test_the_cache_can_be_turned_off():
    """With no room there is none: every request is computed."""
    model, passes = counting()
    async with assembled(model, cache=CacheConfig(cache_entries=0)) as parts:
        for _ in range(3):
            assert (await embed(parts, "a")).usage.cached == ()
    assert sum(passes) == 3


async def test_identical_requests_in_flight_are_computed_once(parts_with_cache):
    """Twenty clients that ask for the same at once cost one forward pass of one input."""
    parts, passes = parts_with_cache
    given = await asyncio.gather(*(embed(parts, "a") for _ in range(20)))
    assert sum(passes) == 1
    assert len({one.vectors.tobytes() for one in given}) == 1


async def test_bulk_work_and_interactive_work_share_what_is_known(parts_with_cache):
    """A priority is no part of a result."""
    parts, passes = parts_with_cache
    await embed(parts, "a", priority=Priority.BULK)
    assert (await embed(parts, "a")).usage.cached == (0,)
    assert sum(passes) == 1


DIFFERENT = ({"prompt": "x: "}, {"normalize": True}, {"late_chunking": True})


@pytest.mark.parametrize("form", DIFFERENT, ids=str)
async def test_what_is_asked_for_in_another_way_is_not_known(form):
    """A prompt, another length of the vector, and texts that are read as one are other results."""
    async with assembled(fake_model(TokenBackend(), pooling="mean"), cache=CACHE) as parts:
        await embed(parts, "a", "b")
        assert (await embed(parts, "a", "b", **form)).usage.cached == ()


async def test_vectors_of_tokens_and_of_texts_do_not_mix(parts_with_cache):
    """The same text gives one vector or one for each token, as it is asked for."""
    parts, _ = parts_with_cache
    for _ in range(2):
        one = await embed(parts, "abc")
        each = await parts.service.embed_tokens(EmbedRequest(inputs=["abc"]), ME)
        assert (one.vectors.shape, each.vectors[0].shape) == ((1, 32), (3, 32))


async def test_documents_and_queries_of_a_ranking_are_known_too(parts_with_cache):
    """A ranking by cosine computes what it has not seen; its usage counts the documents."""
    parts, passes = parts_with_cache
    request = RerankRequest(query="q", documents=["a", "b"])
    first = await parts.service.rerank(request, ME)
    again = await parts.service.rerank(replace(request, documents=["c", "b"]), ME)
    assert (first.usage.cached, again.usage.cached) == ((), (1,))
    assert sum(passes) == 4


async def test_another_model_of_the_same_name_is_another_origin():
    """What a model gave is not given for one that was loaded in its place and computes other bits."""
    old, new = (WarmUp(fingerprint=name) for name in ("old", "new"))
    async with assembled(cache=CACHE) as parts:
        known = []
        for warm_up in (old, new, old):
            await parts.engine.replicas.remove("test/hash")
            parts.engine.replicas.add("test/hash", hash_model(), warm_up)
            known.append((await embed(parts, "a")).usage.cached)
    assert known == [(), (), (0,)]


def test_a_fingerprint_is_of_the_bits_that_a_model_gives(minilm):
    """It is the same for the same weights, and another for others."""
    assert minilm.warm_up().fingerprint == minilm.warm_up().fingerprint
    others = {fake_model(backend).warm_up().fingerprint for backend in (HashBackend(), TokenBackend())}
    assert len({minilm.warm_up().fingerprint, *others}) == 3


SCOPES = {
    "auto": {"same user": True, "other user": False, "nobody": False},
    "shared": {"same user": True, "other user": True, "nobody": True},
    "caller": {"same user": True, "other user": False, "nobody": False},
}
WHO = {"same user": replace(holder(1), id="another key"), "other user": holder(2), "nobody": ME}


@pytest.mark.parametrize(("scope", "who", "knows"), [(s, w, k) for s, of in SCOPES.items() for w, k in of.items()])
async def test_results_are_shared_as_configured(scope, who, knows):
    """With keys, only those of one user share, unless it is said otherwise."""
    async with assembled(cache=replace(CACHE, cache_scope=scope)) as parts:
        await embed(parts, "a", caller=holder(1))
        assert bool((await embed(parts, "a", caller=WHO[who])).usage.cached) is knows


@pytest.mark.parametrize(("scope", "knows"), [("auto", True), ("caller", False)])
async def test_without_keys_everybody_shares_unless_told_otherwise(scope, knows):
    """Two addresses know the same, or each its own."""
    async with assembled(cache=replace(CACHE, cache_scope=scope)) as parts:
        await embed(parts, "a", caller=Caller("10.0.0.1"))
        assert bool((await embed(parts, "a", caller=Caller("10.0.0.2"))).usage.cached) is knows


async def test_labels_are_known_but_not_those_of_another_activation_mixed_up(minilm_labels):
    """Logits are kept, and what is made of them is made anew."""
    parts = minilm_labels
    one = await parts.service.classify(ClassifyRequest(inputs=["a"]), ME)
    raw = await parts.service.classify(ClassifyRequest(inputs=["a"], raw_scores=True), ME)
    assert (one.usage.cached, raw.usage.cached) == ((), (0,))
    assert not np.array_equal(one.scores, raw.scores)


@pytest.fixture
async def minilm_labels():
    """Return a server's parts around a model that scores three labels."""
    async with assembled(fake_model(LogitBackend(labels=3), kind="classify"), cache=CACHE) as parts:
        yield parts


async def test_seed_4_says_what_was_cached(parts_with_cache):
    """The reply of the FastEmbed Query API tells whether the vector was known."""
    parts, _ = parts_with_cache
    call = Call("POST", "/fastembed_query/v1/embed", {}, b'{"text": "a"}')
    replies = [json.loads((await parts.api.receive(call)).body) for _ in range(2)]
    assert [reply["cached"] for reply in replies] == [False, True]
    assert replies[0]["embedding"] == replies[1]["embedding"]


async def test_metrics_count_hits_misses_and_bytes(parts_with_cache):
    """What was known, what was not, and what is kept."""
    parts, _ = parts_with_cache
    await embed(parts, "a", "b")
    await embed(parts, "a")
    text = (await parts.service.metrics(ME)).decode()
    for line in (
        'quiver_cache_hits_total{where="memory"} 1.0',
        "quiver_cache_misses_total 2.0",
        "quiver_cache_entries 2.0",
        f"quiver_cache_bytes {float(2 * 32 * 4)}",
        'quiver_tokens_total{model="test/hash"} 2.0',
    ):
        assert line in text.splitlines()


async def test_servers_that_share_a_redis_share_results():
    """What one server computed, another one with the same secret knows, and one with another secret does not."""
    async with redis_prefix() as prefix:
        shared = replace(CACHE, redis_url=Secret(REDIS), redis_prefix=prefix, cache_secret=Secret("s"))
        async with assembled(cache=shared) as parts:
            first = await embed(parts, "a")
        async with assembled(cache=shared) as parts:
            again = await embed(parts, "a")
        async with assembled(cache=replace(shared, cache_secret=Secret("t"))) as parts:
            foreign = await embed(parts, "a")
    assert (first.usage.cached, again.usage.cached, foreign.usage.cached) == ((), (0,), ())
    np.testing.assert_array_equal(first.vectors, again.vectors)


async def test_a_redis_that_is_not_there_costs_no_request():
    """The server starts and answers, and knows in memory what it has seen."""
    nowhere = replace(CACHE, redis_url=Secret("redis://127.0.0.1:9/0"), cache_secret=Secret("s"))
    async with assembled(cache=nowhere) as parts:
        given = [(await embed(parts, text)).usage.cached for text in ("a", "b", "a")]
    assert given == [(), (), (0,)]
