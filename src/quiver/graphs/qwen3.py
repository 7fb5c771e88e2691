"""Qwen3: a decoder whose last token stands for the text, since each token sees only those before it.

Yang et al. 2025; pre-norm blocks whose norms do not centre: x = x + attention(norm(x)), then
x = x + down(activation(gate(norm(x))) × up(norm(x))). Several query heads share a head of keys and values, and the
queries and keys of each head have a norm of their own before they are turned by their positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import LONG, Attention, Heads, Pattern, Rotary, attention, rotate, share_heads, split_heads
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect
from quiver.graphs.layers import Affine, activation, add_linear, even_out, linear, rms_norm, scaled

WORDS = "embed_tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """What all blocks have in common."""

    attention: Attention
    groups: int
    """Heads of keys and values, each for as many query heads."""
    angles: Rotary
    activation: str
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """The layers of a block by their role."""

    attention_norm: Affine
    query: Affine
    key: Affine
    value: Affine
    query_norm: Affine
    key_norm: Affine
    attention_output: Affine
    feed_forward_norm: Affine
    gate: Affine
    up: Affine
    down: Affine


def build_qwen3(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a Qwen3 decoder."""
    heads, positions = Heads(config["num_attention_heads"], config["head_dim"]), config["max_position_embeddings"]
    decoder = Decoder(
        attention=Attention(heads, Pattern(causal=True), long=positions > LONG),
        groups=config["num_key_value_heads"],
        angles=Rotary.of(positions, heads.size, _rotary_base(config)),
        activation=config["hidden_act"],
        epsilon=config["rms_norm_eps"],
    )
    checkpoint = Checkpoint(weights, ("", "model."), f"{WORDS}.weight")
    words = checkpoint.table(WORDS)  # (V, H)
    x = g.op("Gather", g.weight(WORDS, words), g.input("ids", "T"))
    for i in range(config["num_hidden_layers"]):
        block = _read(checkpoint, f"layers.{i}.", heads, has_biases=bool(config.get("attention_bias")))
        block = _evened(block) if dtype == "int8" else block
        x = _feed_forward(g, _attend(g, x, block, decoder, dtype), block, decoder, dtype)
    x = rms_norm(g, x, checkpoint.affine("norm"), decoder.epsilon)
    return Trunk(x, checkpoint, WORDS, vocab_size=len(words), max_positions=positions)


def _rotary_base(config: Mapping[str, Any]) -> float:
    """Refuse windows and stretched positions; transformers 5 words these in its own way."""
    expect(config, {"use_sliding_window": False, "rope_scaling": None})
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise LoadError(f"config.json asks for layers of {others.pop()!r}; this architecture has full_attention only")
    parameters = config.get("rope_parameters") or config
    expect(parameters, {"rope_type": "default"})
    base: float = parameters["rope_theta"]
    return base


def _read(checkpoint: Checkpoint, name: str, heads: Heads, *, has_biases: bool) -> Block:
    """Read a block; its queries are scaled behind their norm, so that its scores need not be."""

    def layer(of: str) -> Affine:
        return (checkpoint.biased if has_biases else checkpoint.affine)(f"{name}self_attn.{of}")

    return Block(
        attention_norm=checkpoint.affine(f"{name}input_layernorm"),
        query=layer("q_proj"),
        key=layer("k_proj"),
        value=layer("v_proj"),
        query_norm=scaled(checkpoint.affine(f"{name}self_attn.q_norm"), heads.size**-0.5),
        key_norm=checkpoint.affine(f"{name}self_attn.k_norm"),
        attention_output=layer("o_proj"),
        feed_forward_norm=checkpoint.affine(f"{name}post_attention_layernorm"),
        gate=checkpoint.affine(f"{name}mlp.gate_proj"),
        up=checkpoint.affine(f"{name}mlp.up_proj"),
        down=checkpoint.affine(f"{name}mlp.down_proj"),
    )


def _evened(block: Block) -> Block:
    """Even out, for 8 bits, the columns of each norm for the layers that read it."""
    query, key = even_out(block.attention_norm, [block.query, block.key])
    gate, up = even_out(block.feed_forward_norm, [block.gate, block.up])
    return replace(block, query=query, key=key, gate=gate, up=up)


def _attend(g: GraphBuilder, x: str, block: Block, decoder: Decoder, dtype: Dtype) -> str:
    """(T, H) -> (T, H)."""
    heads, groups = decoder.attention.heads, Heads(decoder.groups, decoder.attention.heads.size)
    normed = rms_norm(g, x, block.attention_norm, decoder.epsilon)

    def project(layer: Affine, norm: Affine, heads: Heads) -> str:
        projected = split_heads(g, linear(g, normed, layer, dtype), heads)  # (T, heads, D)
        return rotate(g, rms_norm(g, projected, norm, decoder.epsilon), heads, decoder.angles)

    query, key = project(block.query, block.query_norm, heads), project(block.key, block.key_norm, groups)
    # Values and what goes down stay in float32: what they lose goes straight into the residual.
    value = split_heads(g, linear(g, normed, block.value, "float32"), groups)
    key, value = (share_heads(g, shared, groups.count, heads) for shared in (key, value))  # (T, A, D)
    return add_linear(g, attention(g, query, key, value, decoder.attention), block.attention_output, x, dtype)


def _feed_forward(g: GraphBuilder, x: str, block: Block, decoder: Decoder, dtype: Dtype) -> str:
    """(T, H) -> (T, H)."""
    normed = rms_norm(g, x, block.feed_forward_norm, decoder.epsilon)
    gate = activation(g, linear(g, normed, block.gate, dtype), decoder.activation)
    gated = g.op("Mul", gate, linear(g, normed, block.up, dtype))
    return add_linear(g, gated, block.down, x, "float32")
