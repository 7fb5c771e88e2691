"""A cluster without Ray: what goes where, who is asked, what is lost, and what is said at the start."""

import asyncio
import base64
import importlib.util
import json
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import UNCACHED, assembled
from fakes import byte_tokenizer, hash_vector
from quiver import app
from quiver.accounts import ApiKey, Tier, User
from quiver.api.call import Call
from quiver.capacity import Queue
from quiver.config import AccountsConfig, CacheConfig, Config, JobsConfig, ModelsConfig, ScaleConfig, Secret, TlsConfig
from quiver.errors import (
    ConfigError,
    DatabaseDown,
    Overloaded,
    QuiverError,
    RateLimited,
    Unavailable,
    UnknownModel,
    WrongMethod,
)
from quiver.scale import cluster, plan, proxy
from quiver.scale.command import reason_in
from quiver.scale.cores import Cores
from quiver.scale.host import Host
from quiver.scale.policy import wanted_replicas
from quiver.scale.remote_engine import Crowded, Lost, RemoteEngine
from quiver.scale.wire import Answer, LoadStats, asked, unwrapped
from quiver.telemetry.observer import Observer
from quiver.types import (
    Caller,
    DecodeRequest,
    Embeddings,
    EmbedRequest,
    RerankRequest,
    SimilarityRequest,
    TokenizeRequest,
)
from server_process import run

MODEL = "test/hash"
BODY = {"input": ["a", "b"], "model": MODEL, "encoding_format": "base64"}
KEY = ApiKey(id="k", prefix="qv_k", hash="$2b$secret", user=User(7, "ann@b.c", Tier("t")))


class Wired:
    """A wire to a model in this process that dies, or is crowded, as often as it is told; all that passes is pickled."""

    def __init__(self, host: Host, *faults: Exception) -> None:
        self.host = host
        self.faults = list(faults)
        self.asked = 0
        self.begun = asyncio.Event()
        self.cancelled = 0

    async def ask(self, request):
        """Have a request answered."""
        self.asked += 1
        self.begun.set()
        if self.faults:
            raise self.faults.pop(0)
        try:
            return travelled(await self.host.answer(travelled(request)))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def describe(self):
        """Tell what the model is."""
        return travelled(self.host.describe())


def travelled(value):
    """Return what arrives elsewhere of a value."""
    buffers: list[pickle.PickleBuffer] = []
    return pickle.loads(pickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers=buffers)  # noqa: S301  our own


async def ingress(wire, **sections):
    """Put an ingress's parts together around one wire."""
    config = Config(**{"cache": UNCACHED, **sections}, models=ModelsConfig(model=(MODEL,), data_dir=Path("none")))
    parts = app.build(config, make_engine=lambda config, observer: RemoteEngine(config, observer, {MODEL: wire}))
    await parts.engine.load(lambda *_: None)
    return parts


@pytest.fixture
async def host():
    """A replica with the hash model."""
    async with assembled() as parts:
        yield Host(parts, None)


def expected(text: str) -> bytes:
    """Return the bits that a single process gives."""
    (encoding,) = byte_tokenizer().encode([text], truncate=False)
    return hash_vector(encoding.ids).astype("<f4").tobytes()


def embed(**more) -> Call:
    """Make a call for embeddings."""
    body = json.dumps({**BODY, **more}).encode()
    return Call("POST", "/v1/embeddings", {"content-type": "application/json"}, body)


# The remote engine


async def test_the_bits_are_those_of_one_process(host):
    """Through an ingress, a pickle and a replica each vector is what the model computes."""
    parts = await ingress(Wired(host))
    reply = await parts.api.receive(embed())
    got = [base64.b64decode(item["embedding"]) for item in json.loads(reply.body)["data"]]
    assert (reply.status, got) == (200, [expected("a"), expected("b")])
    assert "total;dur=" in reply.headers["server-timing"]


async def test_a_replica_that_dies_is_asked_anew_once(host):
    """One death is not seen by the client, and the second is told with a time to come back."""
    once, twice = Wired(host, Lost()), Wired(host, Lost(), Lost())
    parts = await ingress(once)
    assert (await parts.api.receive(embed())).status == 200
    reply = await (await ingress(twice)).api.receive(embed())
    assert (reply.status, reply.headers["retry-after"], once.asked, twice.asked) == (503, "2", 2, 2)


