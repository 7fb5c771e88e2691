"""Tiny random checkpoints of ModernBERT, Qwen3 and CLIP, and of the heads of all kinds, as transformers saves them.

A config.json says it all: the shapes of the tensors follow from it. No torch, and no tokenizers, are needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import checkpoints
from checkpoints import dense, norm, write_json

Head = Literal["classifier", "masked_lm", "colbert"]
Shape = tuple[str, tuple[int, ...]]
Tensors = dict[str, NDArray[Any]]
Config = Mapping[str, Any]

VOCAB = 1500
LABELS = 3
PREFIXES = {
    "bert": "bert.",
    "camembert": "roberta.",
    "clip": "text_model.",
    "clip_text_model": "text_model.",
    "distilbert": "distilbert.",
    "modernbert": "model.",
    "qwen3": "model.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
}
"""What stands before the encoder's tensors where a model has a head."""

MODERNBERT: Config = {
    "architectures": ["ModernBertModel"],
    "model_type": "modernbert",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_activation": "gelu",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "local_attention": 16,
    "classifier_pooling": "cls",
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "decoder_bias": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
QWEN3: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CLIP_TEXT: Config = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 120,
    "projection_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": VOCAB - 2,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": 1,
}
CLIP: Config = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 20,
    "text_config": CLIP_TEXT,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 24, "projection_dim": 20},
}
CONFIGS = {"modernbert": MODERNBERT, "qwen3": QWEN3, "clip": CLIP, "clip_text_model": CLIP_TEXT}


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk, and what is in it."""

    folder: Path
    config: dict[str, Any]
    weights: Tensors
    """The encoder's by their plain names, the head's by their whole ones."""


def make(
    folder: Path, kind: str, *, head: Head | None = None, prefix: str | None = None, seed: int = 0, **changes: Any
) -> Made:
    """Write the checkpoint of a kind into `folder`; `changes` go over its config.json, and None leaves a key out."""
    config = {key: value for key, value in (config_of(kind) | changes).items() if value is not None}
    if head == "classifier":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(LABELS)}
    has_head = head in {"classifier", "masked_lm"} or kind.startswith("clip")
    prefix = prefix if prefix is not None else PREFIXES[kind] if has_head else ""
    plain = encoder_weights(config, seed)
    others = draw(head_shapes(config, head), seed + 1)
    stored = {prefix + name: array for name, array in plain.items()} | others
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return Made(folder, config, plain | others)


def config_of(kind: str) -> dict[str, Any]:
    """Describe a model of a kind."""
    if kind in CONFIGS:
        return dict(CONFIGS[kind])
    return checkpoints.config(family(kind))


def family(kind: str) -> checkpoints.Checkpoint:
    """Describe a model of BERT's family."""
    return checkpoints.Checkpoint(kind=kind, vocab=VOCAB)


def add_dense(folder: Path, inputs: int, outputs: int, activation: str, *, seed: int = 7) -> Tensors:
    """Write a layer behind the pooling, as sentence-transformers stores it, into `folder`."""
    tensors = draw(dense("linear", inputs, outputs), seed)
    config = {"in_features": inputs, "out_features": outputs, "bias": True, "activation_function": activation}
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


# Weights


def encoder_weights(config: Config, seed: int) -> Tensors:
    """Draw the tensors of what lies below the head, by their plain names."""
    shapes = {"modernbert": modernbert, "qwen3": qwen3, "clip": clip, "clip_text_model": clip}
    if config["model_type"] in get_args(checkpoints.Kind):
        return checkpoints.weights(family(config["model_type"]))
    return draw(shapes[config["model_type"]](config), seed)


def draw(shapes: Iterator[Shape], seed: int) -> Tensors:
    """Draw tensors of a size that keeps attention sharp and two texts' vectors apart."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes:
        noise = rng.standard_normal(shape)
        match name.rsplit(".", 1)[-1], len(shape):
            case "weight", 1:
                tensors[name] = 1 + 0.2 * noise
            case "bias", _:
                tensors[name] = 0.05 * noise
            case _ if "position_embedding" in name:
                tensors[name] = 0.3 * noise
            case _ if "embed" in name:
                tensors[name] = noise
            case _:
                tensors[name] = 1.2 * noise / np.sqrt(shape[-1])
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def affine(name: str, inputs: int, outputs: int, *, biased: bool) -> Iterator[Shape]:
    """Yield the tensors of a linear layer, with a bias or without."""
    yield from (shape for shape in dense(name, inputs, outputs) if biased or not shape[0].endswith("bias"))


def scale(name: str, size: int, *, biased: bool) -> Iterator[Shape]:
    """Yield the tensors of a norm, with a bias or without."""
    yield from (shape for shape in norm(name, size) if biased or not shape[0].endswith("bias"))


def modernbert(config: Config) -> Iterator[Shape]:
    """Yield ModernBERT's tensors."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    norms, attention, layers = config["norm_bias"], config["attention_bias"], config["mlp_bias"]
    yield "embeddings.tok_embeddings.weight", (config["vocab_size"], hidden)
    yield from scale("embeddings.norm", hidden, biased=norms)
    for i in range(config["num_hidden_layers"]):
        if i:
            yield from scale(f"layers.{i}.attn_norm", hidden, biased=norms)
        yield from affine(f"layers.{i}.attn.Wqkv", hidden, 3 * hidden, biased=attention)
        yield from affine(f"layers.{i}.attn.Wo", hidden, hidden, biased=attention)
        yield from scale(f"layers.{i}.mlp_norm", hidden, biased=norms)
        yield from affine(f"layers.{i}.mlp.Wi", hidden, 2 * wide, biased=layers)
        yield from affine(f"layers.{i}.mlp.Wo", wide, hidden, biased=layers)
    yield from scale("final_norm", hidden, biased=norms)


