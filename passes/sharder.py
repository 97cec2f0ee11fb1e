"""Writes one rank's graph from a plan; knows neither what is cut nor why.

One walk over the graph writes a new one. Each value has a whole form, a cut form or both; a form that is missing is
made when it is first asked for: a whole value is split (nothing is sent, every rank holds it), a cut one gathered.
Every node is evaluated on fake tensors as it is written, and its local shape is held against the plan's.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload

from paracompile.errors import GraphError
from paracompile.layout.factors import Factor, Local, Operand, Shape, Span
from paracompile.layout.graph import Operation, Value, is_tensor, shape_of, tensor_of, value_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Plan, Sharding
from paracompile.mesh import Axis
from paracompile.passes.tokens import all_tokens, own_tokens
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.autocast import AUTOCAST_EDGES, ENTER_AUTOCAST

aten = torch.ops.aten


class Sharder:
    """Writes the graph of one rank from a plan.

    attributes:
        plan: what is cut and how.
        axis: the ranks that share the cut dimension, and which of them this is.
        write: writes nodes into the new graph.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: Plan,
        axis: Axis,
        write_attention: Callable[[Sharder, Attention], fx.Node] | None = None,
    ) -> None:
        """`write_attention` writes an attention whose tokens the ranks exchange, and returns its cut result."""
        self.gm = gm
        self.plan = plan
        self.axis = axis
        self.write_attention = write_attention
        self.by_node = {operation.node: operation for operation in plan.operations}
        fakes = [node.meta["val"] for node in gm.graph.nodes if is_tensor(node)]
        fake_mode = detect_fake_mode(fakes)
        assert fake_mode is not None
        self.write = GraphWriter(fake_mode)
        self.whole: dict[Value, fx.Node] = {}
        self.cut: dict[Value, fx.Node] = {}
        self.split: dict[tuple[Value, Sharding], fx.Node] = {}
        self.others: dict[fx.Node, fx.Node] = {}
        self.regions: dict[fx.Node, contextlib.ExitStack] = {}

    def run(self) -> fx.GraphModule:
        """The rank's graph."""
        with contextlib.ExitStack() as open_regions:
            for node in self.gm.graph.nodes:
                self._node(node, open_regions)
        for node in self.gm.graph.nodes:
            self._carry_roles(node)
        self.write.graph.lint()
        local = fx.GraphModule(self.gm, self.write.graph)
        local.meta.update(self.gm.meta)
        if hasattr(self.gm, "_param_name_to_source"):
            local._param_name_to_source = self.gm._param_name_to_source
        return local

    def _node(self, node: fx.Node, open_regions: contextlib.ExitStack) -> None:
        self.write.origin = node
        operation = self.by_node.get(node)
        if node.target is operator.getitem and value_of(node) in self.whole.keys() | self.cut.keys():
            return  # written together with its producer
        if operation is not None and operation in self.plan.cuts:
            self._cut_operation(operation)
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._whole_node)
        copied = self.write.copy(node, args, kwargs)
        self.others[node] = copied
        if operation is not None and operation.results:
            self._results(operation, copied, self.whole)
        elif is_tensor(node):
            self.whole[value_of(node)] = copied
        elif node.target in AUTOCAST_EDGES:
            self._autocast(node, open_regions)

    def _carry_roles(self, node: fx.Node) -> None:
        """Gives each form of a value the roles that `mark_blocks` gave it, and says which form it is."""
        roles: dict[str, str] = node.meta.get("cache_roles", {})
        value = value_of(node)
        parts = [self.cut.get(value), *(split for (of, _), split in self.split.items() if of == value)]
        for form, written in (("", self.whole.get(value)), *(("/part", part) for part in parts)):
            if roles and written is not None:
                written.meta["cache_roles"] = {role: before + form for role, before in roles.items()}

    def _autocast(self, node: fx.Node, open_regions: contextlib.ExitStack) -> None:
        """Enters or leaves an autocast region for real, so that what is written inside gets its types."""
        if node.target is ENTER_AUTOCAST:
            self.regions[node] = open_regions.enter_context(contextlib.ExitStack())
            self.regions[node].enter_context(torch.autocast(*cast(Any, node.args)))
        else:
            entered = node.args[0]
            assert isinstance(entered, fx.Node)
            self.regions[entered].close()

    def _results(self, operation: Operation, written: fx.Node, forms: dict[Value, fx.Node]) -> None:
        if isinstance(written.meta["val"], torch.Tensor):
            forms[operation.results[0]] = written
            return
        for value in operation.results:
            forms[value] = self.write(operator.getitem, written, value.index)

    # The three forms of a value

    def _whole_node(self, node: fx.Node) -> fx.Node:
        return self.whole_form(value_of(node)) if is_tensor(node) else self.others[node]

    def whole_form(self, value: Value) -> fx.Node:
        """The whole value, gathered if it is cut."""
        if value not in self.whole:
            sharding = self.plan.result(value)
            assert sharding is not None
            self.whole[value] = all_tokens(
                self.write,
                self.cut[value],
                shape_of(value),
                sharding,
                self.plan.shares,
                self.axis.rank,
                self.axis.group,
            )
        return self.whole[value]

    def operand(self, operation: Operation, slot: int) -> fx.Node:
        """The operand of a cut operation in the form that the plan says it takes."""
        value, sharding = operation.operands[slot], self.plan.operand(operation, slot)
        if sharding is None:
            return self.whole_form(value)
        if value in self.cut and self.plan.takes_cut(operation, slot):
            return self.cut[value]
        if (value, sharding) not in self.split:
            self.split[value, sharding] = own_tokens(
                self.write, self.whole_form(value), shape_of(value), sharding, self.plan.shares, self.axis.rank
            )
        return self.split[value, sharding]

    # Operations on a rank's tokens

    def _cut_operation(self, operation: Operation) -> None:
        attention = self.plan.exchanged(operation)
        if attention is not None:
            assert self.write_attention is not None
            self.cut[operation.results[0]] = self.write_attention(self, attention)
        else:
            operands = [self.operand(operation, slot) for slot in range(len(operation.operands))]
            if all(0 in self._local_shape(value) for value in operation.results):
                self._empty(operation, operands)
            else:
                self._results(operation, self.apply(operation, operands), self.cut)
        for value in operation.results:
            self._verify(value)

    def _empty(self, operation: Operation, operands: list[fx.Node]) -> None:
        """What is empty on this rank is written as empty: operators need not bear that (convolutions, FFTs)."""
        for value in operation.results:
            how = {"dtype": _dtype_of(value), "device": tensor_of(value).device, "pin_memory": False}
            shape = list(self._local_shape(value))
            self.cut[value] = (
                self.write(aten.new_empty.default, operands[0], shape, **how)  # still comes after what it is made from
                if operands
                else self.write(aten.empty.memory_format, shape, **how)
            )

    def apply(self, operation: Operation, operands: list[fx.Node]) -> fx.Node:
        """Writes the operation on local operands, with its size arguments made local."""
        op, rule = operation.op, operation.rule
        assert op is not None
        assert rule is not None
        arguments, target = dict(op.arguments), op.target
        if rule.localise is not None:
            arguments.update(rule.localise(op, self._local(operation, operands)))
            if rule.local_target is not None:
                target = rule.local_target
        args, kwargs = _spell(target, _fill(arguments, operands))
        return self.write(target, *args, **kwargs)

    def _local(self, operation: Operation, operands: list[fx.Node]) -> Local:
        factor = self.plan.cuts[operation].factor
        return Local(
            operands=tuple(tuple(node.meta["val"].shape) for node in operands),
            results=tuple(map(self._local_shape, operation.results)),
            operand_starts=tuple(self._start(operation, factor, span) for span in factor.operands),
            result_starts=tuple(self._start(operation, factor, span) for span in factor.results),
        )

    def _start(self, operation: Operation, factor: Factor, span: Span | None) -> int:
        """Where the window of a span begins among the rank's positions of the factor."""
        if span is None or span.length == factor.size:
            return 0
        cut = self.plan.cuts[operation]
        before, local = 0, 0
        for length in self._factor_segments(operation):
            if before * cut.token.inner >= span.start:
                break
            before += length
            local += self.plan.shares.of(length)[self.axis.rank]
        return local * cut.token.inner

    def _factor_segments(self, operation: Operation) -> tuple[int, ...]:
        """The segments of all of the factor's positions, from any slot that spans it or from the joined windows."""
        factor, token = self.plan.cuts[operation].factor, self.plan.cuts[operation].token
        edges = {0, token.length}
        spans = [(span, self.plan.operand(operation, slot)) for slot, span in enumerate(factor.operands)]
        spans += [
            (span, self.plan.result(value)) for span, value in zip(factor.results, operation.results, strict=True)
        ]
        for span, sharding in spans:
            if span is None or sharding is None:
                continue
            edge = 0 if span.length == factor.size else span.start // token.inner
            for length in sharding.segments:
                edge += length
                edges |= {edge - length, edge}
        ordered = sorted(edges)
        return tuple(stop - start for start, stop in pairwise(ordered))

    def _local_shape(self, value: Value) -> Shape:
        sharding = self.plan.result(value)
        assert sharding is not None
        return sharding.local_shape(shape_of(value), self.plan.shares, self.axis.rank)

    def _verify(self, value: Value) -> None:
        expected = self._local_shape(value)
        found = self.cut[value].meta["val"]
        if tuple(found.shape) != expected or found.dtype != _dtype_of(value):
            raise GraphError(
                value.node,
                f"on rank {self.axis.rank} it has the shape {tuple(found.shape)} ({found.dtype}) where the analysis "
                f"expects {expected} ({_dtype_of(value)})",
                "this is a mistake in paracompile's rule for the operator: please report it with the graph that "
                'options={"dump": FOLDER} writes',
            )


def _dtype_of(value: Value) -> torch.dtype:
    fake = value.node.meta["val"]
    dtype: torch.dtype = (fake[value.index] if isinstance(fake, (tuple, list)) else fake).dtype
    return dtype


def _fill(argument: Any, operands: list[fx.Node]) -> Any:
    if isinstance(argument, Operand):
        return operands[argument.index]
    if isinstance(argument, dict):
        return {name: _fill(item, operands) for name, item in argument.items()}
    if isinstance(argument, (list, tuple)):
        return [_fill(item, operands) for item in argument]
    return argument


def _spell(target: OpOverload, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as the positional and keyword arguments that the schema of `target` wants."""
    args, kwargs = [], {}
    for parameter in target._schema.arguments:
        if parameter.name not in arguments:
            continue
        if parameter.kwarg_only:
            kwargs[parameter.name] = arguments[parameter.name]
        else:
            args.append(arguments[parameter.name])
    return tuple(args), kwargs