async def test_where_nobody_can_be_asked_it_says_when_to_come_back(host):
    """A deployment without a replica is unavailable, and nothing is tried twice."""
    wire = Wired(host, Crowded())
    reply = await (await ingress(wire)).api.receive(embed())
    assert (reply.status, reply.headers["retry-after"], wire.asked) == (503, "2", 1)


async def test_an_error_of_the_model_is_the_client_s_own_shape(host):
    """What a replica refuses arrives with its type, its text and its field."""
    parts = await ingress(Wired(host))
    reply = await parts.api.receive(embed(dimensions=4096))
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["param"] == "dimensions"


async def test_an_unknown_model_is_refused_without_asking_anyone(host):
    """The ingress knows the names."""
    wire = Wired(host)
    parts = await ingress(wire)
    with pytest.raises(UnknownModel):
        await parts.service.embed(EmbedRequest(inputs=["a"], model="nope"), Caller("t"))
    assert wire.asked == 0


async def test_cancelled_work_is_let_go_of_there(host):
    """Who goes takes its request from the replica's queue."""
    wire = Wired(host)
    parts = await ingress(wire)
    task = asyncio.create_task(parts.service.embed(EmbedRequest(inputs=["a"] * 500), Caller("t")))
    await asyncio.wait_for(wire.begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert wire.cancelled == 1


def test_a_deadline_travels_as_the_time_that_is_left():
    """Two machines' clocks have nothing in common; keys' hashes and tabs stay at home."""
    caller = Caller("t", time.monotonic() + 5, KEY, tab=object())
    sent = travelled(asked("embed", EmbedRequest(inputs=["a"], model=MODEL), caller))
    assert 4 < sent.seconds_left <= 5
    assert (sent.caller.key.hash, sent.caller.tab, sent.caller.account, sent.request.model) == (
        "",
        None,
        "user 7",
        None,
    )


async def test_what_waits_there_is_known_here(host):
    """A model's last answer tells how busy it was, and for two seconds the door believes it."""
    parts = await ingress(Wired(host))
    busy = Queue(10, 90_000, 100_000, 9.0, 10_000.0)
    (model,) = parts.engine.replicas.configured
    model.hear(busy)
    refused = parts.admission.refusal(100, Caller("t", time.monotonic() + 5), is_queued=False)
    assert isinstance(refused, Overloaded)
    model.heard_at -= 3
    assert parts.admission.refusal(100, Caller("t", time.monotonic() + 5), is_queued=False) is None


async def test_every_verb_travels(host):
    """Each of an engine's verbs gives elsewhere what it gives here."""
    remote = RemoteEngine(Config(models=ModelsConfig(model=(MODEL,))), Observer(), {MODEL: Wired(host)})
    await remote.load(lambda *_: None)
    caller, text = Caller("t"), EmbedRequest(inputs=["a", "b"])
    assert np.array_equal((await remote.embed(text, caller)).vectors, (await host.engine.embed(text, caller)).vectors)
    ranking = RerankRequest(query="a", documents=["b", "a"])
    assert (await remote.rerank(ranking, caller)).order.tolist() == (
        await host.engine.rerank(ranking, caller)
    ).order.tolist()
    similar = SimilarityRequest(source="a", texts=["a", "b"])
    assert (await remote.compare(similar, caller)).scores[0] == pytest.approx(1)
    tokens = await remote.tokenize(TokenizeRequest(texts=["ab"]))
    assert await remote.decode(DecodeRequest(ids=[[t.id for t in tokens.tokens[0]]])) == ["ab"]
    await remote.ping()
    assert remote.died is None


# What travels


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("busy", retry_after_seconds=3.5, model="m"),
        RateLimited("often", retry_after_seconds=1.0),
        WrongMethod("no", allowed=("GET",)),
        UnknownModel("which", param="model"),
    ],
)
def test_errors_travel_whole(error):
    """A constructor that wants more than a text loses nothing."""
    arrived = travelled(error)
    assert (type(arrived), vars(arrived), str(arrived)) == (type(error), vars(error), str(error))


def test_arrays_travel_without_a_copy():
    """Of a thousand vectors nothing but their head is in the pickle itself."""
    vectors = np.ones((1000, 384), np.float32)
    buffers: list[pickle.PickleBuffer] = []
    answer = Answer(Embeddings("m", vectors), plan.NO_QUEUE)
    data = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    assert (len(buffers), len(data) < 2000) == (1, True)
    assert np.shares_memory(pickle.loads(data, buffers=buffers).found.vectors, vectors)  # noqa: S301  our own


