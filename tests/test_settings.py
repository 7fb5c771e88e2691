"""What some settings do to a server that has them: how much it takes at once, where it listens, how it pools."""

import asyncio
import json
import threading

import httpx
import numpy as np
import pytest

import checkpoints
from conftest import assembled, listening
from fakes import HashBackend, fake_model, hash_model
from hub_machine import beside_a_hub, spec
from hub_server import Repository, tiny
from quiver import app
from quiver.api.call import Call
from quiver.config import Config, EngineConfig, ModelsConfig, ServerConfig
from quiver.models.catalogue import Golden
from quiver.models.files import ModelFiles
from quiver.models.spec import with_pooling
from quiver.types import Caller, EmbedRequest

TEXTS = ["a cat on the mat", "so", "three men in a boat"]


class Held:
    """A model whose forward passes wait until the test lets them go."""

    def __init__(self):
        self._gate, self._busy = threading.Event(), threading.Event()
        self.model = hash_model(lanes=1, before=self._enter)

    def _enter(self, batch):
        del batch
        self._busy.set()
        assert self._gate.wait(10)

    async def at_work(self):
        """Wait until a forward pass has begun."""
        await asyncio.to_thread(self._busy.wait, 10)

    def let_go(self):
        """Let all of them end."""
        self._gate.set()


def ask(parts, text, path="/v1/embeddings"):
    """Start a request; returns its task."""
    body = json.dumps({"input": text, "inputs": text}).encode()
    return asyncio.ensure_future(parts.api.receive(Call("POST", path, {}, body)))


# At once


async def test_a_request_over_the_number_at_work_is_refused():
    """It is told to come back in the shape of its own API, and is welcome once another has been answered."""
    held = Held()
    async with assembled(held.model, server=ServerConfig(max_concurrent_requests=1)) as parts:
        first = ask(parts, "a")
        await held.at_work()
        refused, of_tei = await ask(parts, "b"), await ask(parts, "b", "/tei/embed")
        held.let_go()
        answered = [await first, await ask(parts, "c")]
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert (of_tei.status, json.loads(of_tei.body)["error_type"]) == (429, "Overloaded")
    assert [reply.status for reply in answered] == [200, 200]


async def test_it_may_wait_for_its_turn():
    """With `queue_seconds` it is answered when another is done in time, and refused when none is."""
    held = Held()
    patient = ServerConfig(max_concurrent_requests=1, queue_seconds=0.3)
    async with assembled(held.model, server=patient) as parts:
        first = ask(parts, "a")
        await held.at_work()
        assert (await ask(parts, "b")).status == 429
        waiting = ask(parts, "c")
        await asyncio.sleep(0.05)
        assert not waiting.done()
        held.let_go()
        assert [(await first).status, (await waiting).status] == [200, 200]


async def test_one_that_gave_up_waiting_leaves_no_gap():
    """A client that goes while it waits takes no place with it."""
    held = Held()
    async with assembled(held.model, server=ServerConfig(max_concurrent_requests=1, queue_seconds=10)) as parts:
        first = ask(parts, "a")
        await held.at_work()
        gone = ask(parts, "b")
        await asyncio.sleep(0.01)
        gone.cancel()
        held.let_go()
        assert [(await first).status, (await ask(parts, "c")).status] == [200, 200]


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/v1/models"])
async def test_who_only_looks_is_always_let_in(path):
    """Probes and lists are answered while all places are taken."""
    held = Held()
    async with assembled(held.model, server=ServerConfig(max_concurrent_requests=1)) as parts:
        first = ask(parts, "a")
        await held.at_work()
        assert (await parts.api.receive(Call("GET", path))).status == 200
        held.let_go()
        await first


# In a forward pass


async def test_a_forward_pass_takes_so_many_inputs():
    """`batch_inputs` bounds a batch, of the model that it is for."""
    counts = []
    model = fake_model(HashBackend(lanes=1, before=lambda batch: counts.append(len(batch.lengths))))
    async with assembled(model, models={"batch_inputs": (2,)}) as parts:
        await parts.engine.embed(EmbedRequest(inputs=[str(i) for i in range(10)]), Caller("test"))
    assert max(counts) == 2
    assert sum(counts) == 10


@pytest.mark.parametrize(("asked", "wanted"), [(0, 128), (64, 64), (16384, 128)])
async def test_a_forward_pass_never_takes_more_tokens_than_the_backend_is_made_for(asked, wanted):
    """Another system's number lowers the budget, and does not lift it over what is exact and fast here."""
    async with assembled(hash_model(batch_tokens=128), engine=EngineConfig(batch_tokens=asked)) as parts:
        (status,) = parts.service.models()
    assert status.batch_tokens == wanted


