"""Tiny MPNet, NomicBERT, GTE and JinaBERT checkpoints give what the float64 reference gives, alone and packed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import checkpoints_more as checkpoints
import reference_more as reference
from checkpoints import write_json
from quiver.backends import Backend, onnx
from quiver.config import Dtype
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Kind
from test_graphs import assert_near, encodings, read

KINDS: tuple[checkpoints.Kind, ...] = get_args(checkpoints.Kind)
LENGTHS = (1, 2, 3, 7, 33, 128, 257, 511, 512)
PACKS = ((1, 1), (1, 40, 1, 7, 60, 19), (512, 1, 300), (5,) * 25)
LONG = {"n_positions": 2048, "max_position_embeddings": 2048}
LONG_LENGTH = 1500
TOLERANCE = 1e-4
BUDGET = 224
LABELS = 3


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as Quiver has loaded it, beside the files that the reference computes from."""

    folder: Path
    backend: Backend
    config: Mapping[str, Any]
    weights: Mapping[str, NDArray[Any]]
    """By their plain names."""

    def hidden(self, texts: Sequence[Encoding]) -> NDArray[np.float32]:
        """Run one forward pass: (T, H), or with a head (B, L)."""
        return self.backend.forward(pack(texts))

    def expected(self, text: Encoding) -> reference.Doubles:
        """Run the reference over a text: (T, H)."""
        type_ids = None if text.type_ids is None else text.type_ids.tolist()
        return reference.hidden_states(self.config, self.weights, text.ids.tolist(), type_ids)

    def assert_equals_reference(self, texts: Sequence[Encoding]) -> None:
        """Check every hidden state of texts in one forward pass."""
        assert_near(self.hidden(texts), np.concatenate([self.expected(text) for text in texts]), TOLERANCE)


def load(folder: Path, dtype: Dtype = "float32", kind: Kind = "embed") -> Backend:
    """Load a directory as a model does."""
    spec = ModelSpec(id="test/tiny", weights="test/tiny", kind=kind, dimensions=48, max_tokens=512)
    return onnx.load(ModelFiles(folder), spec, dtype=dtype, lanes=1)


def made(folder: Path, kind: checkpoints.Kind, *, prefix: str = "", use: Kind = "embed", **options: Any) -> Loaded:
    """Write a checkpoint and load it."""
    checkpoints.make(folder, kind, prefix=prefix, **options)
    config, weights = read(folder)
    plain = {name.removeprefix(prefix): array for name, array in weights.items()}
    return Loaded(folder, load(folder, kind=use), config, plain)


def reloaded(loaded: Loaded, changes: Mapping[str, NDArray[Any]]) -> Loaded:
    """Change some weights of a checkpoint in place and load it again."""
    weights = {**loaded.weights, **changes}
    save_file(weights, loaded.folder / "model.safetensors")
    return Loaded(loaded.folder, load(loaded.folder), loaded.config, weights)


def distance(some: NDArray[Any], others: NDArray[Any]) -> float:
    """Return the furthest that a number is off another."""
    return float(np.abs(some - others).max())


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Give each kind in turn."""
    return made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(loaded: Loaded, length: int) -> None:
    """A text by itself has the reference's hidden states, at every length."""
    loaded.assert_equals_reference(encodings(length))


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed(loaded: Loaded, lengths: tuple[int, ...]) -> None:
    """Texts in one forward pass each have the reference's hidden states: none sees another."""
    loaded.assert_equals_reference(encodings(*lengths))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bits(loaded: Loaded, dtype: Dtype) -> None:
    """Texts have the same bits alone and in any batch within the budget."""
    backend = load(loaded.folder, dtype)
    texts = encodings(*range(1, BUDGET + 1, 3), *[1, 2, 3] * 20, BUDGET)
    alone = [backend.forward(pack([text])) for text in texts]
    draw = np.random.default_rng(0)
    for _ in range(3):
        for batch in batches(texts, draw.permutation(len(texts))):
            packed = backend.forward(pack([texts[i] for i in batch]))
            assert np.array_equal(packed, np.concatenate([alone[i] for i in batch]))


