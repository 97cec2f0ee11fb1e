"""Decides, on whole shapes, what the ranks cut and how: tokens over the sequence's ranks, rows over the batch axis'.

Where convolutions between a transformer's attentions reach over to neighbours, tokens may be cut in whole rows, columns
or frames, so that these are shared as well; what is cheaper is chosen.

Rows of a batch never meet, so batch parallelism (the conditional and the unconditional pass of classifier-free
guidance, one on each half of the ranks) is the same analysis with another seed and no exchange. A value may be cut
along both axes; where both would cut one and the same part of it (rows that are tokens in another attention), it is
cut as tokens.

The analysis is `paracompile.layout`, which knows no operator; it is given the tables of `patterns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.boundaries import Machine
from paracompile.layout.costs import Cost, cost_of
from paracompile.layout.graph import Operation, operations, shape_of
from paracompile.layout.places import Seed
from paracompile.layout.plan import Plan, make_plan
from paracompile.layout.sizes import sizes_of
from paracompile.mesh import Axis, Ranks
from paracompile.passes.formulas import fix_sizes
from paracompile.passes.found import TOKENS, Found
from paracompile.patterns.attention import find_attentions
from paracompile.patterns.convolutions import DIMENSIONS, mixes_neighbours, spatial_seeds, works_on_images
from paracompile.patterns.flops import attention_flops, flops_of
from paracompile.patterns.rules import rule_for

_IMAGES = Machine(start=3e-4)
"""A decoder at its real size computes longer than a step of a transformer, and exchanges often, and little."""
_WORTH_ROWS = 0.05
"""The share of a model's products that tokens one by one leave whole on their way, from which on rows and the like are
tried, for which open sizes are fixed."""
_WORTH_SHARING = 0.5
"""The least share of a model's products that must be cut where its largest attention cannot be."""


def plan_layouts(gm: fx.GraphModule, example_inputs: Sequence[Any], *, ranks: Ranks, found: Found) -> fx.GraphModule:
    """Finds a plan for each axis of more than one rank; changes nothing, but that open sizes of images are fixed.

    raises:
        GraphError: no attention and no images, random numbers inside the model, or neither its largest attention nor
            half of its products can be cut.
    """
    all_operations = operations(gm.graph, rule_for)
    on_images = works_on_images(all_operations)
    if on_images and fix_sizes(gm):  # the windows that convolutions take of each rank's rows are told as numbers
        all_operations = operations(gm.graph, rule_for)
    if on_images and _plan_of_images(gm, all_operations, ranks.all, found):
        return gm
    if not find_attentions(all_operations):
        if found.why_a_piece is not None:
            return gm  # the piece runs whole on every rank
        if on_images:
            raise GraphError(
                None,
                f"none of its convolutions' results has {ranks.size} rows, columns or frames that the {ranks.size} "
                "ranks could share",
                "use fewer ranks, or larger images",
            )
    tokens = _plan_of_tokens(gm, ranks.sequence, found) if ranks.sequence_size > 1 else None
    if ranks.batch.size > 1:
        found.plans[ranks.batch.name] = _plan(gm, ranks.batch, "batch", tokens)
    if tokens is not None:
        found.plans[ranks.sequence.name] = tokens
    return gm


def _plan_of_images(gm: fx.GraphModule, all_operations: Sequence[Operation], axis: Axis, found: Found) -> bool:
    """Finds the cheapest plan among those of all spatial dimensions; whether there is one."""
    choices = [(name, plan) for name, plan in _spatial_plans(gm, all_operations, axis, _IMAGES) if plan.cuts]
    if not choices:
        return False
    found.plans[axis.name], found.dimensions = _cheapest(choices, axis, _IMAGES)
    _check_randomness(found.plans[axis.name])
    return True


def _plan_of_tokens(gm: fx.GraphModule, axis: Axis, found: Found) -> Plan:
    """The plan of tokens one by one, or a cheaper one that cuts convolutions between attentions as well."""
    plan = _plan(gm, axis, "tokens")
    if not _stops_at_windows(plan):
        return plan
    if fix_sizes(gm):
        plan = _plan(gm, axis, "tokens")
    choices = [(TOKENS, plan), *_spatial_plans(gm, plan.operations, axis, Machine())]
    plan, dimensions = _cheapest(choices, axis, Machine())
    if dimensions[0][0] != TOKENS:
        found.dimensions = dimensions
    return plan


def _stops_at_windows(plan: Plan) -> bool:
    """Whether convolutions on the way of the tokens reach over to neighbours, so that much of the way is whole."""
    on_the_way: set[fx.Node] = set()
    whole = []
    for operation in plan.operations:
        if operation in plan.cuts:
            on_the_way.add(operation.node)
        elif any(value.node in on_the_way for value in operation.operands):
            on_the_way.add(operation.node)
            whole.append(operation)
    if not any(map(mixes_neighbours, whole)):
        return False
    return sum(map(flops_of, whole)) > _WORTH_ROWS * sum(map(flops_of, plan.operations))


