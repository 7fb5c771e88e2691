"""A multi-vector model end to end: marks, masks that fill a query and that nobody attends to, and ranking by its tokens."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
from conftest import assembled, settings
from quiver.engine import model
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Caller, EmbedRequest, RerankRequest

QUERY_TOKENS = 12
SPEC = ModelSpec(
    id="test/colbert",
    weights="test/colbert",
    kind="multi_vector",
    dimensions=16,
    max_tokens=64,
    prompts={"query": "[UNK] ", "document": "[PAD] "},
    query_tokens=QUERY_TOKENS,
)


def loaded(spec, folder):
    """Load the checkpoint for what a spec says of it."""
    return model.load(spec, ModelFiles(folder), settings(), lanes=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a tiny BERT with a layer that projects each token."""
    folder = checkpoints.make(tmp_path_factory.mktemp("colbert"), "bert", pooling=None)
    weights = load_file(folder / "model.safetensors")
    projection = np.random.default_rng(0).normal(size=(16, 48)).astype(np.float32)
    save_file({**weights, "linear.weight": projection}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("query_tokens", [QUERY_TOKENS, 0])
def test_masks_fill_a_query_and_nobody_attends_to_them(folder, query_tokens):
    """The vectors of a query's own tokens have the bits that they have without masks; attended to, they would not."""
    colbert = loaded(replace(SPEC, query_tokens=query_tokens), folder)
    plain = colbert.tokenizer.encode(["a dog"], truncate=True, prompt="[UNK] ")
    filled = colbert.tokenizer.fill(plain, QUERY_TOKENS)
    alone, together = colbert.compute(plain)[0], colbert.compute(filled)[0]
    assert together.shape == (QUERY_TOKENS, 16)
    assert np.array_equal(together[: len(alone)], alone) == bool(query_tokens)
    colbert.backend.close()


async def test_it_ranks_by_its_best_tokens(folder):
    """The score of a document is the sum, over the filled query's tokens, of its best token's cosine."""
    colbert = loaded(SPEC, folder)
    documents = ["the cat sat on the mat", "a dog", "to be, or not to be!"]
    async with assembled(colbert) as parts:
        request = RerankRequest(query="a dog", documents=documents)
        ranking = await parts.service.rerank(request, Caller("me"))
        vectors = await parts.service.embed_tokens(EmbedRequest(inputs=documents, task="document"), Caller("me"))
    query = colbert.tokenizer.encode(["a dog"], truncate=True, prompt="[UNK] ")
    (query,) = loaded(SPEC, folder).compute(colbert.tokenizer.fill(query, QUERY_TOKENS))
    marks = {colbert.tokenizer.backend.token_to_id(mark) for mark in "!,"}
    encodings = colbert.tokenizer.encode(documents, truncate=True, prompt="[PAD] ")
    scores = []
    for encoding, document in zip(encodings, vectors.vectors, strict=True):
        kept = document[[token not in marks for token in encoding.ids.tolist()]]
        scores.append((query @ kept.T).max(axis=1).sum())
    assert ranking.scored_by == "maxsim"
    assert ranking.order.tolist() == np.argsort(-np.array(scores)).tolist()
    np.testing.assert_allclose(ranking.scores, sorted(scores, reverse=True), rtol=1e-5)
