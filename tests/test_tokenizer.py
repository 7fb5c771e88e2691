"""Texts, pairs and ids become encodings; what is too long is cut where the caller said, or refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from fakes import byte_tokenizer
from quiver.engine import tokenizer
from quiver.errors import InvalidInput, TooLong
from quiver.models.catalogue import ModelSpec
from quiver.types import Pair

LONG = "the cat sat on the mat and looked at the dog"
TEMPLATE = ("before: ", "<q>{query}</q><d>{document}</d>", " after")


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request, tmp_path_factory):
    """Write a checkpoint of each kind of tokenizer that reads pairs."""
    return checkpoints.make(tmp_path_factory.mktemp("tokenizer"), request.param)


def load(folder, max_tokens=512, **facts):
    """Load a checkpoint's tokenizer."""
    spec = ModelSpec(id="test/tiny", weights="test/tiny", dimensions=48, max_tokens=max_tokens, **facts)
    return tokenizer.load(folder / "tokenizer.json", spec)


def ids_of(tokenizer, text):
    """Return the ids of a text without special tokens."""
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_tokens", [3, 5, 8])
def test_a_text_is_cut_at_the_side_that_was_asked_for(folder, side, max_tokens):
    """The special tokens stay, and between them the first or the last tokens of the text."""
    whole = load(folder).encode([LONG], truncate=False)[0]
    (cut,) = load(folder, max_tokens).encode([LONG], truncate=True, side=side)
    inner = whole.ids[1:-1]
    kept = inner[: max_tokens - 2] if side == "right" else inner[len(inner) - (max_tokens - 2) :]
    assert cut.ids.tolist() == [whole.ids[0], *kept, whole.ids[-1]]
    assert cut.truncated
    assert not whole.truncated


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pair_loses_its_document_and_keeps_its_query(folder, side):
    """Whatever is cut of a pair is the document's, from the side that was asked for."""
    whole, pair = load(folder), Pair("a dog", LONG)
    (full,) = whole.encode([pair], truncate=False)
    (cut,) = load(folder, len(full) - 4).encode([pair], truncate=True, side=side)
    query, document = ids_of(whole, pair.query), ids_of(whole, pair.document)
    kept = document[:-4] if side == "right" else document[4:]
    words = [i for i in cut.ids.tolist() if i not in set(full.ids.tolist()) - {*query, *document}]
    assert words == query + kept
    assert cut.truncated
    assert len(cut.type_ids) == len(cut.ids) == len(full) - 4


def test_a_query_that_fills_the_model_is_cut_last(folder):
    """Where even the query is too long, the document is gone and the query is cut to what fits."""
    (cut,) = load(folder, 7).encode([Pair(LONG, "a dog")], truncate=True)
    assert len(cut) == 7
    assert set(ids_of(load(folder), LONG)) >= set(cut.ids[1:4].tolist())


def test_the_halves_of_a_pair_are_told_apart(tmp_path):
    """BERT's document has token type 1, with the separator that ends it; a text alone has no types."""
    tiny = load(checkpoints.make(tmp_path, "bert"))
    pair, text = tiny.encode([Pair("a dog", "the cat"), "a dog"], truncate=False)
    query, document = (len(ids_of(tiny, text)) for text in ("a dog", "the cat"))
    assert pair.type_ids.tolist() == [0] * (1 + query + 1) + [1] * (document + 1)
    assert text.type_ids is None


def test_a_prompt_stands_before_each_text(folder):
    """It is part of the text that is encoded, and of the tokens that count."""
    encode = load(folder).encode
    prompted, plain = encode(["a dog"], truncate=False, prompt="the cat "), encode(["the cat a dog"], truncate=False)
    np.testing.assert_array_equal(prompted[0].ids, plain[0].ids)


def test_a_pair_may_be_asked_about_by_template(tmp_path):
    """The template's frame surrounds the pair without any special token, and stays when the pair is cut."""
    folder = checkpoints.make(tmp_path, "roberta")
    whole = load(folder, pair_template=TEMPLATE)
    (full,) = whole.encode([Pair("a dog", LONG)], truncate=False)
    body = f"<q>a dog</q><d>{LONG}</d>"
    assert full.ids.tolist() == [i for part in (TEMPLATE[0], body, TEMPLATE[2]) for i in ids_of(whole, part)]
    assert full.type_ids is None

    (cut,) = load(folder, len(full) - 3, pair_template=TEMPLATE).encode([Pair("a dog", LONG)], truncate=True)
    kept = ids_of(whole, body)[:-3]
    assert cut.ids.tolist() == [*ids_of(whole, TEMPLATE[0]), *kept, *ids_of(whole, TEMPLATE[2])]


