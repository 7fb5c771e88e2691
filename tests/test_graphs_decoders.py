"""ModernBERT, Qwen3 and CLIP's text tower give what the float64 reference gives, alone and packed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import load_from_string
from safetensors.numpy import save_file

import checkpoints_decoders
import reference_decoders
from checkpoints import write_json
from checkpoints_decoders import MODERNBERT, QWEN3, VOCAB, Made
from quiver.backends import onnx
from quiver.backends.onnx import OnnxBackend
from quiver.config import Dtype
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.graphs import compile_graph
from quiver.graphs.attention import LONG
from quiver.graphs.heads import Head
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, PackedBatch
from reference import Doubles
from test_graphs import assert_near, encodings

NEW_THETAS = {
    kind: {"rope_type": "default", "rope_theta": MODERNBERT[old]}
    for kind, old in {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}.items()
}
NEW_WORDS: Mapping[str, Mapping[str, Any]] = {
    "modernbert": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": NEW_THETAS,
        "global_attn_every_n_layers": None,
        "global_rope_theta": None,
        "local_rope_theta": None,
    },
    "qwen3": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": QWEN3["rope_theta"]},
        "rope_theta": None,
    },
}
"""How transformers 5 says what a config.json said before."""

TOWER = {"projection_dim": None}
"""CLIP without its projection: hidden states come out."""
CHECKPOINTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "modernbert": ("modernbert", {}),
    "modernbert, biases": ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    "modernbert, odd": ("modernbert", {"hidden_size": 66, "num_attention_heads": 3, "intermediate_size": 37}),
    "qwen3": ("qwen3", {}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "qwen3, odd": ("qwen3", {"hidden_size": 33, "num_key_value_heads": 6, "head_dim": 14, "intermediate_size": 37}),
    "clip": ("clip_text_model", TOWER),
}
KINDS = ("modernbert", "qwen3", "clip_text_model")
LENGTHS = (1, 2, 3, 8, 9, 10, 33, 77)
PACKS = ((1, 1), (1, 40, 1, 7, 60, 19), (77, 1, 77), (5,) * 25)
LONG_LENGTH = 1500

HIDDEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as Quiver has loaded it, beside what the reference computes from."""

    made: Made
    backend: OnnxBackend

    def run(self, *texts: Encoding) -> NDArray[np.float32]:
        """Run one forward pass: (T, ·), or (B, ·) where a head pools."""
        return self.backend.forward(pack(texts))

    def hidden(self, *texts: Encoding) -> Doubles:
        """Run the reference text by text: (T, H)."""
        return np.concatenate([self._hidden(text) for text in texts])

    def _hidden(self, text: Encoding) -> Doubles:
        return reference_decoders.hidden_states(self.made.config, self.made.weights, text.ids.tolist())


def load(folder: Path, dtype: Dtype = "float32", **spec: Any) -> OnnxBackend:
    """Load a directory as the engine does, for what `spec` says is wanted."""
    wanted = ModelSpec(id="test/tiny", weights="test/tiny", dimensions=1, max_tokens=1, **spec)
    return onnx.load(ModelFiles(folder, "tiny"), wanted, dtype=dtype, lanes=1)


def make(folder: Path, kind: str, **changes: Any) -> Loaded:
    """Write a checkpoint and load it."""
    made = checkpoints_decoders.make(folder, kind, **changes)
    return Loaded(made, load(folder))


def packs(count: int, longest: int) -> list[list[Encoding]]:
    """Draw texts that fill the budget of one forward pass each."""
    draw, drawn = np.random.default_rng(count), []
    for _ in range(count):
        lengths = [int(n) for n in draw.integers(1, longest + 1, onnx.BATCH_TOKENS)]
        fitting = int(np.searchsorted(np.cumsum(lengths), onnx.BATCH_TOKENS, side="right"))
        drawn.append([Encoding(draw.integers(0, VOCAB, n)) for n in lengths[:fitting]])
    return drawn


