"""MPNet: BERT with positions that begin behind the padding's, no token types, and scores that know distances.

Song et al. 2020. What a score gains depends on the distance alone: the nearest have a gain each, those further away
share one with more and more others (as in T5, Raffel et al. 2020), and all blocks have the same gains.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quiver.config import Dtype
from quiver.graphs.attention import Pattern
from quiver.graphs.bert import WORDS, Naming, bert_shape, build_encoder
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect

MPNET = Naming(
    prefixes=("", "mpnet."),
    has_token_types=False,
    block="encoder.layer.{}.",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
)
BUCKETS = 32
FURTHEST = 128
"""From here on, all distances share a bucket."""


def build_mpnet(g: GraphBuilder, config: Mapping[str, Any], weights: Weights, dtype: Dtype) -> Trunk:
    """Compile an MPNet encoder."""
    expect(config, {"relative_attention_num_buckets": BUCKETS})
    shape = bert_shape(config, first_position=config["pad_token_id"] + 1)
    checkpoint = Checkpoint(weights, MPNET.prefixes, f"{WORDS}.weight")
    positions = len(checkpoint.table("embeddings.position_embeddings")) - shape.first_position
    gains = checkpoint.table("encoder.relative_attention_bias")  # (BUCKETS, A)
    distances = np.arange(1 - positions, positions)
    return build_encoder(g, MPNET, shape, weights, dtype, Pattern(by_distance=gains[buckets(distances)]))


def buckets(distances: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each distance from query to key: half of them for keys behind, half for keys ahead."""
    half, near = BUCKETS // 2, BUCKETS // 4
    away = np.abs(distances)
    steps = np.log(np.maximum(away, near) / near) / math.log(FURTHEST / near) * (half - near)
    shared = np.minimum(near + steps.astype(np.int64), half - 1)
    bucket: NDArray[np.int64] = np.where(distances > 0, half, 0) + np.where(away < near, away, shared)
    return bucket