def test_an_error_in_an_answer_is_raised():
    """A result is given, an error is raised."""
    with pytest.raises(Unavailable):
        unwrapped(Answer(Unavailable("no"), plan.NO_QUEUE))
    assert unwrapped(Answer("yes", plan.NO_QUEUE)) == "yes"


# What goes where


def config(**sections) -> Config:
    """Return settings of two models."""
    models = ModelsConfig(model=("a/one", "b/two"), dtype=("int8", "float32"), data_dir=Path("none"))
    return Config(**{"models": models, **sections})


def test_each_model_has_its_own_part_of_the_settings():
    """Lists of one value for each model are cut to the one, and a replica's lanes are its CPUs."""
    whole = config(scale=ScaleConfig(ray_cpus=(2.0, 0.5), ray_max_replicas=(3,)))
    first, second = plan.placements(whole)
    mine = plan.for_model(whole, second)
    assert (mine.models.model, mine.models.dtype, mine.engine.lanes) == (("b/two",), ("float32",), 1)
    assert (first.lanes, first.max_replicas, first.needs) == (2, 3, {"CPU": 2.0})
    assert mine.accounts.auth == "off"


def test_a_pool_has_what_may_be_asked_for():
    """The configured models are not in it, and the catalogue's are where all of them are allowed."""
    allowed = config(models=ModelsConfig(model=("a/one",), allow_models=("x/rare", "a/one")))
    assert plan.pooled(allowed) == ["x/rare"]
    assert len(plan.pooled(config(models=ModelsConfig(allow_models=("*",))))) > 10
    assert plan.pooled(config()) == []