def each(batch: PackedBatch, output: NDArray[Any]) -> list[NDArray[Any]]:
    """Split a forward pass into what each text has of it."""
    return np.split(output, batch.cu_seqlens[1:-1])


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Give each checkpoint in turn."""
    kind, changes = CHECKPOINTS[request.param]
    return make(tmp_path_factory.mktemp("tiny"), kind, **changes)


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(loaded: Loaded, length: int) -> None:
    """A text by itself has the reference's hidden states."""
    (text,) = encodings(length)

    assert_near(loaded.run(text), loaded.hidden(text), HIDDEN_TOLERANCE)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed(loaded: Loaded, lengths: tuple[int, ...]) -> None:
    """Texts in one forward pass each have the reference's hidden states: none sees another."""
    texts = encodings(*lengths)

    assert_near(loaded.run(*texts), loaded.hidden(*texts), HIDDEN_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bits(loaded: Loaded, dtype: Dtype) -> None:
    """A text has the same bits alone and in a full batch."""
    backend = load(loaded.made.folder, dtype)
    for texts in packs(12, longest=60):
        batch = pack(texts)
        for text, packed in zip(texts, each(batch, backend.forward(batch)), strict=True):
            assert np.array_equal(backend.forward(pack([text])), packed)


@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_long(tmp_path: Path, kind: str) -> None:
    """A text of 1,500 tokens has the reference's hidden states, alone and beside a short one."""
    loaded, texts = make(tmp_path, kind), encodings(LONG_LENGTH, 3)

    assert_near(loaded.run(texts[0]), loaded.hidden(texts[0]), HIDDEN_TOLERANCE)
    assert_near(loaded.run(*texts), loaded.hidden(*texts), HIDDEN_TOLERANCE)


@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
@pytest.mark.parametrize(("positions", "in_parts"), [(LONG, False), (LONG + 1, True)])
def test_scores_in_parts(kind: str, positions: int, *, in_parts: bool) -> None:
    """A model that reads long texts computes scores in parts, or those of 8,192 tokens would fill gigabytes."""
    config = checkpoints_decoders.config_of(kind) | {"max_position_embeddings": positions}
    graph = compile_graph(config, checkpoints_decoders.encoder_weights(config, seed=0), "float32", Head())

    assert ("Loop" in {node.op_type for node in load_from_string(graph.model).graph.node}) == in_parts


def test_int8(loaded: Loaded) -> None:
    """In 8 bits the mean and the last of a text's hidden states stay near: measured, the furthest is at 0.995."""
    backend = load(loaded.made.folder, "int8")
    cosines = []
    for text in encodings(*range(1, 61)):
        exact, rough = loaded.run(text).astype(np.float64), backend.forward(pack([text])).astype(np.float64)
        assert not np.array_equal(exact, rough)
        for one, other in ((exact.mean(axis=0), rough.mean(axis=0)), (exact[-1], rough[-1])):
            cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    assert min(cosines) >= 0.99


def test_sizes(loaded: Loaded) -> None:
    """The vocabulary and the positions are those of config.json."""
    config = loaded.made.config

    assert loaded.backend.vocab_size == config["vocab_size"]
    assert loaded.backend.max_positions == config["max_position_embeddings"]


# What sets an architecture apart


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("modernbert", {"local_attention": 18}),
        ("modernbert", {"local_rope_theta": 160000.0}),
        ("modernbert", {"global_rope_theta": 10000.0}),
        ("modernbert", {"global_attn_every_n_layers": 2}),
        ("modernbert", {"norm_eps": 0.1}),
        ("modernbert", {"hidden_activation": "relu"}),
        ("modernbert", {"hidden_activation": "silu"}),
        ("qwen3", {"rope_theta": 100.0}),
        ("qwen3", {"rms_norm_eps": 0.1}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("clip_text_model", {**TOWER, "hidden_act": "gelu"}),
        ("clip_text_model", {**TOWER, "layer_norm_eps": 0.1}),
    ],
    ids=str,
)
def test_config_matters(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """What config.json says is followed: with another value, other hidden states are right, and the old ones wrong."""
    loaded, (text,) = make(tmp_path, kind, **changes), encodings(40)
    plain = replace(loaded.made, config=checkpoints_decoders.config_of(kind))

    assert_near(loaded.run(text), loaded.hidden(text), HIDDEN_TOLERANCE)
    assert np.abs(loaded.run(text) - replace(loaded, made=plain).hidden(text)).max() > 100 * HIDDEN_TOLERANCE


def test_every_tensor_matters(loaded: Loaded) -> None:
    """Negative control: the reference with the columns of any one tensor moved by one is not what is computed."""
    (text,) = encodings(40)
    found = loaded.run(text)
    for name, tensor in loaded.made.weights.items():
        if name.endswith("k_proj.bias") and "clip" in loaded.made.config["model_type"]:
            continue  # it adds the same to all scores of a query: no softmax sees it
        other = replace(loaded.made, weights=loaded.made.weights | {name: np.roll(tensor, 1, axis=-1)})
        assert np.abs(replace(loaded, made=other).hidden(text) - found).max() > HIDDEN_TOLERANCE, name


def test_window(tmp_path: Path) -> None:
    """A token of a local layer sees those at most half of `local_attention` away, on both sides, and no others."""
    loaded = make(tmp_path, "modernbert", num_hidden_layers=1, layer_types=["sliding_attention"])
    (text,) = encodings(50)
    changed = text.ids.copy()
    changed[25] = (changed[25] + 1) % VOCAB

    differs = (loaded.run(text) != loaded.run(Encoding(changed))).any(axis=1)  # (T,)

    assert np.flatnonzero(differs).tolist() == list(range(25 - 8, 25 + 8 + 1))


def test_global_layer_sees_all(tmp_path: Path) -> None:
    """Negative control of the window: a token of a global layer sees all others."""
    loaded = make(tmp_path, "modernbert", num_hidden_layers=1, layer_types=["full_attention"])
    (text,) = encodings(50)
    changed = text.ids.copy()
    changed[25] = (changed[25] + 1) % VOCAB

    assert (loaded.run(text) != loaded.run(Encoding(changed))).any(axis=1).all()


@pytest.mark.parametrize(("kind", "changes"), [("qwen3", {}), ("clip_text_model", TOWER)])
def test_causality(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """A token shows in its own hidden state and in those of all that follow, but in none before it."""
    loaded, (text,) = make(tmp_path, kind, **changes), encodings(50)
    changed = text.ids.copy()
    changed[25] = (changed[25] + 1) % VOCAB

    differs = (loaded.run(text) != loaded.run(Encoding(changed))).any(axis=1)  # (T,)

    assert np.flatnonzero(differs).tolist() == list(range(25, 50))


def test_heads_of_keys_are_shared_in_order(tmp_path: Path) -> None:
    """Neighbouring query heads share keys and values: exchanging two heads of keys and values changes everything."""
    loaded, (text,) = make(tmp_path, "qwen3"), encodings(20)
    swapped = {
        name: np.roll(tensor, QWEN3["head_dim"], axis=0) if "k_proj" in name or "v_proj" in name else tensor
        for name, tensor in loaded.made.weights.items()
    }

    wrong = replace(loaded, made=replace(loaded.made, weights=swapped)).hidden(text)

    assert np.abs(loaded.run(text) - wrong).max() > 100 * HIDDEN_TOLERANCE


# What a checkpoint may say


@pytest.mark.parametrize("kind", NEW_WORDS)
def test_words_of_transformers_5(tmp_path: Path, kind: str) -> None:
    """The same said in the words of transformers 5 gives the same bits."""
    old, new = make(tmp_path / "old", kind), make(tmp_path / "new", kind, **NEW_WORDS[kind])
    texts = encodings(1, 30, 9)

    assert np.array_equal(new.run(*texts), old.run(*texts))


@pytest.mark.parametrize(
    ("kind", "prefix", "other"),
    [("modernbert", "", "model."), ("qwen3", "", "model."), ("clip_text_model", "text_model.", "")],
)
def test_names(tmp_path: Path, kind: str, prefix: str, other: str) -> None:
    """A checkpoint whose tensors have a head's prefix gives the same bits as one without."""
    one, two = make(tmp_path / "one", kind, prefix=prefix), make(tmp_path / "two", kind, prefix=other)
    texts = encodings(1, 30, 9)

    assert np.array_equal(one.run(*texts), two.run(*texts))


def test_settings_that_clip_leaves_out(tmp_path: Path) -> None:
    """Of both towers, transformers saves only what differs from its defaults: 12 layers, 8 heads, quick_gelu, 1e-5."""
    left_out = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
    text = checkpoints_decoders.CLIP_TEXT | {"num_hidden_layers": 12, "num_attention_heads": 8}
    said = make(tmp_path / "said", "clip", text_config=text)
    short = {key: value for key, value in text.items() if key not in left_out}
    write_json(said.made.folder / "config.json", said.made.config | {"text_config": short})
    texts = encodings(1, 30, 9)

    assert np.array_equal(load(said.made.folder).forward(pack(texts)), said.run(*texts))


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("modernbert", {"hidden_activation": "mish"}, "mish"),
        ("modernbert", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "chunked_attention"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "rope_type 'yarn'",
        ),
        ("modernbert", {"num_hidden_layers": 5}, "layers.4."),
        ("modernbert", {"norm_bias": True}, "norm.bias"),
        ("modernbert", {"attention_bias": True}, "attn.Wqkv.bias"),
        ("qwen3", {"hidden_act": "mish"}, "mish"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'yarn'"),
        ("qwen3", {"attention_bias": True}, "q_proj.bias"),
        ("qwen3", {"num_hidden_layers": 4}, "layers.3."),
        ("clip_text_model", {"hidden_act": "mish"}, "mish"),
        ("clip_text_model", {"num_hidden_layers": 4}, "encoder.layers.3."),
    ],
    ids=str,
)
def test_config_not_understood(tmp_path: Path, kind: str, changes: dict[str, Any], named: str) -> None:
    """A config.json that asks for what is not there is refused when it is loaded, by name."""
    made = checkpoints_decoders.make(tmp_path, kind)
    write_json(tmp_path / "config.json", made.config | changes)

    with pytest.raises(LoadError, match=re.escape(named)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("modernbert", ("num_attention_heads", "local_attention", "global_rope_theta", "norm_eps")),
        ("qwen3", ("head_dim", "num_key_value_heads", "rope_theta", "max_position_embeddings")),
    ],
)
def test_config_key_missing(tmp_path: Path, kind: str, keys: Sequence[str]) -> None:
    """A config.json that leaves out what the graph depends on is refused, naming the key."""
    made = checkpoints_decoders.make(tmp_path, kind)
    for key in keys:
        write_json(tmp_path / "config.json", {k: value for k, value in made.config.items() if k != key})
        with pytest.raises(LoadError, match=key):
            load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_missing(tmp_path: Path, kind: str) -> None:
    """A checkpoint that lacks any one tensor is refused, naming the tensor."""
    made = checkpoints_decoders.make(tmp_path, kind, prefix="", num_hidden_layers=2)
    for name in made.weights:
        if name == "text_projection.weight":
            continue  # a tower may have none
        save_file(
            {other: array for other, array in made.weights.items() if other != name}, tmp_path / "model.safetensors"
        )
        with pytest.raises(LoadError, match=re.escape(name)):
            load(tmp_path)
