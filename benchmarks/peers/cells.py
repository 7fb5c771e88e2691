"""What is asked of each peer: the cells of the table, and the texts, the same for all peers of a round."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from quiver.bench.embeddings import EncodingFormat
from quiver.bench.workload import BLOCK, Workload, exact_texts

Kind = Literal["mixed", "queries", "passages"]

POOL = 4096
"""Texts of one round; whoever embeds more than these meets them again. No peer keeps results."""
IDLE_TOKENS = (6, 20, 50, 256)
IDLE_TEXTS = 16
REST_SECONDS = 0.05
"""Before a text that comes to a server which nobody has asked for a while."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One load: so many clients, each with `batch` texts in a request."""

    name: str
    title: str
    kind: Kind = "mixed"
    clients: int = 1
    batch: int = 1
    encoding: EncodingFormat = "float"


SERVER_CELLS = (
    Cell("clients-1", "1 client"),
    Cell("clients-8", "8 clients", clients=8),
    Cell("clients-32", "32 clients", clients=32),
    Cell("clients-128", "128 clients", clients=128),
    Cell("queries", "queries", "queries", clients=32),
    Cell("passages", "passages", "passages", clients=32),
    Cell("batch-32", "32 in one request", batch=32),
    Cell("batch-1024", "1,024 in one request", batch=1024),
    Cell("base64", "base64", clients=32, encoding="base64"),
)
LIBRARY_CELLS = (
    Cell("clients-1", "1 text a call"),
    Cell("batch-32", "32 in one call", batch=32),
    Cell("batch-1024", "1,024 in one call", batch=1024),
    Cell("queries", "queries, 32 a call", "queries", batch=32),
    Cell("passages", "passages, 32 a call", "passages", batch=32),
)
SLOW = frozenset({"batch-1024"})
"""Cells whose single request can take longer than all others together."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts with the tokens that each has."""

    texts: Sequence[str]
    tokens: Sequence[int]

    def requests(self, batch: int) -> Iterator[tuple[Sequence[str], int]]:
        """Yield `batch` texts at a time with their tokens, for ever."""
        number = 0
        while True:
            at = start_of(number, batch, len(self.texts))
            yield self.texts[at : at + batch], sum(self.tokens[at : at + batch])
            number += 1

    def each(self) -> Iterator["Texts"]:
        """Yield them one by one."""
        return (Texts([text], [tokens]) for text, tokens in zip(self.texts, self.tokens, strict=True))

    def rotated(self, share: float) -> "Texts":
        """Return the same, beginning at a share of all: no cell need meet what another one did."""
        at = int(share * len(self.texts))
        return Texts([*self.texts[at:], *self.texts[:at]], [*self.tokens[at:], *self.tokens[:at]])


def start_of(number: int, batch: int, size: int) -> int:
    """Return where a request's texts begin; a worker counts in the same way."""
    return number * batch % (size - batch + 1)


@dataclass(frozen=True, slots=True)
class Asked:
    """All texts of one round."""

    kinds: dict[Kind, Texts]
    idle: dict[int, Texts]
    """Texts of exact lengths, by their tokens."""

    @classmethod
    def of(cls, seed: int, tokenizer_file: Path, size: int = POOL) -> "Asked":
        """Write the texts of a seed; half of each block are its queries, the shorter ones."""
        count = counter(tokenizer_file)
        mixed = Workload(seed=seed, size=size).texts
        blocks = [sorted(mixed[at : at + BLOCK], key=len) for at in range(0, size, BLOCK)]
        queries = [text for block in blocks for text in block[: len(block) // 2]]
        passages = [text for block in blocks for text in block[len(block) // 2 :]]
        kinds: dict[Kind, Sequence[str]] = {"mixed": mixed, "queries": queries, "passages": passages}
        idle = {n: exact_texts(n, IDLE_TEXTS, lambda text: count([text])[0], seed=seed) for n in IDLE_TOKENS}
        return cls(
            {kind: Texts(texts, count(texts)) for kind, texts in kinds.items()},
            {n: Texts(texts, [n] * len(texts)) for n, texts in idle.items()},
        )


def counter(tokenizer_file: Path) -> Callable[[Sequence[str]], list[int]]:
    """Return what counts tokens as the model's own tokenizer does."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def cells_of(*, is_server: bool, base64: bool, slow: bool, batch: int = 1024) -> Iterator[Cell]:
    """Yield the cells that a peer can be asked for; `batch` bounds the largest, for runs that are to be short."""
    for cell in SERVER_CELLS if is_server else LIBRARY_CELLS:
        if (cell.encoding == "base64" and not base64) or (cell.name in SLOW and not slow):
            continue
        yield replace(cell, batch=min(cell.batch, batch))
