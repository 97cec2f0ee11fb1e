"""Context parallelism: cuts the token sequence over the ranks; batch parallelism cuts the batch likewise.

    before                                  after, on rank r
    x: f32[1, 4096, 64]                     x_r = x[:, 2048 r : 2048 (r + 1)]          (split: nothing is sent)
    h = linear(x, w)                        h_r = linear(x_r, w)                       (only a rank's tokens)
    o = attention(q, k, v)                  v, k, q: all_to_all tokens -> heads
                                            attention on some heads, all tokens        (a ring, if there is one)
                                            o: all_to_all heads -> tokens
    return linear(o)                        return all_gather(linear(o_r))             (where the value is narrowest)

1. plan: what is cut and how (`paracompile.layout.plan`, which knows no operator, given the tables of `patterns`).
2. write: `sharder` writes the rank's graph, `unified_attention` the attentions whose tokens the ranks exchange.

Requires functional ATen with static sizes (`normalise`). The result is a function of graph, plan and rank alone: it
needs no process group. Rows of a batch never meet, so batch parallelism (the conditional and the unconditional pass of
classifier-free guidance, one on each half of the ranks) is the same walk with another seed and no exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.graph import Operation, shape_of
from paracompile.layout.plan import Plan, make_plan
from paracompile.mesh import Axis, Ranks
from paracompile.passes.sharder import Sharder
from paracompile.passes.unified_attention import UnifiedAttention
from paracompile.patterns.attention import find_attentions
from paracompile.patterns.flops import flops
from paracompile.patterns.rules import rule_for


def context_parallel(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    ranks: Ranks,
    planned: Callable[[Plan], object] = lambda plan: None,
) -> fx.GraphModule:
    """Writes the graph in which this rank works on its part of the tokens.

    args:
        ranks: the ranks; those of the ring and the ulysses axis share the tokens.
        planned: told the plan before the graph is rewritten.

    raises:
        GraphError: no attention, random numbers inside the model, or sizes that cannot be cut.
    """
    axis = ranks.sequence
    plan = make_plan(gm.graph, rule_for=rule_for, find_attentions=find_attentions, flops=flops_of, ranks=axis.size)
    planned(plan)
    _check_randomness(plan)
    _check_attention(plan, axis)
    return Sharder(gm, plan, axis, UnifiedAttention(ranks, plan.shares, plan.operand)).run()


def batch_parallel(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    axis: Axis,
    planned: Callable[[Plan], object] = lambda plan: None,
) -> fx.GraphModule:
    """Writes the graph in which this rank works on its part of the batch; `planned` as in `context_parallel`.

    raises:
        GraphError: no attention, random numbers inside the model, or a batch smaller than the number of ranks.
    """
    plan = make_plan(
        gm.graph,
        rule_for=rule_for,
        find_attentions=find_attentions,
        flops=flops_of,
        ranks=axis.size,
        seed="batch",
    )
    planned(plan)
    _check_randomness(plan)
    _check_attention(plan, axis)
    heaviest = max(plan.attentions.values(), key=lambda attention: attention.flops)
    batch = plan.places[heaviest.operation.results[0]].length
    if batch < axis.size:
        raise GraphError(
            heaviest.operation.node,
            f"its batch of {batch} cannot be shared by the {axis.size} ranks of the batch axis",
            "use the batch axis for pipelines that run the conditional and the unconditional pass in one batch, or "
            "call init_mesh without max_batch_dim_size",
        )
    return Sharder(gm, plan, axis).run()


def flops_of(operation: Operation) -> int:
    """Multiply-add work of an operation, 0 where it is not an ATen operator."""
    return flops(operation.op) if operation.op is not None else 0


def _check_attention(plan: Plan, axis: Axis) -> None:
    if not plan.attentions:
        raise GraphError(
            None,
            f"the graph has no scaled_dot_product_attention, so nothing can be shared by the {axis.size} ranks: each "
            "would run the whole model",
            "set the model's attention backend to PyTorch's own (model.set_attention_backend('native')); a custom "
            "attention kernel hides its sequence",
        )
    heaviest = max(plan.attentions.values(), key=lambda attention: attention.flops)
    if heaviest.operation not in plan.cuts:
        raise GraphError(
            heaviest.operation.node,
            f"the graph's largest attention cannot be cut: its operands have the shapes {_shapes(heaviest.operation)}",
            "call scaled_dot_product_attention with tensors of shape (batch, heads, tokens, head size)",
        )


def _shapes(operation: Operation) -> list[tuple[int, ...]]:
    return [shape_of(value) for value in operation.operands]


def _check_randomness(plan: Plan) -> None:
    for operation in plan.operations:
        op = operation.op
        if op is None or torch.Tag.nondeterministic_seeded not in op.target.tags:
            continue
        if op.arguments.get("dropout_p", 1) == 0:
            continue
        raise GraphError(
            operation.node,
            "it draws random numbers inside the model, and each rank would draw its own",
            "call model.eval(), or draw the numbers outside the compiled model and pass them in",
        )
