"""Post-norm encoder blocks with a gated feed-forward layer, as rotary and ALiBi encoders have them.

x = norm(x + attention(x)); x = norm(x + down(up(x) × activation(gate(x)))) (Shazeer 2020). T tokens, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from quiver.config import Dtype
from quiver.graphs.attention import Attention, attention
from quiver.graphs.bert import WORDS
from quiver.graphs.builder import GraphBuilder
from quiver.graphs.checkpoint import Checkpoint
from quiver.graphs.layers import Affine, activation, add_linear, even_out, layer_norm, linear

TYPES = "embeddings.token_type_embeddings"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """The layers of a block by their role."""

    query: Affine
    key: Affine
    value: Affine
    query_norm: Affine | None = None
    key_norm: Affine | None = None
    attention_output: Affine
    inner_norm: Affine | None = None
    """A norm before the attention's: its result is added onto the residual once more."""
    attention_norm: Affine
    up: Affine
    gate: Affine
    down: Affine
    output_norm: Affine


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """What all blocks have in common."""

    attention: Attention
    activation: str
    epsilon: float
    place: Callable[[str], str]
    """Queries or keys, (T, H), turned by their positions, or left as they are."""


def embed(g: GraphBuilder, checkpoint: Checkpoint, types: int) -> str:
    """Embed each token, and its half of a pair where there are `types` of them -> (T, H)."""
    x = g.op("Gather", g.weight(WORDS, checkpoint.table(WORDS)), g.input("ids", "T"))
    if not types:
        return x
    # With one type, it is for whatever a tokenizer calls the second text of a pair.
    kind = g.input("type_ids", "T") if types > 1 else g.op("Mul", g.input("ids", "T"), g.ints(0))
    return g.op("Add", x, g.op("Gather", g.weight(TYPES, checkpoint.table(TYPES)), kind))


def encode(g: GraphBuilder, x: str, norm: Affine, blocks: Sequence[Block], how: Gated, dtype: Dtype) -> str:
    """Run embeddings through their norm and the blocks: (T, H) -> (T, H).

    8 bits are for the layers that read a norm, whose columns can be evened out, except for the values: measured, these
    and the layers that end in a residual make more than half of the error, and three eighths of the work.
    """
    x = layer_norm(g, x, norm, how.epsilon)
    for block in _evened(norm, blocks) if dtype == "int8" else blocks:
        x = _feed_forward(g, _attend(g, x, block, how, dtype), block, how, dtype)
    return x


def _evened(norm: Affine, blocks: Sequence[Block]) -> Iterator[Block]:
    """Even out, for 8 bits, the columns of each norm for the layers that read it."""
    for block in blocks:
        query, key = even_out(norm, [block.query, block.key])
        up, gate = even_out(block.attention_norm, [block.up, block.gate])
        yield replace(block, query=query, key=key, up=up, gate=gate)
        norm = block.output_norm


def _attend(g: GraphBuilder, x: str, block: Block, how: Gated, dtype: Dtype) -> str:
    def project(layer: Affine, norm: Affine | None) -> str:
        projected = linear(g, x, layer, dtype)
        return how.place(layer_norm(g, projected, norm, how.epsilon) if norm else projected)

    query, key = project(block.query, block.query_norm), project(block.key, block.key_norm)
    value = linear(g, x, block.value, "float32")
    attended = add_linear(g, attention(g, query, key, value, how.attention), block.attention_output, x, "float32")
    if block.inner_norm:
        attended = g.op("Add", layer_norm(g, attended, block.inner_norm, how.epsilon), x)
    return layer_norm(g, attended, block.attention_norm, how.epsilon)


def _feed_forward(g: GraphBuilder, x: str, block: Block, how: Gated, dtype: Dtype) -> str:
    gate = activation(g, linear(g, x, block.gate, dtype), how.activation)
    gated = g.op("Mul", linear(g, x, block.up, dtype), gate)
    return layer_norm(g, add_linear(g, gated, block.down, x, "float32"), block.output_norm, how.epsilon)
