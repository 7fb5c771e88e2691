"""ModernBERT: most layers look at near tokens only, the others at all; rotary positions and gated layers.

Warner et al. 2024; pre-norm blocks: x = x + attention(norm(x)), then x = x + down(activation(gate(norm(x))) × up(norm(x))).
The first block reads the norm of the embeddings as it is. Checkpoints store queries, keys and values as one layer,
gate and up as one, and biases only where config.json says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import LONG, Attention, Heads, Pattern, Rotary, attention, rotate, split_heads
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect
from quiver.graphs.layers import Affine, activation, add_linear, even_out, layer_norm, linear, scaled, split

WORDS = "embeddings.tok_embeddings"
ALL, NEAR = "full_attention", "sliding_attention"
"""The kinds of layers, as transformers 5 calls them."""
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What the tokens of a layer see, and the angles by which it turns them."""

    attention: Attention
    angles: Rotary


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """The layers of a block by their role."""

    attention_norm: Affine | None
    query: Affine
    key: Affine
    value: Affine
    attention_output: Affine
    feed_forward_norm: Affine
    gate: Affine
    up: Affine
    down: Affine


def build_modernbert(g: GraphBuilder, config: Config, weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a ModernBERT encoder."""
    checkpoint = Checkpoint(weights, ("", "model."), f"{WORDS}.weight")
    words, norm = checkpoint.table(WORDS), _layer(checkpoint, "embeddings.norm", config, "norm_bias")
    x = g.op("Gather", g.weight(WORDS, words), g.input("ids", "T"))
    x = layer_norm(g, x, norm, config["norm_eps"])
    for i, sight in enumerate(_sights(config)):
        block = _read(checkpoint, config, i, sight.attention.heads)
        block = _evened(block, norm) if dtype == "int8" else block
        x = _attend(g, x, block, sight, config["norm_eps"], dtype)
        x = _feed_forward(g, x, block, config, dtype)
    x = layer_norm(g, x, _layer(checkpoint, "final_norm", config, "norm_bias"), config["norm_eps"])
    return Trunk(x, checkpoint, WORDS, vocab_size=len(words), max_positions=config["max_position_embeddings"])


def _sights(config: Config) -> Sequence[Sight]:
    """Tell what each layer sees; transformers 5 lists their kinds, before it every so many saw all."""
    count, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or [NEAR if i % every else ALL for i in range(count)]
    sights = {
        ALL: _sight(config, ALL, "global_rope_theta", Pattern()),
        NEAR: _sight(config, NEAR, "local_rope_theta", Pattern(window=config["local_attention"] // 2)),
    }
    if others := set(kinds) - set(sights):
        raise LoadError(f"config.json lists a layer of the type {others.pop()!r}; known are {', '.join(sights)}")
    if len(kinds) != count:
        raise LoadError(f"config.json lists layer_types of {len(kinds)} layers, but num_hidden_layers is {count}")
    return [sights[kind] for kind in kinds]


def _sight(config: Config, kind: str, theta: str, pattern: Pattern) -> Sight:
    heads = Heads(config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"])
    positions = config["max_position_embeddings"]
    rotary = (config.get("rope_parameters") or {}).get(kind) or {"rope_theta": config[theta]}
    expect(rotary, {"rope_type": "default"})
    angles = Rotary.of(positions, heads.size, rotary["rope_theta"], kind)
    return Sight(Attention(heads, pattern, long=positions > LONG), angles)


def _read(checkpoint: Checkpoint, config: Config, i: int, heads: Heads) -> Block:
    """Read a block; its queries are scaled, so that its scores need not be."""

    def layer(name: str, flag: str) -> Affine:
        return _layer(checkpoint, f"layers.{i}.{name}", config, flag)

    query, key, value = split(layer("attn.Wqkv", "attention_bias"), 3)
    gate, up = split(layer("mlp.Wi", "mlp_bias"), 2)
    return Block(
        attention_norm=layer("attn_norm", "norm_bias") if i else None,
        query=scaled(query, heads.size**-0.5),
        key=key,
        value=value,
        attention_output=layer("attn.Wo", "attention_bias"),
        feed_forward_norm=layer("mlp_norm", "norm_bias"),
        gate=gate,
        up=up,
        down=layer("mlp.Wo", "mlp_bias"),
    )


def _layer(checkpoint: Checkpoint, name: str, config: Config, flag: str) -> Affine:
    """Read a layer, with a bias where a flag of config.json says that it has one."""
    return checkpoint.biased(name) if config.get(flag) else checkpoint.affine(name)


def _evened(block: Block, first_norm: Affine) -> Block:
    """Even out, for 8 bits, the columns of each norm for the layers that read it."""
    query, key = even_out(block.attention_norm or first_norm, [block.query, block.key])
    gate, up = even_out(block.feed_forward_norm, [block.gate, block.up])
    return replace(block, query=query, key=key, gate=gate, up=up)


def _attend(g: GraphBuilder, x: str, block: Block, sight: Sight, epsilon: float, dtype: Dtype) -> str:
    """(T, H) -> (T, H)."""
    heads = sight.attention.heads
    normed = layer_norm(g, x, block.attention_norm, epsilon) if block.attention_norm else x
    query, key = (split_heads(g, linear(g, normed, layer, dtype), heads) for layer in (block.query, block.key))
    query, key = (rotate(g, placed, heads, sight.angles) for placed in (query, key))  # (T, A, D)
    # Values and what goes down stay in float32: what they lose goes straight into the residual.
    value = linear(g, normed, block.value, "float32")
    return add_linear(g, attention(g, query, key, value, sight.attention), block.attention_output, x, dtype)


def _feed_forward(g: GraphBuilder, x: str, block: Block, config: Config, dtype: Dtype) -> str:
    """(T, H) -> (T, H)."""
    normed = layer_norm(g, x, block.feed_forward_norm, config["norm_eps"])
    gate = activation(g, linear(g, normed, block.gate, dtype), config["hidden_activation"])
    gated = g.op("Mul", gate, linear(g, normed, block.up, dtype))
    return add_linear(g, gated, block.down, x, "float32")
