"""Encoders of the BERT family on CTranslate2: the extra `ct2`, and the only file that knows it.

The model is described to CTranslate2 straight from safetensors, which takes neither torch nor transformers, and no
longer than reading a copy of it from a cache would.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quiver.backends import Backend
from quiver.backends.onnx import cores
from quiver.errors import LoadError, MissingExtra
from quiver.graphs.bert import BERT, DISTILBERT, WORDS, Naming, Shape
from quiver.graphs.checkpoint import Checkpoint
from quiver.graphs.layers import Affine
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights
from quiver.types import Floats, Ints, PackedBatch

DTYPES = ("float32", "int8")
ARCHITECTURES = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
BATCH_TOKENS = 224
POSITIONS = "embeddings.position_embeddings"
TYPES = "embeddings.token_type_embeddings"

_ACTIVATIONS = {
    "gelu": "GELU",
    "gelu_fast": "GELUTanh",
    "gelu_new": "GELUTanh",
    "gelu_pytorch_tanh": "GELUTanh",
    "quick_gelu": "GELUSigmoid",
    "relu": "RELU",
    "silu": "SWISH",
    "swish": "SWISH",
}
"""CTranslate2's name of what config.json names."""
