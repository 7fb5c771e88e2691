"""A repository's own ONNX file gives what the float64 reference gives, and is refused where it could give anything else."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import checkpoints
import onnx_files
import reference
from onnx_files import Export, Repository
from quiver.backends import onnx_file
from quiver.backends.onnx_file import OnnxFileBackend
from quiver.backends.sessions import MAX_BYTES_FOR_TWO, Sessions
from quiver.engine import tokenizer
from quiver.engine.model import Model
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding

HIDDEN = 48
POSITIONS = 512
VOCAB = 1500
TOLERANCE = 1e-4
HALF_TOLERANCE = 0.05
LENGTHS = (1, 2, 7, 33, 128, 257, POSITIONS)
BATCHES = ((1, 1), (1, 40, 1, 7, 60, 19), (POSITIONS, 1, POSITIONS), (5,) * 25)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 90405214\n"

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
    described = spec_of(**spec)
    return Loaded(repository, described, load(repository.folder, described))


def spec_of(**changes: Any) -> ModelSpec:
    """Describe the tiny model."""
    plain = {"pooling": "mean", "dimensions": HIDDEN, "max_tokens": POSITIONS}
    return ModelSpec(id="test/tiny", weights="test/tiny", **plain | changes)


def load(folder: Path, spec: ModelSpec | None = None, dtype: str = "float32") -> OnnxFileBackend:
    """Load a directory as the engine does."""
    return onnx_file.load(ModelFiles(folder, "test/tiny"), spec or spec_of(), dtype=dtype, lanes=2)


def refusal(folder: Path, **spec: Any) -> str:
    """Return why a directory is not loaded; it must be said in one line."""
    with pytest.raises(LoadError) as refused:
        load(folder, spec_of(**spec))
    assert "\n" not in refused.value.message
    return refused.value.message


def texts_of(*lengths: int) -> list[Encoding]:
    """Draw a text of each length; the same lengths give the same texts."""
    draw = np.random.default_rng(sum(lengths))
    return [Encoding(draw.integers(5, VOCAB, length)) for length in lengths]


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
    from quiver.types import Pair

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


# The inputs that are understood


def declare(file: Path, name: str, kind: int, shape: Sequence[Any]) -> None:
    """Let a graph declare an input of this type and shape, in place of one of the same name."""
    model = onnx.load(file)
    kept = [known for known in model.graph.input if known.name != name]
    del model.graph.input[:]
    model.graph.input.extend([*kept, helper.make_tensor_value_info(name, kind, shape)])
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("pixel_values", TensorProto.FLOAT, ["B", 3, 224, 224]),
        ("task_id", TensorProto.INT64, []),
        ("use_cache_branch", TensorProto.BOOL, [1]),
        ("past_key_values.0.key", TensorProto.FLOAT, ["B", "heads", "past", 12]),
        ("past_key_values.0.key", TensorProto.FLOAT, ["B", 4, 16, 12]),
        ("past_key_values.0.key", TensorProto.INT64, ["B", 4, "past", 12]),
        ("attention_mask", TensorProto.FLOAT, ["B", "L"]),
    ],
)
def test_unknown_input(tmp_path: Path, name: str, kind: int, shape: Sequence[Any]) -> None:
    """A graph that wants what is not known is refused, naming the input."""
    repository = onnx_files.make(tmp_path)
    declare(repository.file, name, kind, shape)
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert repr(name) in message


def test_fixed_shape(tmp_path: Path) -> None:
    """A graph that reads inputs of one length alone is refused."""
    repository = onnx_files.make(tmp_path)
    declare(repository.file, "input_ids", TensorProto.INT64, ["B", 128])
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert "128" in message


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
    backend = load(tmp_path, spec_of(max_tokens=99))

    assert (backend.vocab_size, backend.max_positions) == (vocab_size, max_positions)


def test_no_config(tmp_path: Path) -> None:
    """A graph alone is enough: what config.json would state is taken from the catalogue."""
    loaded, texts = made(tmp_path), texts_of(9, 1, 30)
    (tmp_path / "config.json").unlink()

    assert_near(opened(loaded.repository).forward(texts), loaded.hiddens(texts))


# The file


@pytest.mark.parametrize("file", onnx_file.CANDIDATES)
def test_the_usual_names(tmp_path: Path, file: str) -> None:
    """The file is found where exporters put it."""
    assert made(tmp_path, file=file).backend.name == "onnx file"


def test_the_first_choice(tmp_path: Path) -> None:
    """Of two files in the usual places, the exporters' newer one is taken."""
    onnx_files.make(tmp_path, Export(outputs=HIDDEN_STATES))
    onnx_files.make(tmp_path, Export(file="model.onnx", outputs={"sentence_embedding": "mean"}))

    assert not load(tmp_path).pooled


def test_the_file_that_is_named(tmp_path: Path) -> None:
    """The file that the catalogue or the operator names is taken, wherever the others are."""
    onnx_files.make(tmp_path)
    onnx_files.make(tmp_path, Export(file="onnx/model_other.onnx", outputs={"sentence_embedding": "mean"}))

    assert load(tmp_path, spec_of(onnx_file="onnx/model_other.onnx")).pooled


