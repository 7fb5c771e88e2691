"""transformers itself, on the sentences: the reference and Quiver give what it gives. Only `make test-torch` runs this."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import checkpoints
import reference
from quiver.config import EngineConfig, ModelsConfig
from quiver.engine.engine import Engine
from quiver.engine.watchdog import Watchdog
from quiver.models.catalogue import Catalogue
from quiver.models.files import ModelFiles
from quiver.telemetry.observer import Observer
from quiver.types import Caller, EmbedRequest
from sentences import SENTENCES

pytestmark = pytest.mark.torch

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 256
CALLER = Caller("test")
VECTOR_TOLERANCE = 1e-5
HIDDEN_TOLERANCE = 1e-4

CLASSES = {
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "distilbert": "DistilBertModel",
}
TINY: dict[str, dict[str, Any]] = {
    "bert": {"kind": "bert"},
    "bert, tanh": {"kind": "bert", "activation": "gelu_pytorch_tanh"},
    "bert, relu": {"kind": "bert", "activation": "relu"},
    "bert, with a head": {"kind": "bert", "prefix": "bert."},
    "bert, old names": {"kind": "bert", "legacy_norms": True},
    "bert, half precision": {"kind": "bert", "dtype": "float16"},
    "camembert": {"kind": "camembert"},
    "roberta": {"kind": "roberta"},
    "xlm-roberta": {"kind": "xlm-roberta"},
    "distilbert": {"kind": "distilbert"},
    "distilbert, tanh": {"kind": "distilbert", "activation": "gelu_new"},
}


@dataclass(frozen=True)
class Checkpoint:
    """A model that all three run."""

    name: str
    """What Quiver is asked for: a directory, or a name of the catalogue."""
    folder: Path
    config: Mapping[str, Any]
    weights: reference.Weights
    """By the names that the reference knows, whatever the file calls them."""


@dataclass(frozen=True)
class Genuine:
    """What transformers makes of the sentences, one at a time and unpadded."""

    model: Any
    tokenizer: Any
    ids: Sequence[list[int]]
    hidden: Sequence[NDArray[np.float32]]  # each (T, H)
    vectors: NDArray[np.float32]  # (B, H) mean-pooled, of unit length


@dataclass(frozen=True)
class Ours:
    """What Quiver makes of them, all in one request."""

    ids: Sequence[list[int]]
    vectors: NDArray[np.float32]  # (B, H)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """Import torch when it is needed; these tests are asked for by name, so without it they fail."""
    import torch  # noqa: PLC0415 - an optional package

    return torch


@pytest.fixture(scope="session", params=[*TINY, MINILM])
def checkpoint(
    request: pytest.FixtureRequest, minilm_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Give each checkpoint in turn."""
    if request.param == MINILM:
        weights = load_file(minilm_files.path("model.safetensors"))
        return Checkpoint(MINILM, minilm_files.root, minilm_files.json("config.json"), weights)
    options = {"positions": MAX_TOKENS, **TINY[request.param]}
    folder = checkpoints.make(tmp_path_factory.mktemp("tiny"), **options)
    plain = checkpoints.Checkpoint(**options | {"prefix": "", "legacy_norms": False})
    return Checkpoint(str(folder), folder, checkpoints.config(plain), checkpoints.stored(plain))


@pytest.fixture(scope="session")
def genuine(checkpoint: Checkpoint, torch: ModuleType) -> Genuine:
    """Load the checkpoint by transformers' own class and embed the sentences."""
    import transformers  # noqa: PLC0415 - an optional package

    kind = getattr(transformers, CLASSES[checkpoint.config["model_type"]])
    model, info = kind.from_pretrained(
        checkpoint.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"], "transformers makes up the tensors that it does not find"
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    ids = [tokenizer(sentence, truncation=True, max_length=MAX_TOKENS)["input_ids"] for sentence in SENTENCES]
    with torch.inference_mode():
        hidden = [model(torch.tensor([text])).last_hidden_state[0] for text in ids]
        vectors = torch.nn.functional.normalize(torch.stack([states.mean(dim=0) for states in hidden]))
    return Genuine(model, tokenizer, ids, [states.numpy() for states in hidden], vectors.numpy())


@pytest.fixture(scope="session")
def ours(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """Load the checkpoint as the server does and embed the sentences."""
    config = ModelsConfig(model=(checkpoint.name,), data_dir=tmp_path_factory.mktemp("data"), hub_offline=True)
    return asyncio.run(run_quiver(config))


async def run_quiver(config: ModelsConfig) -> Ours:
    """Send the sentences to an engine in one request."""
    async with Engine(config, EngineConfig(), Catalogue.load(), Observer(), Watchdog(stall_seconds=60)) as engine:
        await engine.load(lambda *_: None)
        embeddings = await engine.embed(EmbedRequest(inputs=SENTENCES, truncate=True), CALLER)
        encodings = engine.replicas.loaded[0].model.tokenizer.encode(SENTENCES, truncate=True)
    return Ours([encoding.ids.tolist() for encoding in encodings], embeddings.vectors)


def assert_near(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    """Check that no number is further off than `tolerance`."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_reference(checkpoint: Checkpoint, genuine: Genuine) -> None:
    """The NumPy reference has transformers' hidden states of every token and vectors of every sentence."""
    hidden = [reference.hidden_states(checkpoint.config, checkpoint.weights, ids) for ids in genuine.ids]
    vectors = np.stack([reference.normalise(reference.pool(states, "mean")) for states in hidden])  # (B, H)

    assert_near(np.concatenate(hidden), np.concatenate(genuine.hidden), HIDDEN_TOLERANCE)
    assert_near(vectors, genuine.vectors, VECTOR_TOLERANCE)


def test_reference_of_a_pair(torch: ModuleType, checkpoint: Checkpoint, genuine: Genuine) -> None:
    """The NumPy reference has transformers' hidden states of two texts that are read together."""
    pair = genuine.tokenizer("how do i reset my password", "Open the settings.", return_token_type_ids=True)
    ids, type_ids = pair["input_ids"], pair["token_type_ids"]
    has_types = checkpoint.config.get("type_vocab_size", 0) > 1
    types = {"token_type_ids": torch.tensor([type_ids])} if has_types else {}
    with torch.inference_mode():
        expected = genuine.model(torch.tensor([ids]), **types).last_hidden_state[0].numpy()

    assert any(type_ids) or not has_types
    actual = reference.hidden_states(checkpoint.config, checkpoint.weights, ids, type_ids if has_types else None)
    assert_near(actual, expected, HIDDEN_TOLERANCE)


def test_ids(genuine: Genuine, ours: Ours) -> None:
    """Quiver reads every sentence as transformers' tokenizer does, cut to the same length."""
    assert genuine.ids == ours.ids
    assert max(map(len, ours.ids)) == MAX_TOKENS


def test_vectors(genuine: Genuine, ours: Ours) -> None:
    """Quiver's vectors are those of transformers, mean-pooled and normalised."""
    assert_near(ours.vectors, genuine.vectors, VECTOR_TOLERANCE)