def _spatial_plans(
    gm: fx.GraphModule, all_operations: Sequence[Operation], axis: Axis, machine: Machine
) -> list[tuple[str, Plan]]:
    """A plan for each spatial dimension, by its name."""
    seeds = spatial_seeds(all_operations, axis.size)
    return [(DIMENSIONS[seed.dim], _made(gm, axis, seed, machine=machine)) for seed in seeds]


def _cheapest(
    choices: Sequence[tuple[str, Plan]], axis: Axis, machine: Machine
) -> tuple[Plan, tuple[tuple[str, Cost], ...]]:
    """The cheapest plan, and what all of them cost, by name, the cheapest first."""
    costs = [(cost_of(plan, flops_of, axis.size, machine), name, plan) for name, plan in choices]
    costs.sort(key=lambda choice: choice[0].seconds)
    return costs[0][2], tuple((name, cost) for cost, name, _ in costs)


def _plan(gm: fx.GraphModule, axis: Axis, seed: Seed, beside: Plan | None = None) -> Plan:
    plan = _made(gm, axis, seed, beside)
    _check_randomness(plan)
    _check_flex_attention(gm.graph, plan, axis)
    _check_attention(plan, axis, seed)
    return plan


def _made(
    gm: fx.GraphModule, axis: Axis, seed: Seed, beside: Plan | None = None, machine: Machine | None = None
) -> Plan:
    return make_plan(
        gm.graph,
        rule_for=rule_for,
        find_attentions=find_attentions,
        flops=flops_of,
        ranks=axis.size,
        seed=seed,
        beside=beside,
        machine=machine,
    )


def _check_flex_attention(graph: fx.Graph, plan: Plan, axis: Axis) -> None:
    """What hides keys from queries in flex attention is a function of their positions, of which a rank has others.

    A small one, as in a refiner of the text, is computed whole on every rank.
    """
    largest = max((attention.flops for attention in plan.attentions.values()), default=0)
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention):
        query, key, value = (sizes_of(operand.meta["val"]) for operand in node.args[:3])
        if attention_flops(query, key, value) > largest:
            raise GraphError(
                node,
                f"it has queries {query} and keys {key}, and cannot be cut: each of the {axis.size} ranks would do "
                "all of it",
                "set the model's attention backend to PyTorch's own (model.set_attention_backend('native')), or run "
                "the model on one rank",
            )


def _check_attention(plan: Plan, axis: Axis, seed: Seed) -> None:
    """Raises a GraphError where too little can be cut to be worth the ranks; what is left whole the report says."""
    if not plan.attentions:
        raise GraphError(
            None,
            "the graph has no scaled_dot_product_attention, nor one that is written out and has more tokens than a "
            f"head has channels, so nothing can be shared by the {axis.size} ranks: each would run the whole model",
            "set the model's attention backend to PyTorch's own (model.set_attention_backend('native')); a custom "
            "attention kernel hides its sequence",
        )
    shared, all_work = (sum(map(flops_of, each)) for each in (plan.cuts, plan.operations))
    heaviest = max(plan.attentions.values(), key=lambda attention: attention.flops).operation
    queries = shape_of(heaviest.operands[0])
    length = queries[0] if seed == "batch" else queries[-2]
    if heaviest not in plan.cuts and shared < _WORTH_SHARING * all_work:
        _refuse(heaviest, axis, seed, length, f"{shared / all_work:.0%} of the model's products can be shared by ranks")
    if seed == "batch" and heaviest in plan.cuts and plan.places[heaviest.results[0]].length < axis.size:
        _refuse(heaviest, axis, seed, length, "some ranks would have nothing to do")


def _refuse(attention: Operation, axis: Axis, seed: Seed, length: int, problem: str) -> NoReturn:
    shapes = [shape_of(value) for value in attention.operands]
    if length >= axis.size:
        raise GraphError(
            attention.node,
            f"the graph's largest attention cannot be cut (its operands have the shapes {shapes}), and {problem}",
            "call scaled_dot_product_attention with tensors of shape (batch, heads, tokens, head size)",
        )
    if seed == "batch":
        raise GraphError(
            attention.node,
            f"its batch of {length} cannot be shared by the {axis.size} ranks of the batch axis: {problem}",
            "use the batch axis for pipelines that run the conditional and the unconditional pass in one batch, or "
            "call init_mesh without max_batch_dim_size",
        )
    raise GraphError(
        attention.node,
        f"the graph's largest attention has {length} query tokens for the {axis.size} ranks of its sequence: {problem}",
        "use fewer ranks, or, for a batch of several, give them to it: init_mesh(..., max_batch_dim_size=...)",
    )


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
