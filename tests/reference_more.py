"""MPNet, NomicBERT, GTE v1.5 and JinaBERT v2 in float64 NumPy, one text at a time and as plainly as their papers say it.

Song et al. 2020 (MPNet, with the relative positions of Raffel et al. 2020), Nussbaum et al. 2024 (NomicBERT), Zhang et
al. 2024 (GTE), Günther et al. 2023 (JinaBERT); Su et al. 2021 (rotary positions), Press et al. 2021 (ALiBi), Shazeer
2020 (gated layers). Tensors go by the names of the hub's checkpoints. T tokens, H hidden size, A heads of D.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reference import Doubles, Weights, activate, double, layer_norm, softmax

Config = Mapping[str, Any]
Turn = Callable[[Doubles], Doubles]
"""Queries or keys, (T, A, D), turned by their positions."""


def hidden_states(config: Config, weights: Weights, ids: list[int], type_ids: list[int] | None = None) -> Doubles:
    """Run the encoder over one text: T token ids to (T, H)."""
    match config["model_type"]:
        case "mpnet":
            return mpnet(config, weights, ids)
        case "nomic_bert":
            return nomic(config, weights, ids, type_ids)
        case "new":
            return gte(config, weights, ids, type_ids)
        case "bert" if "encoder.layer.0.mlp.gated_layers.weight" in weights:
            return jina(config, weights, ids, type_ids)
        case "bert":
            return jina_code(config, weights, ids, type_ids)
    raise ValueError(f"the reference does not know {config['model_type']!r}")


def scores(config: Config, weights: Weights, first: Doubles) -> Doubles:
    """Score labels by the hidden state of a text's first token: (H,) to (L,)."""
    dense, out = ("classifier.dense", "classifier.out_proj") if config["model_type"] == "mpnet" else HEAD
    return linear(weights, out, np.tanh(linear(weights, dense, first)))


HEAD = ("pooler.dense", "classifier")


def mpnet(config: Config, weights: Weights, ids: list[int]) -> Doubles:
    """Add to BERT's scores what their distance's bucket gains them, the same in all blocks."""
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    first = config["pad_token_id"] + 1
    x = embeddings(weights, ids, None)
    x = x + double(weights["embeddings.position_embeddings.weight"][first : first + len(ids)])
    x = layer_norm(weights, "embeddings.LayerNorm", x, epsilon)
    table = double(weights["encoder.relative_attention_bias.weight"])
    gains = np.array([[table[bucket(key - query)] for key in range(len(ids))] for query in range(len(ids))])
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{i}."
        q, k, v = (by_heads(linear(weights, f"{block}attention.attn.{name}", x), heads) for name in "qkv")
        mixed = linear(weights, f"{block}attention.attn.o", attend(q, k, v, gains.transpose(2, 0, 1)))
        x = layer_norm(weights, f"{block}attention.LayerNorm", x + mixed, epsilon)
        up = activate(linear(weights, f"{block}intermediate.dense", x), config["hidden_act"])
        x = layer_norm(weights, f"{block}output.LayerNorm", x + linear(weights, f"{block}output.dense", up), epsilon)
    return x


def bucket(distance: int) -> int:
    """Return one of 32 buckets: 16 for keys behind or at the query, 16 for keys ahead; of these, 8 are for one distance."""
    side, away = (16 if distance > 0 else 0), abs(distance)
    if away < 8:
        return side + away
    return side + min(15, 8 + int(math.log(away / 8) / math.log(128 / 8) * 8))


def nomic(config: Config, weights: Weights, ids: list[int], type_ids: list[int] | None) -> Doubles:
    """Turn queries and keys by position, gate by the second of two layers."""
    heads, epsilon = config["n_head"], config["layer_norm_epsilon"]
    gating = {"swiglu": silu, "geglu": lambda x: activate(x, "gelu")}[config["activation_function"]]
    turn = rotary(len(ids), nomic_frequencies(config, len(ids)))
    x = layer_norm(weights, "emb_ln", embeddings(weights, ids, type_ids), epsilon)
    for i in range(config["n_layer"]):
        block = f"encoder.layers.{i}."
        q, k, v = (by_heads(part, heads) for part in np.split(linear(weights, f"{block}attn.Wqkv", x), 3, axis=1))
        mixed = linear(weights, f"{block}attn.out_proj", attend(turn(q), turn(k), v))
        x = layer_norm(weights, f"{block}norm1", x + mixed, epsilon)
        gated = linear(weights, f"{block}mlp.fc11", x) * gating(linear(weights, f"{block}mlp.fc12", x))
        x = layer_norm(weights, f"{block}norm2", x + linear(weights, f"{block}mlp.fc2", gated), epsilon)
    return x


