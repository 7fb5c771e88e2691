"""What follows the hidden states: pooled vectors, scores of labels, scores of words, vectors of tokens.

B inputs, T tokens, H hidden, L labels, V words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

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
    unseen: int | None = None
    """A token that others do not attend to: the mask, with which a multi-vector model's queries are filled."""
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
            return Output(_token_vectors(g, trunk, head), pooled=False)


def pooled(g: GraphBuilder, hidden: str, how: Pooling) -> str:
    """(T, H) -> (B, H)."""
    match how:
        case "cls":
            return g.op("Gather", hidden, g.input("firsts", "B"))
        case "last_token":
            return g.op("Gather", hidden, g.input("lasts", "B"))
        case "mean":
            return _means(g, hidden)


def _means(g: GraphBuilder, hidden: str) -> str:
    """(T, H) -> (B, H), one input after another: in one product for all, company would show in the last bit."""
    firsts, lasts = g.input("firsts", "B"), g.input("lasts", "B")

    def mean(inner: GraphBuilder, index: str) -> str:
        i = inner.op("Unsqueeze", index, inner.ints(0))
        first, last = inner.op("Gather", firsts, i), inner.op("Gather", lasts, i)
        tokens = inner.op("Slice", hidden, first, inner.op("Add", last, inner.ints(1)), inner.ints(0))
        return inner.op("ReduceMean", tokens, axes=[0], keepdims=0)

    return g.loop(g.op("Squeeze", g.op("Shape", firsts)), mean)


def _vectors(g: GraphBuilder, trunk: Trunk, head: Head) -> Output:
    if not head.dense and not trunk.projection:
        return Output(trunk.hidden, pooled=False)  # pooled on the host
    x = pooled(g, trunk.hidden, head.pooling)
    x = linear(g, x, trunk.projection, "float32") if trunk.projection else x
    return Output(_through(g, x, head.dense), pooled=True)


def _token_vectors(g: GraphBuilder, trunk: Trunk, head: Head) -> str:
    """ColBERT's: each token through one layer, or through those that sentence-transformers stores -> (T, D)."""
    if head.dense:
        return _through(g, trunk.hidden, head.dense)
    return linear(g, trunk.hidden, trunk.checkpoint.root.affine("linear"), "float32")


def _through(g: GraphBuilder, x: str, layers: Sequence[Dense]) -> str:
    for i, dense in enumerate(layers):
        x = linear(g, x, Affine(f"dense_{i}", dense.weight, dense.bias), "float32")
        x = x if dense.activation == "identity" else activation(g, x, dense.activation)
    return x


def _classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    kind = config["model_type"]
    if kind not in CLASSIFIERS:
        raise LoadError(f"the architecture {kind!r} is known as an encoder, but not with a head that scores labels")
    return CLASSIFIERS[kind](g, trunk, config, head)


def _pooler_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """BERT's: the first token through the pooler, then the classifier -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.biased("pooler.dense"), "float32")
    return _out(g, g.op("Tanh", x), trunk.checkpoint.root, "classifier")


def _dense_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """RoBERTa's: the first token through a layer of the classifier's own -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.root.biased("classifier.dense"), "float32")
    return _out(g, g.op("Tanh", x), trunk.checkpoint.root, "classifier.out_proj")


def _distilbert_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """The first token through a layer and a ReLU -> (B, L)."""
    del config, head
    x = linear(g, pooled(g, trunk.hidden, "cls"), trunk.checkpoint.root.biased("pre_classifier"), "float32")
    return _out(g, g.op("Relu", x), trunk.checkpoint.root, "classifier")


def _out(g: GraphBuilder, x: str, root: Checkpoint, name: str) -> str:
    return linear(g, x, root.biased(name), "float32")


