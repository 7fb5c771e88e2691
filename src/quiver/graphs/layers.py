"""The layers that encoders are made of, over packed tokens.

Every operation works row by row in a fixed order, so that an input's hidden states are the same to the last bit
alone and in any company. T tokens, H hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs.builder import MICROSOFT, GraphBuilder
from quiver.graphs.int8 import Columns, int8_product


@dataclass(frozen=True, slots=True)
class Affine:
    """A weight and its bias, if it has one: of a linear layer (out, in) and (out,), or of a norm (H,) and (H,)."""

    name: str
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    columns: Columns | None = None
    """What evens out the columns of a linear layer's input before they are rounded to 8 bits."""


def linear(g: GraphBuilder, x: str, layer: Affine, dtype: Dtype, *, onto: str | None = None) -> str:
    """(T, in) -> (T, out): x Wᵀ + bias; or, `onto` a residual that carries the bias already, x Wᵀ + residual."""
    addend = onto or (layer.bias is not None and g.weight(f"{layer.name}.bias", layer.bias)) or ""
    if dtype == "int8":
        product = int8_product(g, x, layer.name, layer.weight, layer.columns)
        return g.op("Add", product, addend) if addend else product
    addends = [addend] if addend else []
    return g.op("Gemm", x, g.weight(f"{layer.name}.weight", layer.weight), *addends, transB=1)


def add_linear(g: GraphBuilder, x: str, layer: Affine, residual: str, dtype: Dtype) -> str:
    """(T, in) -> (T, out): x Wᵀ + bias + residual; without a bias, the product itself adds the residual."""
    if layer.bias is None:
        return linear(g, x, layer, dtype, onto=residual)
    return g.op("Add", linear(g, x, layer, dtype), residual)


def split(layer: Affine, count: int) -> list[Affine]:
    """Take a layer apart that a checkpoint stores as one: as many layers, of equal size."""
    weights = np.split(layer.weight, count)
    biases = [None] * count if layer.bias is None else np.split(layer.bias, count)
    return [Affine(f"{layer.name}.{i}", *parts) for i, parts in enumerate(zip(weights, biases, strict=True))]


def layer_norm(g: GraphBuilder, x: str, layer: Affine, epsilon: float) -> str:
    """(…, H) -> (…, H)."""
    parts = [g.weight(f"{layer.name}.weight", layer.weight)]
    if layer.bias is not None:
        parts.append(g.weight(f"{layer.name}.bias", layer.bias))
    return g.op("LayerNormalization", x, *parts, epsilon=epsilon, axis=-1)


def rms_norm(g: GraphBuilder, x: str, layer: Affine, epsilon: float) -> str:
    """(…, H) -> (…, H), scaled but not centred."""
    weight = g.weight(f"{layer.name}.weight", layer.weight)
    return g.op("SimplifiedLayerNormalization", x, weight, epsilon=epsilon, axis=-1)


def activation(g: GraphBuilder, x: str, name: str) -> str:
    """Apply the activation that a config.json calls `name`."""
    match name:
        case "gelu":
            return g.op("Gelu", x, domain=MICROSOFT)
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
            return g.op("FastGelu", x, domain=MICROSOFT)
        case "quick_gelu":
            return g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.702)
        case "relu":
            return g.op("Relu", x)
        case "silu" | "swish":
            return g.op("Mul", x, g.op("Sigmoid", x))
        case "tanh":
            return g.op("Tanh", x)
    known = "gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu, silu, tanh"
    raise LoadError(f"config.json asks for the activation {name!r}; known are {known}")


def carry(norm: Affine, layer: Affine, readers: Iterable[Affine]) -> tuple[Affine, Iterator[Affine]]:
    """Let a norm's output carry the bias of the layer that is added onto it, and free the norm's readers of it.

    The layer that is added onto that residual then needs no bias of its own: the product adds both at once.
    """
    carried = _bias(layer).astype(np.float64)
    freed = (replace(r, bias=(_bias(r) - r.weight @ carried).astype(np.float32)) for r in readers)
    return replace(norm, bias=(_bias(norm) + carried).astype(np.float32)), freed


def even_out(norm: Affine, readers: Sequence[Affine]) -> Iterator[Affine]:
    """Give the readers of a norm what evens out its columns in 8 bits; float32 takes no notice of it."""
    columns = Columns.between(norm.name, np.abs(_bias(norm)) + 2 * np.abs(norm.weight), [r.weight for r in readers])
    return (replace(reader, columns=columns) for reader in readers)


def scaled(layer: Affine, factor: float) -> Affine:
    """Fold a constant factor into a linear layer."""
    bias = None if layer.bias is None else layer.bias * np.float32(factor)
    return replace(layer, weight=layer.weight * np.float32(factor), bias=bias)


def _bias(layer: Affine) -> NDArray[Any]:
    """Return a bias as numbers: zeros where there is none."""
    return np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias
