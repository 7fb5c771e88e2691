"""A repository's own ONNX file gives what the float64 reference gives, and is refused where it could give anything else."""

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import checkpoints
import onnx_files
import reference
from onnx_files import POSITIONS, VOCAB, Export, Repository, load, refusal, spec_of, texts_of
from quiver.backends.onnx_file import OnnxFileBackend
from quiver.engine import tokenizer
from quiver.engine.model import Model
from quiver.engine.packing import pack
from quiver.models.catalogue import ModelSpec
from quiver.types import Encoding, Pair

TOLERANCE = 1e-4
HALF_TOLERANCE = 0.05
LENGTHS = (1, 2, 7, 33, 128, 257, POSITIONS)
BATCHES = ((1, 1), (1, 40, 1, 7, 60, 19), (POSITIONS, 1, POSITIONS), (5,) * 25)

PLAIN = ("input_ids", "attention_mask")
HIDDEN_STATES = {"last_hidden_state": "tokens"}


@dataclass(frozen=True)
class Loaded:
    """A repository as Quiver has loaded it, beside the numbers that the reference computes from."""

    repository: Repository
    spec: ModelSpec
    backend: OnnxFileBackend

    @property
    def model(self) -> Model:
        """Put the engine's part around the backend."""
        path = self.repository.folder / "tokenizer.json"
        return Model(self.spec, "float32", tokenizer.load(path, self.spec), self.backend)

    def forward(self, texts: Sequence[Encoding]) -> NDArray[np.float32]:
        """Run one forward pass."""
        return self.backend.forward(pack(texts))

    def hidden(self, text: Encoding) -> reference.Doubles:
        """Run the reference over one text: (T, H)."""
        type_ids = None if text.type_ids is None else text.type_ids.tolist()
        return reference.hidden_states(self.repository.config, self.repository.weights, text.ids.tolist(), type_ids)

    def hiddens(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Run the reference text by text: (T, H) of all."""
        return np.concatenate([self.hidden(text) for text in texts])

    def vectors(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Average and normalise what the reference computes: (B, H)."""
        return np.stack([reference.normalise(self.hidden(text).mean(axis=0)) for text in texts])

    def logits(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Score labels as BERT's head does: (B, L)."""
        weights = self.repository.weights
        firsts = np.stack([self.hidden(text)[0] for text in texts])
        return reference.linear(weights, "classifier", np.tanh(reference.linear(weights, "pooler.dense", firsts)))

    def words(self, texts: Sequence[Encoding]) -> reference.Doubles:
        """Score words: (T, V) of all."""
        return self.hiddens(texts) @ self.repository.weights["embeddings.word_embeddings.weight"].T


def made(folder: Path, kind: checkpoints.Kind = "bert", spec: Mapping[str, Any] | None = None, **export: Any) -> Loaded:
    """Write a repository and load it."""
    return opened(onnx_files.make(folder, Export(**export), kind), **(spec or {}))


def opened(repository: Repository, **spec: Any) -> Loaded:
    """Load a repository."""
    return Loaded(repository, spec_of(**spec), load(repository.folder, **spec))


def pairs_of(*lengths: int) -> list[Encoding]:
    """Draw texts whose second half has token type 1."""
    return [
        Encoding(text.ids, (np.arange(len(text)) >= len(text) // 2).astype(np.int64)) for text in texts_of(*lengths)
    ]


def assert_near(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = TOLERANCE) -> None:
    """Check the type, and that no number is further off than `tolerance`."""
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Give the plainest export."""
    return made(tmp_path_factory.mktemp("bert"))


# The same numbers as the reference


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(bert: Loaded, length: int) -> None:
    """A text by itself has the reference's hidden states and vector, at every length up to the last position."""
    text = texts_of(length)

    assert not bert.backend.pooled
    assert_near(bert.forward(text), bert.hiddens(text))
    assert_near(bert.model.compute(text), bert.vectors(text))


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_batches(bert: Loaded, lengths: tuple[int, ...]) -> None:
    """Texts of mixed lengths in one forward pass each have the reference's hidden states and vector."""
    texts = texts_of(*lengths)

    assert_near(bert.forward(texts), bert.hiddens(texts))
    assert_near(bert.model.compute(texts), bert.vectors(texts))


@pytest.mark.parametrize(
    ("kind", "export"),
    [
        ("bert", {"inputs": PLAIN}),
        ("bert", {"inputs": ("input_ids", "input_mask", "segment_ids")}),
        ("bert", {"inputs": (*PLAIN, "token_type_ids", "position_ids")}),
        ("bert", {"inputs": ("token_type_ids", "attention_mask", "input_ids"), "integers": "int32"}),
        ("bert", {"inputs": (*PLAIN, "position_ids"), "past": True}),
        ("roberta", {"inputs": PLAIN}),
        ("xlm-roberta", {"inputs": PLAIN}),
        ("xlm-roberta", {"inputs": (*PLAIN, "position_ids")}),
    ],
    ids=str,
)
def test_inputs(tmp_path: Path, kind: checkpoints.Kind, export: dict[str, Any]) -> None:
    """Whichever inputs a graph declares, by whichever names and of whichever integers: the reference's numbers."""
    loaded, texts = made(tmp_path, kind, **export), texts_of(9, 1, 30)

    assert_near(loaded.forward(texts), loaded.hiddens(texts))


@pytest.mark.parametrize("inputs", [(*PLAIN, "token_type_ids"), ("input_ids", "input_mask", "segment_ids")], ids=str)
def test_cross_encoder(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    """A cross-encoder is told which tokens are the document's, and its logits come as they are."""
    loaded = made(tmp_path, spec={"kind": "rerank", "dimensions": 1}, inputs=inputs, outputs={"logits": "labels"})
    pairs = pairs_of(9, 4, 30)
    untold = [Encoding(pair.ids) for pair in pairs]

    assert loaded.backend.pooled
    assert_near(loaded.model.compute(pairs), loaded.logits(pairs))
    assert np.abs(loaded.model.compute(untold) - loaded.logits(pairs)).max() > 100 * TOLERANCE


def test_the_tokenizers_pairs(tmp_path: Path) -> None:
    """A pair's own token types reach the graph from the tokenizer on."""
    loaded = made(tmp_path, spec={"kind": "rerank", "dimensions": 1}, outputs={"logits": "labels"})
    (pair,) = loaded.model.tokenizer.encode([Pair("a question", "and an answer")], truncate=True)

    assert set(pair.type_ids) == {0, 1}
    assert_near(loaded.model.compute([pair]), loaded.logits([pair]))


def test_half_precision(tmp_path: Path) -> None:
    """A file in 16 bits gives float32 results that are near."""
    loaded, texts = made(tmp_path, floats="float16"), texts_of(9, 1, 30)

    assert_near(loaded.forward(texts), loaded.hiddens(texts), HALF_TOLERANCE)


# The output that is read


@pytest.mark.parametrize(
    ("outputs", "pooled"),
    [
        ({"token_embeddings": "tokens"}, False),
        ({"whatever": "tokens"}, False),
        ({"last_hidden_state": "tokens", "pooler_output": "first"}, False),
        ({"attentions": "attention", "last_hidden_state": "tokens"}, False),
        ({"sentence_embedding": "mean"}, True),
        ({"whatever": "mean"}, True),
        ({"last_hidden_state": "tokens", "text_embeds": "mean"}, True),
        ({"token_embeddings": "tokens", "attentions": "attention", "sentence_embedding": "mean"}, True),
    ],
    ids=str,
)
def test_vectors(tmp_path: Path, outputs: Mapping[str, onnx_files.Form], *, pooled: bool) -> None:
    """An embedder's vectors are read from the right output, and are not pooled again where that holds vectors."""
    loaded, texts = made(tmp_path, outputs=outputs), texts_of(9, 1, 30)

    assert loaded.backend.pooled is pooled
    assert_near(loaded.model.compute(texts), loaded.vectors(texts))


def test_classifier(tmp_path: Path) -> None:
    """A classifier gives a logit for each label."""
    loaded = made(tmp_path, spec={"kind": "classify", "dimensions": 3}, outputs={"logits": "labels"}, labels=3)
    texts = texts_of(9, 1, 30)

    assert loaded.forward(texts).shape == (3, 3)
    assert_near(loaded.model.compute(texts), loaded.logits(texts))


def test_sparse(tmp_path: Path) -> None:
    """A sparse model's weights come from the logits of the words of real tokens alone."""
    loaded = made(tmp_path, spec={"kind": "sparse", "dimensions": VOCAB}, outputs={"logits": "words"})
    texts = texts_of(9, 1, 30)
    largest = [loaded.words([text]).max(axis=0) for text in texts]

    assert_near(loaded.model.compute(texts), np.log1p(np.maximum(largest, 0)))


@pytest.mark.parametrize("outputs", [{"contextual": "tokens"}, {"pooler": "first", **HIDDEN_STATES}], ids=str)
def test_multi_vector(tmp_path: Path, outputs: Mapping[str, onnx_files.Form]) -> None:
    """A multi-vector model gives a vector of unit length for each real token."""
    loaded = made(tmp_path, spec={"kind": "multi_vector"}, outputs=outputs)
    texts = texts_of(9, 1, 30)

    for text, vectors in zip(texts, loaded.model.compute(texts), strict=True):
        assert_near(vectors, np.stack([reference.normalise(row) for row in loaded.hidden(text)]))


def test_yes_or_no(tmp_path: Path) -> None:
    """A language model's score of a pair is how much rather it would go on with yes than with no."""
    spec = {"kind": "rerank", "dimensions": 1, "yes_no": (77, 12)}
    loaded = made(tmp_path, spec=spec, outputs={"logits": "words"}, past=True)
    texts = texts_of(9, 1, 30)
    last = np.stack([loaded.words([text])[-1] for text in texts])  # (B, V)

    assert loaded.backend.pooled
    assert_near(loaded.model.compute(texts), last[:, [77]] - last[:, [12]], 10 * TOLERANCE)


def test_yes_or_no_in_one_logit(tmp_path: Path) -> None:
    """A language model that was exported with a head of one label gives that label's logit."""
    spec = {"kind": "rerank", "dimensions": 1, "yes_no": (77, 12)}
    loaded, texts = made(tmp_path, spec=spec, outputs={"logits": "labels"}), texts_of(9, 1, 30)

    assert_near(loaded.model.compute(texts), loaded.logits(texts))


@pytest.mark.parametrize(
    ("spec", "outputs", "named"),
    [
        ({}, {"attentions": "attention"}, "attentions (4 axes)"),
        ({}, {"a": "tokens", "b": "tokens"}, "a (3 axes), b (3 axes)"),
        ({}, {"sentence_embedding": "tokens", "b": "tokens"}, "sentence_embedding (3 axes)"),
        ({}, {"logits": "words"}, "1500 numbers"),
        ({"dimensions": 47}, HIDDEN_STATES, "48 numbers"),
        ({"dense": ("2_Dense",)}, HIDDEN_STATES, "2_Dense"),
        ({"kind": "rerank"}, HIDDEN_STATES, "last_hidden_state (3 axes)"),
        ({"kind": "classify"}, {"logits": "words"}, "logits (3 axes)"),
        ({"kind": "sparse"}, {"logits": "labels"}, "logits (2 axes)"),
        ({"kind": "multi_vector"}, {"sentence_embedding": "mean"}, "sentence_embedding (2 axes)"),
    ],
    ids=str,
)
def test_no_output_fits(
    tmp_path: Path, spec: dict[str, Any], outputs: Mapping[str, onnx_files.Form], named: str
) -> None:
    """A graph that cannot give what the model's kind needs is refused, with what it has."""
    repository = onnx_files.make(tmp_path, Export(outputs=outputs))
    message = refusal(tmp_path, **spec)

    assert str(repository.file) in message
    assert named in message


def test_layers_inside_the_graph(tmp_path: Path) -> None:
    """A graph that ends in vectors has the layers behind the pooling in it."""
    loaded = made(tmp_path, spec={"dense": ("2_Dense",)}, outputs={"sentence_embedding": "mean"})

    assert loaded.backend.pooled


# What config.json states


@pytest.mark.parametrize(
    ("kind", "changes", "vocab_size", "max_positions"),
    [
        ("bert", {}, VOCAB, POSITIONS),
        ("xlm-roberta", {}, VOCAB, POSITIONS),
        ("xlm-roberta", {"pad_token_id": None}, VOCAB, POSITIONS),
        ("bert", {"max_position_embeddings": None}, VOCAB, 99),
        ("bert", {"vocab_size": "many", "max_position_embeddings": 300}, 100, 300),
    ],
)
def test_sizes(
    tmp_path: Path, kind: checkpoints.Kind, changes: dict[str, Any], vocab_size: int, max_positions: int
) -> None:
    """The vocabulary and the positions are those of config.json, and of the catalogue where it does not state them."""
    repository = onnx_files.make(tmp_path, Export(inputs=PLAIN), kind)
    checkpoints.write_json(tmp_path / "config.json", repository.config | changes)
    backend = load(tmp_path, max_tokens=99)

    assert (backend.vocab_size, backend.max_positions) == (vocab_size, max_positions)


def test_no_config(tmp_path: Path) -> None:
    """A graph alone is enough: what config.json would state is taken from the catalogue."""
    loaded, texts = made(tmp_path), texts_of(9, 1, 30)
    (tmp_path / "config.json").unlink()

    assert_near(opened(loaded.repository).forward(texts), loaded.hiddens(texts))


# The same bits, whoever else computes


def test_both_sessions(bert: Loaded) -> None:
    """A forward pass that is not alone has the same bits from the narrow session."""
    for text in texts_of(*LENGTHS):
        alone = bert.forward([text])
        with bert.backend._sessions.free():
            np.testing.assert_array_equal(bert.forward([text]), alone)


def test_two_threads(bert: Loaded) -> None:
    """Two threads at once compute the same bits as one."""
    texts = texts_of(*range(1, 60), 300, 400)
    alone = [bert.forward([text]) for text in texts]
    both_ready = threading.Barrier(2)

    def compute(order: slice) -> list[NDArray[np.float32]]:
        both_ready.wait(timeout=10)
        return [bert.forward([text]) for text in texts[order]][order]

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(compute, (slice(None), slice(None, None, -1))):
            for result, wanted in zip(results, alone, strict=True):
                np.testing.assert_array_equal(result, wanted)


def test_the_warm_up(bert: Loaded) -> None:
    """The engine's warm-up runs on it, and its promise holds: where it finds no trace of padding, there is none."""
    texts = texts_of(40, 3, 1, 28)
    together = np.split(bert.forward(texts), np.cumsum([40, 3, 1]))
    alike = [np.array_equal(bert.forward([text]), rows) for text, rows in zip(texts, together, strict=True)]

    assert all(alike) or not bert.model.warm_up()


def test_memory_is_given_back(tmp_path: Path) -> None:
    """What the attention over a very long text takes is not kept."""
    repository = onnx_files.make(tmp_path, positions=4096)
    backend = load(tmp_path, max_tokens=4096)
    backend.forward(pack(texts_of(100)))
    before = psutil.Process().memory_info().rss
    backend.forward(pack(texts_of(4096)))

    scores = repository.config["num_attention_heads"] * 4096**2 * 4
    assert psutil.Process().memory_info().rss - before < scores // 2


def test_a_tokenizer_that_pads(bert: Loaded) -> None:
    """The padding that tokenizer.json brings along is discarded: one word has no more than its own tokens."""
    stored = json.loads((bert.repository.folder / "tokenizer.json").read_text(encoding="utf-8"))
    (word,) = bert.model.tokenizer.encode(["a"], truncate=True)

    assert len(word) < stored["padding"]["strategy"]["Fixed"]
    assert_near(bert.model.compute([word]), bert.vectors([word]))
