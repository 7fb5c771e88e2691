"""The verbs over fakes whose numbers can be told beforehand: embed, rerank, classify, sparse and token vectors."""

import asyncio
import threading

import numpy as np
import pytest

from conftest import assembled
from fakes import HIDDEN, HashBackend, LogitBackend, TokenBackend, byte_tokenizer, fake_model, hash_vector
from quiver.config import EngineConfig, ModelsConfig
from quiver.engine import outputs, scoring
from quiver.engine.model import WarmUp
from quiver.engine.runner import Runner
from quiver.engine.watchdog import Watchdog
from quiver.errors import InvalidInput, TooLong, TooManyInputs
from quiver.telemetry.observer import Observer
from quiver.types import Caller, ClassifyRequest, EmbedRequest, Pair, RerankRequest

ME = Caller("me")
PROMPTS = {"query": "query: ", "passage": "passage: "}
DOCUMENTS = ["one", "two", "three", "four", "five"]


def hashed(text):
    """Return the vector that the hash backend gives a text."""
    return hash_vector(list(ids_of(text)))


def ids_of(text):
    """Return the ids that the byte tokenizer gives a text."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids


async def embed(parts, *texts, **options):
    """Embed texts."""
    return await parts.service.embed(EmbedRequest(inputs=texts, **options), ME)


async def rerank(parts, query, documents, **options):
    """Rank documents."""
    return await parts.service.rerank(RerankRequest(query=query, documents=documents, **options), ME)


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, ""),
        ({"prompt": "say: "}, "say: "),
        ({"prompt_name": "query"}, "query: "),
        ({"task": "query"}, "query: "),
        ({"task": "document"}, "passage: "),
        ({"task": "clustering"}, ""),
        ({"prompt": "", "prompt_name": "query"}, ""),
    ],
)
async def test_a_prompt_is_the_one_that_was_asked_for(options, prompt):
    """By its text, by the model's name for it, or by the task, which a model may call otherwise or not know."""
    async with assembled(fake_model(HashBackend(), prompts=PROMPTS)) as parts:
        embeddings = await embed(parts, "a dog", **options)
    np.testing.assert_array_equal(embeddings.vectors[0], hashed(prompt + "a dog"))
    assert embeddings.usage.num_tokens == len(prompt + "a dog")


async def test_a_prompt_that_the_model_does_not_have_is_refused():
    """The error lists those that it has."""
    async with assembled(fake_model(HashBackend(), prompts=PROMPTS)) as parts:
        with pytest.raises(InvalidInput, match="has: query, passage") as refusal:
            await embed(parts, "a dog", prompt_name="clustering")
    assert refusal.value.param == "prompt_name"


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [({"default_prompt_name": ("query",)}, "query: "), ({"default_prompt": "say: "}, "say: ")],
)
async def test_a_default_prompt_is_for_requests_that_name_none(settings, prompt):
    """It is put before their texts, and not before those of a request that names another or an empty one."""
    async with assembled(fake_model(HashBackend(), prompts=PROMPTS), models=settings) as parts:
        kinds = ({}, {"task": "document"}, {"prompt": ""})
        plain, named, empty = [await embed(parts, "a dog", **kind) for kind in kinds]
    np.testing.assert_array_equal(plain.vectors[0], hashed(prompt + "a dog"))
    np.testing.assert_array_equal(named.vectors[0], hashed("passage: a dog"))
    np.testing.assert_array_equal(empty.vectors[0], hashed("a dog"))


async def test_what_was_cut_is_told():
    """Usage names the inputs that were cut, and counts the tokens that were read."""
    async with assembled(fake_model(HashBackend())) as parts:
        embeddings = await embed(parts, "short", "long " * 200, "x" * 512, "y" * 513, truncate=True)
        with pytest.raises(TooLong, match="input 1"):
            await embed(parts, "short", "long " * 200, truncate=False)
    assert embeddings.usage.truncated == (1, 3)
    assert embeddings.usage.num_tokens == 5 + 3 * 512


async def test_the_side_of_the_cut_is_the_callers():
    """The left side drops the beginning of a text."""
    async with assembled(fake_model(HashBackend())) as parts:
        embeddings = await embed(parts, "a" + "b" * 512, truncate=True, truncate_side="left")
    np.testing.assert_array_equal(embeddings.vectors[0], hashed("b" * 512))


