"""Repositories that hold an ONNX file alone, as optimum and Xenova export them: tiny, random, written without torch.

The graphs read padded inputs (B, L); their tensors and config.json are those of checkpoints.py. H hidden size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from safetensors.numpy import load_file

import checkpoints
from quiver.backends import onnx_file
from quiver.backends.onnx_file import OnnxFileBackend
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding

HIDDEN = 48
POSITIONS = 512
VOCAB = 1500

Form = Literal["tokens", "mean", "first", "labels", "words", "attention"]
"""What an output holds: hidden states (B, L, H), their masked mean or first (B, H), scores of labels (B, labels), of
words (B, L, words), or the last block's attention."""

LARGE = 1024
"""Bytes from which on a tensor is kept outside of the graph, as exporters do: shapes must be inside."""
MASKS = ("attention_mask", "input_mask")
TYPES = ("token_type_ids", "segment_ids")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What file to write, over which graph."""

    file: str = "onnx/model.onnx"
    inputs: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids")
    """Those that the graph has no use for are declared all the same."""
    outputs: Mapping[str, Form] = field(default_factory=lambda: {"last_hidden_state": "tokens"})
    labels: int = 1
    past: bool = False
    """Declare the keys and values of an earlier pass, as decoders do."""
    integers: Literal["int64", "int32"] = "int64"
    floats: Literal["float32", "float16"] = "float32"
    external: str | None = None
    """Keep the tensors in a file beside the graph."""


@dataclass(frozen=True)
class Repository:
    """What has been written, beside the numbers that a reference needs."""

    folder: Path
    file: Path
    config: dict[str, Any]
    weights: dict[str, NDArray[Any]]


def make(folder: Path, export: Export | None = None, kind: checkpoints.Kind = "bert", **options: Any) -> Repository:
    """Write the repository of a BERT or RoBERTa; `options` are those of its checkpoint."""
    export = export or Export()
    checkpoints.make(folder, kind, **options)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights |= classifier(export.labels, config["hidden_size"])
    file = folder / export.file
    file.parent.mkdir(exist_ok=True)
    save(file, Encoder(export, config, weights).model(), export.external)
    return Repository(folder, file, config, weights)


def classifier(labels: int, hidden: int) -> dict[str, NDArray[np.float32]]:
    """Draw the last layer of a cross-encoder."""
    draw = np.random.default_rng(labels)
    return {
        "classifier.weight": draw.standard_normal((labels, hidden)).astype(np.float32),
        "classifier.bias": draw.standard_normal(labels).astype(np.float32),
    }


def save(file: Path, model: ModelProto, location: str | None = None) -> None:
    """Write a model, its tensors in a file of their own if a location is given."""
    if location:
        data = bytearray()
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < LARGE:
                continue
            set_external_data(tensor, location, offset=len(data), length=len(tensor.raw_data))
            data += tensor.raw_data
            tensor.ClearField("raw_data")
        (file.parent / location).write_bytes(data)
    file.write_bytes(model.SerializeToString())


def relocate(file: Path, location: str) -> None:
    """Let a graph say that its tensors are in another file."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())


def spec_of(**changes: Any) -> ModelSpec:
    """Describe the tiny model."""
    plain = {"pooling": "mean", "dimensions": HIDDEN, "max_tokens": POSITIONS}
    return ModelSpec(id="test/tiny", weights="test/tiny", **plain | changes)


def load(folder: Path, dtype: str = "float32", **spec: Any) -> OnnxFileBackend:
    """Load a repository as the engine does."""
    return onnx_file.load(ModelFiles(folder, "test/tiny"), spec_of(**spec), dtype=dtype, lanes=2)


def refusal(folder: Path, dtype: str = "float32", **spec: Any) -> str:
    """Return why a repository is not loaded; it must be said in one line."""
    with pytest.raises(LoadError) as refused:
        load(folder, dtype, **spec)
    assert "\n" not in refused.value.message
    return refused.value.message


def texts_of(*lengths: int) -> list[Encoding]:
    """Draw a text of each length; the same lengths give the same texts."""
    draw = np.random.default_rng(sum(lengths))
    return [Encoding(draw.integers(len(checkpoints.BERT_SPECIALS), VOCAB, length)) for length in lengths]


