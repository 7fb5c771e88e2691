"""Tiny checkpoints through the real loading path give what the float64 reference gives, alone and packed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import checkpoints
import reference
from conftest import settings
from quiver.config import Dtype, ModelsConfig
from quiver.engine import model
from quiver.engine.model import Model
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.models.hub import resolve
from quiver.types import Encoding
from sentences import SENTENCES

KINDS: tuple[checkpoints.Kind, ...] = ("bert", "roberta", "camembert", "xlm-roberta", "distilbert")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
POSITIONS = 512
VOCAB = 1500
LENGTHS = (1, 2, 3, 7, 16, 33, 128, 257, POSITIONS - 1, POSITIONS)
PACKS = ((1, 1), (1, 40, 1, 7, 60, 19), (POSITIONS, 1, POSITIONS), (5,) * 25)

HIDDEN_TOLERANCE = 1e-4
VECTOR_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as Quiver has loaded it, beside the files that the reference computes from."""

    folder: Path
    model: Model
    config: dict[str, Any]
    weights: dict[str, NDArray[Any]]

    def hidden(self, texts: Sequence[Encoding]) -> NDArray[np.float32]:
        """Run one forward pass: (T, H)."""
        return self.model.backend.forward(pack(texts))

    def expected_hidden(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Run the reference text by text: (T, H)."""
        return np.concatenate([self._reference(text) for text in texts])

    def expected(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Pool and normalise what the reference computes: (B, H)."""
        pooled = (reference.pool(self._reference(text), self.model.spec.pooling) for text in texts)
        return np.stack([reference.normalise(vector) for vector in pooled])

    def _reference(self, text: Encoding) -> reference.Doubles:
        type_ids = None if text.type_ids is None else text.type_ids.tolist()
        return reference.hidden_states(self.config, self.weights, text.ids.tolist(), type_ids)


def made(folder: Path, kind: checkpoints.Kind, **options: Any) -> Loaded:
    """Write a checkpoint and load it."""
    checkpoints.make(folder, kind, **options)
    return Loaded(folder, load(folder), *read(folder))


def load(folder: Path, dtype: Dtype = "float32") -> Model:
    """Load a directory as the engine does."""
    found = resolve(str(folder), None, ModelsConfig(), lambda *_: None)
    return model.load(found.spec, found.files, settings(dtype), lanes=1)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return a checkpoint's config.json and its tensors."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def encodings(*lengths: int) -> list[Encoding]:
    """Draw a text of each length; the same lengths give the same texts."""
    draw = np.random.default_rng(sum(lengths))
    return [Encoding(draw.integers(0, VOCAB, length)) for length in lengths]


def assert_near(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    """Check that no number is further off than `tolerance`."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Give each kind in turn."""
    return made(tmp_path_factory.mktemp(request.param), request.param, positions=POSITIONS, vocab=VOCAB)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Give the plainest kind."""
    return made(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(loaded: Loaded, length: int) -> None:
    """A text by itself has the reference's hidden states and vector, at every length up to the last position."""
    text = encodings(length)

    assert_near(loaded.hidden(text), loaded.expected_hidden(text), HIDDEN_TOLERANCE)
    assert_near(loaded.model.compute(text), loaded.expected(text), VECTOR_TOLERANCE)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed(loaded: Loaded, lengths: tuple[int, ...]) -> None:
    """Texts in one forward pass each have the reference's hidden states and vector: none sees another."""
    texts = encodings(*lengths)

    assert_near(loaded.hidden(texts), loaded.expected_hidden(texts), HIDDEN_TOLERANCE)
    assert_near(loaded.model.compute(texts), loaded.expected(texts), VECTOR_TOLERANCE)


def test_sentences(loaded: Loaded) -> None:
    """The sentences, read by the checkpoint's own tokenizer and cut to its length, have the reference's vectors."""
    texts = loaded.model.tokenizer.encode(SENTENCES, truncate=True)
    actual = np.concatenate([loaded.model.compute(texts[i : i + 8]) for i in range(0, len(texts), 8)])

    assert max(map(len, texts)) == POSITIONS
    assert_near(actual, loaded.expected(texts), VECTOR_TOLERANCE)


def test_stored_truncation_and_padding(loaded: Loaded) -> None:
    """The truncation and the padding that a tokenizer.json brings along are discarded."""
    stored = json.loads((loaded.folder / "tokenizer.json").read_text(encoding="utf-8"))
    short, long = loaded.model.tokenizer.encode(["a", "many words " * 50], truncate=True)

    assert stored["truncation"]["max_length"] == stored["padding"]["strategy"]["Fixed"] == checkpoints.STORED_LENGTH
    assert len(short) < checkpoints.STORED_LENGTH < len(long)


def test_sentences_differ() -> None:
    """There are 200 sentences and no two are the same."""
    assert 200 == len(SENTENCES) == len(set(SENTENCES))


def test_vectors_differ(loaded: Loaded) -> None:
    """The checkpoints tell the sentences apart, or equal vectors would prove nothing."""
    texts = {tuple(text.ids): text for text in loaded.model.tokenizer.encode(SENTENCES, truncate=True)}
    vectors = np.concatenate([loaded.model.compute([text]) for text in texts.values()])  # (B, H)
    cosines = vectors @ vectors.T

    assert len(texts) > 190
    assert np.median(cosines) < 0.9
    assert (np.triu(cosines, k=1) > 0.99).sum() < 5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_activations(tmp_path: Path, kind: checkpoints.Kind, activation: str) -> None:
    """Each activation that config.json may name is the reference's."""
    loaded, texts = made(tmp_path, kind, activation=activation), encodings(1, 30, 9)

    assert_near(loaded.hidden(texts), loaded.expected_hidden(texts), HIDDEN_TOLERANCE)


def test_activation_matters(bert: Loaded, tmp_path: Path) -> None:
    """The activation is read from config.json: the same weights with another one give other vectors."""
    relu, texts = made(tmp_path, "bert", activation="relu"), encodings(30)

    assert np.abs(relu.model.compute(texts) - bert.model.compute(texts)).max() > 100 * VECTOR_TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_poolings(tmp_path: Path, pooling: str) -> None:
    """The pooling that the sentence-transformers files name is the reference's."""
    loaded, texts = made(tmp_path, "bert", pooling=pooling), encodings(1, 30, 9)

    assert pooling == loaded.model.spec.pooling
    assert_near(loaded.model.compute(texts), loaded.expected(texts), VECTOR_TOLERANCE)


def test_type_ids(bert: Loaded) -> None:
    """The two halves of a pair have token types of their own."""
    text = encodings(24)[0]
    pair = Encoding(text.ids, np.repeat([0, 1], 12))
    texts = [text, pair]

    assert_near(bert.hidden(texts), bert.expected_hidden(texts), HIDDEN_TOLERANCE)
    assert np.abs(bert.hidden([text]) - bert.hidden([pair])).max() > 100 * HIDDEN_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 3])
