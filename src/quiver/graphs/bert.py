"""BERT and its family: RoBERTa and XLM-RoBERTa (positions begin later), DistilBERT (no token types, other names).

Devlin et al. 2018; post-norm encoder blocks: x = norm(x + attention(x)); x = norm(x + feed_forward(x)).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import LONG, PLAIN, Attention, Heads, Pattern, attention
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk
from quiver.graphs.layers import Affine, activation, carry, even_out, layer_norm, linear, scaled

WORDS = "embeddings.word_embeddings"
ALWAYS_FLOAT = frozenset({"value", "down"})
"""Not rounded to 8 bits: measured, these two make nine tenths of the error."""

Layers = dict[str, Affine]
"""The layers of a block by their role."""


@dataclass(frozen=True, slots=True)
class Naming:
    """Where a checkpoint keeps each layer."""

    prefixes: tuple[str, ...]
    has_token_types: bool
    block: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str

    def roles(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each layer of a block by its role."""
        for role in fields(self)[3:]:
            yield role.name, getattr(self, role.name)


BERT = Naming(
    prefixes=("", "bert.", "roberta."),
    has_token_types=True,
    block="encoder.layer.{}.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
)
DISTILBERT = Naming(
    prefixes=("", "distilbert."),
    has_token_types=False,
    block="transformer.layer.{}.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What config.json says of the encoder."""

    hidden: int
    heads: int
    layers: int
    activation: str
    epsilon: float
    first_position: int = 0
    """Row of the position table that the first token takes."""

    @property
    def split(self) -> Heads:
        """How the heads share the hidden size."""
        return Heads(self.heads, self.hidden // self.heads)


def build_bert(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a BERT encoder."""
    return build_encoder(g, BERT, bert_shape(config), weights, dtype)


def build_roberta(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a RoBERTa or XLM-RoBERTa encoder, whose positions begin behind the padding's."""
    return build_encoder(g, BERT, bert_shape(config, first_position=config["pad_token_id"] + 1), weights, dtype)


def build_distilbert(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a DistilBERT encoder."""
    shape = Shape(config["dim"], config["n_heads"], config["n_layers"], config.get("activation", "gelu"), 1e-12)
    return build_encoder(g, DISTILBERT, shape, weights, dtype)


def bert_shape(config: Mapping[str, Any], first_position: int = 0) -> Shape:
    """Read a config.json that is worded as BERT's."""
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise LoadError(f"config.json asks for {kind!r} positions; this architecture is known with absolute ones only")
    if config.get("is_decoder"):
        raise LoadError("config.json describes a decoder; this architecture is known as an encoder only")
    return Shape(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        activation=config.get("hidden_act", "gelu"),
        epsilon=config.get("layer_norm_eps", 1e-12),
        first_position=first_position,
    )


def build_encoder(
    g: GraphBuilder, naming: Naming, shape: Shape, weights: Weights, dtype: Dtype, pattern: Pattern = PLAIN
) -> Trunk:
    """Compile an encoder of BERT's make."""
    checkpoint = Checkpoint(weights, naming.prefixes, f"{WORDS}.weight")
    words = checkpoint.table(WORDS)  # (V, H)
    order = checkpoint.table("embeddings.position_embeddings")[shape.first_position :]  # (P, H)
    x = g.op("Gather", g.weight(WORDS, words), g.input("ids", "T"))
    x = g.op("Add", x, g.op("Gather", g.weight("position_embeddings", order), g.input("positions", "T")))
    if naming.has_token_types:
        types = checkpoint.table("embeddings.token_type_embeddings")
        # RoBERTa has one type, for whatever a tokenizer calls the second text of a pair.
        kind = g.input("type_ids", "T") if len(types) > 1 else g.op("Mul", g.input("ids", "T"), g.ints(0))
        x = g.op("Add", x, g.op("Gather", g.weight("token_type_embeddings", types), kind))
    blocks = [_layers(checkpoint, naming, shape, i) for i in range(shape.layers)]
    norm = _prepare(checkpoint.biased("embeddings.LayerNorm"), blocks)

    how = Attention(shape.split, pattern, long=len(order) > LONG)
    x = layer_norm(g, x, norm, shape.epsilon)
    for layers in blocks:
        x = _block(g, x, layers, shape, dtype, how)
    return Trunk(x, checkpoint, WORDS, vocab_size=len(words), max_positions=len(order))


def _layers(checkpoint: Checkpoint, naming: Naming, shape: Shape, block: int) -> Layers:
    """Read a block; its queries are scaled, so that its scores need not be."""
    layers = {role: checkpoint.biased(naming.block.format(block) + name) for role, name in naming.roles()}
    return layers | {"query": scaled(layers["query"], shape.split.size**-0.5)}


def _prepare(norm: Affine, blocks: list[Layers]) -> Affine:
    """Let each norm carry the bias of its residual, and even out its columns for 8 bits; returns the first norm."""
    embeddings: Layers = {"output_norm": norm}
    for before, layers in pairwise([embeddings, *blocks]):
        readers = [layers[role] for role in ("query", "key", "value")]
        before["output_norm"], freed = carry(before["output_norm"], layers["attention_output"], readers)
        *attending, layers["value"] = freed
        layers["query"], layers["key"] = even_out(before["output_norm"], attending)
        layers["attention_norm"], freed = carry(layers["attention_norm"], layers["down"], [layers["up"]])
        (layers["up"],) = even_out(layers["attention_norm"], list(freed))
    return embeddings["output_norm"]


def _block(g: GraphBuilder, x: str, layers: Layers, shape: Shape, dtype: Dtype, how: Attention) -> str:
    """One encoder block: (T, H) -> (T, H)."""

    def apply(role: str, x: str, onto: str | None = None) -> str:
        return linear(g, x, layers[role], "float32" if role in ALWAYS_FLOAT else dtype, onto=onto)

    def norm(role: str, x: str) -> str:
        return layer_norm(g, x, layers[role], shape.epsilon)

    mixed = attention(g, apply("query", x), apply("key", x), apply("value", x), how)
    x = norm("attention_norm", apply("attention_output", mixed, onto=x))
    up = activation(g, apply("up", x), shape.activation)
    return norm("output_norm", apply("down", up, onto=x))
