"""Texts to token ids, once: cost, usage, admission and the forward pass all come from these ids."""

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import tokenizers

from quiver.errors import InvalidInput, LoadError, TooLong
from quiver.models.catalogue import ModelSpec
from quiver.types import Encoding, Input, Ints, Pair, Side, Token

T = TypeVar("T")

MAX_CHARS_PER_TOKEN = 250
"""A text with more characters than this for each token that the model reads is not encoded whole: cutting to
the model's length would not bound the cost of encoding, since the whole text is encoded before it is cut."""
QUICK_CHARS = 1000
"""So many characters hold up the event loop for a quarter of a millisecond; to hand them to a thread and back takes an
eighth more, of the cores that the lanes need."""
TEXTS_AT_ONCE = 128
"""The tokenizer notes a hundred bytes of each token that nobody needs: of so many texts, not of a whole request's."""
_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """How a language model is asked about a pair: what stands before it, the pair itself, what stands after it."""

    before: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    body: str = ""
    after: Ints = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer.json with our own limit in place of the file's truncation and padding; safe in many threads."""

    backend: tokenizers.Tokenizer
    max_tokens: int
    vocab_size: int
    num_tail: int
    """Special tokens that end every encoding, kept when an input is cut."""
    num_head: int = 0
    """Special tokens that begin it."""
    template: PairTemplate | None = None
    quick_chars: int = QUICK_CHARS
    """Texts of so few characters together need no thread of their own."""

    def encode(
        self, inputs: Sequence[Input | Pair], *, truncate: bool, side: Side = "right", prompt: str = ""
    ) -> list[Encoding]:
        """Encode inputs in order, `prompt` before each text; blocks. Raises `TooLong` and `InvalidInput` naming the input."""
        limits = _Limits(truncate, side)
        texts: dict[int, _Text] = {}
        encoded: dict[int, _Encoded] = {}
        for i, given in enumerate(inputs):
            if isinstance(given, str | Pair):
                texts[i] = self._text(given, i, prompt, limits)
            else:
                encoded[i] = _Encoded(self._given(given, i))
        encoded |= self._encode_texts(texts)
        return [self._limited(encoded[i], i, limits) for i in range(len(inputs))]

    def tokens(self, text: str, *, special_tokens: bool) -> list[Token]:
        """Cut a text into its tokens, however many; blocks."""
        encoded = self._checked(lambda: self.backend.encode(text, add_special_tokens=special_tokens))
        parts = zip(encoded.ids, encoded.tokens, encoded.special_tokens_mask, encoded.offsets, strict=True)
        return [
            Token(number, token, special=True, start=None, stop=None)
            if special
            else Token(number, text[start:stop] or token, special=False, start=start, stop=stop)
            for number, token, special, (start, stop) in parts
        ]

    def decode(self, ids: Sequence[int], *, special_tokens: bool) -> str:
        """Turn token ids back into a text; blocks. Raises `InvalidInput`."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise InvalidInput(f"token ids must be 0 to {self.vocab_size - 1}", param="ids")
        return self.backend.decode(list(ids), skip_special_tokens=not special_tokens)

    def join(self, encodings: Sequence[Encoding]) -> tuple[Encoding, Ints]:
        """Lay texts one behind another, with special tokens around the whole -> that, and where each ends, (B,).

        Raises `TooLong`.
        """
        first, last = encodings[0].ids, encodings[-1].ids
        empty = [i for i, e in enumerate(encodings) if len(e) <= self.num_head + self.num_tail]
        if empty:
            raise InvalidInput(f"input {empty[0]} is empty: there is nothing to pool", param=f"input[{empty[0]}]")
        inner = [e.ids[self.num_head : len(e) - self.num_tail] for e in encodings]
        ids = np.concatenate((first[: self.num_head], *inner, last[len(last) - self.num_tail :]))
        if len(ids) > self.max_tokens:
            raise TooLong(
                f"the texts have {len(ids)} tokens together, but the model reads at most {self.max_tokens} at once. "
                "Send fewer texts, or send late_chunking=false.",
                param="input",
            )
        return Encoding(ids, per_token=True), self.num_head + np.cumsum([len(part) for part in inner])

    def fill(self, encodings: Sequence[Encoding], length: int) -> list[Encoding]:
        """Bring encodings to a length with mask tokens, as a multi-vector model's query has it; longer ones are cut."""
        mask = next((m for m in map(self.backend.token_to_id, _MASKS) if m is not None), None)
        if mask is None:
            raise InvalidInput("this model's tokenizer has no mask token to fill a query with")
        return [replace(e, ids=_filled(e.ids, length, mask, self.num_tail)) for e in encodings]

    def punctuation(self) -> Ints:
        """Return the ids of single punctuation marks, which multi-vector models leave out of documents."""
        ids = (self.backend.token_to_id(mark) for mark in string.punctuation)
        return np.array([i for i in ids if i is not None], np.int64)

    def _text(self, given: str | Pair, index: int, prompt: str, limits: "_Limits") -> "_Text":
        """Bound a text's characters; a pair that is asked about by template becomes one text."""
        if isinstance(given, str):
            return self._bounded(prompt + given, index, limits)
        query, document = (self._bounded(text, index, limits) for text in (given.query, given.document))
        if self.template:
            return self.template.body.format(query=query, document=document)
        return query, document

    def _bounded(self, text: str, index: int, limits: "_Limits") -> str:
        limit = MAX_CHARS_PER_TOKEN * self.max_tokens
        if len(text) <= limit:
            return text
        if limits.truncate:
            return text[:limit] if limits.side == "right" else text[-limit:]
        raise TooLong(
            f"input {index} has {len(text)} characters: more than {limit} are not read for a model of "
            f"{self.max_tokens} tokens. Split the text, or ask for it to be cut (truncate).",
            param=f"input[{index}]",
        )

    def _encode_texts(self, texts: "Mapping[int, _Text]") -> "dict[int, _Encoded]":
        items = list(texts.items())
        parts = (self._encode_some(items[at : at + TEXTS_AT_ONCE]) for at in range(0, len(items), TEXTS_AT_ONCE))
        return dict(itertools.chain.from_iterable(parts))

    def _encode_some(self, items: "Sequence[tuple[int, _Text]]") -> "list[tuple[int, _Encoded]]":
        texts, specials = [text for _, text in items], self.template is None
        encoded = self._checked(lambda: self.backend.encode_batch_fast(texts, add_special_tokens=specials))
        return [
            (i, _Encoded(np.array(e.ids, np.int64), e if isinstance(text, tuple) else None))
            for (i, text), e in zip(items, encoded, strict=True)
        ]

    @staticmethod
    def _checked(encode: Callable[[], T]) -> T:
        try:
            return encode()
        except (TypeError, UnicodeError) as error:
            raise InvalidInput("a text is not valid Unicode (a lone surrogate?)", param="input") from error

    def _given(self, ids: Sequence[int], index: int) -> Ints:
        """Check ids that the caller brought."""
        if not ids:
            raise InvalidInput(f"input {index} has no tokens", param=f"input[{index}]")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidInput(
                f"input {index} holds token ids outside 0 to {self.vocab_size - 1}: ids must come from this model's own "
                "tokenizer, not from OpenAI's. Send the text instead (langchain: check_embedding_ctx_length=False).",
                param=f"input[{index}]",
            )
        return np.array(ids, np.int64)

    def _limited(self, encoded: "_Encoded", index: int, limits: "_Limits") -> Encoding:
        """Cut what is too long, or refuse it."""
        ids, type_ids = encoded.ids, encoded.type_ids
        excess = len(ids) + len(self.template or ()) - self.max_tokens
        if excess > 0 and not limits.truncate:
            raise TooLong(
                f"input {index} has {self.max_tokens + excess} tokens, but the model reads at most {self.max_tokens}. "
                "Split the text, or ask for it to be cut (truncate).",
                param=f"input[{index}]",
            )
        if excess > 0:
            kept = self._kept(encoded, excess, limits.side)
            ids, type_ids = ids[kept], None if type_ids is None else type_ids[kept]
        if self.template:
            ids = np.concatenate((self.template.before, ids, self.template.after))
        return Encoding(ids, type_ids, truncated=excess > 0)

    def _kept(self, encoded: "_Encoded", excess: int, side: Side) -> Ints:
        """Return the places of the tokens that stay: special ones do; a pair loses its document first."""
        places = np.arange(len(encoded.ids))
        if encoded.pair is None:
            order = [places if self.template else places[self.num_head : len(places) - self.num_tail]]
        else:
            owners = np.array([-1 if owner is None else owner for owner in encoded.pair.sequence_ids])
            order = [np.flatnonzero(owners == 1), np.flatnonzero(owners == 0)]
        dropped = np.concatenate([part[::-1] if side == "right" else part for part in order])[:excess]
        return np.setdiff1d(places, dropped)


