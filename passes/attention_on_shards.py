"""Attention in a graph whose inputs are a rank's own shards: all else stays as it is.

    before: q, k, v are this rank's tokens               after
    o = attention(q, k, v, mask)                         o = unified attention over the tokens of all ranks

The lengths of the other ranks' shards are not in the graph: the ranks tell each other, and must be cut as `torch.chunk`
cuts, rank 0 first. A mask is this rank's shard too, along keys (padding) or along queries, and is gathered. A mask over
both is refused: a rank would hold what its queries see of its own keys, and nothing of the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.factors import Place
from paracompile.layout.graph import is_tensor, node_of, operations, shape_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Sharding
from paracompile.layout.shares import Shares
from paracompile.layout.sizes import sizes_of
from paracompile.mesh import Axis, Ranks
from paracompile.passes.found import Found
from paracompile.passes.lower_attention import AttentionOnTokens, UnifiedAttention
from paracompile.passes.tokens import all_tokens
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.attention import find_attentions
from paracompile.patterns.rules import rule_for
from paracompile.torch_private import detect_fake_mode

Lengths = list[tuple[int, int]]
"""Query and key tokens of each attention in a graph, in order."""


def local_lengths(gm: fx.GraphModule) -> Lengths:
    """The lengths of this rank's shards, read from Dynamo's graph."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        named = {**dict(zip(("query", "key"), node.args, strict=False)), **node.kwargs}
        query, key = (int(named[name].meta["example_value"].shape[-2]) for name in ("query", "key"))
        found.append((query, key))
    return found


def attention_on_shards(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    ranks: Ranks,
    lengths: Sequence[Lengths],
    together: bool,
    eight_bits: torch.dtype | None = None,
    found: Found,
) -> fx.GraphModule:
    """Makes every attention one over all ranks' tokens, in place.

    args:
        lengths: `local_lengths` of every rank, in the order of their place in the sequence.
        together: exchanges that are mostly their start go together.
        eight_bits: the type in which what attention exchanges travels; None: as it is.

    raises:
        GraphError: no attention, shards that are not cut as `torch.chunk` cuts, or a mask over queries and keys.
    """
    attentions = find_attentions(operations(gm.graph, rule_for))
    if not attentions:
        raise GraphError(
            None,
            "the graph has no scaled_dot_product_attention, so its ranks have nothing to exchange",
            "compile the function that calls attention, with PyTorch's own attention backend",
        )
    fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
    assert fake_mode is not None
    own = [tuple(shape_of(each.operation.operands[slot])[-2] for slot in (each.query, each.key)) for each in attentions]
    if own != list(lengths[ranks.sequence_rank]):
        raise GraphError(
            attentions[0].operation.node,
            f"the lengths of the attentions, {own}, are not those that the ranks agreed on, {lengths}",
            "this is a mistake in paracompile: please report it with the graph that options={'dump': FOLDER} writes",
        )
    write = GraphWriter(fake_mode, gm.graph)
    unified = UnifiedAttention(ranks, together=together, eight_bits=eight_bits)
    for number, attention in enumerate(attentions):
        _check_mask(attention)
        queries, keys = (
            _sharding(attention, slot, [of_rank[number][which] for of_rank in lengths])
            for which, slot in enumerate((attention.query, attention.key))
        )
        operation, node = attention.operation, attention.operation.node
        assert operation.op is not None
        arguments = operation.op.arguments
        operands = [node_of(value) for value in operation.operands]
        with gm.graph.inserting_before(node):
            write.origin = node
            mask = None
            if attention.mask is not None:
                mask = _whole_mask(write, ranks.sequence, operands[attention.mask], queries, keys)
            attended = unified(
                write,
                AttentionOnTokens(
                    origin=node,
                    query=operands[attention.query],
                    key=operands[attention.key],
                    value=operands[attention.value],
                    mask=mask,
                    is_causal=attention.is_causal,
                    scale=arguments["scale"],
                    enable_gqa=bool(arguments["enable_gqa"]),
                    queries=queries,
                    keys=keys,
                ),
            )
            node.replace_all_uses_with(attended)
        gm.graph.erase_node(node)
    found.together = unified.put_together
    gm.graph.lint()
    gm.recompile()
    return gm


def _whole_mask(write: GraphWriter, axis: Axis, mask: fx.Node, queries: Sharding, keys: Sharding) -> fx.Node:
    """A mask of (..., queries, keys), gathered along the one of the two that it has."""
    shape = sizes_of(mask.meta["val"])
    for dim, tokens in ((-2, queries), (-1, keys)):
        if len(shape) + dim >= 0 and shape[dim] > 1:
            place = Place(len(shape) + dim, tokens.place.length)
            whole = (*shape[:dim], place.length, *shape[place.dim + 1 :])
            gathered: fx.Node = all_tokens(write, mask, whole, replace(tokens, place=place), axis.rank, axis.group)
            return gathered
    return mask


def _sharding(attention: Attention, slot: int, by_rank: Sequence[int]) -> Sharding:
    total = sum(by_rank)
    expected = Shares(len(by_rank), 0, chunked=True).of(total)
    if tuple(by_rank) != expected:
        raise GraphError(
            attention.operation.node,
            f"its shards have {list(by_rank)} tokens on the ranks, and torch.chunk would cut {total} tokens into "
            f"{list(expected)}",
            "cut the inputs with torch.chunk(x, ranks, dim)[rank], rank 0 first",
        )
    shape = shape_of(attention.operation.operands[slot])
    return Sharding(Place(len(shape) - 2, total), (total,), Shares(len(by_rank), 0, chunked=True))


def _check_mask(attention: Attention) -> None:
    if attention.mask is None:
        return
    shape = shape_of(attention.operation.operands[attention.mask])
    if shape[-1] > 1 and shape[-2:-1] not in ((), (1,)):
        raise GraphError(
            attention.operation.node,
            f"its mask, of shape {shape}, says which of this rank's keys its queries see, "
            "and nothing of other ranks' keys",
            "with inputs that are shards, mask keys (..., 1, keys) or use is_causal; or let paracompile shard them",
        )
