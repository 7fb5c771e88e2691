"""The backend on PyTorch: packed or padded, it gives what transformers gives for each input alone."""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from checkpoints import write_json
from quiver.backends import Backend, pytorch
from quiver.engine.packing import pack
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Kind, Pooling

pytestmark = pytest.mark.torch

HIDDEN, VOCAB, LABELS = 32, 500, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
WINDOW = 32
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "xlm-roberta": ("XLMRobertaConfig", {"type_vocab_size": 1}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", {}),
    "modernbert": ("ModernBertConfig", {"local_attention": WINDOW, **SPECIALS}),
    "modernbert, mean": ("ModernBertConfig", {"local_attention": WINDOW, "classifier_pooling": "mean", **SPECIALS}),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen3, windows": (
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, **GROUPED},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, **GROUPED}),
}
"""The class of transformers that describes an architecture, and what is set beside the sizes."""
PACKED = ("bert", "xlm-roberta", "distilbert", "electra", "modernbert", "qwen3", "qwen3, windows")
PADDED = ("mpnet", "gemma2")
"""MPNet does not go through transformers' attention interface; Gemma 2 asks for what our attention does not do."""
LENGTHS = (7, 120, 1, 33, 200)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Tiny:
    """A random model as transformers has it, and the directory that it was saved to."""

    model: Any
    folder: Path

    def load(self, kind: Kind = "embed", dtype: str = "float32", **spec: Any) -> Backend:
        """Load the directory with the backend."""
        entry = ModelSpec(id="a/b", weights="a/b", dimensions=HIDDEN, max_tokens=256, kind=kind, **spec)
        return pytorch.load(ModelFiles(self.folder, "a/b"), entry, dtype=dtype)  # on a card, where there is one

    def alone(self, inputs: Sequence[Encoding]) -> list[NDArray[np.float32]]:
        """Run transformers' own model over each input: (T, ·) states, or (L,) logits."""
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            return [self.model(**arguments(one))[0][0].numpy() for one in inputs]


def arguments(one: Encoding) -> dict[str, Any]:
    """Return an input as transformers wants it."""
    import torch  # noqa: PLC0415

    types = {} if one.type_ids is None else {"token_type_ids": torch.from_numpy(one.type_ids)[None]}
    return {"input_ids": torch.from_numpy(one.ids)[None], **types}


def made(folder: Path, name: str, auto_class: str = "AutoModel", **changes: Any) -> Tiny:
    """Draw a model whose attention is sharp, and save it."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**SIZES | {"num_labels": LABELS} | settings | changes)
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.5 * (weight.dim() == 1), 0.2)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return Tiny(model, folder)


def drawn(*lengths: int, types: bool = False) -> list[Encoding]:
    """Draw inputs whose tokens are wanted; those with types are pairs of texts."""
    draw = np.random.default_rng(sum(lengths))
    ids = [draw.integers(5, VOCAB, length) for length in lengths]
    halves = [np.repeat([0, 1], [len(one) - len(one) // 2, len(one) // 2]) if types else None for one in ids]
    return [Encoding(one, half, per_token=True) for one, half in zip(ids, halves, strict=True)]


def assert_near(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = TOLERANCE) -> None:
    """Check that no number is further off than the tolerance."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# States


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_states(name: str, tmp_path: Path) -> None:
    """Together, inputs have the states that transformers gives each alone, in the way that the architecture allows."""
    tiny, inputs = made(tmp_path, name), drawn(*LENGTHS)
    backend = tiny.load()

    assert backend.padded == (name in PADDED)
    assert not backend.pooled
    assert_near(backend.forward(pack(inputs)), np.concatenate(tiny.alone(inputs)))


