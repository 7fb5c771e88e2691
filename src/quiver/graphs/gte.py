"""GTE v1.5, whose architecture calls itself "new": rotary positions, stretched at a fixed factor, and GELU-gated layers.

Zhang et al. 2024 (mGTE). Its checkpoints store queries, keys and values as one layer, and up and gate as one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import LONG, Attention, Heads, Rotary, join_heads, rotate, split_heads
from quiver.graphs.bert import WORDS
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect
from quiver.graphs.gated import Block, Gated, embed, encode
from quiver.graphs.layers import scaled, split

HONOURED = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
    "is_decoder": False,
}


def build_gte(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a GTE v1.5 encoder."""
    expect(config, HONOURED)
    checkpoint = Checkpoint(weights, ("", "new."), f"{WORDS}.weight")
    heads = Heads(config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"])
    positions = config["max_position_embeddings"]
    angles = Rotary.with_frequencies(positions, _frequencies(config, heads.size))
    how = Gated(
        attention=Attention(heads, long=positions > LONG),
        activation=config.get("hidden_act", "gelu"),
        epsilon=config.get("layer_norm_eps", 1e-12),
        place=lambda x: join_heads(g, rotate(g, split_heads(g, x, heads), heads, angles), heads),
    )
    blocks = [_block(checkpoint, f"encoder.layer.{i}.", heads) for i in range(config["num_hidden_layers"])]
    x = embed(g, checkpoint, config["type_vocab_size"])
    x = encode(g, x, checkpoint.biased("embeddings.LayerNorm"), blocks, how, dtype)
    return Trunk(x, checkpoint, WORDS, vocab_size=len(checkpoint.table(WORDS)), max_positions=positions)


def _frequencies(config: Mapping[str, Any], size: int) -> NDArray[np.float64]:
    """Return the angle between neighbours in each pair of dimensions, (D / 2,), as `rope_scaling` slows it."""
    scaling = config.get("rope_scaling") or {"type": "ntk", "factor": 1.0}
    if scaling["type"] != "ntk":
        raise LoadError(
            f"config.json asks for rope_scaling {scaling!r}; this architecture is known with type 'ntk' only"
        )
    pairs = np.arange(1, size // 2 + 1) / (size / 2)  # (D / 2,)
    # kexue.fm/archives/9706, (10) to (13); its fixed NTK, (6), is the mixed one with b = 1.
    slower = scaling["factor"] ** pairs ** (scaling.get("mixed_b") or 1.0)
    frequencies: NDArray[np.float64] = config["rope_theta"] ** -(np.arange(0, size, 2) / size) / slower
    return frequencies


def _block(checkpoint: Checkpoint, name: str, heads: Heads) -> Block:
    """Read a block; its queries are scaled, so that its scores need not be."""
    query, key, value = split(checkpoint.biased(f"{name}attention.qkv_proj"), 3)
    up, gate = split(checkpoint.affine(f"{name}mlp.up_gate_proj"), 2)
    return Block(
        query=scaled(query, heads.size**-0.5),
        key=key,
        value=value,
        attention_output=checkpoint.biased(f"{name}attention.o_proj"),
        attention_norm=checkpoint.biased(f"{name}attn_ln"),
        up=up,
        gate=gate,
        down=checkpoint.biased(f"{name}mlp.down_proj"),
        output_norm=checkpoint.biased(f"{name}mlp_ln"),
    )
