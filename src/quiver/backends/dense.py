"""The layers that sentence-transformers puts behind the pooling, read from their folders."""

from typing import cast, get_args

from quiver.errors import LoadError
from quiver.graphs.heads import Dense, DenseActivation
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights


def read_dense(files: ModelFiles, folder: str) -> Dense:
    """Read one such layer; raises `LoadError`."""
    config, weights = files.json(f"{folder}/config.json"), Weights(ModelFiles(files.root / folder, files.model))
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2].lower()
    if activation not in get_args(DenseActivation):
        raise LoadError(f"{files.path(f'{folder}/config.json')} asks for the activation {activation!r}")
    return Dense(weights["linear.weight"], weights.get("linear.bias"), cast(DenseActivation, activation))
