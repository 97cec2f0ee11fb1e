"""One spelling per operator: Dynamo's graph, retraced into functional ATen above autograd.

    before (torch level)                        after (pre-dispatch ATen)
    q.transpose(1, 2)                           aten.transpose.int(q, 1, 2)
    x.unsqueeze(-1), torch.unsqueeze(x, 3)      aten.unsqueeze.default(x, -1)
    out[..., 0::2] = a                          aten.copy, aten.slice_scatter.default(out, ...)
    F.linear(x, w), F.scaled_dot_product_...    aten.linear.default, aten.scaled_dot_product_attention.default

torch itself does the work: `FunctionalTensorMode` removes views of mutated values and in-place operators, and tracing
before dispatch keeps `linear`, `layer_norm` and attention as single nodes. Every node then has a schema, so that one
table of rules covers functions, methods, keywords and operators alike.

- Sizes are stated where they are used, as numbers or, where they may be others in the next call, as `Size`s. Numbers
  that are only calculated with become tensors () (`numbers`).
- A tensor subclass among the inputs (a weight quantised by torchao) is traced as a plain tensor of the same outer
  shape, and `aten.linear` stays one node; `subclasses` spells it so that the real one is asked when it runs.
- What autocast casts inside of attention is cast before it.
- `as_strided` is spelled as what it selects (`strides`).
- A number that the model states as a tensor is made on the device where it is used.
- A mutated graph input is written back by `aten.copy_` at the end, the one in-place operator that remains.
- Placeholders keep what Dynamo attached to them, without which AOTAutograd no longer knows the static weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx, py_sym_types
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols, statically_known_true
from torch.fx.traceback import preserve_node_meta

from paracompile.errors import GraphError
from paracompile.layout.sizes import formula, numbers_in, size_of
from paracompile.passes.equal_blocks import STAND_IN, fold_equal_blocks, unfold
from paracompile.passes.numbers import write_numbers
from paracompile.passes.strides import spell_strides
from paracompile.passes.vmap import write_vmaps
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.autocast import ENTER_AUTOCAST, EXIT_AUTOCAST
from paracompile.patterns.numbers import Numbers, find_numbers
from paracompile.torch_private import (
    ConstantSource,
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    check,
    detect_fake_mode,
    has_data_mutation,
    memory_of,
    parameter_sources,
    rename,
    set_grad_enabled,
    set_parameter_sources,
    set_source,
    source_of,
    tree_map_only,
    unwrapped,
)

aten = torch.ops.aten

_DROPPED = {aten._assert_tensor_metadata.default, set_grad_enabled}
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_FACTORIES = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Retraces `gm` into functional pre-dispatch ATen; `gm` itself is not touched.

    Of equal blocks one is traced (`equal_blocks`).
    """
    numbers = find_numbers(gm.graph)
    plain = write_numbers(gm, numbers)
    fake_mode = detect_fake_mode(example_inputs) or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake_mode, _plain_inference():
        mapped = write_vmaps(plain, _static_stand_in)
    traced = _trace_folded(mapped, example_inputs, fake_mode) or _trace(mapped, example_inputs, fake_mode)[0]
    _restore_inputs(gm, traced, numbers)
    for node in list(traced.graph.nodes):
        _respell(node)
    _place_numbers(traced)
    spell_strides(traced)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced


def _trace_folded(
    gm: fx.GraphModule, example_inputs: Sequence[Any], fake_mode: FakeTensorMode
) -> fx.GraphModule | None:
    """Traces of equal blocks only one; None where there are none, or memory is written to across their edges."""
    folded = fold_equal_blocks(gm)
    if folded is None:
        return None
    traced, written = _trace(folded.gm, [*example_inputs, *folded.like], fake_mode)
    bodies = {name: _trace(body, folded.examples(name), fake_mode)[0] for name, body in folded.bodies.items()}
    if written or any(_shares_memory(body) for body in bodies.values()):
        return None
    unfold(traced, folded, bodies)
    return traced