def nomic_frequencies(config: Config, length: int) -> Doubles:
    """Return the angles between neighbours, stretched where a text is longer than the trained ones (dynamic NTK)."""
    size = config["n_embd"] // config["n_head"]
    base, factor, trained = config["rotary_emb_base"], config["rotary_scaling_factor"], config["max_trained_positions"]
    if factor and length > trained:
        base = base * (factor * length / trained - (factor - 1)) ** (size / (size - 2))
    return np.array([base ** (-2 * pair / size) for pair in range(size // 2)])


def gte(config: Config, weights: Weights, ids: list[int], type_ids: list[int] | None) -> Doubles:
    """Turn queries and keys by position, gate by the second half of one layer."""
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    turn = rotary(len(ids), gte_frequencies(config))
    x = layer_norm(weights, "embeddings.LayerNorm", embeddings(weights, ids, type_ids), epsilon)
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{i}."
        q, k, v = (
            by_heads(part, heads) for part in np.split(linear(weights, f"{block}attention.qkv_proj", x), 3, axis=1)
        )
        mixed = linear(weights, f"{block}attention.o_proj", attend(turn(q), turn(k), v))
        x = layer_norm(weights, f"{block}attn_ln", x + mixed, epsilon)
        up, gate = np.split(linear(weights, f"{block}mlp.up_gate_proj", x), 2, axis=1)
        gated = up * activate(gate, config["hidden_act"])
        x = layer_norm(weights, f"{block}mlp_ln", x + linear(weights, f"{block}mlp.down_proj", gated), epsilon)
    return x


def gte_frequencies(config: Config) -> Doubles:
    """Return the angles between neighbours: with fixed NTK a larger base and all a little slower, or mixed (b)."""
    size = config["hidden_size"] // config["num_attention_heads"]
    base, scaling = config["rope_theta"], config["rope_scaling"]
    plain = np.array([base ** (-2 * pair / size) for pair in range(size // 2)])
    if scaling is None:
        return plain
    factor, b = scaling["factor"], scaling.get("mixed_b")
    if b is None:
        larger = np.array([(base * factor) ** (-2 * pair / size) for pair in range(size // 2)])
        return larger / factor ** (2 / size)
    a = math.log(factor) / (size / 2) ** b
    return plain / np.array([math.exp(a * pair**b) for pair in range(1, size // 2 + 1)])


def jina(config: Config, weights: Weights, ids: list[int], type_ids: list[int] | None) -> Doubles:
    """Let scores fall with distance, gate by the first half of one layer."""
    heads, epsilon, gating = config["num_attention_heads"], config["layer_norm_eps"], jina_gating(config)
    x = layer_norm(weights, "embeddings.LayerNorm", embeddings(weights, ids, type_ids), epsilon)
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{i}."
        names = (f"{block}attention.self.{name}" for name in ("query", "key", "value"))
        q, k, v = (by_heads(linear(weights, name, x), heads) for name in names)
        mixed = linear(weights, f"{block}attention.output.dense", attend(q, k, v, alibi(len(ids), heads)))
        x = layer_norm(weights, f"{block}attention.output.LayerNorm", x + mixed, epsilon)
        gate, up = np.split(linear(weights, f"{block}mlp.gated_layers", x), 2, axis=1)
        down = linear(weights, f"{block}mlp.wo", gating(gate) * up)
        x = layer_norm(weights, f"{block}mlp.layernorm", x + down, epsilon)
    return x


def jina_code(config: Config, weights: Weights, ids: list[int], type_ids: list[int] | None) -> Doubles:
    """Norm queries and keys as well, add the residual to attention twice, gate by the second half of one layer."""
    heads, epsilon, gating = config["num_attention_heads"], config["layer_norm_eps"], jina_gating(config)
    x = layer_norm(weights, "embeddings.LayerNorm", embeddings(weights, ids, type_ids), epsilon)
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{i}."
        names = (f"{block}attention.self.{name}" for name in ("query", "key", "value"))
        q, k, v = (linear(weights, name, x) for name in names)
        q = layer_norm(weights, f"{block}attention.self.layer_norm_q", q, epsilon)
        k = layer_norm(weights, f"{block}attention.self.layer_norm_k", k, epsilon)
        mixed = attend(*(by_heads(part, heads) for part in (q, k, v)), alibi(len(ids), heads))
        mixed = linear(weights, f"{block}attention.output.dense", mixed)
        attended = layer_norm(weights, f"{block}attention.output.LayerNorm", x + mixed, epsilon)
        x = layer_norm(weights, f"{block}layer_norm_1", x + attended, epsilon)
        up, gate = np.split(linear(weights, f"{block}mlp.up_gated_layer", x), 2, axis=1)
        down = linear(weights, f"{block}mlp.down_layer", up * gating(gate))
        x = layer_norm(weights, f"{block}layer_norm_2", x + down, epsilon)
    return x


def jina_gating(config: Config) -> Turn:
    """Return the non-linearity of the gate."""
    name = {"geglu": "gelu", "reglu": "relu"}[config["feed_forward_type"]]
    return lambda x: activate(x, name)


def alibi(length: int, heads: int) -> Doubles:
    """Return what each head's score loses with distance: (A, T, T)."""
    places = np.arange(length)
    return -np.array(slopes(heads))[:, None, None] * np.abs(places[:, None] - places)


def slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes; where the heads are no power of two, every other one of twice as many fills the rest."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    whole = 2 ** math.floor(math.log2(heads))
    return slopes(whole) + slopes(2 * whole)[::2][: heads - whole]


def embeddings(weights: Weights, ids: list[int], type_ids: list[int] | None) -> Doubles:
    """Add up what stands for each token and its half of a pair: (T, H)."""
    x = double(weights["embeddings.word_embeddings.weight"][ids])
    types = weights.get("embeddings.token_type_embeddings.weight")
    if types is None:
        return x
    return x + double(types[[0] * len(ids) if type_ids is None or len(types) == 1 else type_ids])


def rotary(length: int, frequencies: Doubles) -> Turn:
    """Turn each pair of numbers, seen as a complex one, by its position's angle."""
    # Checkpoints were trained with angles in float32: their rounding belongs to the model.
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies.astype(np.float32)  # (T, D / 2)
    turns = np.exp(1j * angles.astype(np.float64))[:, None]  # (T, 1, D / 2)

    def turn(x: Doubles) -> Doubles:
        real, imaginary = np.split(x, 2, axis=-1)
        turned = (real + 1j * imaginary) * turns
        return np.concatenate([turned.real, turned.imag], axis=-1)

    return turn


def attend(query: Doubles, key: Doubles, value: Doubles, gains: Doubles | None = None) -> Doubles:
    """Let each token look at all tokens, in each head by itself: (T, A, D) each to (T, H)."""
    mixed = np.empty_like(value)
    for head in range(value.shape[1]):
        found = query[:, head] @ key[:, head].T / math.sqrt(value.shape[2])  # (T, T)
        mixed[:, head] = softmax(found if gains is None else found + gains[head]) @ value[:, head]
    return mixed.reshape(len(mixed), -1)


def by_heads(x: Doubles, heads: int) -> Doubles:
    """(T, H) to (T, A, D)."""
    return x.reshape(len(x), heads, -1)


def linear(weights: Weights, name: str, x: Doubles) -> Doubles:
    """Map (…, in) to (…, out), with a bias where there is one."""
    product: Doubles = x @ double(weights[f"{name}.weight"]).T
    return product + double(weights[f"{name}.bias"]) if f"{name}.bias" in weights else product


def silu(x: Doubles) -> Doubles:
    """Apply x · sigmoid(x)."""
    return x / (1 + np.exp(-x))
