"""LlamaIndex's packages for OpenAI-like servers and for Text Embeddings Inference, unmodified."""

import pytest
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from conftest import EMBEDDER, QUERY, TEXTS


@pytest.mark.client("llama-index-embeddings-openai-like", "OpenAILikeEmbedding.get_text_embedding_batch")
def test_openai_like(url, assert_vectors):
    """Vectors in order."""
    model = OpenAILikeEmbedding(model_name=EMBEDDER, api_base=f"{url}/v1", api_key="any")
    assert_vectors(model.get_text_embedding_batch(TEXTS))


@pytest.mark.client(
    "llama-index-embeddings-text-embeddings-inference", "TextEmbeddingsInference.get_text_embedding_batch"
)
def test_text_embeddings_inference(url, assert_vectors):
    """Vectors in order; the client puts no prompt before the texts of a model that has none."""
    model = TextEmbeddingsInference(model_name=EMBEDDER, base_url=url, text_instruction="", query_instruction="")
    assert_vectors(model.get_text_embedding_batch(TEXTS))


@pytest.mark.client("llama-index-postprocessor-tei-rerank", "TextEmbeddingInference.postprocess_nodes")
def test_tei_rerank(url, post):
    """The best nodes first, with the scores of the server's first model: the client names none."""
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    ranked = TextEmbeddingInference(base_url=url, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    wanted = post("/tei/rerank", query=QUERY, texts=TEXTS)[:2]
    assert [node.text for node in ranked] == [TEXTS[item["index"]] for item in wanted]
    assert [node.score for node in ranked] == pytest.approx([item["score"] for item in wanted], abs=1e-6)