def _shares_memory(body: fx.GraphModule) -> bool:
    """Whether a traced block writes to its inputs, or hands on one or a view of one."""
    inputs = [node for node in body.graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], torch.Tensor)]
    (output,) = body.graph.find_nodes(op="output")
    memory = {memory_of(node.meta["val"]) for node in inputs}
    return any(memory_of(node.meta["val"]) in memory for node in output.all_input_nodes) or any(
        user.target is aten.copy_.default and user.args[0] is node for node in inputs for user in node.users
    )


def _trace(gm: fx.GraphModule, example_inputs: Sequence[Any], fake_mode: FakeTensorMode) -> tuple[fx.GraphModule, bool]:
    """The functional graph, and whether anything was written to what leaves a stand-in.

    args:
        example_inputs: which of them share memory is asked where one is written to.
    """
    written: list[bool] = []
    with fake_mode, _plain_inference():
        stand_ins = [_stand_in(value) for value in _examples(gm, example_inputs)]
        traced = make_fx(
            lambda *args: _run_functionally(gm, args, example_inputs, written.append),
            tracing_mode="real",  # the inputs are fake
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*stand_ins)
    _state_sizes(traced)
    return traced, any(written)


def _examples(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What stands for the inputs: Dynamo's fake tensors, whose sizes may be open, where it gave any."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", value) for node, value in zip(inputs, example_inputs, strict=True)]


def _state_sizes(traced: fx.GraphModule) -> None:
    """Writes sizes where they are used, by their formulas, and drops the nodes that calculate them.

    One that the graph hands back is fixed.
    """

    def stated(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if isinstance(value, (torch.SymFloat, torch.SymBool)) and not free_unbacked_symbols(value):
            return float(value) if isinstance(value, torch.SymFloat) else bool(value)
        return size_of(value) if isinstance(size_of(value), int) else source

    for node in traced.graph.nodes:
        if any(isinstance(source.meta.get("val"), py_sym_types) for source in node.all_input_nodes):
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), stated)
    (output,) = traced.graph.find_nodes(op="output")
    output.args = numbers_in(output.args)
    for node in reversed(traced.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), py_sym_types) and not node.users:
            traced.graph.erase_node(node)


def _respell(node: fx.Node) -> None:
    """Drops what does nothing in a functional graph, and operands that are only asked for a type or a shape.

    Such an operand (of `type_as` or `new_zeros`, or the overwritten one of `copy`) would tie two unrelated values
    together.
    """
    made = node.meta.get("val")
    if node.target in _DROPPED:
        _drop(node, None)
    elif node.target in _RESHAPES:
        node.target = aten.reshape.default
    elif _is_identity(node):
        _drop(node, node.args[0])
    elif node.target in (aten.type_as.default, aten.copy.default):
        source = node.args[0 if node.target is aten.type_as.default else 1]
        assert isinstance(source, fx.Node)
        assert isinstance(made, torch.Tensor)
        before = source.meta["val"]
        if before.shape != made.shape:
            return  # a broadcasting copy stays as it is
        if (before.dtype, before.device) == (made.dtype, made.device):
            node.target, node.args = aten.clone.default, (source,)  # the source itself may be written to, or returned
        else:
            node.target, node.args = aten._to_copy.default, (source,)
            node.kwargs = {"dtype": made.dtype, "device": made.device}
    elif node.target in _FACTORIES:
        assert isinstance(made, torch.Tensor)
        node.target, node.args = _FACTORIES[node.target], node.args[1:]
        node.kwargs = {"dtype": made.dtype, "device": made.device, "pin_memory": False}
    elif node.target is aten.scaled_dot_product_attention.default:
        _spell_casts(node)


