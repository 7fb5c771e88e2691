"""What a key may: by scope, by rate and by quota, in the words of each API, and counted once."""

import asyncio
import json
import logging
import re

import pytest
import structlog

from conftest import UNCACHED
from desk import get, post, staffed
from fakes import hash_model
from quiver.accounts import Rate, Tier
from quiver.config import CacheConfig

SLOW = Tier("slow", None, Rate(0.01, 2))
SMALL = Tier("small", 3)

CALLS = {
    "openai": ("/openai/v1/embeddings", {"input": "a"}),
    "tei": ("/tei/embed", {"inputs": "a"}),
    "cohere": ("/cohere/v2/embed", {"texts": ["a"], "input_type": "search_query", "embedding_types": ["float"]}),
    "ollama": ("/ollama/api/embed", {"model": "hash", "input": "a"}),
    "fastembed_query": ("/fastembed_query/v1/embed", {"text": "a"}),
    "jina": ("/jina/v1/embeddings", {"model": "hash", "input": ["a"]}),
    "voyage": ("/voyage/v1/embeddings", {"model": "hash", "input": ["a"]}),
    "infinity": ("/infinity/embeddings", {"model": "hash", "input": ["a"]}),
    "s3_embedding": ("/s3_embedding/api/v1/embed", {"inputs": "a"}),
    "inference_api": ("/inference_api/api/embed", {"text": "a", "model": "hash"}),
}
"""One input by each API."""


def wire(name):
    """Return the path and body of an API's call."""
    path, body = CALLS[name]
    return path, json.dumps(body).encode()


async def counted(parts, desk):
    """Return what the ledger has, once all of it is there."""
    await parts.stores.register.meter.flush()
    return {(t.key_id, t.model): (t.requests, t.embeddings, t.cached) for t in await desk.totals()}


def refusal_of(reply):
    """Return what a refusal says."""
    assert int(reply.headers["retry-after"]) >= 1
    assert int(reply.headers["retry-after-ms"]) > 0
    return json.loads(reply.body)


# Rates


