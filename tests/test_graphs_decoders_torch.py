"""transformers' own classes give what Quiver gives, alone and packed. Only `make test-torch` runs this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import checkpoints_decoders
from checkpoints_decoders import VOCAB, Head, Made
from quiver.backends.onnx import OnnxBackend
from quiver.engine.packing import pack
from quiver.engine.pooling import largest_logits, word_weights
from quiver.types import Encoding
from test_graphs import assert_near
from test_graphs_decoders import LONG_LENGTH, NEW_WORDS, each, load

pytestmark = pytest.mark.torch

LENGTHS = (1, 40, 2, 77, 60, 19)
YES_NO = (1203, 7)
TOLERANCE = 1e-4

Numbers = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, what Quiver is asked for, and which of transformers' results that is."""

    kind: str
    genuine: str
    """The class of transformers."""
    read: Callable[[Any], Any]
    """What of its output, with a batch of one text, is to be compared."""
    head: Head | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    longest: int = LONG_LENGTH


def hidden(output: Any) -> Any:
    """Take each token's hidden state: (T, H)."""
    return output.last_hidden_state[0]


def logits(output: Any) -> Any:
    """Take the logits of labels, (L,), or of each token's words, (T, V)."""
    return output.logits[0]


def projected(output: Any) -> Any:
    """Take a text's vector among the images': (D,)."""
    return output.text_embeds[0]


def yes_over_no(output: Any) -> Any:
    """Take how much likelier yes is to come next than no: (1,)."""
    yes, no = output.logits[0, -1, list(YES_NO)]
    return (yes - no)[None]


def classifier(kind: str, genuine: str, **changes: Any) -> Case:
    """Make a case of a classifier."""
    return Case(
        kind=kind,
        genuine=genuine,
        read=logits,
        head="classifier",
        spec={"kind": "classify"},
        changes=changes,
        longest=LONG_LENGTH if kind in {"modernbert", "qwen3"} else 512,
    )


def word_scorer(kind: str, genuine: str) -> Case:
    """Make a case of a masked language model."""
    return Case(kind=kind, genuine=genuine, read=logits, head="masked_lm", spec={"kind": "sparse"}, longest=512)


def judge(*, tied: bool) -> Case:
    """Make a case of a language model that answers yes or no."""
    return Case(
        kind="qwen3",
        genuine="Qwen3ForCausalLM",
        read=yes_over_no,
        head="masked_lm",
        spec={"kind": "rerank", "yes_no": YES_NO},
        changes={"tie_word_embeddings": tied},
    )


def tower(kind: str) -> Case:
    """Make a case of CLIP's text tower."""
    spec = {"pooling": "last_token"}
    return Case(kind=kind, genuine="CLIPTextModelWithProjection", read=projected, spec=spec, longest=77)


MODERNBERT_BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
CASES = {
    "modernbert": Case(kind="modernbert", genuine="ModernBertModel", read=hidden),
    "modernbert, window of 128": Case(
        kind="modernbert", genuine="ModernBertModel", read=hidden, changes={"local_attention": 128}
    ),
    "modernbert, transformers 5": Case(
        kind="modernbert", genuine="ModernBertModel", read=hidden, changes=NEW_WORDS["modernbert"]
    ),
    "modernbert, biases": Case(kind="modernbert", genuine="ModernBertModel", read=hidden, changes=MODERNBERT_BIASES),
    "modernbert classifier": classifier("modernbert", "ModernBertForSequenceClassification"),
    "modernbert classifier, mean": classifier(
        "modernbert", "ModernBertForSequenceClassification", classifier_pooling="mean", **MODERNBERT_BIASES
    ),
    "modernbert words": word_scorer("modernbert", "ModernBertForMaskedLM"),
    "qwen3": Case(kind="qwen3", genuine="Qwen3Model", read=hidden),
    "qwen3, transformers 5": Case(kind="qwen3", genuine="Qwen3Model", read=hidden, changes=NEW_WORDS["qwen3"]),
    "qwen3, biases": Case(kind="qwen3", genuine="Qwen3Model", read=hidden, changes={"attention_bias": True}),
    "qwen3 classifier": classifier("qwen3", "Qwen3ForSequenceClassification"),
    "qwen3 yes": judge(tied=True),
    "qwen3 yes, untied": judge(tied=False),
    "clip": tower("clip"),
    "clip, text alone": tower("clip_text_model"),
    "bert classifier": classifier("bert", "BertForSequenceClassification"),
    "roberta classifier": classifier("roberta", "RobertaForSequenceClassification"),
    "camembert classifier": classifier("camembert", "CamembertForSequenceClassification"),
    "xlm-roberta classifier": classifier("xlm-roberta", "XLMRobertaForSequenceClassification"),
    "distilbert classifier": classifier("distilbert", "DistilBertForSequenceClassification"),
    "bert words": word_scorer("bert", "BertForMaskedLM"),
    "roberta words": word_scorer("roberta", "RobertaForMaskedLM"),
    "distilbert words": word_scorer("distilbert", "DistilBertForMaskedLM"),
}