@pytest.mark.parametrize("name", [None, "onnx/model_q4.onnx", "../model.onnx", "/model.onnx"])
def test_no_file(tmp_path: Path, name: str | None) -> None:
    """A file that is not there, or not the model's, is refused by its name."""
    assert (name or "onnx/model.onnx and no model.onnx") in refusal(tmp_path, onnx_file=name)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: LFS_POINTER, "git lfs pull"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda _: b"", "cut short"),
        (lambda _: b"<!DOCTYPE html><html>Not found</html>", "not an ONNX file"),
        (lambda _: b"\x80\x04\x95 a pickle", "not an ONNX file"),
    ],
)
def test_damaged_file(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    """A pointer, a part of a file, or a file of another format is refused, naming file and reason."""
    file = onnx_files.make(tmp_path).file
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(tmp_path)

    assert str(file) in message
    assert reason in message


def test_a_graph_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    """A graph that is no valid one is refused, naming file and reason."""
    repository = onnx_files.make(tmp_path)
    model = onnx.load(repository.file)
    model.graph.node[0].op_type = "Fetch"
    repository.file.write_bytes(model.SerializeToString())
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert "Fetch" in message


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_another_precision(tmp_path: Path, dtype: str) -> None:
    """A prebuilt file cannot be made less precise: the refusal says to choose another file."""
    onnx_files.make(tmp_path)

    with pytest.raises(LoadError, match=f"cannot be made {dtype}.* onnx_file"):
        load(tmp_path, dtype=dtype)


# The files beside it


def test_external_data(tmp_path: Path, bert: Loaded) -> None:
    """Tensors in a file beside the graph give the same bits as those inside it."""
    loaded, texts = made(tmp_path, external="model.onnx_data"), texts_of(9, 1, 30)

    assert loaded.repository.file.stat().st_size < 50_000
    np.testing.assert_array_equal(loaded.forward(texts), bert.forward(texts))


def in_cache(folder: Path, shared: Path | None = None) -> Path:
    """Write a repository as the hub's cache keeps it: links to blobs, which may be links to a shared store."""
    snapshot, blobs = folder / "snapshots" / ("c" * 40), folder / "blobs"
    blobs.mkdir(parents=True)
    onnx_files.make(snapshot, Export(external="model.onnx_data"))
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        blob = file.rename(blobs / f"{number:040}")
        file.symlink_to(os.path.relpath(blob, file.parent))
        if shared:
            (shared / f"{number:02}").mkdir(parents=True)
            blob.symlink_to(os.path.relpath(blob.rename(shared / f"{number:02}" / blob.name), blobs))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_in_the_hubs_cache(tmp_path: Path, bert: Loaded, *, shared: bool) -> None:
    """Links to the blobs of the hub's cache are followed, also where these are links to its shared store."""
    snapshot, texts = in_cache(tmp_path / "models--test--tiny", tmp_path / "blobs" if shared else None), texts_of(9, 30)

    assert (snapshot / "onnx/model.onnx_data").is_symlink()
    np.testing.assert_array_equal(load(snapshot).forward(pack(texts)), bert.forward(texts))


def linked(_: Path, data: Path, secret: Path) -> str:
    """Put a link to the secret in place of the tensors."""
    data.unlink()
    data.symlink_to(secret)
    return data.name


def linked_relatively(_: Path, data: Path, secret: Path) -> str:
    """Put a link that leads up and out of the model in place of the tensors."""
    data.unlink()
    data.symlink_to(os.path.relpath(secret, data.parent))
    return data.name


def linked_folder(_: Path, data: Path, secret: Path) -> str:
    """Lead out by a link to a folder."""
    (data.parent / "deeper").symlink_to(secret.parent)
    return f"deeper/{secret.name}"


def linked_twice(_: Path, data: Path, secret: Path) -> str:
    """Lead out by a link to a link."""
    (data.parent / "first").symlink_to(secret)
    (data.parent / "second").symlink_to("first")
    return "second"


def linked_as_a_blob(root: Path, data: Path, secret: Path) -> str:
    """Pretend to be the cache, in a directory that is none."""
    blobs = root.parent / "blobs"
    blobs.mkdir()
    secret.rename(blobs / "secret")
    data.unlink()
    data.symlink_to("../../blobs/secret")
    return data.name


@pytest.mark.parametrize(
    "lead_out",
    [
        lambda _root, _data, secret: str(secret),
        lambda _root, _data, secret: f"../../{secret.name}",
        lambda _root, _data, _secret: "sub/../model.onnx_data",
        lambda _root, _data, _secret: "*/_ORT_MEM_ADDR_/*",
        lambda _root, _data, _secret: "",
        lambda _root, _data, _secret: ".",
        linked,
        linked_relatively,
        linked_folder,
        linked_twice,
        linked_as_a_blob,
    ],
)
def test_external_data_leads_out(tmp_path: Path, lead_out: Callable[[Path, Path, Path], str]) -> None:
    """A graph whose tensors are said to be outside of the model's folder is refused, naming file and location."""
    repository = onnx_files.make(tmp_path / "model", Export(external="model.onnx_data"))
    data, secret = repository.file.with_name("model.onnx_data"), tmp_path / "secret"
    secret.write_bytes(data.read_bytes())
    location = lead_out(repository.folder, data, secret)
    onnx_files.relocate(repository.file, location)
    message = refusal(repository.folder)

    assert str(repository.file) in message
    assert f"{location!r}, which is not a file of the model's own folder" in message


def test_a_link_within_the_model(tmp_path: Path, bert: Loaded) -> None:
    """A link that stays in the model's folder is followed."""
    repository, texts = onnx_files.make(tmp_path, Export(external="model.onnx_data")), texts_of(9, 30)
    data = repository.file.with_name("model.onnx_data")
    data.rename(tmp_path / "weights.bin")
    data.symlink_to("../weights.bin")

    np.testing.assert_array_equal(load(tmp_path).forward(pack(texts)), bert.forward(texts))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data.unlink(), "is missing"),
        (lambda data: data.write_bytes(LFS_POINTER), "git lfs pull"),
        (lambda data: data.write_bytes(data.read_bytes()[:-1]), "cut short"),
        (lambda data: data.write_bytes(b""), "cut short"),
    ],
)
def test_damaged_external_data(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    """Tensors that are missing, a pointer, or cut short are refused, naming file and reason."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))
    damage(repository.file.with_name("model.onnx_data"))
    message = refusal(tmp_path)

    assert "model.onnx_data" in message
    assert reason in message


@pytest.mark.parametrize("offset", ["-4096", "far"])
def test_tensor_nowhere(tmp_path: Path, offset: str) -> None:
    """A tensor at an impossible place in its file is refused."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))
    model = onnx.load(repository.file, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "offset").value = offset
    repository.file.write_bytes(model.SerializeToString())

    assert str(repository.file) in refusal(tmp_path)


def outside() -> TensorProto:
    """Make a tensor that is said to be outside."""
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def in_constant() -> onnx.ModelProto:
    """Hide the tensor in a node's attribute."""
    return model_of([helper.make_node("Constant", [], ["t"], value=outside())])


def in_list() -> onnx.ModelProto:
    """Hide the tensor in an attribute that lists several."""
    return model_of([helper.make_node("Whatever", [], ["t"], domain="test", values=[outside()])])


def in_sparse() -> onnx.ModelProto:
    """Hide the tensor in the values of a sparse one."""
    indices = helper.make_tensor("i", TensorProto.INT64, [4], range(4))
    model = model_of([helper.make_node("Identity", ["t"], ["y"])])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(outside(), indices, [8]))
    return model


