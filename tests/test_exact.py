"""The embedded default model on real input: equal to the reference, and bit-identical in any company."""

import asyncio
import base64

import numpy as np
import openai
import pytest

import reference
from company import CLIENTS, alone, are_bit_identical, in_company
from conftest import listening
from fakes import LentBackend
from quiver.engine.model import Model
from quiver.models.weights import Weights
from sentences import SENTENCES

MAX_LENGTH = 512


@pytest.fixture(scope="session")
def sentence_vectors(minilm) -> np.ndarray:
    """Return the vector of each of the 200 sentences, computed alone."""
    return alone(minilm, minilm.tokenizer.encode(SENTENCES, truncate=True))


def test_the_default_model_equals_the_reference(minilm, minilm_files, sentence_vectors):
    """Each of 200 varied sentences is within 1e-5 of plain float64 NumPy; int8 has a cosine of at least 0.985 to it."""
    config, weights = minilm_files.json("config.json"), Weights(minilm_files)
    ids = [encoding.ids.tolist() for encoding in minilm.tokenizer.encode(SENTENCES, truncate=True)]
    wanted = np.stack(
        [reference.normalise(reference.pool(reference.hidden_states(config, weights, one), "mean")) for one in ids]
    )

    assert len(SENTENCES) == len(set(SENTENCES)) == 200
    if minilm.dtype == "float32":
        assert np.abs(sentence_vectors - wanted).max() <= 1e-5
    cosines = (sentence_vectors * wanted).sum(axis=1)
    assert cosines.min() >= 0.985


def test_the_sentences_are_varied(minilm):
    """They hold one-token texts, texts that are cut at 256 tokens, and texts that are empty once normalised."""
    lengths = [len(encoding) for encoding in minilm.tokenizer.encode(SENTENCES, truncate=True)]
    assert min(lengths) == 2
    assert lengths.count(2) >= 2
    assert 3 in lengths
    assert lengths.count(256) >= 3


async def test_sentences_are_bit_identical_in_any_company(minilm, sentence_vectors):
    """Packed with anything, in any order, asked for by 32 callers: the same bits as alone."""
    encodings = minilm.tokenizer.encode(SENTENCES, truncate=True)
    for seed in range(3):
        assert np.array_equal(await in_company(minilm, encodings, seed=seed), sentence_vectors)


async def test_sentences_are_bit_identical_over_http(minilm, sentence_vectors):
    """32 clients of a live server, floats and base64, one text or several a request: the same bits as alone."""
    rng = np.random.default_rng(5)

    async def client(http, number):
        wrong = 0
        for _ in range(6):
            portion = rng.choice(len(SENTENCES), rng.integers(1, 7), replace=False)
            kind = "base64" if number % 2 else "float"
            reply = await http.embeddings.create(
                model="", input=[SENTENCES[i] for i in portion], encoding_format=kind, extra_body={"truncate": True}
            )
            got = [
                np.frombuffer(base64.b64decode(d.embedding), "<f4") if kind == "base64" else np.float32(d.embedding)
                for d in reply.data
            ]
            wrong += int((np.stack(got) != sentence_vectors[portion]).any(axis=1).sum())
        return wrong

    async with listening(minilm) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as http:
        wrong = await asyncio.gather(*(client(http, number) for number in range(CLIENTS)))
    assert sum(wrong) == 0


async def test_every_length_is_bit_identical_in_any_company(minilm):
    """Random tokens of each length from 1 to 512: the same bits alone and among 32 callers' others.

    `make test-faults` does it with 2,000 inputs.
    """
    lengths = np.random.default_rng(7).permutation(MAX_LENGTH) + 1
    assert await are_bit_identical(minilm, lengths, seed=8)


def test_a_last_bit_would_be_seen(sentence_vectors):
    """Negative control: one flipped last bit in one number fails the comparison that the tests above make."""
    changed = sentence_vectors.copy()
    changed.view(np.uint32)[117, 3] ^= 1
    assert not np.array_equal(changed, sentence_vectors)


def test_the_warm_up_confirms_it(minilm):
    """What the server reports of this machine is what the tests above found."""
    assert minilm.warm_up().batch_invariant


def test_company_that_shows_would_be_caught(minilm):
    """Negative control of the warm-up: a backend whose bits depend on the batch is reported as such."""

    class Blurred(LentBackend):
        def __init__(self, backend):
            super().__init__(backend)
            self.forward = lambda batch: self._blur(batch, backend.forward(batch))

        @staticmethod
        def _blur(batch, hidden):
            hidden[:, 0] += np.float32(1e-5) * (len(batch.cu_seqlens) > 2)
            return hidden

    blurred = Model(minilm.spec, minilm.dtype, minilm.tokenizer, Blurred(minilm.backend))
    assert not blurred.warm_up().batch_invariant