def qwen3(config: Config) -> Iterator[Shape]:
    """Yield Qwen3's tensors."""
    hidden, wide, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    biased = config["attention_bias"]
    yield "embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from affine(f"layers.{i}.self_attn.{name}", hidden, outputs, biased=biased)
        yield from affine(f"layers.{i}.self_attn.o_proj", queries, hidden, biased=biased)
        for name, outputs in (("q_norm", size), ("k_norm", size)):
            yield from scale(f"layers.{i}.self_attn.{name}", outputs, biased=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from scale(f"layers.{i}.{name}", hidden, biased=False)
        for name, inputs, outputs in (("gate", hidden, wide), ("up", hidden, wide), ("down", wide, hidden)):
            yield f"layers.{i}.mlp.{name}_proj.weight", (outputs, inputs)
    yield from scale("norm", hidden, biased=False)


def clip(config: Config) -> Iterator[Shape]:
    """Yield the tensors of CLIP's text tower."""
    text = config.get("text_config", config)
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    yield "embeddings.token_embedding.weight", (text["vocab_size"], hidden)
    yield "embeddings.position_embedding.weight", (text["max_position_embeddings"], hidden)
    for i in range(text["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from dense(f"encoder.layers.{i}.self_attn.{name}", hidden, hidden)
        yield from norm(f"encoder.layers.{i}.layer_norm1", hidden)
        yield from dense(f"encoder.layers.{i}.mlp.fc1", hidden, wide)
        yield from dense(f"encoder.layers.{i}.mlp.fc2", wide, hidden)
        yield from norm(f"encoder.layers.{i}.layer_norm2", hidden)
    yield from norm("final_layer_norm", hidden)


# Heads


def head_shapes(config: Config, head: Head | None) -> Iterator[Shape]:
    """Yield the tensors of a head, and what CLIP has beside its text tower."""
    kind, hidden = config["model_type"], config.get("hidden_size") or config.get("dim")
    if head == "classifier":
        yield from classifier(config, kind, hidden)
    if head == "masked_lm":
        yield from masked_lm(config, kind, hidden)
    if head == "colbert":
        yield "linear.weight", (16, hidden)
    if "projection_dim" in config:
        yield "text_projection.weight", (config["projection_dim"], config.get("text_config", config)["hidden_size"])
    if kind == "clip":
        yield "visual_projection.weight", (config["projection_dim"], config["vision_config"]["hidden_size"])
        yield "vision_model.embeddings.class_embedding", (config["vision_config"]["hidden_size"],)


def classifier(config: Config, kind: str, hidden: int) -> Iterator[Shape]:
    """Yield the tensors that score labels."""
    match kind:
        case "bert":
            yield from dense("classifier", hidden, LABELS)  # the pooler is among the encoder's
        case "distilbert":
            yield from dense("pre_classifier", hidden, hidden)
            yield from dense("classifier", hidden, LABELS)
        case "modernbert":
            yield from affine("head.dense", hidden, hidden, biased=config["classifier_bias"])
            yield from scale("head.norm", hidden, biased=config["norm_bias"])
            yield from dense("classifier", hidden, LABELS)
        case "qwen3":
            yield "score.weight", (LABELS, hidden)
        case _:
            yield from dense("classifier.dense", hidden, hidden)
            yield from dense("classifier.out_proj", hidden, LABELS)


def masked_lm(config: Config, kind: str, hidden: int) -> Iterator[Shape]:
    """Yield the tensors that score words; their table is that of the embeddings unless config.json unties it."""
    tied = config.get("tie_word_embeddings", True)
    match kind:
        case "bert":
            yield from dense("cls.predictions.transform.dense", hidden, hidden)
            yield from norm("cls.predictions.transform.LayerNorm", hidden)
            table, bias = "cls.predictions.decoder", "cls.predictions.bias"
        case "distilbert":
            yield from dense("vocab_transform", hidden, hidden)
            yield from norm("vocab_layer_norm", hidden)
            table, bias = "vocab_projector", "vocab_projector.bias"
        case "modernbert":
            yield from affine("head.dense", hidden, hidden, biased=config["classifier_bias"])
            yield from scale("head.norm", hidden, biased=config["norm_bias"])
            table, bias = "decoder", "decoder.bias" if config["decoder_bias"] else ""
        case "qwen3":
            table, bias = "lm_head", ""
        case _:
            yield from dense("lm_head.dense", hidden, hidden)
            yield from norm("lm_head.layer_norm", hidden)
            table, bias = "lm_head.decoder", "lm_head.bias"
    if bias:
        yield bias, (VOCAB,)
    if not tied:
        yield f"{table}.weight", (VOCAB, hidden)
