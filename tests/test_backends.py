"""What every backend keeps, whatever runs it: the reference's numbers, the shapes of the contract, errors that name the file."""

import gc
import json
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import checkpoints
import reference
from quiver.backends import Backend, ct2, onnx, pytorch
from quiver.engine.packing import pack
from quiver.errors import LoadError, MissingExtra
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Kind

LOADERS: dict[str, ModuleType] = {"onnx": onnx, "torch": pytorch, "ct2": ct2}
NEEDS_PACKAGES = pytest.mark.torch
"""The packages of the extras are installed where transformers is."""
BACKENDS = ["onnx", pytest.param("torch", marks=NEEDS_PACKAGES), pytest.param("ct2", marks=NEEDS_PACKAGES)]
WITH_HEADS = BACKENDS[:2]
POSITIONS = 256
VOCAB = 1500
LENGTHS = (1, 2, 7, 33, 128, POSITIONS)
PACKS = ((1, 1), (1, 40, 1, 7, 60, 19), (POSITIONS, 1, POSITIONS), (5,) * 25)
LABELS = 3
MANY_WORDS = 400_000
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Loaded:
    """A backend beside the files that the reference computes from."""

    backend: Backend
    config: dict[str, Any]
    weights: dict[str, NDArray[Any]]

    def expected(self, inputs: Sequence[Encoding]) -> reference.Doubles:
        """Run the reference input by input: (T, H)."""
        return np.concatenate([self.hidden(one) for one in inputs])

    def hidden(self, one: Encoding) -> reference.Doubles:
        """Run the reference over one input: (T, H)."""
        type_ids = None if one.type_ids is None else one.type_ids.tolist()
        return reference.hidden_states(self.config, self.weights, one.ids.tolist(), type_ids)


def load(name: str, folder: Path, kind: Kind = "embed") -> Backend:
    """Load a directory as an engine does."""
    spec = ModelSpec(id="test/tiny", weights="test/tiny", kind=kind, dimensions=48, max_tokens=POSITIONS)
    return LOADERS[name].load(ModelFiles(folder, "test/tiny"), spec, dtype="float32", lanes=2)


def made(folder: Path, kind: checkpoints.Kind, **options: Any) -> Path:
    """Write a checkpoint of the sizes of these tests."""
    return checkpoints.make(folder, kind, positions=POSITIONS, vocab=VOCAB, **options)


def drawn(*lengths: int) -> list[Encoding]:
    """Draw an input of each length; the same lengths give the same inputs."""
    draw = np.random.default_rng(sum(lengths))
    return [Encoding(draw.integers(5, VOCAB, length)) for length in lengths]