def batches(texts: Sequence[Encoding], order: NDArray[np.int64]) -> list[list[int]]:
    """Fill batches up to the budget, in order."""
    ends = np.cumsum([len(texts[i]) for i in order])
    filled: list[list[int]] = [[]]
    for i, (before, end) in zip(order.tolist(), pairwise([0, *ends.tolist()]), strict=True):
        start = before - sum(len(texts[j]) for j in filled[-1])
        if filled[-1] and end - start > BUDGET:
            filled.append([])
        filled[-1].append(i)
    return filled


def test_int8(loaded: Loaded) -> None:
    """In 8 bits each text's mean stays near its own: a cosine of 0.99 or more."""
    int8, texts = load(loaded.folder, "int8"), encodings(*range(1, 60), 300)
    exact = np.stack([loaded.hidden([text]).mean(axis=0) for text in texts])  # (B, H)
    rough = np.stack([int8.forward(pack([text])).mean(axis=0) for text in texts])
    cosines = (exact * rough).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)

    assert not np.array_equal(exact, rough)
    assert cosines.min() >= 0.99


def test_order_matters(loaded: Loaded) -> None:
    """A text in another order has other hidden states; but for MPNet, only angles or slopes can tell."""
    text = encodings(30)[0]
    order = np.random.default_rng(0).permutation(len(text))
    turned = loaded.hidden([Encoding(text.ids[order])])

    assert distance(turned, loaded.hidden([text])[order]) > 100 * TOLERANCE


def test_order_does_not_matter_without_positions(tmp_path: Path) -> None:
    """Negative control: where angles are too small to turn anything, the same test finds nothing."""
    loaded = made(tmp_path, "new", changes={"rope_scaling": {"type": "ntk", "factor": 1e60}})
    text = encodings(30)[0]
    order = np.random.default_rng(0).permutation(len(text))

    assert distance(loaded.hidden([Encoding(text.ids[order])]), loaded.hidden([text])[order]) < TOLERANCE


def test_distances_matter(tmp_path: Path) -> None:
    """What MPNet's scores gain by distance is the reference's for all buckets, and shows."""
    loaded, texts = made(tmp_path, "mpnet"), encodings(300)
    before = loaded.hidden(texts)
    none = np.zeros_like(loaded.weights["encoder.relative_attention_bias.weight"])
    without = reloaded(loaded, {"encoder.relative_attention_bias.weight": none})

    without.assert_equals_reference(texts)
    assert distance(before, without.hidden(texts)) > 100 * TOLERANCE


def test_query_and_key_norms_matter(tmp_path: Path) -> None:
    """The norms that only base-code has are read from its checkpoint."""
    loaded, texts = made(tmp_path, "jina_bert_code"), encodings(30)
    before = loaded.hidden(texts)
    for name in ("attention.self.layer_norm_q", "attention.self.layer_norm_k", "layer_norm_1"):
        whole = f"encoder.layer.0.{name}.weight"
        changed = reloaded(loaded, {whole: loaded.weights[whole] * 2})

        changed.assert_equals_reference(texts)
        assert distance(before, changed.hidden(texts)) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nomic_bert", {"rotary_emb_base": 10}),
        ("nomic_bert", {"activation_function": "geglu"}),
        ("nomic_bert", {"rotary_scaling_factor": 2, "max_trained_positions": 16}),
        ("new", {"rope_theta": 100}),
        ("new", {"rope_scaling": None}),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 8.0}}),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.625}}),
        ("new", {"hidden_act": "relu"}),
        ("jina_bert", {"feed_forward_type": "reglu"}),
        ("jina_bert_code", {"feed_forward_type": "reglu"}),
        ("mpnet", {"hidden_act": "gelu_new"}),
    ],
    ids=str,
)
def test_config_matters(tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any]) -> None:
    """What config.json says of the arithmetic is heard: the same weights give the reference's other hidden states."""
    plain, texts = made(tmp_path / "plain", kind), encodings(40, 3)
    changed = made(tmp_path / "changed", kind, changes=changes)

    changed.assert_equals_reference(texts)
    assert distance(plain.hidden(texts), changed.hidden(texts)) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mpnet", {"num_attention_heads": 3}),
        ("nomic_bert", {"n_head": 6, "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True}),
        ("nomic_bert", {"type_vocab_size": 0}),
        ("new", {"num_attention_heads": 6, "type_vocab_size": 1}),
        ("jina_bert", {"num_attention_heads": 12}),
        ("jina_bert", {"num_attention_heads": 3}),
        ("jina_bert_code", {"num_attention_heads": 1}),
    ],
    ids=str,
)
def test_shapes(tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any]) -> None:
    """Other numbers of heads and token types, and biases where there were none, give the reference's hidden states."""
    loaded = made(tmp_path, kind, changes={**changes, "num_hidden_layers": 3, "n_layer": 3, "intermediate_size": 70})

    loaded.assert_equals_reference(encodings(40, 1, 13))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nomic_bert", {}),
        ("jina_bert", {}),
        ("jina_bert_code", {}),
        ("new", {"type_vocab_size": 2}),
    ],
)
def test_type_ids(tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any]) -> None:
    """The two halves of a pair have token types of their own."""
    loaded, text = made(tmp_path, kind, changes=changes), encodings(24)[0]
    pair = Encoding(text.ids, np.repeat([0, 1], 12))

    loaded.assert_equals_reference([text, pair])
    assert distance(loaded.hidden([text]), loaded.hidden([pair])) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["mpnet", "new"])
