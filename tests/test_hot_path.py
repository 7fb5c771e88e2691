"""The profile of our own hot path counts what it says that it counts."""

import hot_path
import pytest

from faults.load import Answer
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Found

BLOCK_FLOPS = 2 * (4 * 384 * 384 + 2 * 384 * 1536)
"""Of one token in the linear layers of one block of the default model."""


@pytest.fixture(scope="module")
def found(minilm_files):
    """Return the default model as it is found."""
    return Found(Catalogue.load().find(minilm_files.model), minilm_files)


def test_the_profiler_sees_every_product_of_the_model(found):
    """The linear layers that it tells of have exactly the operations of six blocks for each token."""
    batches = hot_path.full_batches(found, 2)
    events, wall = hot_path.profiled(found, "float32", batches)
    shares = hot_path.shares_of(events)

    tokens = sum(int(batch.cu_seqlens[-1]) for batch in batches)
    linear = sum(share.flops for kind, share in shares.items() if kind.endswith("linear layers"))
    assert linear == 6 * BLOCK_FLOPS * tokens
    assert any(kind.endswith("attention") and share.flops for kind, share in shares.items())
    assert 0 < sum(share.seconds for share in shares.values()) <= wall


def test_batches_are_full_and_no_text_is_lost(found):
    """Batches hold what fits; only the largest input may stand alone above that."""
    batches = hot_path.full_batches(found, 20)
    sizes = [int(batch.cu_seqlens[-1]) for batch in batches]
    assert max(sizes) <= max(hot_path.BATCH_TOKENS, *(int(batch.lengths.max()) for batch in batches))
    assert sum(sizes) / len(sizes) > 0.85 * hot_path.BATCH_TOKENS


def test_a_product_is_named_by_what_it_multiplies():
    """Products of more than two dimensions are attention's, those of 8 bits are counted as others."""
    flat = {"input_type_shape": [{"float": [7, 4]}, {"float": [4, 3]}], "output_type_shape": [{"float": [7, 3]}]}
    rows = {"input_type_shape": [{"float": [2, 5, 4]}], "output_type_shape": [{"float": [2, 5, 5]}]}
    assert hot_path.kind_of({"op_name": "Gemm", **flat}) == "Gemm, linear layers"
    assert hot_path.kind_of({"op_name": "FusedMatMul", **rows}) == "FusedMatMul, attention"
    assert hot_path.kind_of({"op_name": "Gelu", **flat}) == "Gelu"
    assert hot_path.flops_of({"op_name": "MatMulIntegerToFloat", **flat}) == 2 * 7 * 4 * 3
    assert hot_path.flops_of({"op_name": "Gelu", **flat}) == 0


def test_the_parts_of_a_request_add_up():
    """What a client waits is the server's stages, what is between them, and HTTP."""
    head = b"HTTP/1.1 200 OK\r\nserver-timing: encode;dur=0.250, compute;dur=2.000, total;dur=2.500\r\n"
    waited, *parts = hot_path.stages_of(Answer(200, 0.004, b"", head))
    assert waited == pytest.approx(4000)
    assert parts == pytest.approx([250, 2000, 250, 1500])


def test_stacks_are_counted_for_the_loop_alone():
    """A function counts once in a sample however often it stands on the stack, and other threads do not."""
    folded = (
        "thread (10);run_until_stopped (h.py:1);work (a.py:3);work (a.py:4) 3\n"
        "thread (11);forward (b.py:1) 90\n"
        "thread (10);run_until_stopped (h.py:1) 1\n"
    )
    rows = {row[0]: row[1:] for row in hot_path.functions_table(folded, 10).rows}
    assert rows == {"`work (a.py)`": ["75.0%", "75.0%"], "`run_until_stopped (h.py)`": ["25.0%", "100.0%"]}
