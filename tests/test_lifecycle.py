"""Models come and go while others serve: on first use, under a memory budget, by hand; failures stay with their model."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import checkpoints
from conftest import MINILM, assembled, settings
from fakes import HashBackend, fake_model, hash_model
from quiver import app
from quiver.config import Config, EngineConfig, ModelsConfig
from quiver.engine import model as loading
from quiver.engine.model import WarmUp
from quiver.errors import LoadError, LoadFailed, NotReady, Overloaded, UnknownModel
from quiver.models.catalogue import Catalogue, Golden
from quiver.types import Caller, EmbedRequest, ModelState

ME = Caller("me")
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write three tiny models that differ."""
    root = tmp_path_factory.mktemp("models")
    return {name: checkpoints.make(root / name, "bert", seed=i) for i, name in enumerate(NAMES)}


def lazily(folders, *names, **settings):
    """Return settings that let models be loaded on first use."""
    return {"allow_models": tuple(str(folders[name]) for name in names), **settings}


async def embed(parts, model, text="a dog", **options):
    """Embed a text with a model."""
    return await parts.service.embed(EmbedRequest(inputs=[text], model=model, **options), ME)


def state_of(parts, name):
    """Return what a model is doing."""
    return parts.service.model(name).state


async def test_a_model_is_loaded_when_it_is_first_asked_for(folders):
    """It is listed as available before, and as ready after; two requests at once load it once."""
    async with assembled(models=lazily(folders, "first")) as parts:
        assert state_of(parts, "first") is ModelState.AVAILABLE
        one, two = await asyncio.gather(embed(parts, "first"), embed(parts, "FIRST"))
        assert state_of(parts, "first") is ModelState.READY
        assert len(parts.engine.replicas.loaded) == 2
    assert one.model == "first"
    np.testing.assert_array_equal(one.vectors, two.vectors)


async def test_a_model_that_is_not_allowed_is_not_loaded(folders):
    """A name that nobody allowed is unknown, whatever lies on the disk, and no path is ever followed."""
    async with assembled(models=lazily(folders, "first")) as parts:
        for name in ("second", str(folders["second"]), "../second", "BAAI/bge-small-en-v1.5", "a/../b"):
            with pytest.raises(UnknownModel):
                await embed(parts, name)
        assert len(parts.engine.replicas.loaded) == 1


async def test_a_star_allows_the_catalogue():
    """Every model of the catalogue is listed as available; the configured one is ready."""
    async with assembled(models={"allow_models": ("*",)}) as parts:
        states = {status.id: status.state for status in parts.service.models()}
    assert states["test/hash"] is ModelState.READY
    assert states["BAAI/bge-small-en-v1.5"] is ModelState.AVAILABLE
    assert len(states) > 20


async def test_what_a_star_leaves_out_is_unknown():
    """A pattern takes models out of the catalogue by their id or their ONNX file; one that is named by itself stays."""
    named, excluded = ("*", "BAAI/bge-base-en-v1.5"), ("*/BGE-*", "onnx/model.onnx")
    async with assembled(models={"allow_models": named, "exclude_models": excluded}) as parts:
        ids = {status.id for status in parts.service.models()}
    specs = {spec.id: spec for spec in Catalogue.load()}
    left_out = {i for i, spec in specs.items() if "/bge-" in i or spec.onnx_file == "onnx/model.onnx"}
    assert len(left_out) > 5
    assert ids == {"test/hash", "BAAI/bge-base-en-v1.5", *(specs.keys() - left_out)}


async def test_the_least_recently_used_gives_way(folders):
    """Over the budget, the model that was used longest ago is unloaded; a configured one never is."""
    size = (folders["first"] / "model.safetensors").stat().st_size
    async with assembled(models=lazily(folders, *NAMES, max_model_bytes=int(2.5 * size))) as parts:
        for name in ("first", "second", "first", "third"):
            await embed(parts, name)
        assert state_of(parts, "test/hash") is ModelState.READY
        assert [state_of(parts, name) for name in NAMES] == [ModelState.READY, ModelState.AVAILABLE, ModelState.READY]
        await embed(parts, "second")
        assert state_of(parts, "first") is ModelState.AVAILABLE


async def test_a_model_in_use_does_not_give_way(folders):
    """While all that could be unloaded is in use, one more is refused for the moment."""
    size = (folders["first"] / "model.safetensors").stat().st_size
    async with assembled(models=lazily(folders, "first", "second", max_model_bytes=int(1.5 * size))) as parts:
        with await parts.engine.replicas.find("first"):
            with pytest.raises(Overloaded, match="in use"):
                await embed(parts, "second")
            assert state_of(parts, "second") is ModelState.AVAILABLE
        await embed(parts, "second")
        assert state_of(parts, "first") is ModelState.AVAILABLE