def _is_identity(node: fx.Node) -> bool:
    """Dropout of a model that evaluates; a slice of all there is, as `x[:, 1:]` takes of the first dimension.

    (Where sizes are numbers, torch leaves such a slice out itself.)
    """
    if node.target is aten.dropout.default:
        return not (node.args[1] and node.args[2])
    if node.target is not aten.slice.Tensor:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return all(statically_known_true(one == other) for one, other in zip(before, after, strict=True))


def _place_numbers(traced: fx.GraphModule) -> None:
    """Makes a number that the model states (`mask[0] = True`, `torch.tensor(0.5)`) where it is used.

    Dynamo keeps it as a constant in the host's memory: to copy it to a GPU, the host would wait for all that runs
    there.
    """
    for constant in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, constant.target, None)
        if not isinstance(value, torch.Tensor) or value.dim() or value.device.type != "cpu":
            continue
        for lifted in [user for user in constant.users if user.target is aten.lift_fresh_copy.default]:
            for user in list(lifted.users):
                made = user.meta.get("val")
                if isinstance(made, torch.Tensor):
                    write = GraphWriter(lifted.meta["val"].fake_mode, traced.graph)
                    write.origin = user
                    with traced.graph.inserting_before(user):
                        number = write(
                            aten.full.default,
                            [],
                            value.item(),
                            dtype=value.dtype,
                            device=made.device,
                            pin_memory=False,
                        )
                    user.replace_input_with(lifted, number)


def _spell_casts(attention: fx.Node) -> None:
    """Casts queries, keys and values as autocast does inside of attention: there ranks exchange them."""
    made = attention.meta["val"]
    write = GraphWriter(made.fake_mode, attention.graph)
    write.origin = attention
    with attention.graph.inserting_before(attention):
        for place, operand in enumerate(attention.args[:3]):
            assert isinstance(operand, fx.Node)
            if operand.meta["val"].dtype != made.dtype:
                attention.update_arg(place, write(aten._to_copy.default, operand, dtype=made.dtype))


def _drop(node: fx.Node, instead: Any) -> None:
    node.replace_all_uses_with(instead)
    node.graph.erase_node(node)


