"""Encoders of the BERT family on CTranslate2: the extra `ct2`, and the only file that knows it.

The model is described to CTranslate2 straight from safetensors: that takes neither torch nor transformers, and half a
second for a model of 400 MB, so that no converted copy need be kept.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quiver.backends import Backend
from quiver.backends.sessions import cores
from quiver.errors import LoadError, MissingExtra
from quiver.graphs.bert import BERT, DISTILBERT, WORDS, Layers, Naming, Shape, bert_shape
from quiver.graphs.checkpoint import Checkpoint
from quiver.graphs.layers import Affine
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights
from quiver.types import Floats, PackedBatch

DTYPES = ("float32", "int8")
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
"""What CTranslate2 calls an activation of config.json."""


class Ct2Backend:
    """An encoder in CTranslate2 on the CPU, which computes each lane's batch on cores of its own."""

    name = "ct2"
    padded = True
    exact = True
    pooled = False
    batch_tokens = BATCH_TOKENS

    def __init__(self, encoder: Any, *, lanes: int, num_types: int, vocab_size: int, max_positions: int) -> None:
        self.lanes = lanes
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self._num_types = num_types
        self._encoder = encoder

    def forward(self, batch: PackedBatch) -> Floats:
        """Return hidden states (T, H)."""
        from ctranslate2 import StorageView  # noqa: PLC0415  it is optional

        lengths = batch.lengths.astype(np.int32)
        real = np.arange(lengths.max()) < lengths[:, None]  # (B, L)
        ids, type_ids = np.zeros(real.shape, np.int32), np.zeros(real.shape, np.int32)
        ids[real], type_ids[real] = batch.ids, batch.type_ids
        given = {"token_type_ids": type_ids.tolist()} if self._num_types > 1 else {}
        output = self._encoder.forward_batch(StorageView.from_array(ids), StorageView.from_array(lengths), **given)
        hidden: Floats = np.asarray(output.last_hidden_state)[real]
        return hidden

    def close(self) -> None:
        """Give back the encoder's memory."""
        del self._encoder


def load(files: ModelFiles, spec: ModelSpec, *, dtype: str, lanes: int = 0) -> Backend:
    """Load the encoder of a directory; `lanes` 0 means one for each core. Raises `LoadError` and `MissingExtra`."""
    if find_spec("ctranslate2") is None:
        raise MissingExtra("ct2", "the backend ct2")
    if dtype not in DTYPES:
        raise LoadError(f"CTranslate2 computes in {' or '.join(DTYPES)} here, not in {dtype}")
    if spec.kind != "embed" or spec.dense:
        raise LoadError(
            f"{spec.id} is more than an encoder, which is all that CTranslate2 runs: choose another backend"
        )
    config, weights, lanes = files.json("config.json"), Weights(files), lanes or cores()
    try:
        naming, shape = _family(config)
        checkpoint = Checkpoint(weights, naming.prefixes, f"{WORDS}.weight")
        encoder = _start(_described(checkpoint, naming, shape), dtype, lanes)
    except LoadError as error:
        raise LoadError(f"cannot build {files.root}: {error.message}") from error
    except KeyError as error:
        raise LoadError(f"cannot build {files.root}: config.json lacks {error.args[0]!r}") from error
    return Ct2Backend(
        encoder,
        lanes=lanes,
        num_types=len(checkpoint.table(TYPES)) if naming.has_token_types else 0,
        vocab_size=len(checkpoint.table(WORDS)),
        max_positions=len(checkpoint.table(POSITIONS)) - shape.first_position,
    )


def _family(config: Mapping[str, Any]) -> tuple[Naming, Shape]:
    match config.get("model_type"):
        case "bert":
            return BERT, bert_shape(config)
        case "camembert" | "roberta" | "xlm-roberta":
            return BERT, bert_shape(config, first_position=config["pad_token_id"] + 1)
        case "distilbert":
            activation = config.get("activation", "gelu")
            return DISTILBERT, Shape(config["dim"], config["n_heads"], config["n_layers"], activation, 1e-12)
    raise LoadError(
        f"config.json names the architecture {config.get('model_type')!r}, which this backend does not know"
    )


def _described(checkpoint: Checkpoint, naming: Naming, shape: Shape) -> Any:
    """Describe an encoder in CTranslate2's own terms."""
    from ctranslate2.specs import common_spec, transformer_spec  # noqa: PLC0415  it is optional

    tables = [checkpoint.table(name) for name in ([WORDS, TYPES] if naming.has_token_types else [WORDS])]
    if shape.activation not in _ACTIVATIONS:
        raise LoadError(
            f"config.json asks for the activation {shape.activation!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    encoder = transformer_spec.TransformerEncoderSpec(
        shape.layers,
        shape.heads,
        pre_norm=False,
        activation=common_spec.Activation[_ACTIVATIONS[shape.activation]],
        num_source_embeddings=len(tables),
        embeddings_merge=common_spec.EmbeddingsMerge.ADD,
        layernorm_embedding=True,
    )
    encoder.scale_embeddings = False
    for embedding, table in zip(encoder.embeddings, tables, strict=True):
        embedding.weight = table
    encoder.position_encodings.encodings = checkpoint.table(POSITIONS)[shape.first_position :]
    _set_norm(encoder.layernorm_embedding, checkpoint.biased("embeddings.LayerNorm"))
    for i, block in enumerate(encoder.layer):
        _set_block(block, {role: checkpoint.biased(naming.block.format(i) + name) for role, name in naming.roles()})
    model = transformer_spec.TransformerEncoderModelSpec(encoder)
    model.config.layer_norm_epsilon = shape.epsilon
    model.register_vocabulary(map(str, range(len(tables[0]))))  # inputs come as ids; it never reads a word
    model.validate()
    return model


def _set_block(block: Any, layers: Layers) -> None:
    attention, ffn = block.self_attention, block.ffn
    reading = [layers[role] for role in ("query", "key", "value")]
    attention.linear[0].weight = np.concatenate([layer.weight for layer in reading])  # (3 H, H)
    attention.linear[0].bias = np.concatenate([layer.bias for layer in reading])
    _set_linear(attention.linear[1], layers["attention_output"])
    _set_norm(attention.layer_norm, layers["attention_norm"])
    _set_linear(ffn.linear_0, layers["up"])
    _set_linear(ffn.linear_1, layers["down"])
    _set_norm(ffn.layer_norm, layers["output_norm"])


def _set_linear(place: Any, layer: Affine) -> None:
    place.weight, place.bias = layer.weight, layer.bias


def _set_norm(place: Any, norm: Affine) -> None:
    place.gamma, place.beta = norm.weight, norm.bias


def _start(model: Any, dtype: str, lanes: int) -> Any:
    """Hand the model over, which CTranslate2 takes from files alone."""
    from ctranslate2 import Encoder  # noqa: PLC0415  it is optional

    with TemporaryDirectory(prefix="quiver-") as folder:
        model.save(folder)
        try:
            return Encoder(folder, compute_type=dtype, inter_threads=lanes, intra_threads=max(1, cores() // lanes))
        except (RuntimeError, ValueError) as error:
            raise LoadError(f"CTranslate2 refuses it: {error}") from error
