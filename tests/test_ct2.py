"""The backend on CTranslate2: the whole BERT family, in both arithmetics, described from safetensors."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoints
import reference
from quiver.backends import ct2
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding

pytestmark = pytest.mark.torch

KINDS: tuple[checkpoints.Kind, ...] = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
VOCAB = 1500
LENGTHS = (3, 90, 17, 1, 512)
TOLERANCE = 1e-4


def load(folder: Path, dtype: str = "float32", **spec: Any) -> Any:
    """Load a directory as the engine does."""
    entry = ModelSpec(id="a/b", weights="a/b", dimensions=48, max_tokens=512, **spec)
    return ct2.load(ModelFiles(folder), entry, dtype=dtype)


def drawn(*lengths: int) -> list[Encoding]:
    """Draw inputs."""
    draw = np.random.default_rng(sum(lengths))
    return [Encoding(draw.integers(0, VOCAB, length)) for length in lengths]


def expected(folder: Path, inputs: list[Encoding], **changes: Any) -> reference.Doubles:
    """Run the reference input by input: (T, H)."""
    config = json.loads((folder / "config.json").read_text()) | changes
    weights = load_file(folder / "model.safetensors")
    return np.concatenate([reference.hidden_states(config, weights, one.ids.tolist()) for one in inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_family(kind: checkpoints.Kind, tmp_path: Path) -> None:
    """Each architecture of the family has the reference's states."""
    folder, inputs = checkpoints.make(tmp_path, kind), drawn(*LENGTHS)
    np.testing.assert_allclose(load(folder).forward(pack(inputs)), expected(folder, inputs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_activations(kind: checkpoints.Kind, activation: str, tmp_path: Path) -> None:
    """Each activation that config.json may name is the reference's."""
    folder, inputs = checkpoints.make(tmp_path, kind, activation=activation), drawn(30, 9)
    np.testing.assert_allclose(load(folder).forward(pack(inputs)), expected(folder, inputs), rtol=0, atol=TOLERANCE)


def test_epsilon(tmp_path: Path) -> None:
    """What a norm adds to the variance comes from config.json."""
    folder, inputs = checkpoints.make(tmp_path, "bert"), drawn(30, 9)
    config = json.loads((folder / "config.json").read_text())
    checkpoints.write_json(folder / "config.json", config | {"layer_norm_eps": 0.5})
    np.testing.assert_allclose(load(folder).forward(pack(inputs)), expected(folder, inputs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("prefix", "legacy_norms"), [("bert.", False), ("", True)])
def test_names(prefix: str, legacy_norms: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Tensors with a head's prefix or old names give the same bits as the plain ones."""
    plain = checkpoints.make(tmp_path / "plain", "bert")
    other = checkpoints.make(tmp_path / "other", "bert", prefix=prefix, legacy_norms=legacy_norms)
    batch = pack(drawn(30, 9))
    np.testing.assert_array_equal(load(other).forward(batch), load(plain).forward(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_int8(kind: checkpoints.Kind, tmp_path: Path) -> None:
    """In 8 bits each input stays near its vector: on these models the furthest was measured at a cosine of 0.973."""
    folder, inputs = checkpoints.make(tmp_path, kind), drawn(*LENGTHS)
    int8 = load(folder, "int8")
    cosines = [
        rough @ exact / np.linalg.norm(rough) / np.linalg.norm(exact)
        for one in inputs
        for rough, exact in [(int8.forward(pack([one])).mean(axis=0), expected(folder, [one]).mean(axis=0))]
    ]
    assert 0.95 < min(cosines) < 1 - 1e-6


def test_it_pads(tmp_path: Path) -> None:
    """The scheduler is told that short inputs cost as much as the longest beside them."""
    assert load(checkpoints.make(tmp_path, "bert")).padded


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to hand the model over is gone when it is loaded."""
    folder, temporary = checkpoints.make(tmp_path / "model", "bert"), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    load(folder)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mpnet"}, "mpnet"),
        ({"hidden_act": "mish"}, "mish"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "decoder"),
        ({"num_hidden_layers": 3}, "encoder.layer.2."),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_config_not_understood(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """A config.json that asks for what is not there is refused when it is loaded, by name."""
    config = json.loads((checkpoints.make(tmp_path, "bert") / "config.json").read_text()) | changes
    left = {key: value for key, value in config.items() if value is not None or key not in changes}
    checkpoints.write_json(tmp_path / "config.json", left)
    with pytest.raises(LoadError, match=re.escape(named)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("spec", "named"),
    [({"kind": "rerank"}, "a/b"), ({"dense": ("2_Dense",)}, "a/b"), ({"dtype": "bfloat16"}, "bfloat16")],
)
def test_more_than_an_encoder(spec: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Heads, layers behind the pooling and other arithmetics are refused."""
    with pytest.raises(LoadError, match=named):
        load(checkpoints.make(tmp_path, "bert"), **spec)