# Where it listens


@pytest.mark.parametrize("prefix", ["/v1", "/behind/a/proxy/"])
async def test_a_prefix_may_stand_before_every_route(prefix):
    """A route is found with the prefix and without it."""
    async with listening(server=ServerConfig(url_prefix=prefix)) as url, httpx.AsyncClient(base_url=url) as http:
        under = prefix.rstrip("/")
        for path in ("/health/live", f"{under}/health/live", f"{under}/v1/models"):
            assert (await http.get(path)).status_code == 200, path
        embedded = await http.post(f"{under}/infinity/embeddings", json={"input": "a"})
        assert embedded.json()["id"].startswith("infinity-")


async def test_a_path_that_only_begins_like_the_prefix_is_whole():
    """A prefix ends where a slash does: /v is none of /v1."""
    async with listening(server=ServerConfig(url_prefix="/v")) as url, httpx.AsyncClient(base_url=url) as http:
        assert [(await http.get(path)).status_code for path in ("/v1/models", "/v/v1/models")] == [200, 200]


# Which model it is


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return the directory of a tiny random model that averages its tokens."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "tiny", "bert", pooling="mean")


async def embed(folder, pooling):
    """Return a model's vectors, its tokens' vectors, and what it is said to do."""
    engine = app.build(Config(models=ModelsConfig(model=(str(folder),), pooling=(pooling,)))).engine
    async with engine:
        await engine.load(lambda *_: None)
        request = EmbedRequest(inputs=TEXTS, normalize=False)
        vectors = (await engine.embed(request, Caller("test"))).vectors
        tokens = (await engine.embed_tokens(request, Caller("test"))).vectors
        return vectors, tokens, engine.replicas.statuses[0].pooling


@pytest.mark.parametrize(
    ("pooling", "of", "said"),
    [
        ("auto", lambda tokens: tokens.mean(axis=0), "mean"),
        ("mean", lambda tokens: tokens.mean(axis=0), "mean"),
        ("cls", lambda tokens: tokens[0], "cls"),
        ("last_token", lambda tokens: tokens[-1], "last_token"),
    ],
)
async def test_the_operator_may_choose_the_pooling(bert, pooling, of, said):
    """Vectors are made of the tokens' as the setting says, and the model's description says it too."""
    vectors, tokens, name = await embed(bert, pooling)
    np.testing.assert_allclose(vectors, [of(each) for each in tokens], atol=1e-6)
    assert name == said


def test_a_masked_language_model_may_weigh_words(tmp_path):
    """Pooled as SPLADE does, it is a sparse model over its vocabulary, whatever numbers were known of its vectors."""
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    sparse = with_pooling(spec(matryoshka=(32,)), ModelFiles(tmp_path, "acme/tiny"), "splade")
    assert (sparse.kind, sparse.dimensions, sparse.normalize, sparse.matryoshka) == ("sparse", 77, False, ())


def test_only_vectors_are_pooled(tmp_path):
    """A reranker beside an embedding model is left alone by a setting for all."""
    reranker = spec(kind="rerank")
    assert with_pooling(reranker, ModelFiles(tmp_path, "acme/tiny"), "cls") is reranker


async def test_the_operator_may_name_a_model(bert):
    """It is listed and answers under the chosen name, still answers to its own, and stays what it is."""
    models = ModelsConfig(model=(str(bert),), served_model_name=("our-model",))
    engine = app.build(Config(models=models)).engine
    async with engine:
        assert [status.id for status in engine.replicas.statuses] == ["our-model"]
        await engine.load(lambda *_: None)
        for name in (None, "our-model", "OUR-MODEL", "tiny"):
            request = EmbedRequest(inputs=TEXTS, model=name)
            assert (await engine.embed(request, Caller("test"))).model == "our-model"
        assert [status.id for status in engine.replicas.statuses] == ["our-model"]


def test_the_operator_may_choose_the_revision(tmp_path, monkeypatch):
    """A commit's files are served, with no hash of the catalogue's own commit held against them."""
    with beside_a_hub(tmp_path, monkeypatch) as machine:
        old = machine.repository
        machine.hub.repositories["acme/tiny"] = Repository(tiny(value=7), parent=old)
        pinned = spec(revision="main", sha256={"model.safetensors": "0" * 64}, golden=Golden(text="a", first=(1.0,)))
        for known in (None, pinned):
            found = machine.find(spec=known, revision=(old.commit,))
            assert found.spec.revision == old.commit
            assert found.files.path("model.safetensors").read_bytes() == old.files["model.safetensors"]
            assert found.spec.golden is None