@pytest.mark.parametrize(
    ("scale", "complaint"),
    [
        ({"ray_cpus": (1.0, 2.0, 3.0)}, "ray_cpus has 3 values for 2 models"),
        ({"ray_min_replicas": (5,), "ray_max_replicas": (2,)}, "at most, but 5 at least"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(scale, complaint):
    """It says which setting is meant."""
    with pytest.raises(ConfigError, match=complaint):
        plan.placements(config(scale=ScaleConfig(**scale)))


POSTGRES = Secret("postgresql://u:p@h/d")
REDIS = Secret("redis://h:6379/0")


@pytest.mark.parametrize(
    ("sections", "own_keys", "complaint"),
    [
        ({"accounts": AccountsConfig(auth="required")}, False, "database_url=postgresql"),
        ({}, True, "database_url=postgresql"),
        ({"accounts": AccountsConfig(database_url=Secret("sqlite:///x.db"))}, False, "database_url=postgresql"),
        ({"accounts": AccountsConfig(database_url=POSTGRES)}, False, "need Redis"),
        ({"accounts": AccountsConfig(auth="off", rate_per_second=5)}, False, "need Redis"),
        ({"cache": CacheConfig(redis_url=REDIS)}, False, "cache_secret"),
        ({"tls": TlsConfig(tls="on")}, False, "TLS ends before a cluster"),
    ],
)
def test_what_only_one_process_could_keep_is_refused(sections, own_keys, complaint):
    """It says what to set."""
    with pytest.raises(ConfigError, match=complaint):
        plan.check_shared(config(**sections), has_own_keys=own_keys)


def test_what_is_shared_is_let_through():
    """Without keys nothing is needed; with them, both stores."""
    plan.check_shared(config(), has_own_keys=False)
    shared = {
        "accounts": AccountsConfig(database_url=POSTGRES),
        "cache": CacheConfig(redis_url=REDIS, cache_secret=Secret("s")),
    }
    plan.check_shared(config(**shared), has_own_keys=True)


@pytest.mark.parametrize(
    ("needs", "nodes", "complaint"),
    [
        ([("m", {"CPU": 8.0})], [{"CPU": 4.0}, {"CPU": 4.0}], "a replica of m takes 8 CPU, but the largest .* has 4"),
        ([("m", {"CPU": 1.0, "GPU": 1.0})], [{"CPU": 4.0}], "a replica of m takes 1 GPU, but .* has 0"),
        ([("m", {"CPU": 3.0}), ("n", {"CPU": 3.0})], [{"CPU": 4.0}], "take 6 CPU together .m 3, n 3., but .* has 4"),
        ([("m", {"CPU": 1.0})], [], "has 0"),
    ],
)
def test_a_model_that_does_not_fit_is_named(needs, nodes, complaint):
    """It says which, what of, how much, and how much there is."""
    with pytest.raises(ConfigError, match=complaint):
        plan.check_fits(needs, nodes)


def test_models_that_fit_are_let_through():
    """What is needed is what is there."""
    plan.check_fits([("m", {"CPU": 2.0}), ("n", {"CPU": 2.0})], [{"CPU": 4.0}])


async def test_an_ingress_without_postgresql_takes_no_jobs():
    """A file on one of several machines would be lost to the others: it is said, not done."""
    for_ingress = plan.for_ingress(config())
    assert for_ingress.jobs == JobsConfig(take_jobs=False)
    assert plan.for_ingress(config(accounts=AccountsConfig(database_url=POSTGRES))).jobs.take_jobs
    async with assembled(jobs=for_ingress.jobs) as parts:
        with pytest.raises(DatabaseDown, match="not taken here"):
            await parts.service.jobs._opened()


# How many replicas


def test_busy_replicas_want_others():
    """At more than 70 % of the time there are too few, at less too many, and never none."""
    full, idle = LoadStats(0, 1.0, 5000), LoadStats(0, 0.05, 5000)
    assert [wanted_replicas([load] * 4, queue_seconds=0.5) for load in (full, idle)] == [6, 1]
    assert wanted_replicas([], queue_seconds=0.5) == 1


def test_what_waits_too_long_wants_more():
    """Twice the time that may be waited wants twice the replicas; less than it, none."""
    late, early = LoadStats(5000, 0.0, 5000), LoadStats(2000, 0.0, 5000)
    assert wanted_replicas([late] * 3, queue_seconds=0.5) == 6
    assert wanted_replicas([early] * 3, queue_seconds=0.5) == 1


@given(
    st.lists(st.builds(LoadStats, st.floats(0, 1e7), st.floats(0, 1), st.floats(1, 1e6)), max_size=20),
    st.floats(0.01, 10),
)
def test_more_load_never_wants_fewer(loads, seconds):
    """Whatever there is, one that waits with more wants as many at least."""
    more = [replace(load, waiting_tokens=2 * load.waiting_tokens) for load in loads]
    assert wanted_replicas(more, queue_seconds=seconds) >= wanted_replicas(loads, queue_seconds=seconds) >= 1


async def test_a_replica_tells_how_busy_it_was(host):
    """Tokens since it was last asked, over what it could have done."""
    host.load_stats()
    await host.answer(asked("embed", EmbedRequest(inputs=["x" * 400]), Caller("t")))
    assert host.load_stats().busy > 0
    assert host.load_stats().busy == 0


# Cores


def test_cores_are_held_by_one(tmp_path):
    """Two who take one each have different ones, while there are two, and what is let go of can be taken."""
    first, second = Cores(1, tmp_path), Cores(1, tmp_path)
    are_two = len(first.numbers | second.numbers) == 2
    first.close()
    third = Cores(1, tmp_path)
    second.close()
    third.close()
    if not are_two:
        pytest.skip("this machine has one core")
    assert third.numbers == first.numbers


# The command line

WITHOUT_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")


@WITHOUT_RAY
@pytest.mark.parametrize("words", [("scale", "serve"), ("embed", "a.jsonl", "--ray", "-o", "out")])
def test_without_ray_the_extra_is_named(words):
    """It is one line, and the exit code of what the operator can mend."""
    done = run(*words)
    assert (done.returncode, done.stderr) == (
        78,
        "quiver: a cluster needs an optional package: pip install 'quiver[ray]'\n",
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("embed", "a.jsonl", "--ray"), "give -o OUTPUT"),
        (("embed", "a.jsonl", "--ray", "-o", "out", "--url", "http://x/v1"), "leave --url"),
        (("embed", "a.jsonl", "--ray", "-o", "out", "--output-format", "npy"), "leave --url and --output-format out"),
    ],
)
def test_options_that_contradict_a_cluster_are_refused(words, complaint):
    """It says what to leave out."""
    done = run(*words)
    assert (done.returncode, complaint in done.stderr) == (78, True), done.stderr


# The proxy


async def proxied(app) -> list[dict]:
    """Return what a client gets of an application behind the proxy's middleware."""
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    await proxy.Late(app)({"type": "http"}, None, send)
    return sent


START = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"a"), (b"x-request-id", b"a")]}


