"""JinaBERT v2: a BERT without positions, whose scores fall with distance instead, and whose feed-forward layer is gated.

Günther et al. 2023; ALiBi, Press et al. 2021, in both directions. There are two makes: of embeddings and rerankers, and
of base-code, which norms queries and keys, norms what attention adds twice, and has other names.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import Attention, Heads, Pattern
from quiver.graphs.bert import WORDS
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect
from quiver.graphs.gated import Block, Gated, embed, encode
from quiver.graphs.layers import scaled, split

ACTIVATIONS = {"geglu": "gelu", "reglu": "relu"}
MAX_TOKENS = 8192
"""What these models are published for. ALiBi has no table that ends, so the positions of config.json are no limit."""


def build_jina_bert(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a JinaBERT v2 encoder."""
    expect(config, {"position_embedding_type": "alibi", "is_decoder": False})
    kind = config["feed_forward_type"]
    if kind not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise LoadError(f"config.json asks for feed_forward_type {kind!r}; this architecture is known with {known}")
    checkpoint = Checkpoint(weights, ("", "bert."), f"{WORDS}.weight")
    heads = Heads(config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"])
    how = Gated(
        attention=Attention(heads, Pattern(slopes=slopes(heads.count)), long=True),
        activation=ACTIVATIONS[kind],
        epsilon=config.get("layer_norm_eps", 1e-12),
        place=lambda x: x,
    )
    read = _code_block if "encoder.layer.0.mlp.up_gated_layer.weight" in checkpoint else _block
    blocks = [read(checkpoint, f"encoder.layer.{i}.", heads) for i in range(config["num_hidden_layers"])]
    x = embed(g, checkpoint, config.get("type_vocab_size", 2))
    x = encode(g, x, checkpoint.biased("embeddings.LayerNorm"), blocks, how, dtype)
    positions = max(MAX_TOKENS, config["max_position_embeddings"])
    return Trunk(x, checkpoint, WORDS, vocab_size=len(checkpoint.table(WORDS)), max_positions=positions)


def slopes(heads: int) -> NDArray[np.float64]:
    """Return how fast each head's scores fall: a geometric series, whose gaps further heads fill from its double."""
    whole = 2 ** int(math.log2(heads))
    series = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4 / whole * np.arange(1, 2 * whole, 2))
    return np.concatenate([series, between[: heads - whole]])


def _block(checkpoint: Checkpoint, name: str, heads: Heads) -> Block:
    """Read a block of embeddings or a reranker."""
    gate, up = split(checkpoint.affine(f"{name}mlp.gated_layers"), 2)
    query = checkpoint.biased(f"{name}attention.self.query")
    return Block(
        query=scaled(query, heads.size**-0.5),  # so that scores need not be
        key=checkpoint.biased(f"{name}attention.self.key"),
        value=checkpoint.biased(f"{name}attention.self.value"),
        attention_output=checkpoint.biased(f"{name}attention.output.dense"),
        attention_norm=checkpoint.biased(f"{name}attention.output.LayerNorm"),
        up=up,
        gate=gate,
        down=checkpoint.biased(f"{name}mlp.wo"),
        output_norm=checkpoint.biased(f"{name}mlp.layernorm"),
    )


def _code_block(checkpoint: Checkpoint, name: str, heads: Heads) -> Block:
    """Read a block of base-code."""
    up, gate = split(checkpoint.affine(f"{name}mlp.up_gated_layer"), 2)
    return Block(
        query=checkpoint.biased(f"{name}attention.self.query"),
        query_norm=scaled(checkpoint.biased(f"{name}attention.self.layer_norm_q"), heads.size**-0.5),
        key=checkpoint.biased(f"{name}attention.self.key"),
        key_norm=checkpoint.biased(f"{name}attention.self.layer_norm_k"),
        value=checkpoint.biased(f"{name}attention.self.value"),
        attention_output=checkpoint.biased(f"{name}attention.output.dense"),
        inner_norm=checkpoint.biased(f"{name}attention.output.LayerNorm"),
        attention_norm=checkpoint.biased(f"{name}layer_norm_1"),
        up=up,
        gate=gate,
        down=checkpoint.biased(f"{name}mlp.down_layer"),
        output_norm=checkpoint.biased(f"{name}layer_norm_2"),
    )