async def test_a_rate_is_told_in_the_words_of_each_api(tmp_path):
    """Who asks too often gets 429 in the shape of the API that was called, and when to come back."""
    said = {}
    async with staffed(tmp_path) as (parts, desk):
        for name in CALLS:
            key = await desk.key(tier=SLOW)
            path, body = wire(name)
            replies = [await post(parts, path, key, body) for _ in range(3)]
            assert [reply.status for reply in replies] == [200, 200, 429], name
            assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
            said[name] = refusal_of(replies[-1])
    text = r"you may make 0\.01 requests a second, 2 at once: ask again in 100 s"
    assert said["openai"]["error"] == {
        "message": said["openai"]["error"]["message"],
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert said["tei"] == {"error": said["tei"]["error"], "error_type": "Overloaded"}
    assert set(said["cohere"]) == {"message", "id"}
    assert set(said["ollama"]) == {"error"}
    assert said["fastembed_query"]["code"] == "rate_limit_exceeded"
    for name, body in said.items():
        assert re.search(text, json.dumps(body)), name


async def test_what_is_left_is_told_with_every_answer(tmp_path):
    """OpenAI's headers and the IETF's say the same, on success, and on refusal as long as the client must wait."""
    async with staffed(tmp_path) as (parts, desk):
        key = await desk.key(tier=SLOW)
        first, _, last = [await post(parts, "/v1/embeddings", key) for _ in range(3)]
        assert {
            name: first.headers[name] for name in first.headers if "ratelimit" in name and "tokens" not in name
        } == {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-reset-requests": "1m40s",
            "ratelimit-policy": '"requests";q=2;w=200',
            "ratelimit": '"requests";r=1;t=100',
        }
        assert re.fullmatch(r'"requests";r=0;t=(99|100)', last.headers["ratelimit"])
        assert int(last.headers["retry-after"]) >= int(last.headers["ratelimit"].rpartition("=")[2])
        listed = await get(parts, "/v1/models", await desk.key(tier=SLOW))
        assert listed.headers["ratelimit"] == '"requests";r=1;t=100'
        unbound = await post(parts, "/v1/embeddings", await desk.key())
        assert "ratelimit" not in unbound.headers


async def test_a_rate_is_a_keys_own(tmp_path):
    """One key's haste is nothing to another, even of the same user."""
    async with staffed(tmp_path) as (parts, desk):
        one, other = await desk.key(tier=SLOW), await desk.key(tier=SLOW)
        assert [(await post(parts, "/v1/embeddings", one)).status for _ in range(3)] == [200, 200, 429]
        assert (await post(parts, "/v1/embeddings", other)).status == 200


async def test_without_keys_the_rate_is_the_addresss(tmp_path):
    """The configured rate holds for everybody, and probes of health are free."""
    open_to_all = {"auth": "off", "rate_per_second": 0.01, "rate_burst": 2.0}
    async with staffed(tmp_path, accounts=open_to_all) as (parts, _):
        assert [(await post(parts, "/v1/embeddings")).status for _ in range(3)] == [200, 200, 429]
        assert [(await get(parts, "/health/live")).status for _ in range(5)] == [200] * 5
        assert b"quiver_rate_limited_total 1.0" in (await get(parts, "/metrics")).body


# Scopes


@pytest.mark.parametrize(
    ("path", "body", "scope"),
    [
        *((*CALLS[name], "embed") for name in CALLS),
        ("/tei/embed_all", {"inputs": "a"}, "embed"),
        ("/tei/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, "embed"),
        ("/tei/rerank", {"query": "a", "texts": ["b"]}, "rerank"),
        ("/cohere/v2/rerank", {"model": "hash", "query": "a", "documents": ["b"]}, "rerank"),
        ("/tei/predict", {"inputs": "a"}, "classify"),
        ("/tei/tokenize", {"inputs": "a"}, "tokenize"),
        ("/tei/decode", {"ids": [97]}, "tokenize"),
        ("/cohere/v1/tokenize", {"model": "hash", "text": "a"}, "tokenize"),
        ("/cohere/v1/detokenize", {"model": "hash", "tokens": [97]}, "tokenize"),
    ],
)
async def test_a_key_is_good_for_its_scopes_only(tmp_path, path, body, scope):
    """With the scope a call is let through, and without it 403."""
    async with staffed(tmp_path) as (parts, desk):
        with_it, without = await desk.key(scopes=frozenset({scope})), await desk.key(scopes=frozenset({"metrics"}))
        assert (await post(parts, path, with_it, json.dumps(body).encode())).status != 403
        refused = await post(parts, path, without, json.dumps(body).encode())
        assert refused.status == 403
        assert f"this key is good for metrics, not for {scope}" in refused.body.decode()


async def test_usage_and_metrics_have_scopes_of_their_own(tmp_path):
    """Metrics that are not open need a key for them, and so does usage."""
    async with staffed(tmp_path, accounts={"open_metrics": False}) as (parts, desk):
        reader = await desk.key(scopes=frozenset({"metrics"}))
        other = await desk.key(scopes=frozenset({"usage"}))
        assert [(await get(parts, "/metrics", key)).status for key in (reader, other, "")] == [200, 403, 401]
        assert [(await get(parts, "/v1/usage", key)).status for key in (reader, other, "")] == [403, 200, 401]


# Quotas


async def test_a_quota_is_told_in_the_words_of_each_api(tmp_path):
    """Who has used a month up gets 429 in the shape of the API that was called; OpenAI's clients know its two words."""
    said = {}
    async with staffed(tmp_path) as (parts, desk):
        for name in CALLS:
            key = await desk.key(email=f"{name}@b.c", tier=SMALL)
            path, body = wire(name)
            replies = [await post(parts, path, key, body) for _ in range(4)]
            assert [reply.status for reply in replies] == [200] * 3 + [429], name
            said[name] = refusal_of(replies[-1])
    assert said["openai"]["error"]["type"] == said["openai"]["error"]["code"] == "insufficient_quota"
    assert said["openai"]["error"]["param"] is None
    assert said["fastembed_query"]["code"] == "insufficient_quota"
    assert said["tei"]["error_type"] == "Overloaded"
    for name, body in said.items():
        assert "1 embeddings are asked for, but 0 of the 3 of tier 'small' are left" in json.dumps(body), name


async def test_a_quota_is_a_users_and_counts_inputs(tmp_path):
    """Keys of one user share a month; a request that is refused, or fails, costs nothing of it."""
    async with staffed(tmp_path) as (parts, desk):
        one, other = await desk.key(tier=SMALL), await desk.key(tier=SMALL)
        assert (await post(parts, "/v1/embeddings", one, b'{"input": ["a", "b", "c", "d"]}')).status == 429
        assert (await post(parts, "/v1/embeddings", one, b'{"input": []}')).status == 400
        assert (await post(parts, "/v1/embeddings", one, b'{"input": ["a", "b"]}')).status == 200
        assert (await post(parts, "/v1/embeddings", other, b'{"input": ["a", "b"]}')).status == 429
        assert (await post(parts, "/v1/embeddings", other, b'{"input": ["a"]}')).status == 200
        ids = [key.split("_")[1] for key in (one, other)]
        assert await counted(parts, desk) == {(ids[0], "test/hash"): (1, 2, 0), (ids[1], "test/hash"): (1, 1, 0)}


@pytest.mark.parametrize(("count_cached", "left"), [(True, 1), (False, 2)])
async def test_known_results_count_as_configured(tmp_path, count_cached, left):
    """What the cache knew costs as much as the rest, or nothing."""
    known = {"cache": CacheConfig(), "accounts": {"count_cached": count_cached}}
    async with staffed(tmp_path, **known) as (parts, desk):
        key = await desk.key(tier=SMALL)
        for _ in range(2):
            assert (await post(parts, "/v1/embeddings", key)).status == 200
        await counted(parts, desk)
        usage = json.loads((await get(parts, "/v1/usage", key)).body)
        assert (usage["left"], usage["cached"], usage["requests"]) == (left, 1, 2)


async def test_one_request_is_counted_once_however_many_texts_it_is(tmp_path):
    """Voyage's documents and Vertex AI's instances are one request: counted together, or not at all."""
    documents = {"model": "hash", "inputs": [["a", "b"], ["c"]]}
    instances = {"instances": [{"inputs": "a"}, {"inputs": ["b", "c"]}]}
    for path, body in (("/voyage/v1/contextualizedembeddings", documents), ("/tei/vertex", instances)):
        async with staffed(tmp_path / path.split("/")[1], cache=UNCACHED) as (parts, desk):
            key = await desk.key(tier=SMALL)
            assert (await post(parts, path, key, json.dumps(body).encode())).status == 200
            assert list((await counted(parts, desk)).values()) == [(1, 3, 0)]
            assert (await post(parts, path, key, json.dumps(body).encode())).status == 429
            assert list((await counted(parts, desk)).values()) == [(1, 3, 0)]


async def test_a_request_that_is_repeated_costs_once(tmp_path):
    """By its idempotency key, quoted or not; with another body or path that key is refused, and another user's is another."""
    async with staffed(tmp_path) as (parts, desk):
        key, other = await desk.key(), await desk.key(email="bob@b.c")
        for name in ("once", '"once"', "once"):
            assert (await post(parts, "/v1/embeddings", key, idempotency_key=name)).status == 200
        changed = await post(parts, "/v1/embeddings", key, b'{"input": "b"}', idempotency_key="once")
        elsewhere = await post(parts, "/embeddings", key, idempotency_key="once")
        assert [reply.status for reply in (changed, elsewhere)] == [422, 422]
        assert (await post(parts, "/v1/embeddings", other, b'{"input": "b"}', idempotency_key="once")).status == 200
        assert [n for n, *_ in (await counted(parts, desk)).values()] == [1, 1]
        both = await asyncio.gather(*(post(parts, "/v1/embeddings", key, idempotency_key="both") for _ in range(2)))
        assert sorted(reply.status for reply in both) == [200, 409]
        assert (await post(parts, "/v1/embeddings", key, idempotency_key="once")).status == 200
        assert [n for n, *_ in (await counted(parts, desk)).values()] == [2, 1], "the ledger knows it, too"


async def test_usage_is_shown_by_key_and_model(tmp_path):
    """A user sees what all its keys used in a month and what is left, and nothing of anybody else's."""
    async with staffed(tmp_path) as (parts, desk):
        ann, bob = await desk.key(tier=SMALL), await desk.key(email="bob@b.c")
        assert (await post(parts, "/v1/embeddings", ann, b'{"input": ["a", "b"]}')).status == 200
        assert (await post(parts, "/v1/embeddings", bob)).status == 200
        await counted(parts, desk)
        shown = json.loads((await get(parts, "/v1/usage", ann)).body)
        assert {name: shown[name] for name in ("email", "tier", "quota", "used", "left", "requests", "tokens")} == {
            "email": "ann@b.c",
            "tier": "small",
            "quota": 3,
            "used": 2,
            "left": 1,
            "requests": 1,
            "tokens": 2,
        }
        (row,) = shown["data"]
        assert (row["key"], row["model"], row["embeddings"]) == (ann.split("_")[1], "test/hash", 2)
        past = json.loads((await get(parts, "/v1/usage", ann, period="2024-02")).body)
        assert (past["used"], past["left"], past["data"]) == (0, None, [])
        assert (await get(parts, "/v1/usage", ann, period="2024-13")).status == 400


async def test_a_job_is_its_accounts_own(tmp_path):
    """Its usage is counted, other keys of the user see it, and to another's key there is no such job."""
    async with staffed(tmp_path) as (parts, desk):
        ann, again, bob = await desk.key(), await desk.key(), await desk.key(email="bob@b.c")
        job = json.loads((await post(parts, "/run", ann, b'{"input": {"input": "a"}}')).body)["id"]
        assert json.loads((await get(parts, f"/status-sync/{job}", ann)).body)["status"] == "COMPLETED"
        for path in ("status", "status-sync", "stream"):
            assert (await get(parts, f"/{path}/{job}", bob)).status == 404
        for path in ("cancel", "retry"):
            assert (await post(parts, f"/{path}/{job}", bob)).status == 404
        assert (await get(parts, f"/status/{job}", again)).status == 200
        assert list(await counted(parts, desk)) == [(ann.split("_")[1], "test/hash")]


# Secrets


async def test_no_key_and_no_text_is_logged(tmp_path, caplog):
    """At the least level, whatever happens: good calls, bad ones, refused ones, and a handler that fails."""
    texts, events = [], []

    def note(_, __, event):
        events.append(repr(event))
        raise structlog.DropEvent

    def fail(batch):
        if len(texts) > 6:
            raise RuntimeError("it broke")
        texts.append(batch)

    before = structlog.get_config()
    structlog.configure(processors=[note], wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    caplog.set_level(logging.DEBUG)
    try:
        async with staffed(tmp_path, model=hash_model(before=fail)) as (parts, desk):
            key = await desk.key(tier=SLOW)
            for shown in (key, key, key, f"{key}x", await desk.key()):
                for body in (b'{"input": "CANARY"}', b'{"input": ["CANARY", 5]}', b'{"CANARY'):
                    await post(parts, "/v1/embeddings", shown, body, idempotency_key="CANARY")
    finally:
        structlog.configure(**before)
    log = "\n".join([*events, caplog.text])
    assert "calls need a key" in log, "or nothing was listened to"
    assert "CANARY" not in log
    assert not [part for part in key.split("_")[2:] if part in log]


async def test_no_quota_is_exceeded_at_once(tmp_path):
    """Many requests at once of one user never use more than the quota."""
    async with staffed(tmp_path) as (parts, desk):
        key = await desk.key(tier=Tier("ten", 10))
        statuses = await asyncio.gather(*(post(parts, "/v1/embeddings", key) for _ in range(30)))
        assert sorted(reply.status for reply in statuses) == [200] * 10 + [429] * 20