class Encoder:
    """Writes the graph of one encoder, node after node; each method returns the name of what it computes."""

    def __init__(self, export: Export, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
        self.export = export
        self.config = config
        self.weights = weights
        self.heads: int = config["num_attention_heads"]
        self.size: int = config["hidden_size"] // self.heads
        self.nodes: list[NodeProto] = []
        self.initialisers: dict[str, TensorProto] = {}
        self.inputs: list[ValueInfoProto] = []
        self.presents: list[ValueInfoProto] = []

    def model(self) -> ModelProto:
        """Write the whole graph."""
        integers = helper.np_dtype_to_tensor_dtype(np.dtype(self.export.integers))
        self.inputs = [helper.make_tensor_value_info(name, integers, ["B", "L"]) for name in self.export.inputs]
        made = self.forms()
        ranks = {"mean": 2, "first": 2, "labels": 2, "attention": 4}
        outputs = []
        for name, form in self.export.outputs.items():
            self.nodes.append(helper.make_node("Identity", [made[form]], [name]))
            outputs.append(helper.make_tensor_value_info(name, self.float_type, [None] * ranks.get(form, 3)))
        graph = helper.make_graph(
            self.nodes, "encoder", self.inputs, [*outputs, *self.presents], list(self.initialisers.values())
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    @property
    def float_type(self) -> int:
        """The type of weights and results."""
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.export.floats))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, name: str = "") -> str:
        """Store an array; floating-point ones in the file's precision."""
        array = np.asarray(value)
        array = array.astype(self.export.floats) if array.dtype.kind == "f" else array
        name = name or f"constant_{len(self.initialisers)}"
        self.initialisers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        """Store a tensor of the checkpoint."""
        return self.constant(self.weights[name], name)

    def given(self, names: Sequence[str]) -> str | None:
        """Return which of these inputs the graph declares."""
        return next((name for name in names if name in self.export.inputs), None)

    def linear(self, x: str, name: str) -> str:
        """Map the last axis."""
        transposed = self.constant(self.weights[f"{name}.weight"].T, f"{name}.weight")
        return self.op("Add", self.op("MatMul", x, transposed), self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        """Normalise the last axis."""
        scale, offset = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, offset, axis=-1, epsilon=self.config["layer_norm_eps"])

    def embeddings(self) -> str:
        """Add up what stands for each token: (B, L, H)."""
        x = self.op("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        types = self.weight("embeddings.token_type_embeddings.weight")
        x = self.op("Add", x, self.op("Gather", types, self.given(TYPES) or self.constant(np.array([[0]]))))
        order = self.weight("embeddings.position_embeddings.weight")
        x = self.op("Add", x, self.op("Gather", order, self.given(["position_ids"]) or self.rows_of_positions()))
        return self.norm(x, "embeddings.LayerNorm")

    def rows_of_positions(self) -> str:
        """Count from the first position: (L,)."""
        first = 0 if self.config["model_type"] == "bert" else self.config["pad_token_id"] + 1
        length = self.op("Gather", self.op("Shape", "input_ids"), self.constant(np.int64(1)))
        count = self.op("Range", self.constant(np.int64(0)), length, self.constant(np.int64(1)))
        return self.op("Add", count, self.constant(np.int64(first)))

    def bias(self) -> str:
        """Forbid attention to padding: (B, 1, 1, L)."""
        mask = self.given(MASKS)
        if not mask:
            return self.constant(0.0)
        padding = self.op("Sub", self.constant(1.0), self.op("Cast", mask, to=self.float_type))
        forbidden = self.op("Mul", padding, self.constant(np.finfo(self.export.floats).min))
        return self.op("Unsqueeze", forbidden, self.constant(np.array([1, 2])))

    def split(self, x: str) -> str:
        """(B, L, H) -> (B, heads, L, size)."""
        shape = self.constant(np.array([0, 0, self.heads, self.size]))
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def remembered(self, x: str, name: str) -> str:
        """Put the rows of an earlier pass before these."""
        if not self.export.past:
            return x
        shape = ["B", self.heads, "earlier", self.size]
        self.inputs.append(helper.make_tensor_value_info(f"past_key_values.{name}", self.float_type, shape))
        self.presents.append(helper.make_tensor_value_info(f"present.{name}", self.float_type, [None] * 4))
        self.nodes.append(helper.make_node("Concat", [f"past_key_values.{name}", x], [f"present.{name}"], axis=2))
        return f"present.{name}"

    def block(self, x: str, index: int, bias: str) -> tuple[str, str]:
        """One block: (B, L, H) -> (B, L, H), and its attention."""
        name = f"encoder.layer.{index}."
        parts = (self.split(self.linear(x, f"{name}attention.self.{part}")) for part in ("query", "key", "value"))
        query, key, value = parts
        key, value = self.remembered(key, f"{index}.key"), self.remembered(value, f"{index}.value")
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Mul", scores, self.constant(self.size**-0.5)), bias)
        attention = self.op("Softmax", scores, axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", attention, value), perm=[0, 2, 1, 3])
        mixed = self.op("Reshape", mixed, self.constant(np.array([0, 0, -1])))
        x = self.norm(
            self.op("Add", x, self.linear(mixed, f"{name}attention.output.dense")), f"{name}attention.output.LayerNorm"
        )
        up = self.gelu(self.linear(x, f"{name}intermediate.dense"))
        x = self.norm(self.op("Add", x, self.linear(up, f"{name}output.dense")), f"{name}output.LayerNorm")
        return x, attention

    def gelu(self, x: str) -> str:
        """Spell the activation out, as PyTorch's exporter does."""
        erf = self.op("Erf", self.op("Div", x, self.constant(2**0.5)))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant(1.0))), self.constant(0.5))

    def forms(self) -> dict[Form, str]:
        """Compute everything that an output may be asked to hold."""
        x, attention, bias = self.embeddings(), "", self.bias()
        for index in range(self.config["num_hidden_layers"]):
            x, attention = self.block(x, index, bias)
        first = self.op("Gather", x, self.constant(np.int64(0)), axis=1)
        pooler = self.op("Tanh", self.linear(first, "pooler.dense"))
        words = self.constant(self.weights["embeddings.word_embeddings.weight"].T, "words")
        return {
            "tokens": x,
            "first": first,
            "mean": self.mean(x),
            "labels": self.linear(pooler, "classifier"),
            "words": self.op("MatMul", x, words),
            "attention": attention,
        }

    def mean(self, x: str) -> str:
        """Average the tokens that are not padding: (B, L, H) -> (B, H)."""
        mask = self.given(MASKS)
        if not mask:
            return self.op("ReduceMean", x, axes=[1], keepdims=0)
        weights = self.op("Unsqueeze", self.op("Cast", mask, to=self.float_type), self.constant(np.array([2])))
        axes = self.constant(np.array([1]))
        total = self.op("ReduceSum", self.op("Mul", x, weights), axes, keepdims=0)
        return self.op("Div", total, self.op("ReduceSum", weights, axes, keepdims=0))
