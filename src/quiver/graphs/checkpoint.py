"""A checkpoint's tensors by their place in the architecture, whatever stands before their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from quiver.errors import LoadError
from quiver.graphs.builder import Weights
from quiver.graphs.layers import Affine


class Checkpoint:
    """Tensors below a prefix: that of a model with a head (`bert.`), or none."""

    def __init__(self, weights: Weights, prefixes: tuple[str, ...] = ("",), landmark: str = "") -> None:
        """Take the prefix under which the `landmark`, a tensor that each of these models has, is found."""
        self._weights = weights
        self._prefix = next((prefix for prefix in prefixes if prefix + landmark in weights), prefixes[0])

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._weights

    @property
    def root(self) -> "Checkpoint":
        """The same tensors by their whole names: where a head's are found."""
        return Checkpoint(self._weights)

    def tensor(self, name: str) -> NDArray[Any]:
        """Return one tensor."""
        return self._weights[self._prefix + name]

    def table(self, name: str) -> NDArray[Any]:
        """Return the weight of one kind of embeddings: (rows, H)."""
        return self.tensor(f"{name}.weight")

    def affine(self, name: str) -> Affine:
        """Return a linear layer or a norm; one without a bias has None."""
        # Checkpoints converted from TensorFlow call a norm's weight and bias gamma and beta.
        weight, bias = ("gamma", "beta") if f"{name}.gamma" in self else ("weight", "bias")
        has_bias = f"{name}.{bias}" in self
        return Affine(
            self._prefix + name, self.tensor(f"{name}.{weight}"), self.tensor(f"{name}.{bias}") if has_bias else None
        )

    def biased(self, name: str) -> Affine:
        """Return a linear layer or a norm that must have a bias; raises `LoadError`."""
        self.tensor(f"{name}.beta" if f"{name}.gamma" in self else f"{name}.bias")
        return self.affine(name)


@dataclass(frozen=True, slots=True)
class Trunk:
    """What an architecture computes, and what a head needs to go on from it."""

    hidden: str  # (T, H)
    checkpoint: Checkpoint
    words: str
    """Name of the table of word embeddings, (V, H), in the checkpoint: masked-LM heads share it."""
    vocab_size: int
    max_positions: int
    projection: Affine | None = None
    """A layer that the architecture itself has behind the pooling."""


def expect(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for anything but what is known; null, false and zero are the same."""
    for key, value in known.items():
        asked = config.get(key, value)
        if (asked or None) != (value or None):
            raise LoadError(f"config.json asks for {key} {asked!r}; this architecture is known with {value!r} only")
