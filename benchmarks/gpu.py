"""`make bench-gpu`: packed inputs against padded batches on one graphics card, held against its own matrix products.

The model has the shape of bge-large and random weights; the texts are the mixed workload of `quiver bench`. All ways
take turns in each round, and every figure is a median over the rounds. Without a card it runs a small shape on the CPU,
which shows that it works and nothing else.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from quiver.backends import Backend, pytorch
from quiver.bench.workload import WORDS, Workload
from quiver.engine.packing import pack
from quiver.engine.pooling import normalise, pool
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding

Vectors = NDArray[np.float32]
Way = Callable[[], Vectors]
"""Compute all inputs: (B, H), in their order."""

CHUNK = 32
"""Inputs of a padded batch, as sentence-transformers has it unless told otherwise."""
HEAD_SIZE = 64
MAX_TOKENS = 512
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", "?")
VOCAB = 30522
LEAST_COSINE = 0.98
"""Between the vectors of two ways: they must have done the same work."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model is, and the load."""

    layers: int
    hidden: int
    texts: int
    matrix: int
    """Rows and columns of the products that the machine is measured with."""


LARGE = Size(layers=24, hidden=1024, texts=8192, matrix=8192)
SMALL = Size(layers=2, hidden=128, texts=256, matrix=1024)


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one way."""

    way: str
    tokens_per_second: float
    of_matmul: float
    """Share of the rate that the machine's matrix products reach, counting the work on real tokens alone."""
    against_padded: float
    """Median of the ratios within a round."""


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    options = read_options()
    size = Size(options.layers, options.hidden, options.texts, options.matrix)
    with tempfile.TemporaryDirectory(prefix="quiver-") as folder:
        tokenizer = make_model(Path(folder), size)
        texts = Workload(size=size.texts).texts
        inputs = [Encoding(np.array(one.ids, np.int64)) for one in tokenizer.encode_batch(list(texts))]
        ways = dict(make_ways(Path(folder), inputs, texts, options))
        check_agreement(ways)
        report = measure(ways, inputs, size, options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """Read the command line; sizes that it leaves open are those of the device."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default=pytorch.best_device(), help="cuda or cpu (default: %(default)s)")
    arguments.add_argument("--dtype", choices=pytorch.DTYPES, help="default: bfloat16 on a card, float32 on a CPU")
    arguments.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    arguments.add_argument("--batch-tokens", type=int, nargs="*", default=[], help="more budgets to try")
    arguments.add_argument("--json", type=Path, help="write what was measured to this file")
    for name in ("layers", "hidden", "texts", "matrix"):
        arguments.add_argument(
            f"--{name}", type=int, help=f"default: {getattr(LARGE, name)}, on a CPU {getattr(SMALL, name)}"
        )
    options = arguments.parse_args()
    is_card = options.device != "cpu"
    for name, value in asdict(LARGE if is_card else SMALL).items():
        setattr(options, name, getattr(options, name) or value)
    options.dtype = options.dtype or ("bfloat16" if is_card else "float32")
    return options


# The model


def make_model(folder: Path, size: Size) -> Tokenizer:
    """Write a BERT with random weights, and a tokenizer to which each word of the workload is one token."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // HEAD_SIZE),
        intermediate_size=4 * size.hidden,
        max_position_embeddings=MAX_TOKENS,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    words = dict.fromkeys([*SPECIALS, *WORDS.read_text(encoding="ascii").split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, SPECIALS.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return tokenizer


# The ways


def make_ways(
    folder: Path, inputs: Sequence[Encoding], texts: Sequence[str], options: argparse.Namespace
) -> Iterator[tuple[str, Way]]:
    """Load the model for each way; `padded` comes first."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    yield "padded", lambda: padded(model, inputs, options.device)
    if find_spec("sentence_transformers"):
        yield "sentence-transformers", sentence_transformers(folder, texts, options)
    sizes = {"dimensions": options.hidden, "max_tokens": MAX_TOKENS}
    spec = ModelSpec(id="random/large", weights="random/large", pooling="mean", **sizes)
    backend = pytorch.load(ModelFiles(folder), spec, dtype=options.dtype, device=options.device)
    for budget in dict.fromkeys([backend.batch_tokens, *options.batch_tokens]):
        yield f"packed, {budget} tokens", lambda budget=budget: packed(backend, inputs, budget)


@torch.inference_mode()
def padded(model: Any, inputs: Sequence[Encoding], device: str) -> Vectors:
    """Do as sentence-transformers does: the longest first, in batches of 32, mean-pooled on the device."""
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    vectors = np.empty((len(inputs), model.config.hidden_size), np.float32)
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        ids = [torch.from_numpy(inputs[i].ids) for i in chunk]
        laid = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # (32, L)
        mask = (laid != 0).long()  # [PAD] is 0
        states = model(input_ids=laid, attention_mask=mask).last_hidden_state.float()
        means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        vectors[chunk] = means.cpu().numpy()
    return normalise(vectors)


def sentence_transformers(folder: Path, texts: Sequence[str], options: argparse.Namespace) -> Way:
    """Let sentence-transformers itself embed the texts, which takes its tokenising in."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  it need not be installed

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    model = SentenceTransformer(
        str(folder), device=options.device, model_kwargs={"dtype": getattr(torch, options.dtype)}
    )
    return lambda: model.encode(list(texts), batch_size=CHUNK, normalize_embeddings=True, show_progress_bar=False)


def packed(backend: Backend, inputs: Sequence[Encoding], budget: int) -> Vectors:
    """Do as the engine does: batches in the order of arrival, in the backend's lanes."""

    def compute(batch: Sequence[Encoding]) -> Vectors:
        laid = pack(batch)
        rows = backend.forward(laid)
        return normalise(rows if len(rows) == len(batch) else pool(rows, laid.cu_seqlens, "mean"))

    with ThreadPoolExecutor(backend.lanes) as lanes:
        return np.concatenate(list(lanes.map(compute, batches(inputs, budget))))


def batches(inputs: Sequence[Encoding], budget: int) -> Iterator[list[Encoding]]:
    """Yield inputs in batches of at most `budget` tokens."""
    batch, total = list[Encoding](), 0
    for one in inputs:
        if batch and total + len(one) > budget:
            yield batch
            batch, total = [], 0
        batch.append(one)
        total += len(one)
    yield batch


def check_agreement(ways: dict[str, Way]) -> None:
    """Refuse to compare ways that do not compute the same; it also warms them up."""
    first, *rest = (run() for run in ways.values())
    for name, vectors in zip(list(ways)[1:], rest, strict=True):
        cosine = float((first * vectors).sum(axis=1).min())
        if cosine < LEAST_COSINE:
            raise SystemExit(f"{name} does not compute what the padded batches do: a cosine of {cosine:.4f}")


# Measuring


def measure(
    ways: dict[str, Way], inputs: Sequence[Encoding], size: Size, options: argparse.Namespace
) -> dict[str, Any]:
    """Let all ways take turns, after the machine's own matrix products in each round."""
    tokens, flops = sum(map(len, inputs)), count_flops(inputs, size)
    rates: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        rates.append(matmul_rate(size.matrix, options))
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    figures = [
        Figures(
            name,
            tokens_per_second=statistics.median(tokens / taken for taken in times),
            of_matmul=statistics.median(flops / taken / rate for taken, rate in zip(times, rates, strict=True)),
            against_padded=statistics.median(
                base / taken for taken, base in zip(times, seconds["padded"], strict=True)
            ),
        )
        for name, times in seconds.items()
    ]
    return {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "CPU",
        "is_gpu": options.device != "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": options.dtype,
        "size": asdict(size),
        "tokens": tokens,
        "rounds": options.rounds,
        "matmul_tflops": statistics.median(rates) / 1e12,
        "figures": [asdict(one) for one in figures],
        "seconds": seconds,
    }


def count_flops(inputs: Sequence[Encoding], size: Size) -> float:
    """Count the operations on real tokens: in linear layers, and in the scores and mixtures of attention."""
    lengths = np.array([len(one) for one in inputs], float)
    linear = 24 * size.hidden**2 * lengths  # 12 H² weights in a layer, a product and a sum with each
    attention = 4 * size.hidden * lengths**2
    return float(size.layers * (linear + attention).sum())


def matmul_rate(rows: int, options: argparse.Namespace) -> float:
    """Return the operations per second of large products of matrices."""
    a, b = (torch.randn(rows, rows, dtype=getattr(torch, options.dtype), device=options.device) for _ in range(2))
    a @ b
    wait(options.device)
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        a @ b
    wait(options.device)
    return repeats * 2 * rows**3 / (time.perf_counter() - start)


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def show(report: dict[str, Any]) -> None:
    """Print the table, and what must be known to read it."""
    size = report["size"]
    title = f"{size['layers']} layers of {size['hidden']}, {report['dtype']}, on {report['device']}"
    table = Table("way", "tokens/s", "of matmul", "against padded", title=title)
    for one in report["figures"]:
        ratio = f"{one['against_padded']:.2f} ×"
        table.add_row(one["way"], f"{one['tokens_per_second']:,.0f}", f"{100 * one['of_matmul']:.1f} %", ratio)
    console = Console()
    console.print(table)
    console.print(
        f"{size['texts']} texts, {report['tokens']:,} tokens, {report['rounds']} rounds. "
        f"Products of {size['matrix']}² matrices: {report['matmul_tflops']:.2f} TFLOP/s.\n"
        f"padded: transformers in its own attention, batches of {CHUNK} sorted by length, as sentence-transformers "
        "makes them; sentence-transformers itself, if installed, tokenises as well, the other ways do not."
    )
    if not report["is_gpu"]:
        console.print("[bold]This was no graphics card: the figures say that it runs, and nothing about one.[/]")
        if torch.version.cuda is None:
            console.print("This torch is built without CUDA: use a Python that has one with it.")


if __name__ == "__main__":
    main()