@dataclass(frozen=True)
class Compared:
    """The same texts, by both."""

    case: Case
    backend: OnnxBackend
    texts: list[Encoding]
    expected: list[Numbers]
    """By transformers, one at a time and unpadded."""


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    """Import torch when it is needed; these tests are asked for by name, so without it they fail."""
    import torch  # noqa: PLC0415 - an optional package

    return torch


@pytest.fixture(scope="module", params=CASES)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, torch: ModuleType) -> Compared:
    """Give each case in turn."""
    case = CASES[request.param]
    made = checkpoints_decoders.make(tmp_path_factory.mktemp("tiny"), case.kind, head=case.head, **case.changes)
    texts = [text(length) for length in (*LENGTHS, case.longest)]
    return Compared(case, load(made.folder, **case.spec), texts, genuine(case, made, texts, torch))


def text(length: int) -> Encoding:
    """Draw a text without padding that ends as CLIP's do, with the last word of the vocabulary."""
    ids = np.random.default_rng(length).integers(3, VOCAB - 2, length)
    ids[-1] = VOCAB - 1
    return Encoding(ids)


def genuine(case: Case, made: Made, texts: list[Encoding], torch: ModuleType) -> list[Numbers]:
    """Load the checkpoint by transformers' own class and run the texts in float64: two roundings would be compared else."""
    import transformers  # noqa: PLC0415 - an optional package

    model, info = getattr(transformers, case.genuine).from_pretrained(
        made.folder, dtype=torch.float64, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"], "transformers makes up the tensors that it does not find"
    with torch.inference_mode():
        return [case.read(model.eval()(torch.tensor([one.ids.tolist()]))).numpy() for one in texts]


def tolerance(expected: Numbers) -> float:
    """Allow more of larger numbers: a word's logits are ten times a hidden state, and so are their roundings."""
    return TOLERANCE * max(1.0, float(np.sqrt(np.mean(np.square(expected)))))


def ours(compared: Compared, texts: list[Encoding]) -> list[Numbers]:
    """Run texts in one forward pass, and split it into what each has of it."""
    batch = pack(texts)
    output = compared.backend.forward(batch)
    return list(output) if compared.backend.pooled else each(batch, output)


def test_alone(compared: Compared) -> None:
    """A text by itself has transformers' numbers, up to the longest."""
    for one, expected in zip(compared.texts, compared.expected, strict=True):
        assert_near(ours(compared, [one])[0], expected, tolerance(expected))


def test_packed(compared: Compared) -> None:
    """Texts in one forward pass each have transformers' numbers."""
    for found, expected in zip(ours(compared, compared.texts), compared.expected, strict=True):
        assert_near(found, expected, tolerance(expected))


@pytest.mark.parametrize("compared", [name for name in CASES if name.endswith("words")], indirect=True)
def test_word_weights(torch: ModuleType, compared: Compared) -> None:
    """A text's weights of words are those that SPLADE makes of transformers' logits."""
    batch = pack(compared.texts)
    logits = [torch.from_numpy(one) for one in compared.expected]
    expected = torch.stack([torch.log1p(torch.relu(one)).amax(dim=0) for one in logits]).numpy()  # (B, V)

    assert_near(
        word_weights(largest_logits(compared.backend.forward(batch), batch.cu_seqlens)), expected, tolerance(expected)
    )
