"""What follows the hidden states of packed tokens: pooled vectors, scores of labels, vectors of tokens.

B inputs, T tokens, H hidden, L labels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quiver.backends.dense import read_dense
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights
from quiver.types import Pooling

Apply = Callable[[Tensor, Tensor], Tensor]
"""(T, H) states, (B + 1,) cu_seqlens -> (T, ·) or (B, ·)."""
Head = Callable[[Any, Tensor], Tensor]
"""A model with a head of its own, (B, 1, H) states of one token of each input -> (B, L)."""


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """What is made of the states of tokens."""

    apply: Apply
    pooled: bool
    """It gives a row for each input."""
    batch_tokens: int = sys.maxsize
    """Most tokens of a forward pass whose results the host can take."""
    reduce: Apply | None = None
    """Makes a row for each input where no input wants its tokens; None leaves that to the host, whose sums have a fixed
    order."""


# A head reads the first token of each input by itself; with one token to an input, that is the one.
HEADS: dict[str, Head] = {
    "bert": lambda model, x: model.classifier(model.base_model.pooler(x)),
    "camembert": lambda model, x: model.classifier(x),
    "distilbert": lambda model, x: model.classifier(model.pre_classifier(x[:, 0]).relu()),
    "modernbert": lambda model, x: model.classifier(model.head(x[:, 0])),
    "qwen2": lambda model, x: model.score(x[:, 0]),
    "qwen3": lambda model, x: model.score(x[:, 0]),
    "roberta": lambda model, x: model.classifier(x),
    "xlm-roberta": lambda model, x: model.classifier(x),
}
"""By the `model_type` of config.json; of any other architecture, the whole model runs over padded inputs."""
DECODERS = frozenset({"qwen2", "qwen3"})
HOST_WORDS_TOKENS, CARD_WORDS_TOKENS = 1024, 4096
"""Most tokens whose logits of words are held at a time."""
STATES = Tail(lambda states, _: states, pooled=False)
"""The states themselves are wanted."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
}


def pool(states: Tensor, cu_seqlens: Tensor, how: Pooling) -> Tensor:
    """(T, H) -> (B, H)."""
    match how:
        case "cls":
            return states[cu_seqlens[:-1]]
        case "last_token":
            return states[cu_seqlens[1:] - 1]
        case "mean":
            return torch.segment_reduce(states.float(), "mean", offsets=cu_seqlens, axis=0)


def split(model: Any, files: ModelFiles, spec: ModelSpec, device: str) -> tuple[Any, Tail | None]:
    """Split a model into what runs over tokens and what is made of their states.

    None stands for a head that only the whole model knows.
    """
    match spec.kind:
        case "embed":
            return model, _dense_vectors(files, spec, device) if spec.dense else _states(spec, device)
        case "sparse":
            return model, _words(device)
        case "multi_vector":
            return model, _token_vectors(files, device)
    tail = _yes_minus_no(model, spec.yes_no) if spec.yes_no else _classifier(model)
    return (model.base_model, tail) if tail else (model, None)


def _states(spec: ModelSpec, device: str) -> Tail:
    """Leave the states as they are. A card pools them: to carry them to the host takes longer than to compute them."""

    def reduce(states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return pool(states, cu_seqlens, spec.pooling)

    return STATES if device == "cpu" else replace(STATES, reduce=reduce)


def _words(device: str) -> Tail:
    """Leave the logits of words as they are: for each token, as many numbers as the vocabulary has words."""

    def reduce(logits: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.segment_reduce(logits.float(), "max", offsets=cu_seqlens, axis=0)

    if device == "cpu":
        return replace(STATES, batch_tokens=HOST_WORDS_TOKENS)
    return replace(STATES, batch_tokens=CARD_WORDS_TOKENS, reduce=reduce)


def _classifier(model: Any) -> Tail | None:
    """Return the model's own head, if its architecture is known."""
    kind = model.config.model_type
    if kind not in HEADS:
        return None
    own: Pooling = getattr(model.config, "classifier_pooling", "cls")
    how: Pooling = "last_token" if kind in DECODERS else own

    def apply(states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return HEADS[kind](model, pool(states, cu_seqlens, how).to(states.dtype)[:, None])

    return Tail(apply, pooled=True)


def _yes_minus_no(model: Any, yes_no: tuple[int, int]) -> Tail:
    """Let a language model answer: the logit of one token after the input, less that of another -> (B, 1)."""
    words = model.get_output_embeddings().weight  # (V, H)
    yes, no = words[list(yes_no)].float()
    return Tail(lambda states, bounds: (pool(states, bounds, "last_token").float() @ (yes - no))[:, None], pooled=True)


def _token_vectors(files: ModelFiles, device: str) -> Tail:
    """Project each token's state, as multi-vector models do -> (T, D)."""
    weights = Weights(files)
    project = _linear(weights["linear.weight"], weights.get("linear.bias"), device)
    return Tail(lambda states, _: project(states), pooled=False)


def _dense_vectors(files: ModelFiles, spec: ModelSpec, device: str) -> Tail:
    """Pool, then apply the layers that sentence-transformers puts behind it -> (B, D)."""
    layers = [read_dense(files, folder) for folder in spec.dense]
    steps = [(_linear(layer.weight, layer.bias, device), ACTIVATIONS[layer.activation]) for layer in layers]

    def apply(states: Tensor, cu_seqlens: Tensor) -> Tensor:
        vectors = pool(states, cu_seqlens, spec.pooling)
        for project, activate in steps:
            vectors = activate(project(vectors))
        return vectors

    return Tail(apply, pooled=True)


def _linear(weight: NDArray[Any], bias: NDArray[Any] | None, device: str) -> Callable[[Tensor], Tensor]:
    """Return a linear layer in float32."""
    matrix = torch.tensor(weight, device=device)
    offset = None if bias is None else torch.tensor(bias, device=device)
    return lambda x: functional.linear(x.float(), matrix, offset)