def replying(*messages):
    """Return an application that sends these messages."""

    async def application(_scope, _receive, send):
        for message in messages:
            await send(message)

    return application


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (START,),
        ({**START, "status": 500}, {"type": "http.response.body", "body": b"Internal Server Error"}),
        ({**START, "status": 408}, {"type": "http.response.body", "body": b"Request timed out"}),
    ],
    ids=["nothing came", "a head and no body", "a failure that Ray wrote", "no ingress in time"],
)
async def test_a_dead_ingress_is_told_with_a_time(messages):
    """Whatever is missing of the reply, the client gets a whole one that says when to come back."""
    start, body = await proxied(replying(*messages))
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"2")
    assert json.loads(body["body"])["error"]["code"] == "unavailable"


async def test_a_reply_passes_as_it_is():
    """A living ingress's reply is its own, but for what stands in it twice; its errors, too."""
    body = {"type": "http.response.body", "body": b"x"}
    own = {"type": "http.response.start", "status": 503, "headers": [(b"x-content-type-options", b"nosniff")]}
    assert await proxied(replying(START, body)) == [{**START, "headers": [(b"x-request-id", b"a")]}, body]
    assert await proxied(replying(own, body)) == [own, body]


# The start


@pytest.mark.parametrize("version", ["2.9.3", "2.53.0"])
def test_an_old_ray_is_refused(version):
    """It names the oldest that does."""
    with pytest.raises(ConfigError, match=r"too old: pip install 'ray\[serve\]>=2.54'"):
        cluster.check_version(version)


def test_a_new_ray_is_let_through():
    """Versions are numbers, not text."""
    for version in ("2.54.0", "2.100.1", "3.0.0rc1"):
        cluster.check_version(version)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("nonsense", "is no address of a cluster")],
)
def test_a_cluster_that_cannot_be_reached_is_said_at_once(address, complaint):
    """Within seconds, with what to do."""
    start = time.monotonic()
    with pytest.raises(ConfigError, match=complaint):
        cluster.check_address(address)
    assert time.monotonic() - start < 6


def test_the_reason_is_found_in_a_long_report():
    """Of Ray's tracebacks a reader gets the line that our own error wrote."""
    report = "Deploying failed\nTraceback\n  File x\nquiver.errors.LoadError: weights are missing\nmore words"
    assert reason_in(report) == "weights are missing"
    assert reason_in("one\ntwo\n") == "two"
    assert reason_in("") == "Ray does not say why"


def test_secrets_are_not_in_what_is_told(tmp_path):
    """The settings that are handed to Ray hold a token, which is made once and read by its owner alone."""
    made = Config(models=ModelsConfig(data_dir=tmp_path))
    first, second = cluster.settings_for_ray(made), cluster.settings_for_ray(made)
    assert first == second
    assert (first["RAY_AUTH_MODE"], first["RAY_USAGE_STATS_ENABLED"], len(first["RAY_AUTH_TOKEN"])) == (
        "token",
        "0",
        64,
    )
    assert (tmp_path / "ray.token").stat().st_mode & 0o077 == 0
    given = cluster.settings_for_ray(replace(made, scale=ScaleConfig(ray_token=Secret("abc"))))
    assert given["RAY_AUTH_TOKEN"] == "abc"  # noqa: S105  a test's own
    assert "abc" not in repr(ScaleConfig(ray_token=Secret("abc")))


def test_every_error_can_travel():
    """No error's pickle is broken by what its constructor asks for."""
    kinds = [QuiverError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds:
        error = kind.__new__(kind, "text")
        assert type(travelled(error)) is kind


@pytest.mark.parametrize("place", ["deploy/kuberay.yaml", "docs/scaling_ray.md"])
def test_every_machine_is_told_the_same(place):
    """What we set for Ray on one machine is what the manifest and the page say for many."""
    text = (Path(__file__).parents[1] / place).read_text(encoding="utf-8")
    for name, value in cluster.RAY_SETTINGS.items():
        assert re.search(rf'{name}(={re.escape(value)}\b|, value: "{re.escape(value)}")', text), name