def _modernbert_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """ModernBERT's: one vector as its own config.json pools it, through a layer and a norm -> (B, L)."""
    del head
    how, root = config["classifier_pooling"], trunk.checkpoint.root
    if how not in {"cls", "mean"}:
        raise LoadError(f"config.json asks for classifier_pooling {how!r}; known are cls and mean")
    x = _transformed(g, pooled(g, trunk.hidden, how), root, config)
    return _out(g, x, root, "classifier")


def _language_model_classifier(g: GraphBuilder, trunk: Trunk, config: Config, head: Head) -> str:
    """The last token's scores, (B, L), or how much likelier than no the model goes on with yes, (B, 1), as a logit."""
    x, root = pooled(g, trunk.hidden, "last_token"), trunk.checkpoint.root
    if "score.weight" in root or not head.yes_no:
        return linear(g, x, root.affine("score"), "float32")
    tied = config.get("tie_word_embeddings")
    words = trunk.checkpoint.table(trunk.words) if tied else root.table("lm_head")  # (V, H)
    yes, no = head.yes_no
    # The sigmoid of a difference is the softmax over the two.
    return linear(g, x, Affine("yes_no", words[[yes]] - words[[no]], None), "float32")


Classifier = Callable[[GraphBuilder, Trunk, Config, Head], str]

CLASSIFIERS: dict[str, Classifier] = {
    "bert": _pooler_classifier,
    "camembert": _dense_classifier,
    "distilbert": _distilbert_classifier,
    "modernbert": _modernbert_classifier,
    "mpnet": _dense_classifier,
    "new": _pooler_classifier,
    "qwen3": _language_model_classifier,
    "roberta": _dense_classifier,
    "xlm-roberta": _dense_classifier,
}
"""By the `model_type` of config.json."""


def _masked_words(g: GraphBuilder, trunk: Trunk, config: Config) -> str:
    """The masked-LM head, whose last layer is the table of word embeddings unless config.json unties them -> (T, V)."""
    kind = config["model_type"]
    if kind not in MASKED_LM:
        raise LoadError(f"the architecture {kind!r} is known as an encoder, but not with a head that scores words")
    names, root = MASKED_LM[kind], trunk.checkpoint.root
    tied = config.get("tie_word_embeddings", True)
    words = trunk.checkpoint.table(trunk.words) if tied else root.table(names.decoder)  # (V, H)
    bias = root.tensor(names.bias) if config.get("decoder_bias", True) else None
    x = _transformed(g, trunk.hidden, root, config)
    return linear(g, x, Affine(names.decoder, words, bias), "float32")


def _transformed(g: GraphBuilder, x: str, root: Checkpoint, config: Config) -> str:
    """What stands before the words: a layer and a norm -> the shape of x."""
    names = MASKED_LM[config["model_type"]]
    x = linear(g, x, _layer(root, names.dense, config, "classifier_bias"), "float32")
    x = activation(g, x, config.get(names.activation, "gelu"))
    norm = _layer(root, names.norm, config, "norm_bias")
    return layer_norm(g, x, norm, config.get(names.epsilon, 1e-12))


def _layer(root: Checkpoint, name: str, config: Config, flag: str) -> Affine:
    """Read a layer with its bias, unless ModernBERT's config.json has a flag that there is none."""
    return root.biased(name) if config.get(flag, True) else root.affine(name)


@dataclass(frozen=True, slots=True)
class MaskedLm:
    """Where a checkpoint keeps its masked-LM head, and its config.json the head's settings."""

    dense: str
    norm: str
    decoder: str
    bias: str
    activation: str = ""
    """Without one it is GELU, whatever the encoder has."""
    epsilon: str = "layer_norm_eps"


_ROBERTA = MaskedLm("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")

MASKED_LM = {
    "bert": MaskedLm(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
        activation="hidden_act",
    ),
    "camembert": _ROBERTA,
    "distilbert": MaskedLm(
        "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias", activation="activation"
    ),
    "modernbert": MaskedLm(
        "head.dense", "head.norm", "decoder", "decoder.bias", activation="classifier_activation", epsilon="norm_eps"
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""By the `model_type` of config.json."""
