"""Tiny random checkpoints of MPNet, NomicBERT, GTE v1.5 and JinaBERT v2, worded as those on the hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from checkpoints import Tensors, dense, norm, write_json

Kind = Literal["mpnet", "nomic_bert", "new", "jina_bert", "jina_bert_code"]
Config = Mapping[str, Any]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

POSITIONS = 512

BERT: Config = {
    "vocab_size": 1500,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.1,
}
JINA: Config = {
    **BERT,
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "emb_pooler": "mean",
}
CONFIGS: Mapping[Kind, Config] = {
    "mpnet": {
        **{key: value for key, value in BERT.items() if key != "type_vocab_size"},
        "model_type": "mpnet",
        "max_position_embeddings": POSITIONS + 2,
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        "layer_norm_eps": 1e-5,
    },
    # The hub's has the words of GPT-2 and, since transformers knows it, those of BERT as well.
    "nomic_bert": {
        **BERT,
        "model_type": "nomic_bert",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000},
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": POSITIONS,
        "max_trained_positions": 256,
        "layer_norm_epsilon": 1e-12,
        "activation_function": "swiglu",
        "prenorm": False,
        "causal": False,
        "parallel_block": False,
        "use_rms_norm": None,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    },
    "new": {
        **BERT,
        "model_type": "new",
        "type_vocab_size": 0,
        "position_embedding_type": "rope",
        "rope_theta": 500000,
        "rope_scaling": {"factor": 2.0, "type": "ntk"},
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "pack_qkv": True,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    },
    "jina_bert": {**JINA, "_name_or_path": "jinaai/jina-bert-implementation"},
    "jina_bert_code": {**JINA, "_name_or_path": "jinaai/jina-bert-v2-qk-post-norm"},
}


def make(folder: Path, kind: Kind, *, changes: Config | None = None, prefix: str = "", labels: int = 0) -> Path:
    """Write a checkpoint into `folder` and return it: `changes` to its config.json, and a head where it has `labels`."""
    config = {**CONFIGS[kind], **(changes or {})}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tensors = {prefix + name: array for name, array in draw(shapes(kind, config)).items()}
    if labels:
        tensors |= draw(head(kind, config["hidden_size"], labels, prefix))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draw(shapes: Shapes) -> Tensors:
    """Draw tensors of a size that keeps attention sharp and two texts' vectors apart; the same ones each time."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes:
        noise = random.standard_normal(shape)
        match name.rsplit(".", 1)[1], len(shape):
            case "weight", 1:
                tensors[name] = 1 + 0.2 * noise
            case "bias", _:
                tensors[name] = 0.05 * noise
            case _ if "position_embeddings" in name or "token_type_embeddings" in name:
                tensors[name] = 0.3 * noise
            case _ if "word_embeddings" in name or "relative_attention_bias" in name:
                tensors[name] = noise
            case _:
                tensors[name] = 1.2 * noise / np.sqrt(shape[1])
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def shapes(kind: Kind, config: Config) -> Shapes:
    """Yield each tensor's plain name and its shape."""
    hidden, types = config["hidden_size"], config.get("type_vocab_size", 0)
    yield "embeddings.word_embeddings.weight", (config["vocab_size"], hidden)
    if types:
        yield "embeddings.token_type_embeddings.weight", (types, hidden)
    yield from norm("emb_ln" if kind == "nomic_bert" else "embeddings.LayerNorm", hidden)
    if kind == "mpnet":
        yield "embeddings.position_embeddings.weight", (config["max_position_embeddings"], hidden)
        yield "encoder.relative_attention_bias.weight", (32, config["num_attention_heads"])
    layers = "encoder.layers.{}." if kind == "nomic_bert" else "encoder.layer.{}."
    for layer in range(config["num_hidden_layers"]):
        yield from BLOCKS[kind](layers.format(layer), config)