async def test_an_embedding_model_ranks_by_cosine():
    """Query and documents get the prompts of their roles; the best comes first, and the reply says how it was scored."""
    async with assembled(fake_model(HashBackend(), prompts=PROMPTS)) as parts:
        ranking = await rerank(parts, "a dog", DOCUMENTS)
    scores = np.array([hashed("query: a dog") @ hashed(f"passage: {text}") for text in DOCUMENTS])
    assert ranking.scored_by == "cosine"
    assert ranking.model == "test/hash"
    assert ranking.order.tolist() == np.argsort(-scores).tolist()
    np.testing.assert_allclose(ranking.scores, scores[ranking.order], atol=1e-6)
    assert ranking.usage.num_tokens == len("query: a dog") + sum(len(f"passage: {text}") for text in DOCUMENTS)


async def test_a_cross_encoder_ranks_by_its_logits():
    """Scores are from 0 to 1, or the logits themselves, in the same order."""
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        ranking, raw = [await rerank(parts, "a dog", DOCUMENTS, raw_scores=raw) for raw in (False, True)]
    logits = np.array([6 * hash_vector([*ids_of("a dog"), *ids_of(text)])[0] for text in DOCUMENTS])
    assert ranking.scored_by == "cross-encoder"
    assert ranking.order.tolist() == raw.order.tolist() == np.argsort(-logits).tolist()
    np.testing.assert_allclose(raw.scores, logits[raw.order], rtol=1e-6)
    np.testing.assert_allclose(ranking.scores, 1 / (1 + np.exp(-raw.scores)), rtol=1e-6)


async def test_a_multi_vector_model_ranks_by_its_best_tokens():
    """For each token of the query the best of the document's counts; punctuation of documents counts for none."""
    model = fake_model(TokenBackend(), kind="multi_vector", normalize=False)
    async with assembled(model) as parts:
        ranking = await rerank(parts, "ab", ["ba", "cd", "a!b"])
        plain = await rerank(parts, "!", ["a", "!a"])
    expected = np.array([max(hashed(q) @ hashed(d) for d in "cd") for q in "ab"]).sum()
    assert ranking.scored_by == "maxsim"
    assert ranking.order.tolist() == [0, 2, 1]
    np.testing.assert_allclose(ranking.scores, [2, 2, expected], atol=1e-6)
    assert plain.scores[0] == plain.scores[1] < 0.99


async def test_only_the_best_are_returned_where_a_number_is_given():
    """top_n shortens the ranking and changes neither its order nor its scores."""
    async with assembled(fake_model(HashBackend())) as parts:
        everything, best, more = [await rerank(parts, "a dog", DOCUMENTS, top_n=n) for n in (None, 2, 99)]
        with pytest.raises(InvalidInput, match="top_n is 0"):
            await rerank(parts, "a dog", DOCUMENTS, top_n=0)
    assert best.order.tolist() == everything.order[:2].tolist()
    np.testing.assert_array_equal(best.scores, everything.scores[:2])
    assert len(more.order) == len(DOCUMENTS)


async def test_equal_documents_keep_their_order():
    """Three of a kind are ranked as they were sent."""
    async with assembled(fake_model(HashBackend())) as parts:
        ranking = await rerank(parts, "a dog", ["same", "other", "same", "same"])
    assert [i for i in ranking.order.tolist() if i != 1] == [0, 2, 3]


async def test_a_classifier_gives_each_label_its_share():
    """Shares of several labels make one; logits are given as they are; labels have the model's names."""
    model = fake_model(LogitBackend(labels=3), kind="classify", labels=("sad", "glad", "mad"), dimensions=3)
    inputs = ["a dog", Pair("a dog", "a cat")]
    async with assembled(model) as parts:
        shares, logits = [
            await parts.service.classify(ClassifyRequest(inputs=inputs, raw_scores=raw), ME) for raw in (False, True)
        ]
    expected = 6 * np.stack([hashed("a dog")[:3], hash_vector([*ids_of("a dog"), *ids_of("a cat")])[:3]])
    assert shares.labels == ("sad", "glad", "mad")
    np.testing.assert_allclose(logits.scores, expected, rtol=1e-6)
    np.testing.assert_allclose(shares.scores.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        np.log(shares.scores[:, 0] / shares.scores[:, 1]), expected[:, 0] - expected[:, 1], atol=1e-5
    )