def in_subgraph() -> onnx.ModelProto:
    """Hide the tensor in a branch."""
    branch = helper.make_graph([helper.make_node("Identity", ["t"], ["y"])], "branch", [], [], [outside()])
    return model_of([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)])


def in_function() -> onnx.ModelProto:
    """Hide the tensor in a function's body."""
    constant = helper.make_node("Constant", [], ["t"], value=outside())
    model = model_of([helper.make_node("F", [], ["t"], domain="test")])
    model.functions.append(helper.make_function("test", "F", [], ["t"], [constant], [helper.make_opsetid("", 17)]))
    return model


def model_of(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Make a model of some nodes."""
    return helper.make_model(helper.make_graph(nodes, "hiding", [], []))


@pytest.mark.parametrize("hide", [in_constant, in_list, in_sparse, in_subgraph, in_function])
def test_hidden_external_data(tmp_path: Path, hide: Callable[[], onnx.ModelProto]) -> None:
    """A tensor that is said to be outside is found wherever in the graph it stands."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    onnx_files.save(tmp_path / "model/model.onnx", hide())

    assert "'../secret', which is not a file of the model's own folder" in refusal(tmp_path / "model")


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


def started(options: ort.SessionOptions) -> int:
    """Stand in for a session: the number of its threads."""
    return options.intra_op_num_threads


def test_who_gets_the_wide_session() -> None:
    """A forward pass alone gets the session of all cores, any other that of one; then it is free again."""
    sessions = Sessions(lambda options: (started(options), object()), num_bytes=MAX_BYTES_FOR_TWO)
    with sessions.free() as first, sessions.free() as second, sessions.free() as third:
        assert second is third
        assert first is not second
        assert second[0] == 1
    with sessions.free() as again:
        assert again is first


def test_a_large_model_has_one_session() -> None:
    """A model that is too large to be in memory twice has the wide session alone."""
    sessions = Sessions(lambda options: (started(options), object()), num_bytes=MAX_BYTES_FOR_TWO + 1)
    with sessions.free() as first, sessions.free() as second:
        assert second is first


def test_memory_is_given_back(tmp_path: Path) -> None:
    """What the attention over a very long text takes is not kept."""
    repository = onnx_files.make(tmp_path, positions=4096)
    backend = load(tmp_path, spec_of(max_tokens=4096))
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
