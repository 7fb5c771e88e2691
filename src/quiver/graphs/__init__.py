"""Architectures as ONNX graphs over packed tokens, built from config.json and safetensors.

Add one: write a file beside bert.py with a function (g, config, weights, dtype) -> Trunk, and name it here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.bert import build_bert, build_distilbert, build_roberta
from quiver.graphs.builder import CompiledGraph, GraphBuilder, Weights
from quiver.graphs.checkpoint import Trunk
from quiver.graphs.clip_text import build_clip_text
from quiver.graphs.gte import build_gte
from quiver.graphs.heads import Head, add_head
from quiver.graphs.jina_bert import build_jina_bert
from quiver.graphs.modernbert import build_modernbert
from quiver.graphs.mpnet import build_mpnet
from quiver.graphs.nomic import build_nomic
from quiver.graphs.qwen3 import build_qwen3

Architecture = Callable[[GraphBuilder, Mapping[str, Any], Weights, Dtype], Trunk]

ARCHITECTURES: dict[str, Architecture] = {
    "bert": build_bert,
    "camembert": build_roberta,
    "clip": build_clip_text,
    "clip_text_model": build_clip_text,
    "distilbert": build_distilbert,
    "jina_bert": build_jina_bert,
    "modernbert": build_modernbert,
    "mpnet": build_mpnet,
    "new": build_gte,
    "nomic_bert": build_nomic,
    "qwen3": build_qwen3,
    "roberta": build_roberta,
    "xlm-roberta": build_roberta,
}
"""By what `architecture_of` calls them."""


def architecture_of(config: Mapping[str, Any]) -> Any:
    """Return the `model_type` of a config.json; JinaBERT, which states BERT's, is told by its ALiBi."""
    kind = config.get("model_type")
    return "jina_bert" if kind == "bert" and config.get("position_embedding_type") == "alibi" else kind


def is_known(config: Mapping[str, Any]) -> bool:
    """Tell whether the architecture of a config.json can be compiled."""
    return architecture_of(config) in ARCHITECTURES


def compile_graph(config: Mapping[str, Any], weights: Weights, dtype: Dtype, head: Head) -> CompiledGraph:
    """Build the graph of a checkpoint; raises `LoadError` for what it does not understand."""
    kind = architecture_of(config)
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise LoadError(
            f"config.json names the architecture {kind!r}, which is not known (known are: {known}); "
            "if the repository has an ONNX graph of its own, name it by onnx_file"
        )
    g = GraphBuilder()
    g.unseen = head.unseen
    try:
        trunk = ARCHITECTURES[kind](g, config, weights, dtype)
        output = add_head(g, trunk, config, head)
    except KeyError as error:
        raise LoadError(f"config.json lacks {error.args[0]!r}, which the architecture {kind!r} needs") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise LoadError(f"config.json holds a value that the architecture {kind!r} cannot have: {error}") from error
    return g.finish(output.name, pooled=output.pooled, vocab_size=trunk.vocab_size, max_positions=trunk.max_positions)
