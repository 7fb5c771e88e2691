"""transformers itself on tiny MPNet, NomicBERT and GTE checkpoints: Quiver gives what it gives. Only `make test-torch` runs this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import checkpoints_more as checkpoints
from checkpoints import write_json
from quiver.engine.packing import pack
from quiver.types import Encoding
from test_graphs import assert_near, encodings, read
from test_graphs_more import LABELS, load

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
LENGTHS = (1, 2, 40, 129, 512)
STRETCHED = {"rotary_scaling_factor": 2, "max_trained_positions": 64}


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """Import torch when it is needed; these tests are asked for by name, so without it they fail."""
    import torch  # noqa: PLC0415 - an optional package

    return torch


def genuine(torch: ModuleType, folder: Path, name: str, texts: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Run transformers' own class over each text, unpadded: hidden states, each (T, H), or logits, each (1, L)."""
    import transformers  # noqa: PLC0415 - an optional package

    kind = getattr(transformers, name)
    model, info = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]  # no embedding uses it
    assert not missing, "transformers makes up the tensors that it does not find"
    with torch.inference_mode():
        outputs = [model(torch.tensor(ids[None])) for ids in texts]
    return [(one.logits if "logits" in one else one.last_hidden_state[0]).numpy() for one in outputs]


def some_texts() -> list[Encoding]:
    """Draw texts of many lengths, without MPNet's padding, which transformers does not count as positions."""
    return [Encoding(text.ids.clip(min=2)) for text in encodings(*LENGTHS)]


def check(torch: ModuleType, ours: Path, theirs: Path, name: str) -> None:
    """Compare the hidden states of texts of many lengths, packed by Quiver and one at a time by transformers."""
    texts = some_texts()
    expected = genuine(torch, theirs, name, [text.ids for text in texts])

    assert_near(load(ours).forward(pack(texts)), np.concatenate(expected), TOLERANCE)


def respelled(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Change what config.json says of the same arithmetic to the words that transformers' class has for it."""
    config, _ = read(folder)
    write_json(folder / "config.json", {**config, **changes})
    return folder


def test_mpnet(torch: ModuleType, tmp_path: Path) -> None:
    """MPNet's hidden states are transformers'."""
    folder = checkpoints.make(tmp_path, "mpnet")

    check(torch, folder, folder, "MPNetModel")


def test_mpnet_classifier(torch: ModuleType, tmp_path: Path) -> None:
    """MPNet's scores of labels are transformers'."""
    changes = {"id2label": {str(i): str(i) for i in range(LABELS)}}
    folder = checkpoints.make(tmp_path, "mpnet", prefix="mpnet.", labels=LABELS, changes=changes)
    texts = some_texts()
    expected = genuine(torch, folder, "MPNetForSequenceClassification", [text.ids for text in texts])

    assert_near(load(folder, kind="classify").forward(pack(texts)), np.concatenate(expected), TOLERANCE)


def test_nomic(torch: ModuleType, tmp_path: Path) -> None:
    """NomicBERT's hidden states are transformers', within the trained positions and beyond."""
    folder = checkpoints.make(tmp_path, "nomic_bert")

    check(torch, folder, folder, "NomicBertModel")


def test_nomic_stretched(torch: ModuleType, tmp_path: Path) -> None:
    """With a scaling factor they are transformers' with dynamic NTK."""
    ours = checkpoints.make(tmp_path / "ours", "nomic_bert", changes=STRETCHED)
    theirs = respelled(
        checkpoints.make(tmp_path / "theirs", "nomic_bert"),
        {
            "max_position_embeddings": STRETCHED["max_trained_positions"],
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000, "factor": 2.0},
        },
    )

    check(torch, ours, theirs, "NomicBertModel")


@pytest.mark.parametrize("types", [0, 1])
def test_gte(torch: ModuleType, tmp_path: Path, types: int) -> None:
    """GTE's hidden states are transformers', which has the slowed angles as a larger base that is scaled linearly."""
    ours = checkpoints.make(tmp_path / "ours", "new", changes={"type_vocab_size": types})
    size, factor = 48 // 4, 2.0
    rope = {"rope_type": "linear", "rope_theta": 500000 * factor, "factor": factor ** (2 / size)}
    theirs = checkpoints.make(tmp_path / "theirs", "new", changes={"type_vocab_size": types})
    respelled(theirs, {"model_type": "gte", "rope_parameters": rope, "rope_scaling": None, "rope_theta": None})

    check(torch, ours, theirs, "GteModel")


def test_gte_classifier(torch: ModuleType, tmp_path: Path) -> None:
    """GTE's scores of labels are transformers'."""
    changes = {"rope_scaling": None, "id2label": {str(i): str(i) for i in range(LABELS)}}
    ours = checkpoints.make(tmp_path / "ours", "new", prefix="new.", labels=LABELS, changes=changes)
    theirs = checkpoints.make(tmp_path / "theirs", "new", prefix="new.", labels=LABELS, changes=changes)
    rope = {"rope_type": "default", "rope_theta": 500000}
    respelled(theirs, {"model_type": "gte", "rope_parameters": rope})
    texts = some_texts()
    expected = genuine(torch, theirs, "GteForSequenceClassification", [text.ids for text in texts])

    assert_near(load(ours, kind="rerank").forward(pack(texts)), np.concatenate(expected), TOLERANCE)
