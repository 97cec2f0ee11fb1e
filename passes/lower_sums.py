"""Sums over what is cut: each rank sums up its part, and the small results are added.

    before                                        after, on rank r
    kv = matmul(k, v)    (.., m, tokens), ...     kv = all_reduce(matmul(k, v))        over its own tokens
    m = mean(x, [1])                              m = all_reduce(sum(x, [1])) / tokens

Parts of half precision are added in float32. Who holds which positions does not matter, and a rank without any adds
zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from paracompile.layout.graph import Operation, spelled
from paracompile.mesh import Axis
from paracompile.passes.writer import GraphWriter
from paracompile.runtime.collectives import all_reduce
from paracompile.torch_private import OpOverload

__all__ = ["summed_up"]

aten = torch.ops.aten

_MEANS: dict[OpOverload[..., Any], OpOverload[..., Any]] = {
    aten.mean.dim: aten.sum.dim_IntList,
    aten.mean.default: aten.sum.default,
}


def summed_up(write: GraphWriter, operation: Operation, operands: Sequence[fx.Node], axis: Axis) -> fx.Node:
    """Writes the operation on this rank's part of what it sums over, and the exchange.

    args:
        operation: of whole sizes along `axis`, and already of this rank's along all others.
    """
    op, dtype = operation.op, operation.node.meta["val"].dtype
    assert op is not None
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    args, kwargs = spelled(operation, operands)
    target = _MEANS.get(op.target, op.target)
    if "dtype" in op.arguments:
        kwargs = {**kwargs, "dtype": wide}
    part = write(target, *args, **kwargs)
    if part.meta["val"].dtype != wide:
        part = write(aten._to_copy.default, part, dtype=wide)
    part = write(aten.clone.default, part, memory_format=torch.contiguous_format)
    made: fx.Node = all_reduce(write, part, "sum", axis.group)
    if op.target in _MEANS:
        made = write(aten.div.Scalar, made, prod(op.operands[0]) // max(1, prod(op.results[0])))
    return made if made.meta["val"].dtype == dtype else write(aten._to_copy.default, made, dtype=dtype)
