"""What follows the hidden states gives what the float64 reference gives, alone and packed: labels, words, vectors."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import checkpoints_decoders
import reference
import reference_decoders
from checkpoints import write_json
from checkpoints_decoders import LABELS, VOCAB
from quiver.engine.packing import pack
from quiver.engine.pooling import largest_logits, word_weights
from quiver.errors import LoadError
from quiver.types import Encoding, Pooling
from test_graphs import assert_near, encodings
from test_graphs_decoders import Loaded, each, load, packs

FAMILY = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
CLASSIFIERS = (*FAMILY, "modernbert", "qwen3")
WORD_SCORERS = (*FAMILY, "modernbert")
BIASES = {"classifier_bias": True, "norm_bias": True}
LENGTHS = (1, 40, 1, 7, 60, 19)
YES_NO = (1203, 7)

TOLERANCE = 1e-4


def made(folder: Path, kind: str, *, head: Any = None, spec: dict[str, Any], **changes: Any) -> Loaded:
    """Write a checkpoint with a head, and load it for what `spec` says is wanted."""
    made = checkpoints_decoders.make(folder, kind, head=head, **changes)
    return Loaded(made, load(folder, **spec))


def scorer(folder: Path, kind: str, **changes: Any) -> Loaded:
    """Make a classifier."""
    return made(folder, kind, head="classifier", spec={"kind": "classify"}, **changes)


def word_scorer(folder: Path, kind: str, **changes: Any) -> Loaded:
    """Make a masked language model."""
    return made(folder, kind, head="masked_lm", spec={"kind": "sparse"}, **changes)


def judge(folder: Path, **changes: Any) -> Loaded:
    """Make a language model that answers yes or no."""
    return made(folder, "qwen3", head="masked_lm", spec={"kind": "rerank", "yes_no": YES_NO}, **changes)


def labels(loaded: Loaded, *texts: Encoding) -> reference.Doubles:
    """Score the labels by the reference: (B, L)."""
    hidden = [loaded.hidden(text) for text in texts]
    return np.stack([reference_decoders.label_logits(loaded.made.config, loaded.made.weights, one) for one in hidden])


def words(loaded: Loaded, *texts: Encoding) -> reference.Doubles:
    """Score the words by the reference: (T, V)."""
    return reference_decoders.word_logits(loaded.made.config, loaded.made.weights, loaded.hidden(*texts))


def assert_same_bits(loaded: Loaded) -> None:
    """Check that a text has the same bits alone and in a full batch."""
    for texts in packs(8, longest=60):
        batch = pack(texts)
        output = loaded.backend.forward(batch)
        results = list(output[:, None]) if loaded.backend.pooled else each(batch, output)
        for text, result in zip(texts, results, strict=True):
            assert np.array_equal(loaded.run(text), result)


# Labels


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_labels(tmp_path: Path, kind: str) -> None:
    """A text has the reference's logits, one for each label."""
    loaded, texts = scorer(tmp_path, kind), encodings(*LENGTHS)

    assert loaded.backend.pooled
    assert loaded.run(*texts).shape == (len(LENGTHS), LABELS)
    assert_near(loaded.run(*texts), labels(loaded, *texts), TOLERANCE)
    assert_near(loaded.run(texts[1]), labels(loaded, texts[1]), TOLERANCE)
    assert_same_bits(loaded)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_int8_labels(tmp_path: Path, kind: str) -> None:
    """In 8 bits the logits stay near: over some texts, at a cosine of 0.99 at least."""
    loaded, texts = scorer(tmp_path, kind), encodings(*range(1, 21))
    rough = load(tmp_path, "int8", kind="classify").forward(pack(texts)).ravel()
    exact = labels(loaded, *texts).ravel()

    assert exact @ rough / np.linalg.norm(exact) / np.linalg.norm(rough) >= 0.99


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_modernbert_labels(tmp_path: Path, pooling: Pooling, biases: dict[str, bool]) -> None:
    """ModernBERT pools before its head as config.json says, whatever the spec says, and has biases where it says so."""
    loaded, texts = scorer(tmp_path, "modernbert", classifier_pooling=pooling, **biases), encodings(*LENGTHS)

    assert_near(loaded.run(*texts), labels(loaded, *texts), TOLERANCE)
    assert_same_bits(loaded)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"classifier_activation": "relu"}),
        ("modernbert", {"norm_eps": 0.1}),
    ],
    ids=str,
)
def test_config_of_the_classifier_matters(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """What config.json says of a head is followed: with another value, other logits are right, and the old ones wrong."""
    loaded, texts = scorer(tmp_path, kind, **changes), encodings(40, 3)
    plain = replace(loaded, made=replace(loaded.made, config=checkpoints_decoders.config_of(kind)))

    assert_near(loaded.run(*texts), labels(loaded, *texts), TOLERANCE)
    assert np.abs(loaded.run(*texts) - labels(plain, *texts)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_pairs(tmp_path: Path, kind: str) -> None:
    """A pair is scored with its halves' token types, where the architecture has two."""
    loaded, (text,) = scorer(tmp_path, kind), encodings(24)
    pair = Encoding(text.ids, np.repeat([0, 1], 12))
    types = pair.type_ids.tolist() if kind == "bert" else None
    hidden = reference.hidden_states(loaded.made.config, loaded.made.weights, text.ids.tolist(), types)

    expected = reference_decoders.label_logits(loaded.made.config, loaded.made.weights, hidden)

    assert_near(loaded.run(pair)[0], expected, TOLERANCE)
    assert np.array_equal(loaded.run(pair), loaded.run(text)) == (kind != "bert")


# Yes or no


@pytest.mark.parametrize("tied", [True, False])
def test_yes_over_no(tmp_path: Path, *, tied: bool) -> None:
    """A language model's answer is the logit of yes over that of no, from its own table or the embeddings'."""
    loaded, texts = judge(tmp_path, tie_word_embeddings=tied), encodings(*LENGTHS)
    hidden = [loaded.hidden(text) for text in texts]
    expected = np.stack(
        [reference_decoders.yes_over_no(loaded.made.config, loaded.made.weights, one, YES_NO) for one in hidden]
    )

    assert ("lm_head.weight" in loaded.made.weights) == (not tied)
    assert loaded.run(*texts).shape == (len(texts), 1)
    assert_near(loaded.run(*texts), expected, TOLERANCE)
    assert_same_bits(loaded)


def test_answers_are_not_symmetric(tmp_path: Path) -> None:
    """Exchanging yes and no changes the sign."""
    loaded, texts = judge(tmp_path), encodings(*LENGTHS)
    swapped = load(tmp_path, kind="rerank", yes_no=YES_NO[::-1])

    assert np.array_equal(swapped.forward(pack(texts)), -loaded.run(*texts))


def test_scores_go_before_answers(tmp_path: Path) -> None:
    """A language model that was given scores of its own is not asked for words."""
    loaded, texts = scorer(tmp_path, "qwen3"), encodings(*LENGTHS)
    asked = load(tmp_path, kind="rerank", yes_no=YES_NO)

    assert np.array_equal(asked.forward(pack(texts)), loaded.run(*texts))


# Words


@pytest.mark.parametrize("kind", WORD_SCORERS)
def test_words(tmp_path: Path, kind: str) -> None:
    """Each token has the reference's logits of all words, and each text SPLADE's weights of them."""
    loaded, texts = word_scorer(tmp_path, kind), encodings(*LENGTHS)
    batch = pack(texts)
    logits = loaded.backend.forward(batch)
    expected = words(loaded, *texts)
    weights = np.stack([reference_decoders.word_weights(one) for one in each(batch, expected)])

    assert not loaded.backend.pooled
    assert logits.shape == (sum(LENGTHS), VOCAB)
    assert_near(logits, expected, TOLERANCE)
    assert_near(word_weights(largest_logits(logits, batch.cu_seqlens)), weights, TOLERANCE)
    assert 0 < (weights > 0).mean() < 1
    assert_same_bits(loaded)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"tie_word_embeddings": False}),
        ("bert", {"hidden_act": "relu"}),
        ("distilbert", {"tie_word_embeddings": False}),
        ("distilbert", {"activation": "relu"}),
        ("roberta", {"tie_word_embeddings": False}),
        ("roberta", {"hidden_act": "relu"}),
        ("modernbert", {"tie_word_embeddings": False}),
        ("modernbert", {"classifier_activation": "relu"}),
        ("modernbert", {"decoder_bias": False}),
        ("modernbert", BIASES),
    ],
    ids=str,
)
def test_config_of_the_words(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """What config.json says of the head is followed; RoBERTa's has GELU, whatever its encoder has."""
    loaded, texts = word_scorer(tmp_path, kind, **changes), encodings(*LENGTHS)

    assert_near(loaded.run(*texts), words(loaded, *texts), TOLERANCE)


# Vectors


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_token_vectors(tmp_path: Path, kind: str) -> None:
    """A multi-vector model projects each token."""
    loaded = made(tmp_path, kind, head="colbert", spec={"kind": "multi_vector"})
    texts = encodings(*LENGTHS)
    projection = loaded.made.weights["linear.weight"].astype(np.float64)  # (D, H)

    assert not loaded.backend.pooled
    assert_near(loaded.run(*texts), loaded.hidden(*texts) @ projection.T, TOLERANCE)
    assert_same_bits(loaded)


def through(x: reference.Doubles, layers: list[tuple[dict[str, NDArray[Any]], str]]) -> reference.Doubles:
    """Run vectors through the layers of sentence-transformers by the reference."""
    for tensors, activation in layers:
        x = reference_decoders.activate(reference_decoders.linear(tensors, "linear", x), activation)
    return x


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "ReLU", "GELU"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_dense(tmp_path: Path, pooling: Pooling, activation: str) -> None:
    """A layer behind the pooling is applied to the pooled vector, with the activation that its own config.json names."""
    name = f"torch.nn.modules.activation.{activation}"
    layer = checkpoints_decoders.add_dense(tmp_path / "2_Dense", 48, 20, name)
    loaded = made(tmp_path, "bert", spec={"pooling": pooling, "dense": ("2_Dense",)})
    texts = encodings(*LENGTHS)
    vectors = np.stack([reference.pool(loaded.hidden(text), pooling) for text in texts])  # (B, H)

    assert loaded.backend.pooled
    assert_near(loaded.run(*texts), through(vectors, [(layer, activation.lower())]), TOLERANCE)
    assert_same_bits(loaded)


def test_two_dense_layers(tmp_path: Path) -> None:
    """Several layers follow each other in the order of the spec."""
    first = checkpoints_decoders.add_dense(tmp_path / "2_Dense", 48, 100, "torch.nn.modules.linear.Identity", seed=7)
    second = checkpoints_decoders.add_dense(tmp_path / "3_Dense", 100, 48, "torch.nn.modules.linear.Identity", seed=8)
    loaded = made(tmp_path, "bert", spec={"pooling": "mean", "dense": ("2_Dense", "3_Dense")})
    texts = encodings(*LENGTHS)
    vectors = np.stack([loaded.hidden(text).mean(axis=0) for text in texts])  # (B, H)

    assert_near(loaded.run(*texts), through(vectors, [(first, "identity"), (second, "identity")]), TOLERANCE)


def test_dense_token_vectors(tmp_path: Path) -> None:
    """A multi-vector model of sentence-transformers projects each token through its layers."""
    layer = checkpoints_decoders.add_dense(tmp_path / "1_Dense", 48, 16, "torch.nn.modules.linear.Identity")
    loaded = made(tmp_path, "modernbert", spec={"kind": "multi_vector", "dense": ("1_Dense",)})
    texts = encodings(*LENGTHS)

    assert_near(loaded.run(*texts), through(loaded.hidden(*texts), [(layer, "identity")]), TOLERANCE)


@pytest.mark.parametrize("kind", ["clip", "clip_text_model"])
def test_projection(tmp_path: Path, kind: str) -> None:
    """CLIP's last token is projected to where its images lie; a checkpoint of both towers is read for the texts alone."""
    loaded = made(tmp_path, kind, spec={"pooling": "last_token"})
    texts = encodings(77, *LENGTHS)
    last = np.stack([loaded.hidden(text)[-1] for text in texts])  # (B, H)
    projection = loaded.made.weights["text_projection.weight"].astype(np.float64)  # (D, H)

    assert loaded.backend.pooled
    assert loaded.backend.max_positions == 77
    assert_near(loaded.run(*texts), last @ projection.T, TOLERANCE)
    assert_same_bits(loaded)


# What is not there


@pytest.mark.parametrize(
    ("kind", "head", "spec"),
    [
        *((kind, "classifier", {"kind": "classify"}) for kind in CLASSIFIERS),
        *((kind, "masked_lm", {"kind": "sparse"}) for kind in WORD_SCORERS),
        ("bert", "colbert", {"kind": "multi_vector"}),
        ("qwen3", "masked_lm", {"kind": "rerank", "yes_no": YES_NO}),
    ],
    ids=str,
)
def test_head_missing(tmp_path: Path, kind: str, head: Any, spec: dict[str, Any]) -> None:
    """A checkpoint that lacks any one tensor of the head that is wanted is refused, naming the tensor."""
    made = checkpoints_decoders.make(tmp_path, kind, head=head, prefix="", tie_word_embeddings=False)
    encoder = checkpoints_decoders.encoder_weights(made.config, seed=0)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"} if (kind, head) == ("bert", "classifier") else set()
    for name in {*made.weights} - {*encoder} | pooler:
        save_file({n: array for n, array in made.weights.items() if n != name}, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=re.escape(name)):
            load(tmp_path, **spec)


@pytest.mark.parametrize(
    ("kind", "changes", "spec", "named"),
    [
        ("modernbert", {"classifier_pooling": "max"}, {"kind": "rerank"}, "classifier_pooling 'max'"),
        ("modernbert", {"classifier_activation": "mish"}, {"kind": "rerank"}, "mish"),
        ("qwen3", {}, {"kind": "rerank"}, "score.weight"),
        ("qwen3", {"tie_word_embeddings": False}, {"kind": "rerank", "yes_no": YES_NO}, "lm_head.weight"),
        ("qwen3", {}, {"kind": "sparse"}, "'qwen3'"),
        ("clip", {}, {"kind": "rerank"}, "'clip'"),
    ],
    ids=str,
)
def test_head_not_understood(
    tmp_path: Path, kind: str, changes: dict[str, Any], spec: dict[str, Any], named: str
) -> None:
    """A head that the checkpoint does not have, or that asks for what is not known, is refused by name."""
    head = "classifier" if kind == "modernbert" else None
    made = checkpoints_decoders.make(tmp_path, kind, head=head, prefix="")
    write_json(tmp_path / "config.json", made.config | changes)

    with pytest.raises(LoadError, match=re.escape(named)):
        load(tmp_path, **spec)


def test_dense_not_understood(tmp_path: Path) -> None:
    """A layer behind the pooling with an unknown activation is refused by name."""
    checkpoints_decoders.add_dense(tmp_path / "2_Dense", 48, 20, "torch.nn.modules.activation.Mish")
    checkpoints_decoders.make(tmp_path, "bert")

    with pytest.raises(LoadError, match="mish"):
        load(tmp_path, dense=("2_Dense",))
