"""`as_strided` reads memory, which a rank's part of a value has not: it is spelled as what it selects.

    before: y = transpose(x, 1, 2)  (strides 24, 1, 4)      after: m = reshape(permute(y, [0, 2, 1]), [48])
    z = as_strided(y, [2, 3], [4, 5])                       u = unfold(slice(m, 0, 0, 15), 0, 11, 4)
                                                            z = squeeze(unfold(u, 1, 1, 5), 2)

The values of a tensor without gaps, in the order in which they lie, are its memory. A dimension of `n` positions at
stride `t` is `n` windows of it, each `t` further, that hold what the dimensions after it span; the last ones hold one
value. Where the tensor has gaps, the one of which it is a view is asked. An offset into a graph input counts from where
that input starts, as it does in Inductor.
"""

from __future__ import annotations

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.passes.writer import GraphWriter
from paracompile.torch_private import memory_of

aten = torch.ops.aten


def spell_strides(gm: fx.GraphModule) -> None:
    """Replaces each `as_strided` of a functional graph, in place.

    raises:
        GraphError: one that reads what no tensor of the graph holds, or that writes.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.as_strided_scatter.default):
        raise GraphError(node, "the model writes through as_strided", _REMEDY)
    for node in gm.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        fake = node.meta["val"]
        write = GraphWriter(fake.fake_mode, gm.graph)
        write.origin = node
        with gm.graph.inserting_before(node):
            spelled = _windows(write, *_memory(write, node), fake)
        node.replace_all_uses_with(spelled)
        gm.graph.erase_node(node)


_REMEDY = "select with slices, unfold, expand or indices instead"


def _memory(write: GraphWriter, node: fx.Node) -> tuple[fx.Node, int]:
    """The values that `node` selects from, as they lie in memory, and which of them comes first."""
    fake, source = node.meta["val"], node.args[0]
    first = fake.storage_offset()
    last = first + _spans(fake)[0] - 1
    while isinstance(source, fx.Node) and _kind(source) == _kind(node):
        held = source.meta["val"]
        start, order = held.storage_offset(), sorted(range(held.dim()), key=lambda dim: -held.stride(dim))
        if _has_no_gaps(held, order) and start <= first and last < start + held.numel():
            flat = write(aten.reshape.default, write(aten.permute.default, source, order), [held.numel()])
            return flat, first - start
        source = next((each for each in source.all_input_nodes if _shares_memory(each, source)), None)
    raise GraphError(node, "it reads memory between the values of its tensor, or beyond them", _REMEDY)


def _windows(write: GraphWriter, memory: fx.Node, first: int, like: torch.Tensor) -> fx.Node:
    spans = _spans(like)
    selected = write(aten.slice.Tensor, memory, 0, first, first + spans[0])
    for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
        if stride == 0:
            repeated = [*like.shape[: dim + 1], spans[dim + 1]]
            selected = write(aten.expand.default, write(aten.unsqueeze.default, selected, dim), repeated)
        else:
            selected = write(aten.unfold.default, selected, dim, spans[dim + 1], stride)
            if size == 0:
                selected = write(aten.slice.Tensor, selected, dim, 0, 0)
    return write(aten.squeeze.dim, selected, -1)


def _spans(selected: torch.Tensor) -> list[int]:
    """How much memory each dimension spans with those after it; after the last one there is one value."""
    spans = [1]
    for size, stride in zip(reversed(selected.shape), reversed(selected.stride()), strict=True):
        spans.insert(0, spans[0] + max(size - 1, 0) * stride)
    return spans


def _has_no_gaps(tensor: torch.Tensor, order: list[int]) -> bool:
    """Whether its values, in the order of these dimensions, lie one after the other."""
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True


def _kind(node: fx.Node) -> tuple[object, ...]:
    """Memory of another kind reads otherwise."""
    fake = node.meta["val"]
    return fake.dtype, fake.is_conj(), fake.is_neg()


def _shares_memory(node: fx.Node, other: fx.Node) -> bool:
    one, two = node.meta.get("val"), other.meta["val"]
    return isinstance(one, torch.Tensor) and memory_of(one) == memory_of(two)
