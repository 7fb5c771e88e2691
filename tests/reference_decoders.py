"""ModernBERT, Qwen3 and CLIP's text tower in float64 NumPy, one text at a time, and the heads of all kinds.

Warner et al. 2024 (ModernBERT), Yang et al. 2025 (Qwen3), Radford et al. 2021 (CLIP). Tensors go by the names that
transformers gives them. T tokens, H hidden size, A heads of D, L labels, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import reference
from reference import Doubles, Weights, double, softmax

Config = Mapping[str, Any]


def hidden_states(config: Config, weights: Weights, ids: list[int]) -> Doubles:
    """Run a model over one text: T token ids to (T, H)."""
    match config["model_type"]:
        case "modernbert":
            return modernbert(config, weights, ids)
        case "qwen3":
            return qwen3(config, weights, ids)
        case "clip":
            return clip_text(config["text_config"], weights, ids)
        case "clip_text_model":
            return clip_text(config, weights, ids)
    return reference.hidden_states(config, weights, ids)


def modernbert(config: Config, weights: Weights, ids: list[int]) -> Doubles:
    """Most layers see near tokens only, and have angles of their own."""
    size, epsilon = config["hidden_size"] // config["num_attention_heads"], config["norm_eps"]
    near = np.abs(distances(len(ids))) <= config["local_attention"] // 2
    x = layer_norm(weights, "embeddings.norm", double(weights["embeddings.tok_embeddings.weight"][ids]), epsilon)
    for i in range(config["num_hidden_layers"]):
        block, sees_all = f"layers.{i}.", i % config["global_attn_every_n_layers"] == 0
        theta = config["global_rope_theta"] if sees_all else config["local_rope_theta"]
        normed = layer_norm(weights, f"{block}attn_norm", x, epsilon) if i else x
        query, key, value = np.split(linear(weights, f"{block}attn.Wqkv", normed), 3, axis=1)
        query, key = turn(heads(query, size), theta), turn(heads(key, size), theta)
        mixed = attention(query, key, heads(value, size), np.ones_like(near) if sees_all else near)
        x = x + linear(weights, f"{block}attn.Wo", mixed)
        normed = layer_norm(weights, f"{block}mlp_norm", x, epsilon)
        gate, up = np.split(linear(weights, f"{block}mlp.Wi", normed), 2, axis=1)
        x = x + linear(weights, f"{block}mlp.Wo", activate(gate, config["hidden_activation"]) * up)
    return layer_norm(weights, "final_norm", x, epsilon)


def qwen3(config: Config, weights: Weights, ids: list[int]) -> Doubles:
    """Each token sees those before it; three query heads, say, share a head of keys and values."""
    size, theta, epsilon = config["head_dim"], config["rope_theta"], config["rms_norm_eps"]
    x = double(weights["embed_tokens.weight"][ids])
    for i in range(config["num_hidden_layers"]):
        block, attend = f"layers.{i}.", f"layers.{i}.self_attn."
        normed = rms_norm(weights, f"{block}input_layernorm", x, epsilon)
        query, key, value = (heads(linear(weights, f"{attend}{name}_proj", normed), size) for name in "qkv")
        query = turn(rms_norm(weights, f"{attend}q_norm", query, epsilon), theta)
        key = turn(rms_norm(weights, f"{attend}k_norm", key, epsilon), theta)
        mixed = attention(query, key, value, distances(len(ids)) <= 0)
        x = x + linear(weights, f"{attend}o_proj", mixed)
        normed = rms_norm(weights, f"{block}post_attention_layernorm", x, epsilon)
        gate = activate(linear(weights, f"{block}mlp.gate_proj", normed), config["hidden_act"])
        x = x + linear(weights, f"{block}mlp.down_proj", gate * linear(weights, f"{block}mlp.up_proj", normed))
    return rms_norm(weights, "norm", x, epsilon)


def clip_text(config: Config, weights: Weights, ids: list[int]) -> Doubles:
    """Each token sees those before it."""
    size, epsilon = config["hidden_size"] // config["num_attention_heads"], config["layer_norm_eps"]
    x = double(weights["embeddings.token_embedding.weight"][ids])
    x = x + double(weights["embeddings.position_embedding.weight"][: len(ids)])
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{i}."
        normed = layer_norm(weights, f"{block}layer_norm1", x, epsilon)
        query, key, value = (heads(linear(weights, f"{block}self_attn.{name}_proj", normed), size) for name in "qkv")
        mixed = attention(query, key, value, distances(len(ids)) <= 0)
        x = x + linear(weights, f"{block}self_attn.out_proj", mixed)
        normed = layer_norm(weights, f"{block}layer_norm2", x, epsilon)
        up = activate(linear(weights, f"{block}mlp.fc1", normed), config["hidden_act"])
        x = x + linear(weights, f"{block}mlp.fc2", up)
    return layer_norm(weights, "final_layer_norm", x, epsilon)


# Layers


def distances(tokens: int) -> NDArray[np.int64]:
    """Return how far behind each token (a row) each other (a column) stands: (T, T)."""
    places = np.arange(tokens)
    return places[None, :] - places[:, None]


def heads(x: Doubles, size: int) -> Doubles:
    """(T, A × D) to (T, A, D)."""
    return x.reshape(len(x), -1, size)


def turn(x: Doubles, theta: float) -> Doubles:
    """Turn the halves of each head, as real and imaginary parts, by each token's position: (T, A, D) to (T, A, D)."""
    half = x.shape[2] // 2
    # transformers computes the angles in float32, all of it: models were trained with those.
    steps = 1 / np.float32(theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = double(np.arange(len(x), dtype=np.float32)[:, None] * steps)  # (T, D / 2)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=2)


def attention(query: Doubles, key: Doubles, value: Doubles, seen: NDArray[np.bool_]) -> Doubles:
    """Let each token look at those that it sees: (T, A, D), and keys and values of fewer heads, to (T, A × D)."""
    shared = query.shape[1] // key.shape[1]
    mixed = np.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // shared].T / np.sqrt(query.shape[2])
        mixed[:, head] = softmax(np.where(seen, scores, -np.inf)) @ value[:, head // shared]
    return mixed.reshape(len(query), -1)


def linear(weights: Weights, name: str, x: Doubles) -> Doubles:
    """Map (T, in) to (T, out)."""
    return x @ double(weights[f"{name}.weight"]).T + double(weights.get(f"{name}.bias", np.zeros(1)))


def layer_norm(weights: Weights, name: str, x: Doubles, epsilon: float) -> Doubles:
    """Give each row mean 0 and variance 1, then the scale, and the offset if there is one."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return scaled * double(weights[f"{name}.weight"]) + double(weights.get(f"{name}.bias", np.zeros(1)))


def rms_norm(weights: Weights, name: str, x: Doubles, epsilon: float) -> Doubles:
    """Give each row mean square 1, then the scale."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * double(weights[f"{name}.weight"])


def activate(x: Doubles, name: str) -> Doubles:
    """Apply the non-linearity that config.json calls `name`."""
    match name:
        case "silu":
            return x / (1 + np.exp(-x))
        case "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        case "tanh":
            return np.tanh(x)
        case "identity":
            return x
    return reference.activate(x, name)


# Heads


def label_logits(config: Config, weights: Weights, hidden: Doubles) -> Doubles:
    """Score the labels of one text: (T, H) to (L,)."""
    first, last = hidden[0], hidden[-1]
    match config["model_type"]:
        case "bert":
            return linear(weights, "classifier", np.tanh(linear(weights, "pooler.dense", first)))
        case "distilbert":
            return linear(weights, "classifier", np.maximum(linear(weights, "pre_classifier", first), 0))
        case "modernbert":
            pooled = first if config["classifier_pooling"] == "cls" else hidden.mean(axis=0)
            act = activate(linear(weights, "head.dense", pooled), config["classifier_activation"])
            return linear(weights, "classifier", layer_norm(weights, "head.norm", act, config["norm_eps"]))
        case "qwen3":
            return linear(weights, "score", last)
    return linear(weights, "classifier.out_proj", np.tanh(linear(weights, "classifier.dense", first)))


def yes_over_no(config: Config, weights: Weights, hidden: Doubles, yes_no: tuple[int, int]) -> Doubles:
    """Tell how much likelier a language model goes on with one word than with another: (T, H) to (1,)."""
    table = double(weights["embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"])
    yes, no = table[list(yes_no)] @ hidden[-1]
    return np.array([yes - no])


@dataclass(frozen=True)
class WordHead:
    """What an architecture calls the layers that score words."""

    dense: str
    norm: str
    activation: str
    table: str
    bias: str
    embeddings: str = "embeddings.word_embeddings.weight"


WORD_HEADS = {
    "bert": WordHead(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "hidden_act",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
    ),
    "distilbert": WordHead(
        "vocab_transform", "vocab_layer_norm", "activation", "vocab_projector.weight", "vocab_projector.bias"
    ),
    "modernbert": WordHead(
        "head.dense",
        "head.norm",
        "classifier_activation",
        "decoder.weight",
        "decoder.bias",
        "embeddings.tok_embeddings.weight",
    ),
}
ROBERTA_WORDS = WordHead("lm_head.dense", "lm_head.layer_norm", "always", "lm_head.decoder.weight", "lm_head.bias")


def word_logits(config: Config, weights: Weights, hidden: Doubles) -> Doubles:
    """Score the words at each token of one text: (T, H) to (T, V)."""
    names = WORD_HEADS.get(config["model_type"], ROBERTA_WORDS)
    epsilon = config.get("layer_norm_eps") or config.get("norm_eps") or 1e-12
    x = activate(linear(weights, names.dense, hidden), config.get(names.activation, "gelu"))
    x = layer_norm(weights, names.norm, x, epsilon)
    table = weights[names.embeddings if config.get("tie_word_embeddings", True) else names.table]  # (V, H)
    return x @ double(table).T + double(weights.get(names.bias, np.zeros(1)))


def word_weights(logits: Doubles) -> Doubles:
    """Weigh the words of one text as SPLADE does: (T, V) to (V,)."""
    return np.log1p(np.maximum(logits, 0)).max(axis=0)