_Text = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Limits:
    truncate: bool
    side: Side


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Ids before they are cut."""

    ids: Ints
    pair: tokenizers.Encoding | None = None

    @property
    def type_ids(self) -> Ints | None:
        return None if self.pair is None else np.array(self.pair.type_ids, np.int64)


def _filled(ids: Ints, length: int, mask: int, num_tail: int) -> Ints:
    if len(ids) > length:
        return np.concatenate((ids[: length - num_tail], ids[len(ids) - num_tail :]))
    return np.concatenate((ids, np.full(length - len(ids), mask, np.int64)))


def load(path: Path, spec: ModelSpec) -> Tokenizer:
    """Read a tokenizer.json; raises `LoadError`."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise LoadError(f"{path} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    if spec.kind == "multi_vector":  # its prompts are marks of one token, whatever stands after them
        backend.add_special_tokens([prompt.strip() for prompt in spec.prompts.values() if prompt.strip()])
    special = backend.encode("a").special_tokens_mask
    texts = [i for i, is_special in enumerate(special) if not is_special] or [len(special)]
    return Tokenizer(
        backend,
        spec.max_tokens,
        backend.get_vocab_size(),
        num_tail=max(0, len(special) - 1 - texts[-1]),
        num_head=texts[0],
        template=_template(backend, spec.pair_template) if spec.pair_template else None,
    )


def _template(backend: tokenizers.Tokenizer, parts: tuple[str, str, str]) -> PairTemplate:
    before, body, after = parts
    first, last = (np.array(backend.encode(t, add_special_tokens=False).ids, np.int64) for t in (before, after))
    return PairTemplate(first, body, last)
