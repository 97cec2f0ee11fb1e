"""Writes the plan into the graph: what is cut where, and `shard` and `unshard` where a value changes between the two.

    before                          after, the same on every rank
    x: f32[1, 4096, 64]             x_part = shard(x, "sequence", 1, [4096])          (nothing is sent)
    h = linear(x, w)                h = linear(x_part, w)                             (cut)
    o = attention(h, ...)           o = attention(h, ...)                             (cut)
    return linear(o)                return unshard(linear(o), "sequence", 1, [4096])  (where the value is narrowest)

Every value has one form from here on, which its node tells: `shardings_of`. Shapes stay whole, and so does what the
graph computes on one process.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

import paracompile.runtime.placement as placement
from paracompile.layout.factors import Factor
from paracompile.layout.graph import Value, is_tensor, node_of, spelled, value_of
from paracompile.layout.plan import Plan, Sharding
from paracompile.passes.found import Found
from paracompile.passes.mark_blocks import part_of, roles_of
from paracompile.passes.writer import PROVENANCE
from paracompile.torch_private import OpOverload

__all__ = ["Form", "neighbours_of", "shardings_of", "split_and_gather"]

Form = Mapping[str, Sharding]
"""How a value is cut, by mesh axis; whole along an axis that is not there."""


def split_and_gather(gm: fx.GraphModule, example_inputs: Sequence[Any], *, found: Found) -> fx.GraphModule:
    """Marks what is cut, and inserts `shard` and `unshard`, in place."""
    _Resharding(gm.graph, found.plans).run()
    gm.graph.lint()
    gm.recompile()
    return gm


def shardings_of(value: Value) -> Form:
    """How a value of a graph that was split is cut, by mesh axis."""
    by_axis: dict[str, tuple[Sharding, ...]] = value.node.meta.get("shardings", {})
    return {axis: of_results[value.index] for axis, of_results in by_axis.items()}


def neighbours_of(node: fx.Node) -> Mapping[str, Factor]:
    """The factor along which a node needs something of other ranks' parts, by mesh axis."""
    found: Mapping[str, Factor] = node.meta.get("neighbours", {})
    return found


def _form_of(node: fx.Node) -> Form:
    return shardings_of(value_of(node))


class _Resharding:
    def __init__(self, graph: fx.Graph, plans: Mapping[str, Plan]) -> None:
        self.graph = graph
        self.plans = plans
        self.forms: dict[tuple[fx.Node, tuple[tuple[str, Sharding], ...]], fx.Node] = {}

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        for node in nodes:
            self._mark(node)
        for node in nodes:
            if node.target is not operator.getitem:
                self._reshard_operands(node)
        self._pair_streams()

    def _mark(self, node: fx.Node) -> None:
        """Notes how a node's results are cut."""
        for axis, plan in self.plans.items():
            if plan.cuts_node(node):
                factor = plan.cuts[plan.by_node[node]].factor
                if not factor.sums:
                    results = tuple(plan.result(value) for value in plan.by_node[node].results)
                    node.meta["shardings"] = {**node.meta.get("shardings", {}), axis: results}
                if not factor.is_independent:
                    node.meta["neighbours"] = {axis: factor}

    def _reshard_operands(self, node: fx.Node) -> None:
        """Gives a node its operands in the form that the plans say it takes."""
        cut = {axis: plan for axis, plan in self.plans.items() if plan.cuts_node(node)}
        if not cut:
            for source in node.all_input_nodes:
                if is_tensor(source):
                    node.replace_input_with(source, self._form(source, {}, node))
            return
        operation = next(iter(cut.values())).by_node[node]
        sources = [node_of(value) for value in operation.operands]
        wanted = [
            {
                axis: sharding
                for axis, plan in cut.items()
                if (sharding := plan.operand(plan.by_node[node], slot)) is not None
            }
            for slot in range(len(sources))
        ]
        operands = [self._form(source, form, node) for source, form in zip(sources, wanted, strict=True)]
        if operands != sources:
            node.args, node.kwargs = spelled(operation, operands)

    def _pair_streams(self) -> None:
        """Makes values whose difference the first block cache takes in one form, where no other node wants it."""
        by_role: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for role in roles_of(node):
                by_role.setdefault(role, []).append(node)
        for role, (source, *_) in by_role.items():
            if role == "after":
                before = by_role["before"][0]
                most = max(_form_of(before), _form_of(source), key=len)
                self._form(before, most, source)
                self._form(source, most, source.next)
            elif role.startswith("enter"):
                for leave in by_role[role.replace("enter", "leave")]:
                    if part_of(leave) == "middle":
                        self._form(source, _form_of(leave), leave)

    def _form(self, source: fx.Node, wanted: Form, reader: fx.Node) -> fx.Node:
        """The value of `source` in another form, made right before the first that reads it so."""
        form = dict(_form_of(source))
        made = source
        for axis in reversed(list(self.plans)):  # tokens of its own rows come first
            if axis in form and form[axis] != wanted.get(axis):
                sharding = form.pop(axis)
                made = self._once(placement.UNSHARD, source, made, axis, sharding, form, reader)
        for axis in self.plans:
            if axis in wanted and axis not in form:
                form[axis] = wanted[axis]
                made = self._once(placement.SHARD, source, made, axis, wanted[axis], form, reader)
        return made

    def _once(
        self,
        target: OpOverload[..., Any],
        source: fx.Node,
        made: fx.Node,
        axis: str,
        sharding: Sharding,
        form: Form,
        reader: fx.Node,
    ) -> fx.Node:
        key = (source, tuple(sorted(form.items(), key=lambda item: item[0])))
        if key not in self.forms:
            with self.graph.inserting_before(reader):
                node = self.graph.call_function(target, (made, axis, sharding.place.dim, list(sharding.segments)))
            node.meta = {key: reader.meta[key] for key in PROVENANCE if key in reader.meta}
            node.meta |= {"val": source.meta["val"], "shardings": {axis: (cut,) for axis, cut in form.items()}}
            if roles := roles_of(source):
                node.meta["cache_roles"] = roles
            self.forms[key] = node
        return self.forms[key]