async def test_models_that_do_not_fit_together_take_turns(folders):
    """Asked for at once, each is answered, or told that there is no room now; none is given away and then taken."""
    size = (folders["first"] / "model.safetensors").stat().st_size
    async with assembled(models=lazily(folders, *NAMES, max_model_bytes=int(1.5 * size))) as parts:
        for _ in range(3):
            replies = await asyncio.gather(*(embed(parts, name) for name in NAMES), return_exceptions=True)
            answered = [reply for reply in replies if not isinstance(reply, Exception)]
            assert answered
            assert all(isinstance(reply, Overloaded) for reply in replies if isinstance(reply, Exception)), replies


async def test_a_model_that_can_never_fit_says_so(folders):
    """One that is larger than the whole budget is refused with both numbers' names."""
    async with assembled(models=lazily(folders, "first", max_model_bytes=1000)) as parts:
        with pytest.raises(LoadFailed, match="max_model_bytes"):
            await embed(parts, "first")


async def test_a_broken_model_fails_alone(folders, tmp_path):
    """Its requests are told why and which file; it is not tried again at once; the others answer on."""
    broken = tmp_path / "broken"
    checkpoints.make(broken, "bert")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    async with assembled(models={"allow_models": (str(broken), str(folders["first"]))}) as parts:
        with pytest.raises(LoadFailed, match=r"model\.safetensors is cut short"):
            await embed(parts, "broken")
        assert state_of(parts, "broken") is ModelState.FAILED
        weights.unlink()  # it is not looked at again so soon: the error stays the first one
        with pytest.raises(LoadFailed, match="cut short"):
            await embed(parts, "broken")
        await embed(parts, "test/hash")
        await embed(parts, "first")


async def test_whoever_cannot_wait_is_told_and_the_load_goes_on(folders):
    """A request's patience ends while its model loads; the next one finds it loaded."""
    async with assembled(models=lazily(folders, "first")) as parts:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e-4):
                await embed(parts, "first")
        assert (await embed(parts, "first")).model == "first"


async def test_a_model_is_taken_away_without_dropping_a_request():
    """Requests that run are answered, new ones do not find it, and then its memory is given back."""
    gate, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        assert gate.wait(10)

    backend = HashBackend(before=wait)
    async with assembled() as parts:
        replicas = parts.engine.replicas
        replicas.add("other", fake_model(backend, id="test/other", aliases=("other",)), WarmUp())
        running = asyncio.create_task(embed(parts, "test/other"))
        await asyncio.to_thread(busy.wait, 10)
        removing = asyncio.create_task(replicas.remove("other"))
        await asyncio.sleep(0)
        with pytest.raises(UnknownModel):
            await embed(parts, "other")
        assert not removing.done()
        assert not backend.closed
        gate.set()
        assert (await running).model == "test/other"
        await removing
        assert backend.closed
        assert [status.id for status in parts.service.models()] == ["test/hash"]


async def test_a_model_is_added_while_others_serve(folders):
    """Requests for the first model are all answered, with the same bits, while a second one is loaded."""
    async with assembled(hash_model(), models=lazily(folders, "first")) as parts:
        wanted = (await embed(parts, "hash")).vectors
        loaded = asyncio.Event()

        async def ask():
            count = 0
            while not loaded.is_set() or count < 5:
                np.testing.assert_array_equal((await embed(parts, "hash")).vectors, wanted)
                count += 1
            return count

        clients = [asyncio.create_task(ask()) for _ in range(16)]
        await embed(parts, "first")
        loaded.set()
        assert sum(await asyncio.gather(*clients)) >= 16 * 5


async def test_before_a_configured_model_is_there_it_is_not_ready(folders):
    """A request for a model that is still being loaded is told to come back; another name is unknown only later."""
    config = Config(models=ModelsConfig(model=(str(folders["first"]),)), engine=EngineConfig())
    async with app.build(config).engine as engine:
        for name in (None, "first", "second"):
            with pytest.raises(NotReady):
                await engine.embed(EmbedRequest(inputs=["a"], model=name), ME)
        await engine.load(lambda *_: None)
        assert (await engine.embed(EmbedRequest(inputs=["a"], model="first"), ME)).model == "first"
        with pytest.raises(UnknownModel):
            await engine.embed(EmbedRequest(inputs=["a"], model="second"), ME)


async def test_a_model_that_computes_other_numbers_than_its_weights_should_is_refused(minilm_files):
    """The self-test after loading compares with known numbers; without it, the model is loaded."""
    spec = Catalogue.load().find(MINILM)
    assert spec.golden
    model = loading.load(spec, minilm_files, settings(), lanes=1)
    model.check_golden()
    first = (-spec.golden.first[0], *spec.golden.first[1:])
    wrong = replace(model, spec=replace(spec, golden=Golden(text=spec.golden.text, first=first)))
    with pytest.raises(LoadError, match="damaged or another model's"):
        wrong.check_golden()
    model.backend.close()


async def test_idle_models_cost_no_time():
    """A readiness probe pings only what is loaded."""
    async with assembled(models={"allow_models": ("*",)}) as parts:
        start = time.monotonic()
        await parts.service.check_ready()
        assert time.monotonic() - start < 5
