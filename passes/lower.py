"""Writes what one rank does: its shapes, its windows, its exchanges. No pass before it knows which rank this is.

    before, the same on every rank                        after, on rank r of 2
    x_part = shard(x, "sequence", 1, [4096])              x_part = x[:, 2048 r : 2048 (r + 1)]
    h = linear(x_part, w)          f32[1, 4096, 64]       h = linear(x_part, w)          f32[1, 2048, 64]
    q = view(h, [1, 4096, 4, 16])                         q = view(h, [1, 2048, 4, 16])
    o = unified_attention(q, k, v)                        v, k, q: all_to_all tokens -> heads
                                                          attention on some heads, all tokens (or in a ring)
                                                          o: all_to_all heads -> tokens
    y = unshard(o, "sequence", 1, [4096])                 y = all_gather(o)

One walk writes a new graph. Every node is evaluated on fake tensors as it is written, and the shape of what is cut is
held against the plan's. The result is a function of the graph and the rank alone: it needs no process group.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.factors import Operand, Shape
from paracompile.layout.graph import Operation, Value, is_tensor, operations, shape_of, spelled, tensor_of, value_of
from paracompile.layout.halos import Halo
from paracompile.layout.plan import Sharding
from paracompile.layout.sizes import same_shape, sizes_of
from paracompile.mesh import Axis, Ranks
from paracompile.passes.found import Found
from paracompile.passes.localise import localised
from paracompile.passes.lower_attention import AttentionOnTokens, UnifiedAttention
from paracompile.passes.lower_moments import with_shared_moments
from paracompile.passes.lower_sums import summed_up
from paracompile.passes.lower_windows import Held, Source, Windowed
from paracompile.passes.shared_scales import SharedScales, scales_all_at_once
from paracompile.passes.split_and_gather import neighbours_of, shardings_of
from paracompile.passes.tokens import all_tokens, own_tokens
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.autocast import AUTOCAST_EDGES, ENTER_AUTOCAST
from paracompile.patterns.rules import rule_for
from paracompile.runtime.placement import SHARD, UNIFIED_ATTENTION, UNSHARD
from paracompile.torch_private import LazyGraphModule, detect_fake_mode, parameter_sources, set_parameter_sources

aten = torch.ops.aten


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    ranks: Ranks,
    together: bool,
    eight_bits: torch.dtype | None = None,
    found: Found,
) -> fx.GraphModule:
    """The graph of the rank that `ranks` is seen from; `gm` stays as it is.

    args:
        together: exchanges that are mostly their start go together.
        eight_bits: the type in which what attention exchanges travels; None: as it is.

    raises:
        GraphError: an attention whose heads cannot be shared, or a mistake in a rule.
    """
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)  # inputs of our own come last
    scaling = {node for node, value in inputs if scales_all_at_once(value)}
    attention = UnifiedAttention(ranks, together=together, eight_bits=eight_bits)
    lowering = _Lowering(gm, attention, ranks, scaling)
    local = lowering.run()
    found.together = lowering.attention.put_together
    found.ranges = lowering.scales.exchanges
    return local


class _Lowering:
    """One walk.

    attributes:
        axes: those along which anything may be cut.
        scaling: weights whose layers take one scale from all that they get.
        write: writes nodes into the new graph.
        values: what was written for each tensor of the graph.
        others: what was written for nodes that are no tensors.
        to_measure: copies that are written where the window that reads them is.
        regions: the autocast regions that were entered, by the nodes that enter them.
    """

    def __init__(
        self, gm: fx.GraphModule, attention: UnifiedAttention, ranks: Ranks, scaling: Collection[fx.Node]
    ) -> None:
        self.gm = gm
        self.scaling = scaling
        self.scales = SharedScales()
        self.axes = {axis.name: axis for axis in (ranks.batch, ranks.sequence, ranks.all)}
        self.attention = attention
        self.by_node = {operation.node: operation for operation in operations(gm.graph, rule_for)}
        fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
        assert fake_mode is not None
        self.write = GraphWriter(fake_mode)
        self.values: dict[Value, fx.Node] = {}
        self.others: dict[fx.Node, fx.Node] = {}
        self.to_measure: dict[Value, Windowed] = {}
        self.regions: dict[fx.Node, contextlib.ExitStack] = {}

    def run(self) -> fx.GraphModule:
        with contextlib.ExitStack() as open_regions:
            for node in self.gm.graph.nodes:
                self._node(node, open_regions)
        for node in self.gm.graph.nodes:
            self._carry_roles(node)
        self.write.graph.lint()
        local = LazyGraphModule(self.gm, self.write.graph)
        local.meta.update(self.gm.meta)
        sources = parameter_sources(self.gm)
        if sources is not None:
            set_parameter_sources(local, sources)
        return local

    def _node(self, node: fx.Node, open_regions: contextlib.ExitStack) -> None:
        self.write.origin = node
        if node.target is operator.getitem and value_of(node) in self.values:
            return  # written together with its producer
        operation = self.by_node.get(node)
        if operation is not None and operation.results:
            self._operation(operation)
            return
        copied = self.write.copy(node, *self._arguments(node))
        self.others[node] = copied
        if is_tensor(node):
            self.values[value_of(node)] = copied
        elif node.target in AUTOCAST_EDGES:
            self._autocast(node, open_regions)

    def _operation(self, operation: Operation) -> None:
        node = operation.node
        if node.target is SHARD:
            written = self._part(operation)
        elif node.target is UNSHARD:
            written = self._whole(operation)
        elif node.target is UNIFIED_ATTENTION:
            written = self._unified_attention(operation)
        elif any(map(shardings_of, operation.results)) or neighbours_of(node):
            if self._takes_one_scale(operation):
                written = self._scaled(operation)
            elif all(0 in self._local_shape(value) for value in operation.results) and not neighbours_of(node):
                self._empty(operation)
                return
            elif (to_measure := self._to_measure(operation)) is not None:
                self.to_measure[operation.results[0]] = to_measure
                return
            else:
                written = self._cut(operation)
        else:
            written = self.write.copy(node, *self._arguments(node))
        if isinstance(written.meta["val"], torch.Tensor):
            self.values[operation.results[0]] = written
        else:
            for value in operation.results:
                self.values[value] = self.write(operator.getitem, written, value.index)
        for value in operation.results:
            if shardings_of(value):
                self._verify(value)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = cast(Any, fx.map_arg((node.args, node.kwargs), self._written))
        return args, kwargs

    def _written(self, node: fx.Node) -> fx.Node:
        return self.values[value_of(node)] if is_tensor(node) else self.others[node]

    def _autocast(self, node: fx.Node, open_regions: contextlib.ExitStack) -> None:
        """Enters or leaves an autocast region for real, so that what is written inside gets its types."""
        if node.target is ENTER_AUTOCAST:
            self.regions[node] = open_regions.enter_context(contextlib.ExitStack())
            self.regions[node].enter_context(torch.autocast(*cast(Any, node.args)))
        else:
            entered = node.args[0]
            assert isinstance(entered, fx.Node)
            self.regions[entered].close()

    def _carry_roles(self, node: fx.Node) -> None:
        """Gives what was written the roles that `mark_blocks` gave its value, and says how it is cut."""
        roles: dict[str, str] = node.meta.get("cache_roles", {})
        if roles:
            cuts = shardings_of(value_of(node))
            form = "".join(f"/{axis} {cuts[axis].place.dim} {list(cuts[axis].segments)}" for axis in sorted(cuts))
            self._written(node).meta["cache_roles"] = {role: before + form for role, before in roles.items()}

    # How values are cut

    def _cuts(self, value: Value, without: str = "") -> list[tuple[Axis, Sharding]]:
        """How a value is cut, axis by axis, each where those before it have left only this rank's part."""
        found: list[tuple[Axis, Sharding]] = []
        form = shardings_of(value)
        for name, axis in self.axes.items():
            if name in form and name != without:
                sharding = form[name]
                for other, before in found:
                    sharding = sharding.beside(before, other.rank)
                found.append((axis, sharding))
        return found

    def _local_shape(self, value: Value, without: str = "") -> Shape:
        shape = shape_of(value)
        for axis, sharding in self._cuts(value, without):
            shape = sharding.local_shape(shape, axis.rank)
        return shape

    def _verify(self, value: Value) -> None:
        found, dtype = self.values[value].meta["val"], tensor_of(value).dtype
        expected = self._local_shape(value)
        if not same_shape(sizes_of(found), expected) or found.dtype != dtype:
            raise GraphError(
                value.node,
                f"on rank {self.axes['all'].rank} it has the shape {tuple(found.shape)} ({found.dtype}) where the "
                f"analysis expects {expected} ({dtype})",
                "this is a mistake in paracompile's rule for the operator: please report it with the graph that "
                'options={"dump": FOLDER} writes',
            )

    # What is moved between ranks

    def _part(self, operation: Operation) -> fx.Node:
        (source,), (part,) = operation.operands, operation.results
        axis, sharding, shape = self._moved(operation, part)
        made: fx.Node = own_tokens(self.write, self.values[source], shape, sharding, axis.rank)
        return made

    def _whole(self, operation: Operation) -> fx.Node:
        (part,) = operation.operands
        axis, sharding, shape = self._moved(operation, part)
        made: fx.Node = all_tokens(self.write, self.values[part], shape, sharding, axis.rank, axis.group)
        return made

    def _moved(self, operation: Operation, part: Value) -> tuple[Axis, Sharding, Shape]:
        """The axis of a `shard` or `unshard`, how it cuts `part`, and the shape of what it cuts."""
        axis = self.axes[cast(str, operation.node.args[1])]
        sharding = shardings_of(part)[axis.name]
        for other, besides in self._cuts(part, without=axis.name):
            sharding = sharding.beside(besides, other.rank)
        return axis, sharding, self._local_shape(part, without=axis.name)

    def _unified_attention(self, operation: Operation) -> fx.Node:
        assert operation.op is not None
        arguments, operands = operation.op.arguments, operation.operands
        slots = {name: argument.index for name, argument in arguments.items() if isinstance(argument, Operand)}
        inputs = {name: self.values[operands[slot]] for name, slot in slots.items()}
        return self.attention(
            self.write,
            AttentionOnTokens(
                origin=operation.node,
                query=inputs["query"],
                key=inputs["key"],
                value=inputs["value"],
                mask=inputs.get("attn_mask"),
                is_causal=bool(arguments["is_causal"]),
                scale=arguments["scale"],
                enable_gqa=bool(arguments["enable_gqa"]),
                queries=shardings_of(operands[slots["query"]])["sequence"],
                keys=shardings_of(operands[slots["key"]])["sequence"],
            ),
        )

    # What runs on a rank's part

    def _cut(self, operation: Operation) -> fx.Node:
        """Writes the operation on local operands, with its size arguments made local, axis by axis."""
        neighbours = neighbours_of(operation.node)
        of_operands, of_results = (
            [{axis.name: sharding for axis, sharding in self._cuts(value)} for value in values]
            for values in (operation.operands, operation.results)
        )
        for name, axis in self.axes.items():
            if name in neighbours:
                halo = neighbours[name].halo
                if halo is not None:
                    result = of_results[0][name]
                    wanted = [result.bounds(rank) for rank in range(axis.size)]
                    return self._windowed(operation, axis, halo).rows(self.write, halo.dim, wanted)
                operands = [self.values[value] for value in operation.operands]
                if neighbours[name].sums:
                    return summed_up(self.write, operation, operands, axis)
                return with_shared_moments(self.write, operation, operands, of_operands[0][name], axis)
            if name in of_results[0]:
                operation = localised(
                    operation,
                    [cuts.get(name) for cuts in of_operands],
                    [cuts[name] for cuts in of_results],
                    axis.rank,
                )
        args, kwargs = spelled(operation, [self.values[value] for value in operation.operands])
        assert operation.op is not None
        return self.write(operation.op.target, *args, **kwargs)

    def _takes_one_scale(self, operation: Operation) -> bool:
        node = operation.node
        return node.target is aten.linear.default and node.args[1] in self.scaling

    def _scaled(self, operation: Operation) -> fx.Node:
        """Writes a linear layer whose input is cut, by a scale of the whole input."""
        axes = [axis for axis, _ in self._cuts(operation.operands[0])]
        group = axes[0].group if len(axes) == 1 else self.axes["all"].group
        args, _ = self._arguments(operation.node)
        return self.scales.linear(self.write, operation.node, args, group)

    def _windowed(self, operation: Operation, axis: Axis, halo: Halo) -> Windowed:
        value, *others = operation.operands
        source: Source
        if value in self.to_measure:
            source = self.to_measure[value]
        else:
            held = {each.name: sharding for each, sharding in self._cuts(value)}.get(axis.name)
            by_rank = None if held is None else [held.bounds(rank) for rank in range(axis.size)]
            source = Held(self.values[value], by_rank, axis)
        return Windowed(operation, halo, source, [self.values[other] for other in others], axis)

    def _to_measure(self, operation: Operation) -> Windowed | None:
        """A copy that one window alone reads, to be made for that window; None for everything else."""
        value = operation.results[0]
        if operation.rule is None or not operation.rule.copies or len(operation.node.users) != 1:
            return None
        (reader,) = (self.by_node.get(user) for user in operation.node.users)
        if reader is None or operation.node.meta.get("cache_roles"):
            return None
        if reader.operands[:1] != (value,) or reader.operands.count(value) > 1:
            return None
        for name, factor in neighbours_of(reader.node).items():
            halo = self._halo_of_copy(operation, name, factor.halo.dim) if factor.halo is not None else None
            if halo is not None:
                return self._windowed(operation, self.axes[name], halo)
        return None

    def _halo_of_copy(self, operation: Operation, axis: str, dim: int) -> Halo | None:
        """How a copy reads its operand along a dimension, of which its reader takes a window."""
        value = operation.results[0]
        own = neighbours_of(operation.node).get(axis)
        if own is not None:
            return own.halo
        held, made = (shardings_of(each).get(axis) for each in (operation.operands[0], value))
        if held is None or made is None or held.place != made.place or made.place.dim != dim:
            return None
        along = (factor.halo for factor in operation.factors if factor.halo is not None and factor.halo.dim == dim)
        size = shape_of(value)[dim]
        return next(along, Halo(dim, size, size))  # it leaves this dimension as it is

    def _empty(self, operation: Operation) -> None:
        """What is empty on this rank is written as empty: operators need not bear that (convolutions, FFTs)."""
        for value in operation.results:
            like = tensor_of(value)
            how = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
            shape = list(self._local_shape(value))
            if operation.operands:  # it still comes after what it is made from
                first = self.values[operation.operands[0]]
                self.values[value] = self.write(aten.new_empty.default, first, shape, **how)
            else:
                self.values[value] = self.write(aten.empty.memory_format, shape, **how)