def test_braces_in_a_text_are_only_braces(tmp_path):
    """A query or document that looks like a place of the template is not filled in."""
    whole = load(checkpoints.make(tmp_path, "roberta"), pair_template=TEMPLATE)
    (encoding,) = whole.encode([Pair("{document}", "{query} {0}")], truncate=False)
    assert whole.backend.decode(encoding.ids.tolist()) == "before: <q>{document}</q><d>{query} {0}</d> after"


def test_what_is_too_long_is_refused_with_both_numbers(folder):
    """Without truncation, the error names the input, its tokens and the limit; a pair is no exception."""
    small, count = load(folder, 6), len(load(folder).encode([LONG], truncate=False)[0])
    with pytest.raises(TooLong, match=rf"input 1 has {count} tokens, .* at most 6"):
        small.encode(["a", LONG], truncate=False)
    with pytest.raises(TooLong, match="input 0 has"):
        small.encode([Pair("a dog", LONG)], truncate=False)


@given(st.lists(st.text(), max_size=8), st.integers(4, 40), st.sampled_from(["left", "right"]))
def test_no_encoding_is_longer_than_the_model_reads(texts, max_tokens, side):
    """Whatever the texts, each has one encoding within the limit, and is marked if it was cut."""
    whole, small = byte_tokenizer(), byte_tokenizer(max_tokens)
    for full, cut in zip(
        whole.encode(texts, truncate=True), small.encode(texts, truncate=True, side=side), strict=True
    ):
        assert len(cut) == min(len(full), max_tokens)
        assert cut.truncated == (len(full) > max_tokens)
        expected = full.ids[:max_tokens] if side == "right" else full.ids[len(full) - len(cut) :]
        assert cut.ids.tolist() == expected.tolist()


def test_many_inputs_are_the_same_as_each_alone(folder):
    """However many there are, of whatever kind, each has its own encoding, in its own place."""
    whole, words = load(folder), LONG.split()
    texts = [" ".join(words[: 1 + i % len(words)]) for i in range(2 * tokenizer.TEXTS_AT_ONCE + 1)]
    inputs = [
        [3, 4 + i % 5] if i % 7 == 0 else Pair(text, "a dog") if i % 5 == 0 else text for i, text in enumerate(texts)
    ]
    together = whole.encode(inputs, truncate=False)
    alone = [whole.encode([one], truncate=False)[0] for one in inputs]
    assert [e.ids.tolist() for e in together] == [e.ids.tolist() for e in alone]


def test_a_query_is_filled_with_masks(tmp_path):
    """A multi-vector model's query has one length: short ones get masks, long ones keep their end token."""
    tiny = load(checkpoints.make(tmp_path, "bert"), kind="multi_vector", prompts={"query": "[UNK] "})
    mask, end = tiny.backend.token_to_id("[MASK]"), tiny.backend.token_to_id("[SEP]")
    text = tiny.encode(["a dog"], truncate=True)
    short, long = tiny.fill([*text, *tiny.encode([LONG], truncate=True)], 8)
    assert len(short) == len(long) == 8
    assert short.ids.tolist() == [*text[0].ids.tolist(), *[mask] * (8 - len(text[0]))]
    assert long.ids[-1] == end


def test_a_tokenizer_without_masks_cannot_fill():
    """It says so instead of filling with something else."""
    with pytest.raises(InvalidInput, match="mask"):
        byte_tokenizer().fill(byte_tokenizer().encode(["a"], truncate=False), 4)


def test_a_mark_is_one_token(tmp_path):
    """The prompts of a multi-vector model are single tokens of its vocabulary, wherever a text would split them."""
    tiny = load(checkpoints.make(tmp_path, "bert"), kind="multi_vector", prompts={"query": "[MASK] "})
    (encoding,) = tiny.encode(["a dog"], truncate=False, prompt="[MASK] ")
    assert encoding.ids[1] == tiny.backend.token_to_id("[MASK]")
    assert len(encoding) == 3 + len(ids_of(tiny, "a dog"))