async def test_sparse_vectors_hold_what_is_not_zero():
    """Each word's weight is log(1 + its largest positive logit) over the tokens; the others are left out."""
    async with assembled(fake_model(TokenBackend(), kind="sparse", dimensions=HIDDEN)) as parts:
        embeddings = await parts.service.embed_sparse(EmbedRequest(inputs=["ab", "c"]), ME)
    expected = np.log1p(np.maximum(np.maximum(hashed("a"), hashed("b")), 0))
    first = embeddings.vectors[0]
    assert first.indices.tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_array_equal(first.values, expected[first.indices])
    assert len(embeddings.vectors) == 2


@pytest.mark.parametrize("kind", ["embed", "multi_vector"])
async def test_each_token_may_have_its_vector(kind):
    """Inputs of different lengths get as many vectors as they have tokens, also beside requests for one vector each."""
    async with assembled(fake_model(TokenBackend(), kind=kind)) as parts:
        request = EmbedRequest(inputs=["abc", "d"])
        if kind == "embed":
            embeddings, whole = await asyncio.gather(parts.service.embed_tokens(request, ME), embed(parts, "abc", "d"))
            np.testing.assert_array_equal(whole.vectors, np.stack([hashed("a"), hashed("d")]))
        else:
            embeddings = await parts.service.embed_tokens(request, ME)
    np.testing.assert_array_equal(embeddings.vectors[0], np.stack([hashed(c) for c in "abc"]))
    np.testing.assert_array_equal(embeddings.vectors[1], np.stack([hashed("d")]))


@pytest.mark.parametrize(
    ("kind", "verb", "advice"),
    [
        ("rerank", "embed", "rerank with it"),
        ("sparse", "embed", "sparse"),
        ("classify", "rerank", "classify with it"),
        ("embed", "classify", "embed with it"),
        ("embed", "embed_sparse", "embed with it"),
        ("rerank", "embed_tokens", "rerank with it"),
    ],
)
async def test_a_model_is_not_asked_for_what_it_cannot_do(kind, verb, advice):
    """The refusal says what the model is for."""
    requests = {
        "rerank": RerankRequest(query="a", documents=["b"]),
        "classify": ClassifyRequest(inputs=["a"]),
    }
    async with assembled(fake_model(LogitBackend(), kind=kind)) as parts:
        with pytest.raises(InvalidInput, match=advice) as refusal:
            await getattr(parts.service, verb)(requests.get(verb, EmbedRequest(inputs=["a"])), ME)
    assert refusal.value.param == "model"


async def test_a_graph_that_pools_has_no_token_vectors():
    """A model whose file gives one vector for each input says so when it is asked for more."""
    async with assembled(fake_model(LogitBackend(labels=4))) as parts:
        with pytest.raises(InvalidInput, match="none for its tokens"):
            await parts.service.embed_tokens(EmbedRequest(inputs=["a"]), ME)


async def test_documents_are_bounded_as_inputs_are():
    """None, or more than one request may bring, is refused naming the field."""
    async with assembled(fake_model(HashBackend()), engine=EngineConfig(max_client_batch_size=3)) as parts:
        with pytest.raises(InvalidInput, match="documents is empty"):
            await rerank(parts, "a", [])
        with pytest.raises(TooManyInputs, match="4 inputs") as refusal:
            await rerank(parts, "a", ["b"] * 4)
    assert refusal.value.param == "documents"