@pytest.mark.parametrize("name", ["modernbert", "qwen3, windows"])
def test_windows_matter(name: str, tmp_path: Path) -> None:
    """Negative control: with windows wider than the inputs, the long ones have other states and the short ones not."""
    inputs = drawn(WINDOW // 2, 200)
    narrow = made(tmp_path / "narrow", name).load().forward(pack(inputs))
    key = "local_attention" if name == "modernbert" else "sliding_window"
    wide = made(tmp_path / "wide", name, **{key: 512}).load().forward(pack(inputs))

    assert_near(narrow[: WINDOW // 2], wide[: WINDOW // 2])
    assert np.abs(narrow[WINDOW // 2 :] - wide[WINDOW // 2 :]).max() > 100 * TOLERANCE


def test_token_types(tmp_path: Path) -> None:
    """The texts of a packed pair have types of their own."""
    tiny, inputs = made(tmp_path, "bert"), drawn(8, 50, types=True)
    states = tiny.load().forward(pack(inputs))

    assert_near(states, np.concatenate(tiny.alone(inputs)))
    plain = [replace(one, type_ids=None) for one in inputs]
    assert np.abs(states - np.concatenate(tiny.alone(plain))).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3", "mpnet"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_16_bits(name: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """In 16 bits results are float32 again and near the exact ones, packed where they are packed in 32."""
    tiny, inputs = made(tmp_path, name), drawn(*LENGTHS)
    backend = tiny.load(dtype=dtype)
    states = backend.forward(pack(inputs))

    assert states.dtype == np.float32
    # A card's packed attention rounds otherwise: a drawn model whose states hardly differ may seem to come out otherwise.
    assert backend.padded == (name in PADDED) or not backend.exact
    assert 0 < np.abs(states - np.concatenate(tiny.alone(inputs))).max() <= tolerance


def test_sizes(tmp_path: Path) -> None:
    """Positions begin behind the padding's row where the architecture has one, and the model gives the sizes."""
    plain, after_padding = made(tmp_path / "a", "bert").load(), made(tmp_path / "b", "xlm-roberta").load()

    assert plain.max_positions == 300
    assert after_padding.max_positions == 298
    assert plain.vocab_size == VOCAB
    assert plain.exact == (pytorch.best_device() == "cpu")


def test_last_position(tmp_path: Path) -> None:
    """The longest input that an XLM-R takes has the states that transformers gives it."""
    tiny, inputs = made(tmp_path, "xlm-roberta"), drawn(298, 3)
    assert_near(tiny.load().forward(pack(inputs)), np.concatenate(tiny.alone(inputs)))


# What follows the states


@pytest.mark.parametrize(
    ("name", "is_padded"),
    [
        ("bert", False),
        ("xlm-roberta", False),
        ("distilbert", False),
        ("modernbert", False),
        ("modernbert, mean", False),
        ("qwen3", False),
        ("electra", True),
        ("mpnet", True),
    ],
)
def test_scores_of_labels(name: str, is_padded: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A head gives each input the logits that the whole model gives it alone; one that is not known runs padded."""
    tiny = made(tmp_path, name, "AutoModelForSequenceClassification")
    inputs = drawn(*LENGTHS, types=name == "bert")
    backend = tiny.load("classify")

    assert backend.pooled
    assert backend.padded == is_padded
    assert_near(backend.forward(pack(inputs)), np.stack(tiny.alone(inputs)))


def test_yes_or_no(tmp_path: Path) -> None:
    """A language model's score is the logit of yes less that of no, after the last token."""
    tiny, inputs = made(tmp_path, "qwen3", "AutoModelForCausalLM"), drawn(*LENGTHS)
    backend = tiny.load("rerank", yes_no=(17, 4))
    last = np.stack([logits[-1] for logits in tiny.alone(inputs)])  # (B, V)

    assert backend.pooled
    assert_near(backend.forward(pack(inputs)), last[:, [17]] - last[:, [4]])


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_words(name: str, tmp_path: Path) -> None:
    """A masked language model gives each token the logits of all words."""
    tiny, inputs = made(tmp_path, name, "AutoModelForMaskedLM"), drawn(*LENGTHS)
    logits = tiny.load("sparse").forward(pack(inputs))

    assert logits.shape == (sum(LENGTHS), VOCAB)
    assert_near(logits, np.concatenate(tiny.alone(inputs)))


def test_vectors_of_tokens(tmp_path: Path) -> None:
    """A multi-vector model projects each token's state by the layer that lies beside the encoder's."""
    tiny, inputs = made(tmp_path, "bert"), drawn(*LENGTHS)
    weight = np.random.default_rng(0).standard_normal((16, HIDDEN)).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"linear.weight": weight}, path, metadata={"format": "pt"})

    assert_near(
        tiny.load("multi_vector").forward(pack(inputs)), np.concatenate(tiny.alone(inputs)) @ weight.T, 10 * TOLERANCE
    )


POOLINGS: dict[Pooling, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "last_token": lambda states: states[-1],
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_dense_layers(pooling: Pooling, tmp_path: Path) -> None:
    """The layers behind the pooling are applied to each input's vector, in their order."""
    tiny, inputs, draw = made(tmp_path, "bert"), drawn(*LENGTHS), np.random.default_rng(0)
    matrices = [draw.standard_normal(shape).astype(np.float32) / 6 for shape in ((16, HIDDEN), (8, 16))]
    for i, (matrix, activation) in enumerate(zip(matrices, ("Tanh", "Identity"), strict=True)):
        write_json(tmp_path / f"{i}_Dense/config.json", {"activation_function": f"torch.nn.modules.{activation}"})
        tensors = {"linear.weight": matrix, "linear.bias": np.full(len(matrix), 0.5, np.float32)}
        save_file(tensors, tmp_path / f"{i}_Dense/model.safetensors")
    backend = tiny.load(pooling=pooling, dense=("0_Dense", "1_Dense"))

    vectors = np.stack([POOLINGS[pooling](states) for states in tiny.alone(inputs)])  # (B, H)
    assert backend.pooled
    assert_near(backend.forward(pack(inputs)), np.tanh(vectors @ matrices[0].T + 0.5) @ matrices[1].T + 0.5)


# What goes wrong


def test_int8(tmp_path: Path) -> None:
    """Arithmetic that torch does not do here is refused, with what it does."""
    with pytest.raises(LoadError, match=r"float32, float16, bfloat16, not in int8"):
        made(tmp_path, "bert").load(dtype="int8")


def test_wrong_shape(tmp_path: Path) -> None:
    """A tensor of another shape than config.json asks for is refused by its name, with both shapes."""
    tiny = made(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    name = "encoder.layer.1.output.dense.weight"
    save_file(load_file(path) | {name: np.zeros((HIDDEN, 48), np.float32)}, path, metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=re.escape(f"{name!r} has the shape (32, 48), but config.json asks for (32, 64)")
    ):
        tiny.load()


def test_wrong_kind(tmp_path: Path) -> None:
    """A decoder that is asked for scores of words is refused in one line that names the directory."""
    with pytest.raises(LoadError, match=re.escape(str(tmp_path))) as refusal:
        made(tmp_path, "qwen3").load("sparse")
    assert "\n" not in refusal.value.message


def test_code_of_the_repository(tmp_path: Path) -> None:
    """Code that a repository brings along is not run."""
    tiny = made(tmp_path, "bert")
    config = (tmp_path / "config.json").read_text().replace('"bert"', '"own"')
    automatic = '"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}'
    (tmp_path / "config.json").write_text(config.replace("{", "{" + automatic + ",", 1))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LoadError, match="'own'"):
        tiny.load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_quiet(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is drawn or reported when a model is loaded, and transformers speaks again afterwards."""
    from transformers.utils import logging  # noqa: PLC0415

    tiny = made(tmp_path, name, "AutoModelForMaskedLM")
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    tiny.load()

    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()


def test_out_of_memory() -> None:
    """When memory runs out, what was computed so far is let go before the scheduler tries less."""
    import torch  # noqa: PLC0415

    from quiver.backends.pytorch.backend import TorchBackend  # noqa: PLC0415
    from quiver.backends.pytorch.heads import STATES  # noqa: PLC0415

    made = []

    class Greedy:
        device, vocab_size, max_positions = "cpu", VOCAB, 300

        def try_packing(self) -> bool:
            return True

        def packed(self, _: Any) -> Any:
            states = torch.zeros(1000)
            made.append(weakref.ref(states))
            raise torch.OutOfMemoryError

    backend = TorchBackend(Greedy(), STATES, lanes=1, max_tokens=300)
    with pytest.raises(MemoryError) as raised:
        backend.forward(pack(drawn(5)))
    assert raised
    assert made[0]() is None