def test_shapes(tmp_path: Path, kind: checkpoints.Kind, heads: int) -> None:
    """Sizes come from config.json: another width, depth and number of heads give the reference's vectors."""
    loaded = made(tmp_path, kind, hidden=33, layers=3, heads=heads, positions=40)
    texts = encodings(40, 1, 13)

    assert loaded.model.backend.max_positions == 40
    assert loaded.model.spec.max_tokens == 40
    assert loaded.model.backend.vocab_size == VOCAB
    assert_near(loaded.model.compute(texts), loaded.expected(texts), VECTOR_TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "prefix", "legacy_norms"),
    [
        ("bert", "", True),
        ("bert", "bert.", False),
        ("bert", "bert.", True),
        ("roberta", "roberta.", False),
        ("xlm-roberta", "roberta.", False),
        ("distilbert", "distilbert.", False),
    ],
)
def test_names(tmp_path: Path, kind: checkpoints.Kind, prefix: str, *, legacy_norms: bool) -> None:
    """A checkpoint whose tensors have a head's prefix or old names gives the same bits as the plain one."""
    plain = made(tmp_path / "plain", kind)
    other = made(tmp_path / "other", kind, prefix=prefix, legacy_norms=legacy_norms)
    texts = encodings(1, 30, 9)

    assert f"{prefix}embeddings.LayerNorm.{'gamma' if legacy_norms else 'weight'}" in other.weights
    np.testing.assert_array_equal(other.hidden(texts), plain.hidden(texts))


def test_half_precision(tmp_path: Path) -> None:
    """Weights stored in 16 bits are computed in 32: only their own rounding is lost."""
    loaded, texts = made(tmp_path, "bert", dtype="float16"), encodings(1, 30, 9)

    assert {array.dtype for array in loaded.weights.values()} == {np.dtype(np.float16)}
    assert_near(loaded.hidden(texts), loaded.expected_hidden(texts), HIDDEN_TOLERANCE)


def test_no_sentence_transformers_files(tmp_path: Path, bert: Loaded) -> None:
    """A repository without them is pooled by the mean and normalised."""
    bare, texts = made(tmp_path, "bert", pooling=None), encodings(1, 30, 9)

    assert not (tmp_path / "modules.json").exists()
    np.testing.assert_array_equal(bare.model.compute(texts), bert.model.compute(texts))


def test_int8(loaded: Loaded) -> None:
    """In 8 bits each sentence stays near its vector: on these models the furthest was measured at a cosine of 0.998."""
    int8 = load(loaded.folder, "int8")
    texts = loaded.model.tokenizer.encode(SENTENCES, truncate=True)
    exact = np.concatenate([loaded.model.compute([text]) for text in texts])  # (B, H)
    rough = np.concatenate([int8.compute([text]) for text in texts])

    assert not np.array_equal(exact, rough)
    assert (exact * rough).sum(axis=1).min() >= 0.99


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("bert", {"model_type": "mamba"}, "mamba"),
        ("bert", {"model_type": None}, "architecture"),
        ("bert", {"hidden_act": "mish"}, "mish"),
        ("distilbert", {"activation": "mish"}, "mish"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("bert", {"num_hidden_layers": 3}, "encoder.layer.2."),
        ("bert", {"num_attention_heads": 7}, "graph"),
    ],
)
def test_config_not_understood(tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any], named: str) -> None:
    """A config.json that asks for what is not there is refused when it is loaded, by name."""
    config, _ = read(checkpoints.make(tmp_path, kind))
    checkpoints.write_json(tmp_path / "config.json", config | changes)

    with pytest.raises(LoadError, match=re.escape(named)):
        load(tmp_path)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_hidden_layers"])
def test_config_key_missing(tmp_path: Path, key: str) -> None:
    """A config.json that leaves out a size is refused, naming the key."""
    config, _ = read(checkpoints.make(tmp_path, "bert"))
    del config[key]
    checkpoints.write_json(tmp_path / "config.json", config)

    with pytest.raises(LoadError, match=key):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_missing(tmp_path: Path, kind: checkpoints.Kind) -> None:
    """A checkpoint that lacks any one tensor of the encoder is refused, naming the tensor."""
    _, weights = read(checkpoints.make(tmp_path, kind, layers=1))
    for name in weights:
        if name.startswith("pooler."):  # trained for another purpose; no embedding uses it
            continue
        save_file({other: array for other, array in weights.items() if other != name}, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=re.escape(name)):
            load(tmp_path)