def assert_near(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Check that no number is further off than the tolerance."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    """Give each backend's name in turn."""
    return request.param


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def loaded(request: pytest.FixtureRequest, name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """Give each backend with each checkpoint."""
    folder = made(tmp_path_factory.mktemp(request.param), request.param)
    backend = load(name, folder)
    yield Loaded(backend, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
    backend.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(loaded: Loaded, length: int) -> None:
    """An input by itself has the reference's states, at every length up to the last position."""
    inputs = drawn(length)
    assert_near(loaded.backend.forward(pack(inputs)), loaded.expected(inputs))


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_in_company(loaded: Loaded, lengths: tuple[int, ...]) -> None:
    """Inputs of one forward pass each have the reference's states, in their order: none sees another."""
    inputs = drawn(*lengths)
    assert_near(loaded.backend.forward(pack(inputs)), loaded.expected(inputs))


def test_token_types(loaded: Loaded) -> None:
    """The two texts of a pair are told apart where the architecture does so, in company of one that is no pair."""
    single, other = drawn(24, 9)
    pair = Encoding(single.ids, np.repeat([0, 1], 12))
    states = loaded.backend.forward(pack([single, pair, other]))
    if loaded.config["type_vocab_size"] > 1:
        assert_near(states, loaded.expected([single, pair, other]))
        assert np.abs(states[:24] - states[24:48]).max() > 100 * TOLERANCE
    else:
        assert_near(states, loaded.expected([single, single, other]))


def test_layout(loaded: Loaded) -> None:
    """States come as a row for each token, float32 and C-contiguous, in an array that the caller may change."""
    states = loaded.backend.forward(pack(drawn(3, 17, 5)))
    assert states.shape == (25, 48)
    assert states.dtype == np.float32
    assert states.flags.c_contiguous
    assert states.flags.writeable
    assert not loaded.backend.pooled


def test_figures(loaded: Loaded) -> None:
    """What the scheduler reckons with is positive, and what the checkpoint says is as it says."""
    assert loaded.backend.lanes == 2
    assert loaded.backend.batch_tokens > 0
    assert loaded.backend.vocab_size == VOCAB
    assert loaded.backend.max_positions == POSITIONS
    assert loaded.backend.name


def test_lanes_chosen_by_the_backend(name: str, tmp_path: Path) -> None:
    """Asked for no number of lanes, a backend chooses one."""
    spec = ModelSpec(id="test/tiny", weights="test/tiny", dimensions=48, max_tokens=POSITIONS)
    backend = LOADERS[name].load(ModelFiles(made(tmp_path, "bert")), spec, dtype="float32", lanes=0)
    assert backend.lanes > 0


def test_two_threads(loaded: Loaded) -> None:
    """Two lanes at once compute what one computes."""
    batches = [pack(drawn(*lengths)) for lengths in ((40, 7), (3, 90, 1), (128,), (5,) * 20)] * 4
    alone = [loaded.backend.forward(batch) for batch in batches]
    with ThreadPoolExecutor(2) as lanes:
        together = list(lanes.map(loaded.backend.forward, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE / 10)


def test_close(name: str, tmp_path: Path) -> None:
    """A closed backend gives its memory back: so many in a row would hold four times one model's weights, or more."""
    folder = checkpoints.make(tmp_path, "bert", vocab=MANY_WORDS)
    spec = ModelSpec(id="test/tiny", weights="test/tiny", dimensions=48, max_tokens=POSITIONS)
    held = []
    for _ in range(5):
        backend = LOADERS[name].load(ModelFiles(folder), spec, dtype="float32", lanes=1)
        backend.forward(pack(drawn(5)))
        backend.close()
        del backend
        gc.collect()
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[0] < 0.8 * MANY_WORDS * 48 * 4


def test_weights_are_not_copied(tmp_path: Path) -> None:
    """What ONNX Runtime looks up in a file stays there: a model of many words takes less memory than its words do."""
    folder = checkpoints.make(tmp_path, "bert", vocab=MANY_WORDS)
    spec = ModelSpec(id="test/tiny", weights="test/tiny", dimensions=48, max_tokens=POSITIONS)
    LOADERS["onnx"].load(ModelFiles(made(tmp_path, "bert")), spec, dtype="float32", lanes=1).close()  # imports, arenas
    before = psutil.Process().memory_full_info().uss
    backend = LOADERS["onnx"].load(ModelFiles(folder), spec, dtype="float32", lanes=1)
    backend.forward(pack(drawn(5)))
    taken = psutil.Process().memory_full_info().uss - before
    backend.close()
    assert taken < 0.5 * MANY_WORDS * 48 * 4


def with_head(folder: Path) -> Path:
    """Write a BERT with a head that scores labels."""
    made(folder, "bert", prefix="bert.")
    draw = np.random.default_rng(1)
    head = {"classifier.weight": draw.standard_normal((LABELS, 48)), "classifier.bias": draw.standard_normal(LABELS)}
    tensors = load_file(folder / "model.safetensors") | {key: value.astype(np.float32) for key, value in head.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = {str(i): f"LABEL_{i}" for i in range(LABELS)}
    checkpoints.write_json(folder / "config.json", config | {"id2label": names})
    return folder


@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("kind", ["rerank", "classify"])
def test_scores_of_labels(name: str, kind: Kind, tmp_path: Path) -> None:
    """A model with a head gives a row for each input, (B, L), and it is the reference's."""
    backend, inputs = load(name, with_head(tmp_path), kind), drawn(7, 1, 60)
    weights = load_file(tmp_path / "model.safetensors")
    plain = {key.removeprefix("bert."): reference.double(value) for key, value in weights.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    scores = backend.forward(pack(inputs))

    firsts = np.stack([reference.hidden_states(config, plain, one.ids.tolist())[0] for one in inputs])  # (B, H)
    read = np.tanh(reference.linear(plain, "pooler.dense", firsts))
    assert backend.pooled
    assert scores.shape == (3, LABELS)
    assert scores.dtype == np.float32
    assert scores.flags.c_contiguous
    assert_near(scores, reference.linear(plain, "classifier", read))


@pytest.mark.parametrize("name", WITH_HEADS)
def test_no_head(name: str, tmp_path: Path) -> None:
    """A model that is to score labels but has no head for it is refused, naming the tensor."""
    with pytest.raises(LoadError, match=re.escape("classifier.")):
        load(name, made(tmp_path, "bert", prefix="bert."), "classify")


def test_weights_missing(name: str, tmp_path: Path) -> None:
    """A directory without weights is refused, naming the file."""
    (made(tmp_path, "bert") / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=re.escape(str(tmp_path / "model.safetensors"))):
        load(name, tmp_path)


def test_weights_cut_short(name: str, tmp_path: Path) -> None:
    """A file of weights that ends too early is refused, naming it."""
    path = made(tmp_path, "bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LoadError, match=re.escape(str(path))):
        load(name, tmp_path)


def test_weights_pickled(name: str, tmp_path: Path) -> None:
    """Weights that could run code when they are opened are never read."""
    path = made(tmp_path, "bert") / "model.safetensors"
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pickle"):
        load(name, tmp_path)


@pytest.mark.parametrize("tensor", ["embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.bias"])
def test_tensor_missing(name: str, tensor: str, tmp_path: Path) -> None:
    """A checkpoint that lacks a tensor is refused, naming it: none is made up."""
    path = made(tmp_path, "bert") / "model.safetensors"
    weights = load_file(path)
    del weights[tensor]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=re.escape(tensor)):
        load(name, tmp_path)


def test_config_missing(name: str, tmp_path: Path) -> None:
    """A directory without config.json is refused, naming the file."""
    (made(tmp_path, "bert") / "config.json").unlink()
    with pytest.raises(LoadError, match=re.escape("config.json")):
        load(name, tmp_path)


def test_unknown_architecture(name: str, tmp_path: Path) -> None:
    """An architecture that nobody knows is refused by its name."""
    config = json.loads((made(tmp_path, "bert") / "config.json").read_text())
    checkpoints.write_json(tmp_path / "config.json", config | {"model_type": "telepath"})
    with pytest.raises(LoadError, match="telepath"):
        load(name, tmp_path)


@pytest.mark.parametrize(("name", "package"), [("torch", "torch"), ("torch", "transformers"), ("ct2", "ctranslate2")])
def test_extra_missing(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose package is not installed can be imported, and says which extra to install when it is used."""
    for one in ("torch", "transformers", "ctranslate2"):
        module = None if one == package else ModuleType(one)
        if module:
            module.__spec__ = ModuleSpec(one, None)
        monkeypatch.setitem(sys.modules, one, module)
    with pytest.raises(MissingExtra, match=re.escape(f"pip install 'quiver[{name}]'")):
        load(name, tmp_path)


def test_no_graphics_card_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is not installed, there is no graphics card to use, and that is no error."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not pytorch.has_gpu()