def test_a_cut_may_standardise_first():
    """Where a model was trained so, the mean and the spread of a vector are taken out before it is cut."""
    vectors = np.random.default_rng(0).normal(3, 2, (4, 16)).astype(np.float32)
    standard = (vectors - vectors.mean(axis=1, keepdims=True)) / vectors.std(axis=1, keepdims=True)
    expected = standard[:, :5] / np.linalg.norm(standard[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(outputs.cut(vectors, 5, unit_length=True, layer_norm=True), expected, atol=1e-5)
    assert np.abs(outputs.cut(vectors, 5, unit_length=True) - expected).max() > 0.1


def test_scores_of_one_document_do_not_depend_on_the_others():
    """A cosine has the same bits alone and among a thousand."""
    draw = np.random.default_rng(0)
    query, documents = draw.normal(size=384).astype(np.float32), draw.normal(size=(1000, 384)).astype(np.float32)
    together = scoring.cosines(query, documents)
    alone = [scoring.cosines(query, documents[i : i + 1])[0] for i in range(0, 1000, 37)]
    np.testing.assert_array_equal(together[::37], alone)


def test_large_logits_are_no_trouble():
    """A sigmoid or a softmax of a thousand is a one, without a warning."""
    assert scoring.probabilities(np.float32([[1000], [-1000]])).ravel().tolist() == pytest.approx([1, 0])
    assert scoring.probabilities(np.float32([[1000, -1000]])).tolist() == [[1, 0]]


def test_models_settings_are_one_for_all_or_one_for_each():
    """The value of a setting for a model is that at the model's place in the list."""
    config = ModelsConfig(model=("a/a", "b/b"), dtype=("int8", "float32"), backend=("onnx",))
    assert [config.settings_of(name).dtype for name in config.model] == ["int8", "float32"]
    assert [config.settings_of(name).backend for name in config.model] == ["onnx", "onnx"]
    assert config.settings_of("c/c").dtype == "auto"


async def test_a_request_that_names_no_model_gets_one_of_the_right_kind():
    """Where an embedder and a reranker are served, each verb finds its own; a name still counts more."""
    reranker = fake_model(LogitBackend(), id="test/judge", aliases=("judge",), kind="rerank", dimensions=1)
    async with assembled(models={"model": ("test/hash", "judge")}) as parts:
        parts.engine.replicas.add("judge", reranker, WarmUp())
        assert (await embed(parts, "a dog")).model == "test/hash"
        assert (await rerank(parts, "a dog", DOCUMENTS)).model == "test/judge"
        assert (await rerank(parts, "a dog", DOCUMENTS, model="hash")).model == "test/hash"


async def test_late_chunking_reads_all_texts_as_one():
    """Each vector is the mean of its own text's tokens, of unit length, after all texts went through the model together."""
    batches = []
    model = fake_model(TokenBackend(before=lambda batch: batches.append(batch.ids.tolist())), normalize=True)
    async with assembled(model) as parts:
        embeddings = await embed(parts, "ab", "c", "dde", late_chunking=True)
        with pytest.raises(InvalidInput, match="input 1 is empty"):
            await embed(parts, "ab", "", late_chunking=True)
        with pytest.raises(TooLong, match="together"):
            await embed(parts, "a" * 300, "b" * 300, late_chunking=True)
    means = [np.mean([hashed(c) for c in text], axis=0) for text in ("ab", "c", "dde")]
    assert batches == [ids_of("abcdde").tolist()]
    assert embeddings.usage.num_tokens == 6
    np.testing.assert_allclose(embeddings.vectors, [m / np.linalg.norm(m) for m in means], atol=1e-6)


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
async def test_the_length_of_a_vector_is_what_was_asked_for(normalises, asked):
    """A request may have vectors scaled or left alone, whatever the model's own pipeline does."""
    backend = LogitBackend(labels=8)  # its vectors are not of unit length
    async with assembled(fake_model(backend, normalize=normalises, dimensions=8)) as parts:
        vector = (await embed(parts, "a dog", normalize=asked)).vectors[0]
    raw = 6 * hashed("a dog")[:8]
    wanted = raw / np.linalg.norm(raw) if (normalises if asked is None else asked) else raw
    np.testing.assert_allclose(vector, wanted, rtol=1e-5)


async def test_a_text_of_which_a_tokenizer_makes_nothing_is_refused():
    """Where no special tokens stand around a text, an empty one has no tokens: an error that names it, not a failure."""
    async with assembled(fake_model(HashBackend())) as parts:
        with pytest.raises(InvalidInput, match="input 1 has no tokens"):
            await embed(parts, "a dog", "")


@pytest.mark.parametrize("encoders", [1, 3])
async def test_so_many_texts_are_encoded_at_once_as_is_set(encoders):
    """As many threads as the setting says work side by side, and one piece of work more waits for one of them."""
    runner, together, begun = (
        Runner(EngineConfig(encoders=encoders), Observer(), Watchdog(stall_seconds=60)),
        threading.Barrier(encoders),
        [],
    )
    opened = threading.Event()

    def work():
        begun.append(together.wait(10))
        assert opened.wait(10)

    works = [asyncio.ensure_future(runner.encoders.run(work)) for _ in range(2 * encoders)]
    async with asyncio.timeout(10):
        while len(begun) < encoders:  # noqa: ASYNC110  threads have no event
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert len(begun) == runner.limits.encoders == encoders
    opened.set()
    await asyncio.gather(*works)
    runner.close()