def mpnet_block(block: str, config: Config) -> Shapes:
    """Yield the tensors of one block of MPNet."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for name in ("q", "k", "v", "o"):
        yield from dense(f"{block}attention.attn.{name}", hidden, hidden)
    yield from norm(f"{block}attention.LayerNorm", hidden)
    yield from dense(f"{block}intermediate.dense", hidden, inner)
    yield from dense(f"{block}output.dense", inner, hidden)
    yield from norm(f"{block}output.LayerNorm", hidden)


def nomic_block(block: str, config: Config) -> Shapes:
    """Yield the tensors of one block of NomicBERT."""
    hidden, inner = config["n_embd"], config["n_inner"]
    yield from layer(f"{block}attn.Wqkv", hidden, 3 * hidden, biased=config["qkv_proj_bias"])
    yield from layer(f"{block}attn.out_proj", hidden, hidden, biased=config["qkv_proj_bias"])
    yield from norm(f"{block}norm1", hidden)
    yield from layer(f"{block}mlp.fc11", hidden, inner, biased=config["mlp_fc1_bias"])
    yield from layer(f"{block}mlp.fc12", hidden, inner, biased=config["mlp_fc1_bias"])
    yield from layer(f"{block}mlp.fc2", inner, hidden, biased=config["mlp_fc2_bias"])
    yield from norm(f"{block}norm2", hidden)


def gte_block(block: str, config: Config) -> Shapes:
    """Yield the tensors of one block of GTE v1.5."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield from dense(f"{block}attention.qkv_proj", hidden, 3 * hidden)
    yield from dense(f"{block}attention.o_proj", hidden, hidden)
    yield from norm(f"{block}attn_ln", hidden)
    yield from layer(f"{block}mlp.up_gate_proj", hidden, 2 * inner, biased=False)
    yield from dense(f"{block}mlp.down_proj", inner, hidden)
    yield from norm(f"{block}mlp_ln", hidden)


def jina_block(block: str, config: Config) -> Shapes:
    """Yield the tensors of one block of JinaBERT v2."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield from jina_attention(block, hidden)
    yield from layer(f"{block}mlp.gated_layers", hidden, 2 * inner, biased=False)
    yield from dense(f"{block}mlp.wo", inner, hidden)
    yield from norm(f"{block}mlp.layernorm", hidden)


def jina_code_block(block: str, config: Config) -> Shapes:
    """Yield the tensors of one block of JinaBERT v2 base-code."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield from jina_attention(block, hidden)
    yield from norm(f"{block}attention.self.layer_norm_q", hidden)
    yield from norm(f"{block}attention.self.layer_norm_k", hidden)
    yield from norm(f"{block}layer_norm_1", hidden)
    yield from layer(f"{block}mlp.up_gated_layer", hidden, 2 * inner, biased=False)
    yield from dense(f"{block}mlp.down_layer", inner, hidden)
    yield from norm(f"{block}layer_norm_2", hidden)


def jina_attention(block: str, hidden: int) -> Shapes:
    """Yield the tensors of JinaBERT's attention, which are BERT's."""
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        yield from dense(f"{block}attention.{name}", hidden, hidden)
    yield from norm(f"{block}attention.output.LayerNorm", hidden)


BLOCKS = {
    "mpnet": mpnet_block,
    "nomic_bert": nomic_block,
    "new": gte_block,
    "jina_bert": jina_block,
    "jina_bert_code": jina_code_block,
}


def layer(name: str, inputs: int, outputs: int, *, biased: bool) -> Shapes:
    """Yield the tensors of a linear layer that may lack a bias."""
    yield f"{name}.weight", (outputs, inputs)
    if biased:
        yield f"{name}.bias", (outputs,)


def head(kind: Kind, hidden: int, labels: int, prefix: str) -> Shapes:
    """Yield the tensors that score labels, by their whole names."""
    if kind == "mpnet":
        yield from dense("classifier.dense", hidden, hidden)
        yield from dense("classifier.out_proj", hidden, labels)
    else:
        yield from dense(f"{prefix}pooler.dense", hidden, hidden)
        yield from dense("classifier", hidden, labels)