@contextlib.contextmanager
def _plain_inference() -> Any:
    """Tracing must not see inference mode (its tensors have no version counter) nor record gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _stand_in(value: Any) -> Any:
    """A plain fake tensor of the same outer metadata."""
    if isinstance(value, torch.Tensor):
        shape, strides = ([formula(size_of(size)) for size in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, torch.SymInt):
        return formula(size_of(value))
    return float(value) if isinstance(value, torch.SymFloat) else value


def _static_stand_in(value: Any) -> Any:
    """The same with sizes that are numbers."""
    if isinstance(value, torch.Tensor):
        shape, strides = ([int(size) for size in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    return int(value) if isinstance(value, torch.SymInt) else _stand_in(value)


class _Interpreter(fx.Interpreter):
    """Runs a graph with its autocast regions really on, so that values get the types that they have at run time.

    Entering a region also writes its edge into the trace. (Calling Dynamo's node would only write the edge.) `type_as`
    of the same type is the tensor itself, which a later write must reach: `to` says so, the operator does not.
    """

    def __init__(self, gm: fx.GraphModule, regions: contextlib.ExitStack) -> None:
        """`regions` closes what is still open when tracing fails."""
        super().__init__(gm)
        self.regions = regions
        self.from_stand_ins: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        made = n.meta.get("example_value")
        if n.op == "call_method" and n.target == "item" and isinstance(made, torch.SymFloat):
            return float(made)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ENTER_AUTOCAST:
            region = self.regions.enter_context(contextlib.ExitStack())
            region.enter_context(torch.autocast(*args))
            return region
        if target is EXIT_AUTOCAST:
            return args[0].close()
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return self._checkpointed(*args)  # the keywords say how it is computed again
        if target is check and isinstance(args[0], torch.SymBool):  # which would leave no node
            return aten._assert_scalar.default(args[0], "a check of the model's failed")
        made = super().call_function(target, args, kwargs)
        if target is STAND_IN:
            self.from_stand_ins.extend(made)
        return made

    def _checkpointed(self, body: fx.GraphModule, *args: Any) -> Any:
        """Without gradients nothing is computed again: the body is part of the graph."""
        inner = _Interpreter(body, self.regions)
        made = inner.run(*args)
        self.from_stand_ins += inner.from_stand_ins
        return made

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "type_as":
            return args[0].to(dtype=args[1].dtype, device=args[1].device)
        if target == "fill_diagonal_":
            return _fill_diagonal(*args, **kwargs)
        return super().call_method(target, args, kwargs)


def _fill_diagonal(x: torch.Tensor, fill_value: float, wrap: bool = False) -> torch.Tensor:
    """`fill_diagonal_` by views that can be written through; torch's own takes `as_strided`, which cannot."""
    if wrap and x.dim() == 2 and x.shape[0] > x.shape[1] + 1:
        return x.fill_diagonal_(fill_value, wrap)
    diagonal = x
    while diagonal.dim() > 1:
        diagonal = diagonal.diagonal(0, 0, 1)
    diagonal.fill_(fill_value)
    return x


def _run_functionally(
    gm: fx.GraphModule,
    args: Sequence[Any],
    example_inputs: Sequence[Any],
    written: Callable[[bool], object],
) -> Any:
    """Runs `gm` under functionalisation and writes mutated inputs back to `args`.

    `written` is told whether anything was written to what leaves a stand-in.
    """
    excluded = DispatchKeySet(DispatchKey.Functionalize)
    mode = FunctionalTensorMode(pre_dispatch=True, export=True)
    with ExcludeDispatchKeyGuard(excluded), mode:
        inputs = [FunctionalTensor.to_functional(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        with preserve_node_meta(), contextlib.ExitStack() as regions:
            interpreter = _Interpreter(gm, regions)
            outputs = interpreter.run(*inputs)
        written(any(map(has_data_mutation, interpreter.from_stand_ins)))
        outputs = tree_map_only(FunctionalTensor, unwrapped, outputs)
        mutated = {
            index: unwrapped(value)
            for index, value in enumerate(inputs)
            if isinstance(value, FunctionalTensor) and has_data_mutation(value)
        }
    for index, value in mutated.items():
        _check_unshared(gm, index, example_inputs)
        args[index].copy_(value)
    return outputs


def _check_unshared(gm: fx.GraphModule, index: int, example_inputs: Sequence[Any]) -> None:
    """A written input is known by its own name only: another that shares its memory would keep the old values."""
    written = example_inputs[index]
    memory = memory_of(written)
    for other, value in enumerate(example_inputs):
        if other != index and isinstance(value, torch.Tensor) and memory_of(value) == memory:
            nodes = gm.graph.find_nodes(op="placeholder")
            raise GraphError(
                nodes[index],
                f"the model writes to it, and it shares its memory with another input, {nodes[other].name}",
                "pass a copy of one of the two",
            )


def _restore_inputs(original: fx.GraphModule, traced: fx.GraphModule, numbers: Numbers) -> None:
    """Gives the traced placeholders Dynamo's names, sources and tensor metadata; which are numbers is noted."""
    traced.__class__.__name__ = original.__class__.__name__  # make_fx writes "<lambda>", no name in a readable graph
    traced.meta.update(original.meta)
    sources = parameter_sources(original)
    if sources is not None:
        # Constants that tracing found are buffers of the traced module; AOTAutograd asks where each comes from.
        constants = {name: ConstantSource(name) for name, _ in traced.named_buffers()}
        set_parameter_sources(traced, {**sources, **constants})
    before = original.graph.find_nodes(op="placeholder")
    after = traced.graph.find_nodes(op="placeholder")
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        new.meta["number"] = place in numbers.inputs
        kept = {key: old.meta[key] for key in ("tensor_dict", "stack_trace") if key in old.meta}
        new.meta.update(kept)
        set_source(new, source_of(old))
        rename(new, old.name)
