"""Context parallelism: cuts the token sequence over the ranks, following a plan.

    before                                  after, on rank r
    x: f32[1, 4096, 64]                     x_r = x[:, 2048 r : 2048 (r + 1)]          (split: nothing is sent)
    h = linear(x, w)                        h_r = linear(x_r, w)                       (only a rank's tokens)
    o = attention(q, k, v)                  v, k, q: all_to_all tokens -> heads
                                            attention on some heads, all tokens
                                            o: all_to_all heads -> tokens
    return linear(o)                        return all_gather(linear(o_r))             (where the value is narrowest)

1. plan: what is cut and how (`paracompile.layout.plan`, which knows no operator, given the tables of `patterns`).
2. rewrite: one walk over the graph writes a new one. Each value has a whole form, a cut form or both; a form that is
   missing is made when it is first asked for (a whole value is split, a cut one gathered).
3. verify: every node is evaluated on fake tensors as it is written, and its local shape is held against the plan's.

Requires functional ATen with static sizes (`normalise`). The result is a function of graph, plan and rank alone: it
needs no process group.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload

from paracompile.errors import GraphError
from paracompile.layout.factors import Factor, Local, Operand, Span
from paracompile.layout.graph import Operation, Value, is_tensor, shape_of, value_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Plan, Sharding, make_plan
from paracompile.mesh import Axis
from paracompile.passes.tokens import all_tokens, in_order_of_arrival, own_tokens
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.attention import find_attentions
from paracompile.patterns.flops import flops
from paracompile.patterns.rules import rule_for
from paracompile.runtime.ulysses import Exchange, heads_to_tokens, tokens_to_heads

aten = torch.ops.aten

_AUTOCAST = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}


def context_parallel(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    axis: Axis,
    planned: Callable[[Plan], object] = lambda plan: None,
) -> fx.GraphModule:
    """Writes the graph that the rank `axis.rank` of `axis.size` runs.

    args:
        axis: the ranks that share the tokens.
        planned: told the plan before the graph is rewritten.

    raises:
        GraphError: no attention, random numbers inside the model, or sizes that cannot be cut.
    """
    plan = make_plan(gm.graph, rule_for=rule_for, find_attentions=find_attentions, flops=flops_of, ranks=axis.size)
    planned(plan)
    _check_attention(plan, axis)
    _check_randomness(plan)
    return _Rewrite(gm, plan, axis).run()


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
            f"the graph's largest attention cannot be cut along its tokens (operands {heaviest.operation.op})",
            "call scaled_dot_product_attention with tensors of shape (batch, heads, tokens, head size)",
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


class _Rewrite:
    def __init__(self, gm: fx.GraphModule, plan: Plan, axis: Axis) -> None:
        self.gm = gm
        self.plan = plan
        self.axis = axis
        self.by_node = {operation.node: operation for operation in plan.operations}
        fakes = [node.meta["val"] for node in gm.graph.nodes if is_tensor(node)]
        fake_mode = detect_fake_mode(fakes)
        assert fake_mode is not None
        self.write = GraphWriter(fake_mode)
        self.whole: dict[Value, fx.Node] = {}
        self.cut: dict[Value, fx.Node] = {}
        self.split: dict[tuple[Value, Sharding], fx.Node] = {}
        self.arranged: dict[tuple[Value, tuple[int, ...], tuple[int, ...]], fx.Node] = {}
        self.others: dict[fx.Node, fx.Node] = {}
        self.regions: dict[fx.Node, contextlib.ExitStack] = {}

    def run(self) -> fx.GraphModule:
        with contextlib.ExitStack() as open_regions:
            for node in self.gm.graph.nodes:
                self._node(node, open_regions)
        self.write.graph.lint()
        return fx.GraphModule(self.gm, self.write.graph)

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
        elif node.target in _AUTOCAST:
            self._autocast(node, open_regions)

    def _autocast(self, node: fx.Node, open_regions: contextlib.ExitStack) -> None:
        """Enters or leaves an autocast region for real, so that what is written inside gets its types."""
        if node.target is torch.amp.autocast_mode._enter_autocast:
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
        return self._whole(value_of(node)) if is_tensor(node) else self.others[node]

    def _whole(self, value: Value) -> fx.Node:
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

    def _operand(self, operation: Operation, slot: int) -> fx.Node:
        value, sharding = operation.operands[slot], self.plan.operand(operation, slot)
        if sharding is None:
            return self._whole(value)
        if value in self.cut and self.plan.takes_cut(operation, slot):
            return self.cut[value]
        if (value, sharding) not in self.split:
            self.split[value, sharding] = own_tokens(
                self.write, self._whole(value), shape_of(value), sharding, self.plan.shares, self.axis.rank
            )
        return self.split[value, sharding]

    # Operations on a rank's tokens

    def _cut_operation(self, operation: Operation) -> None:
        attention = self.plan.exchanged(operation)
        if attention is not None:
            self.cut[operation.results[0]] = self._exchanged_attention(attention)
        else:
            operands = [self._operand(operation, slot) for slot in range(len(operation.operands))]
            self._results(operation, self._apply(operation, operands), self.cut)
        for value in operation.results:
            self._verify(value)

    def _apply(self, operation: Operation, operands: list[fx.Node]) -> fx.Node:
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
        results = []
        for value in operation.results:
            sharding = self.plan.result(value)
            assert sharding is not None
            results.append(sharding.local_shape(shape_of(value), self.plan.shares, self.axis.rank))
        return Local(
            operands=tuple(tuple(node.meta["val"].shape) for node in operands),
            results=tuple(results),
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

    def _verify(self, value: Value) -> None:
        sharding = self.plan.result(value)
        assert sharding is not None
        expected = sharding.local_shape(shape_of(value), self.plan.shares, self.axis.rank)
        found = self.cut[value].meta["val"]
        if tuple(found.shape) != expected or found.dtype != value_dtype(value):
            raise GraphError(
                value.node,
                f"on rank {self.axis.rank} it has the shape {tuple(found.shape)} ({found.dtype}) where the analysis "
                f"expects {expected} ({value_dtype(value)})",
                "this is a mistake in paracompile's rule for the operator: please report it with the graph that "
                'options={"dump": FOLDER} writes',
            )

    # Attention

    def _exchanged_attention(self, attention: Attention) -> fx.Node:
        operation = attention.operation
        self._check(attention)
        queries = self.plan.operand(operation, attention.query)
        keys = self.plan.operand(operation, attention.key)
        assert queries is not None
        assert keys is not None
        received: dict[int, fx.Node] = {}
        # v first: its exchange runs while k and q are still being normalised and rotated.
        for slot, sharding in ((attention.value, keys), (attention.key, keys), (attention.query, queries)):
            node = self._operand(operation, slot)
            received[slot] = tokens_to_heads(
                self.write, node, node.meta["val"].shape, self._exchange(operation.operands[slot], sharding)
            )
        if attention.mask is not None:
            received[attention.mask] = self._arranged_mask(attention, queries, keys)
        result = self._apply(operation, [received[slot] for slot in range(len(operation.operands))])
        exchange = self._exchange(operation.operands[attention.query], queries)
        sent_back: fx.Node = heads_to_tokens(self.write, result, result.meta["val"].shape, exchange)
        return sent_back

    def _exchange(self, value: Value, sharding: Sharding) -> Exchange:
        ranks, heads = self.axis.size, shape_of(value)[-3]
        return Exchange(
            group=self.axis.group,
            rank=self.axis.rank,
            heads=(heads // ranks,) * ranks,
            tokens=tuple(self.plan.shares.local(sharding.segments, rank) for rank in range(ranks)),
        )

    def _check(self, attention: Attention) -> None:
        operation, ranks = attention.operation, self.axis.size
        operands = operation.operands
        heads = {name: shape_of(operands[getattr(attention, name)])[-3:-2] for name in ("query", "key", "value")}
        if any(not count or count[0] % ranks for count in heads.values()):
            spelled = ", ".join(f"{name} {count[0] if count else 'none'}" for name, count in heads.items())
            raise GraphError(
                operation.node,
                f"its heads ({spelled}) do not divide by the {ranks} ranks of the ulysses axis",
                f"use a number of ranks that divides them: {_divisors([c[0] for c in heads.values() if c])}",
            )
        for slot in (attention.query, attention.key):
            sharding = self.plan.operand(operation, slot)
            assert sharding is not None
            if any(length % ranks for length in sharding.segments):
                raise GraphError(
                    operation.node,
                    f"its token segments {list(sharding.segments)} do not divide by the {ranks} ranks of the "
                    "ulysses axis",
                    f"use lengths that divide (resolution, frames or text length), or a number of ranks that divides "
                    f"them: {_divisors(sharding.segments)}",
                )
        segments = self.plan.operand(operation, attention.query)
        if attention.is_causal and segments is not None and len(segments.segments) > 1:
            raise GraphError(
                operation.node,
                "it is causal over a sequence that is joined from several segments, whose tokens arrive out of order",
                "pass the causal mask as attn_mask",
            )

    def _arranged_mask(self, attention: Attention, queries: Sharding, keys: Sharding) -> fx.Node:
        """The whole mask for a rank's heads, with queries and keys in the order in which they arrive."""
        assert attention.mask is not None
        value = attention.operation.operands[attention.mask]
        heads = shape_of(attention.operation.operands[attention.query])[-3] // self.axis.size
        key = (value, queries.segments, keys.segments)
        if key not in self.arranged:
            mask = self._whole(value)
            shape = shape_of(value)
            for dim, segments in ((len(shape) - 2, queries.segments), (len(shape) - 1, keys.segments)):
                if shape[dim] > 1:
                    mask = in_order_of_arrival(self.write, mask, dim, segments, self.plan.shares)
            if len(shape) > 2 and shape[-3] > 1:
                first = self.axis.rank * heads
                mask = self.write(aten.slice.Tensor, mask, len(shape) - 3, first, first + heads)
            self.arranged[key] = mask
        return self.arranged[key]


def value_dtype(value: Value) -> torch.dtype:
    fake = value.node.meta["val"]
    dtype: torch.dtype = (fake[value.index] if isinstance(fake, (tuple, list)) else fake).dtype
    return dtype


def _divisors(numbers: Sequence[int]) -> list[int]:
    return [ranks for ranks in range(1, min(numbers) + 1) if all(number % ranks == 0 for number in numbers)]


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
