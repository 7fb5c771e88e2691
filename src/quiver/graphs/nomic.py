"""NomicBERT: rotary positions, SwiGLU, and no biases unless config.json asks for them, in the words of GPT-2.

Nussbaum et al. 2024. Texts longer than the trained positions are read as they are, or, where config.json has a
`rotary_scaling_factor`, with angles that are stretched by the text's own length (dynamic NTK).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.attention import LONG, Attention, Heads, Rotary, join_heads, look_up, split_heads, turn
from quiver.graphs.bert import WORDS
from quiver.graphs.builder import GraphBuilder, Weights
from quiver.graphs.checkpoint import Checkpoint, Trunk, expect
from quiver.graphs.gated import Block, Gated, embed, encode
from quiver.graphs.layers import Affine, scaled, split

HONOURED = {
    "prenorm": False,
    "causal": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "norm_mlp": False,
    "moe_every_n_layers": 0,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_head_dim": False,
}
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}
Config = Mapping[str, Any]


def build_nomic(g: GraphBuilder, config: Config, weights: Weights, dtype: Dtype) -> Trunk:
    """Compile a NomicBERT encoder."""
    expect(config, HONOURED)
    kind = config["activation_function"]
    if kind not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise LoadError(f"config.json asks for activation_function {kind!r}; this architecture is known with {known}")
    checkpoint = Checkpoint(weights, ("", "bert.", "nomic_bert."), f"{WORDS}.weight")
    heads, positions = Heads(config["n_head"], config["n_embd"] // config["n_head"]), config["n_positions"]
    cos, sin = _turns(g, config, heads.size)
    how = Gated(
        attention=Attention(heads, long=positions > LONG),
        activation=ACTIVATIONS[kind],
        epsilon=config["layer_norm_epsilon"],
        place=lambda x: join_heads(g, turn(g, split_heads(g, x, heads), heads, cos, sin), heads),
    )
    blocks = [_block(checkpoint, f"encoder.layers.{i}.", config, heads) for i in range(config["n_layer"])]
    x = embed(g, checkpoint, config["type_vocab_size"])
    x = encode(g, x, checkpoint.biased("emb_ln"), blocks, how, dtype)
    return Trunk(x, checkpoint, WORDS, vocab_size=len(checkpoint.table(WORDS)), max_positions=positions)


def _block(checkpoint: Checkpoint, name: str, config: Config, heads: Heads) -> Block:
    """Read a block; its queries are scaled, so that its scores need not be."""

    def read(layer: str, flag: str) -> Affine:
        if config.get(flag, True):
            return checkpoint.biased(name + layer)
        return replace(checkpoint.affine(name + layer), bias=None)

    query, key, value = split(read("attn.Wqkv", "qkv_proj_bias"), 3)
    return Block(
        query=scaled(query, heads.size**-0.5),
        key=key,
        value=value,
        attention_output=read("attn.out_proj", "qkv_proj_bias"),
        attention_norm=checkpoint.biased(f"{name}norm1"),
        up=read("mlp.fc11", "mlp_fc1_bias"),
        gate=read("mlp.fc12", "mlp_fc1_bias"),
        down=read("mlp.fc2", "mlp_fc2_bias"),
        output_norm=checkpoint.biased(f"{name}norm2"),
    )


def _turns(g: GraphBuilder, config: Config, size: int) -> tuple[str, str]:
    """Return the cosines and the sines of each token's angles, (T, D / 2) both."""
    base, factor = config["rotary_emb_base"], config.get("rotary_scaling_factor")
    cos, sin = look_up(g, Rotary.of(config["n_positions"], size, base))
    if not factor:
        return cos, sin
    trained = config.get("max_trained_positions", 2048)
    lengths = np.arange(trained, max(trained, config["n_positions"]) + 1)[:, None]  # (N, 1)
    bases = base * (factor * lengths / trained - (factor - 1)) ** (size / (size - 2))
    frequencies = (bases ** -(np.arange(0, size, 2) / size)).astype(np.float32)  # (N, D / 2)

    beyond = g.op("Max", g.op("Sub", _lengths(g), g.ints(trained)), g.ints(0))  # (T,)
    steps = g.op("Gather", g.weight("rotary.frequencies", frequencies), beyond)  # (T, D / 2)
    positions = g.op("Cast", g.input("positions", "T"), to=TensorProto.FLOAT)
    angles = g.op("Mul", g.op("Unsqueeze", positions, g.ints(1)), steps)
    # The last bit of Cos and Sin varies with the place in the batch: they are for texts that are too long to share one.
    is_long = g.op("Unsqueeze", g.op("Greater", beyond, g.ints(0)), g.ints(1))  # (T, 1)
    return g.op("Where", is_long, g.op("Cos", angles), cos), g.op("Where", is_long, g.op("Sin", angles), sin)


def _lengths(g: GraphBuilder) -> str:
    """Count the tokens of the text that each token belongs to: (T,)."""
    positions, firsts = g.input("positions", "T"), g.input("firsts", "B")
    zero, one = g.constant(np.int64(0)), g.constant(np.int64(1))
    tokens = g.op("Range", zero, g.op("Squeeze", g.op("Shape", positions)), one)  # (T,)
    owners = g.op("Equal", g.op("Unsqueeze", g.op("Sub", tokens, positions), g.ints(1)), firsts)  # (T, B)
    sizes = g.op("Add", g.op("Sub", g.input("lasts", "B"), firsts), one)  # (B,)
    return g.op("ReduceSum", g.op("Where", owners, sizes, zero), g.ints(1), keepdims=0)
