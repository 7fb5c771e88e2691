"""CLIP's text tower: a decoder of 77 positions whose last token is projected to where images lie, too.

Radford et al. 2021; pre-norm blocks: x = x + attention(norm(x)), then x = x + down(activation(up(norm(x)))). The
last token stands for the text, since each token sees only those before it. The tower of images is left alone.
"""

from collections.abc import Mapping
from typing import Any

from quiver.config import Dtype
from quiver.graphs.attention import LONG, Attention, Heads, Pattern, attention
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk
from quiver.graphs.layers import Affine, activation, add_linear, even_out, layer_norm, linear, scaled

WORDS = "embeddings.token_embedding"
ORDER = "embeddings.position_embedding"
PROJECTION = "text_projection"
DEFAULTS = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
"""What transformers leaves out of a config.json when it saves both towers."""
NAMES = {
    "attention_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.out_proj",
    "feed_forward_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
Config = Mapping[str, Any]


def build_clip_text(g: GraphBuilder, config: Config, weights: Weights, dtype: Dtype) -> Trunk:
    """Compile CLIP's text tower, from a checkpoint of both towers or of this one."""
    config = {**DEFAULTS, **config.get("text_config", config)}
    checkpoint = Checkpoint(weights, ("text_model.", ""), f"{WORDS}.weight")
    words, order = checkpoint.table(WORDS), checkpoint.table(ORDER)  # (V, H), (P, H)
    heads = Heads(config["num_attention_heads"], words.shape[1] // config["num_attention_heads"])
    how = Attention(heads, Pattern(causal=True), long=len(order) > LONG)
    x = g.op("Gather", g.weight(WORDS, words), g.input("ids", "T"))
    x = g.op("Add", x, g.op("Gather", g.weight(ORDER, order), g.input("positions", "T")))
    for i in range(config["num_hidden_layers"]):
        layers = _read(checkpoint, f"encoder.layers.{i}.", heads)
        layers = layers | _evened(layers) if dtype == "int8" else layers
        x = _block(g, x, layers, how, config, dtype)
    x = layer_norm(g, x, checkpoint.biased("final_layer_norm"), config["layer_norm_eps"])
    return Trunk(
        x,
        checkpoint,
        WORDS,
        vocab_size=len(words),
        max_positions=len(order),
        projection=checkpoint.root.affine(PROJECTION) if f"{PROJECTION}.weight" in checkpoint.root else None,
    )


def _read(checkpoint: Checkpoint, block: str, heads: Heads) -> dict[str, Affine]:
    """Read a block's layers by their role; its queries are scaled, so that its scores need not be."""
    layers = {role: checkpoint.biased(block + name) for role, name in NAMES.items()}
    return layers | {"query": scaled(layers["query"], heads.size**-0.5)}


def _evened(layers: dict[str, Affine]) -> dict[str, Affine]:
    """Even out, for 8 bits, the columns of each norm for the layers that read it."""
    query, key = even_out(layers["attention_norm"], [layers["query"], layers["key"]])
    (up,) = even_out(layers["feed_forward_norm"], [layers["up"]])
    return {"query": query, "key": key, "up": up}


def _block(g: GraphBuilder, x: str, layers: dict[str, Affine], how: Attention, config: Config, dtype: Dtype) -> str:
    """(T, H) -> (T, H)."""
    normed = layer_norm(g, x, layers["attention_norm"], config["layer_norm_eps"])
    query, key = (linear(g, normed, layers[role], dtype) for role in ("query", "key"))
    # Values and what goes down stay in float32: what they lose goes straight into the residual.
    value = linear(g, normed, layers["value"], "float32")
    x = add_linear(g, attention(g, query, key, value, how), layers["attention_output"], x, dtype)
    normed = layer_norm(g, x, layers["feed_forward_norm"], config["layer_norm_eps"])
    up = activation(g, linear(g, normed, layers["up"], dtype), config["hidden_act"])
    return add_linear(g, up, layers["down"], x, "float32")
