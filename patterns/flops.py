"""What an operator costs: two for each multiplication with its addition, after `torch.utils.flop_counter`.

Only products are counted, as they are nearly all of a transformer's arithmetic; everything else is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch.utils import flop_counter

import paracompile.runtime.kernels
import paracompile.runtime.visible  # noqa: F401  (registers attention_to_visible)
from paracompile.layout.factors import Op
from paracompile.layout.graph import Operation, shape_of
from paracompile.layout.sizes import hint
from paracompile.torch_private import OpOverload

aten = torch.ops.aten


def flops(op: Op) -> int:
    """Twice the multiply-adds of `op` with its shapes, at the sizes of the first call."""
    formula = _FORMULAS.get(op.target)
    if formula is None:
        return 0
    operands, results = ([tuple(map(hint, shape)) for shape in shapes] for shapes in (op.operands, op.results))
    return int(formula(replace(op, operands=tuple(operands), results=tuple(results))))


def flops_of(operation: Operation) -> int:
    """Twice the multiply-adds of an operation; of what is no ATen operator, only a quantised layer's count."""
    if operation.op is not None:
        return flops(operation.op)
    if operation.node.target is torch.nn.functional.linear:  # as `dispatch_on_subclasses` spells it
        return 2 * prod(map(hint, shape_of(operation.results[0]))) * hint(shape_of(operation.operands[0])[-1])
    return 0


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Twice the multiply-adds of an attention whose queries have its whole batch."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product(op: Op) -> int:
    """linear, matmul and their kin: each element of the result is a sum over the first operand's last dimension."""
    summed = op.operands[0][-1] if op.operands[0] else 1
    return 2 * prod(op.results[0]) * summed


def _second_product(op: Op) -> int:
    """addmm and baddbmm: the first operand is only added."""
    return 2 * prod(op.results[0]) * op.operands[1][-1]


def _addbmm(op: Op) -> int:
    return 2 * prod(op.operands[1]) * op.operands[2][-1]


def _outer(op: Op) -> int:
    return 2 * prod(op.results[0])


def _einsum(op: Op) -> int:
    """Two operands: every combination of letters is one multiply-add. More are left to right, less than two free."""
    if len(op.operands) < 2:
        return 0
    left = str(op.arguments["equation"]).replace(" ", "").split("->")[0]
    sizes: dict[object, int] = {}
    for term, shape in zip(left.split(","), op.operands, strict=True):
        before, dots, after = term.partition("...")
        middle = range(len(before) + len(after) - len(shape), 0) if dots else ()
        for letter, size in zip([*before, *middle, *after], shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return 2 * (len(op.operands) - 1) * prod(sizes.values())


def _attention(op: Op) -> int:
    """Scores and weighted values. A causal mask is not counted as a saving, as flop_counter does not either."""
    query, key, value = op.operands[:3]
    return attention_flops((*op.results[0][:-2], *query[-2:]), key, value)


def _convolution(op: Op) -> int:
    image, weight = op.operands[:2]
    spatial = len(weight) - 2
    batched = len(image) == spatial + 2
    shapes = [list(shape) if batched else [1, *shape] for shape in (image, op.results[0])]
    transposed = bool(op.arguments.get("transposed", op.target in _TRANSPOSED))
    return int(flop_counter.conv_flop_count(shapes[0], list(weight), shapes[1], transposed=transposed))


_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
} | _TRANSPOSED

_FORMULAS: dict[OpOverload[..., object], Callable[[Op], int]] = {
    aten.linear.default: _product,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: _product,
    aten.dot.default: _product,
    aten._int_mm.default: _product,
    aten._scaled_mm.default: _product,
    aten._weight_int8pack_mm.default: _product,
    aten.addmm.default: _second_product,
    aten.baddbmm.default: _second_product,
    aten.addmv.default: _second_product,
    aten.addbmm.default: _addbmm,
    aten.outer.default: _outer,
    aten.ger.default: _outer,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.paracompile.attention_by.default: _attention,
    torch.ops.paracompile.attention_with_lse.default: _attention,
    torch.ops.paracompile.attention_to_visible.default: _attention,
    torch.ops.paracompile.attention_with_lse_to_visible.default: _attention,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}
