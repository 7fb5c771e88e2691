"""What follows the hidden states: pooled vectors, scores of labels, scores of words, vectors of tokens.

B inputs, T tokens, H hidden, L labels, V words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray
from onnx import TensorProto

from quiver.errors import LoadError
from quiver.graphs.builder import GraphBuilder
from quiver.graphs.checkpoint import Checkpoint, Trunk
from quiver.graphs.layers import Affine, activation, layer_norm, linear
from quiver.types import Kind, Pooling

Config = Mapping[str, Any]
DenseActivation = Literal["identity", "tanh", "relu", "gelu"]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A layer over pooled vectors, as sentence-transformers stores it."""

    weight: NDArray[Any]  # (out, in)
    bias: NDArray[Any] | None  # (out,)
    activation: DenseActivation


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What is wanted of a model's hidden states."""

    kind: Kind = "embed"
    pooling: Pooling = "mean"
    dense: tuple[Dense, ...] = ()
    yes_no: tuple[int, int] | None = None
    """Ids of the tokens whose logits answer for a pair, where a language model is the judge."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where a head ends."""

    name: str
    pooled: bool
    """(B, ·) instead of (T, ·)."""


def add_head(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> Output:
    """Add what is wanted behind the hidden states; raises `LoadError` where the checkpoint has no such head."""
    match head.kind:
        case "embed":
            return _vectors(g, trunk, head)
        case "rerank" | "classify":
            return Output(_classifier(g, trunk, config, head), pooled=True)
        case "sparse":
            return Output(_masked_words(g, trunk, config), pooled=False)
        case "multi_vector":
            return Output(linear(g, trunk.hidden, trunk.checkpoint.root.affine("linear"), "float32"), pooled=False)


def pooled(g: GraphBuilder, hidden: str, how: Pooling) -> str:
    """(T, H) -> (B, H)."""
    match how:
        case "cls":
            return g.op("Gather", hidden, g.input("firsts", "B"))
        case "last_token":
            return g.op("Gather", hidden, g.input("lasts", "B"))
        case "mean":
            # One product that adds token after token, as attention does: other inputs' tokens are exact zeros.
            return g.op("MatMul", g.input("averages", "B", "T", kind=TensorProto.FLOAT), hidden)


def _vectors(g: GraphBuilder, trunk: Trunk, head: Head) -> Output:
    if not head.dense:
        return Output(trunk.hidden, pooled=False)  # pooled on the host
    x = pooled(g, trunk.hidden, head.pooling)
    for i, dense in enumerate(head.dense):
        x = linear(g, x, Affine(f"dense_{i}", dense.weight, dense.bias), "float32")
        x = x if dense.activation == "identity" else activation(g, x, dense.activation)
    return Output(x, pooled=True)


def _classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    kind = config["model_type"]
    if kind not in CLASSIFIERS:
        raise LoadError(f"the architecture {kind!r} is known as an encoder, but not with a head that scores labels")
    return CLASSIFIERS[kind](g, trunk, config, head)


def _pooler_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """BERT's: the first token through the pooler, then the classifier -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.affine("pooler.dense"), "float32")
    return _out(g, g.op("Tanh", x), trunk.checkpoint.root, "classifier")


def _dense_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """RoBERTa's: the first token through a layer of the classifier's own -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.root.affine("classifier.dense"), "float32")
    return _out(g, g.op("Tanh", x), trunk.checkpoint.root, "classifier.out_proj")


def _distilbert_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """The first token through a layer and a ReLU -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.root.affine("pre_classifier"), "float32")
    return _out(g, g.op("Relu", x), trunk.checkpoint.root, "classifier")


def _out(g: GraphBuilder, x: str, root: Checkpoint, name: str) -> str:
    return linear(g, x, root.affine(name), "float32")


Classifier = Callable[[GraphBuilder, Trunk, Config, Head], str]

CLASSIFIERS: dict[str, Classifier] = {
    "bert": _pooler_classifier,
    "camembert": _dense_classifier,
    "distilbert": _distilbert_classifier,
    "roberta": _dense_classifier,
    "xlm-roberta": _dense_classifier,
}
"""By the `model_type` of config.json."""


def _masked_words(g: GraphBuilder, trunk: Trunk, config: Config) -> str:
    """The masked-LM head, whose last layer is the table of word embeddings -> (T, V) logits."""
    kind = config["model_type"]
    if kind not in MASKED_LM:
        raise LoadError(f"the architecture {kind!r} is known as an encoder, but not with a head that scores words")
    names, root = MASKED_LM[kind], trunk.checkpoint.root
    x = linear(g, trunk.hidden, root.affine(names.dense), "float32")
    x = activation(g, x, config.get("hidden_act", "gelu"))
    x = layer_norm(g, x, root.affine(names.norm), config.get("layer_norm_eps", 1e-12))
    words = Affine("decoder", trunk.checkpoint.table(trunk.words), root.tensor(names.bias))
    return linear(g, x, words, "float32")


@dataclass(frozen=True, slots=True)
class MaskedLmNames:
    """Where a checkpoint keeps its masked-LM head."""

    dense: str
    norm: str
    bias: str


MASKED_LM = {
    "bert": MaskedLmNames(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
    ),
    "distilbert": MaskedLmNames("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    "roberta": MaskedLmNames("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "xlm-roberta": MaskedLmNames("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}
"""By the `model_type` of config.json."""