def test_type_ids_without_types(tmp_path: Path, kind: checkpoints.Kind) -> None:
    """A model that knows no halves, or one for all, takes no notice of a tokenizer's types."""
    loaded, text = made(tmp_path, kind, changes={"type_vocab_size": int(kind == "new")}), encodings(24)[0]

    assert np.array_equal(loaded.hidden([Encoding(text.ids, np.repeat([0, 1], 12))]), loaded.hidden([text]))


@pytest.mark.parametrize("kind", ["nomic_bert", "new", "jina_bert", "jina_bert_code"])
def test_long(tmp_path: Path, kind: checkpoints.Kind) -> None:
    """A text of 1,500 tokens has the reference's hidden states, alone and with another."""
    loaded = made(tmp_path, kind, changes=LONG)

    assert loaded.backend.max_positions >= LONG["n_positions"]
    loaded.assert_equals_reference(encodings(LONG_LENGTH))
    loaded.assert_equals_reference(encodings(9, LONG_LENGTH, 1))


def test_stretched(tmp_path: Path) -> None:
    """With a scaling factor, each text's angles depend on its own length from the trained one on, and on no other's."""
    scaled = {**LONG, "rotary_scaling_factor": 2, "max_trained_positions": 256}
    plain, loaded = made(tmp_path / "plain", "nomic_bert", changes=LONG), made(tmp_path, "nomic_bert", changes=scaled)
    short, longer, longest = encodings(256)[0], encodings(257)[0], encodings(LONG_LENGTH)[0]

    loaded.assert_equals_reference([longest, short, longer, short])
    for texts in ([short], encodings(100, 3, 60)):
        assert np.array_equal(loaded.hidden(texts), plain.hidden(texts))
    for text in (longer, longest):
        assert distance(loaded.hidden([text]), plain.hidden([text])) > TOLERANCE


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("mpnet", "mpnet."),
        ("nomic_bert", "bert."),
        ("nomic_bert", "nomic_bert."),
        ("new", "new."),
        ("jina_bert", "bert."),
        ("jina_bert_code", "bert."),
    ],
)
def test_names(tmp_path: Path, kind: checkpoints.Kind, prefix: str) -> None:
    """A checkpoint whose tensors have a head's prefix gives the same bits as the plain one."""
    plain, other = made(tmp_path / "plain", kind), made(tmp_path / "other", kind, prefix=prefix)
    texts = encodings(1, 30, 9)

    assert all(name.startswith(prefix) for name in load_file(other.folder / "model.safetensors"))
    assert np.array_equal(other.hidden(texts), plain.hidden(texts))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("kind", "prefix"), [("mpnet", "mpnet."), ("new", "new."), ("jina_bert", "bert."), ("jina_bert_code", "bert.")]
)
def test_classifiers(tmp_path: Path, kind: checkpoints.Kind, prefix: str, dtype: Dtype) -> None:
    """With a head, each text has the reference's scores, and the same bits alone and packed."""
    loaded = made(tmp_path, kind, prefix=prefix, labels=LABELS)
    texts, backend = encodings(1, 30, 9), load(loaded.folder, dtype, "rerank")
    expected = np.stack([reference.scores(loaded.config, loaded.weights, loaded.expected(text)[0]) for text in texts])
    actual = backend.forward(pack(texts))  # (B, L)

    assert backend.pooled
    assert np.array_equal(actual, np.concatenate([backend.forward(pack([text])) for text in texts]))
    assert_near(actual, expected, TOLERANCE if dtype == "float32" else 0.2)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
        ("mpnet", {"hidden_act": "mish"}, "mish"),
        ("nomic_bert", {"prenorm": True}, "prenorm"),
        ("nomic_bert", {"causal": True}, "causal"),
        ("nomic_bert", {"parallel_block": True}, "parallel_block"),
        ("nomic_bert", {"use_rms_norm": True}, "use_rms_norm"),
        ("nomic_bert", {"norm_mlp": True}, "norm_mlp"),
        ("nomic_bert", {"moe_every_n_layers": 2}, "moe_every_n_layers"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ("nomic_bert", {"rotary_emb_fraction": 0}, "rotary_emb_fraction"),
        ("nomic_bert", {"rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ("nomic_bert", {"rotary_emb_scale_base": 512}, "rotary_emb_scale_base"),
        ("nomic_bert", {"activation_function": "glu"}, "'glu'"),
        ("nomic_bert", {"activation_function": "gelu"}, "'gelu'"),
        ("nomic_bert", {"mlp_fc1_bias": True}, "encoder.layers.0.mlp.fc11.bias"),
        ("nomic_bert", {"n_layer": 3}, "encoder.layers.2."),
        ("new", {"position_embedding_type": "absolute"}, "'absolute'"),
        ("new", {"layer_norm_type": "rms_norm"}, "rms_norm"),
        ("new", {"pack_qkv": False}, "pack_qkv"),
        ("new", {"logn_attention_scale": True}, "logn_attention_scale"),
        ("new", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("new", {"rope_scaling": {"type": "ntk"}}, "'factor'"),
        ("new", {"rope_scaling": "ntk"}, "new"),
        ("new", {"type_vocab_size": 2}, "token_type_embeddings"),
        ("jina_bert", {"feed_forward_type": "original"}, "original"),
        ("jina_bert_code", {"feed_forward_type": "original"}, "original"),
        ("jina_bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("jina_bert", {"is_decoder": True}, "is_decoder"),
    ],
    ids=str,
)
def test_config_not_understood(tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any], named: str) -> None:
    """A config.json that asks for what is not there is refused when it is loaded, by name."""
    checkpoints.make(tmp_path, kind)
    write_json(tmp_path / "config.json", {**checkpoints.CONFIGS[kind], **changes})

    with pytest.raises(LoadError, match=re.escape(named)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("mpnet", "pad_token_id"),
        ("nomic_bert", "rotary_emb_base"),
        ("nomic_bert", "n_positions"),
        ("new", "rope_theta"),
        ("new", "type_vocab_size"),
        ("jina_bert", "feed_forward_type"),
    ],
)
def test_config_key_missing(tmp_path: Path, kind: checkpoints.Kind, key: str) -> None:
    """A config.json that leaves out what the arithmetic depends on is refused, naming the key."""
    checkpoints.make(tmp_path, kind)
    config = dict(checkpoints.CONFIGS[kind])
    del config[key]
    write_json(tmp_path / "config.json", config)

    with pytest.raises(LoadError, match=key):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_missing(tmp_path: Path, kind: checkpoints.Kind) -> None:
    """A checkpoint that lacks any one tensor of the encoder is refused, naming the tensor."""
    _, weights = read(checkpoints.make(tmp_path, kind, changes={"num_hidden_layers": 1, "n_layer": 1}))
    for name in weights:
        if name.endswith("mlp.up_gated_layer.weight"):  # it tells base-code from the others
            continue
        save_file({other: array for other, array in weights.items() if other != name}, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=re.escape(name)):
            load(tmp_path)
