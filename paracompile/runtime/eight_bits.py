"""Numbers in eight bits for a journey between ranks: float8 (e4m3) or int8, with a scale for each row.

    packed      (..., size) of floats  ->  (..., size + 4) bytes: the numbers, then the row's scale in float32
    unpacked    the way back

A row is a head of a token where attention's operands travel, so that a large one costs no other its precision. In
float8 a number comes back within 1/16 of itself, or 1/2**18 of its row's largest; in int8 within 1/254 of its row's
largest. As in `collectives`, functions take `call(operator, *arguments)`.
"""

from __future__ import annotations

from typing import Any

import torch

from paracompile.runtime.collectives import Call

__all__ = ["KINDS", "SCALE", "packed", "unpacked"]

aten = torch.ops.aten

KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""The types by the names that the option `exchange_dtype` has for them."""

SCALE = torch.float32.itemsize
"""Bytes of a row's scale."""


def packed(call: Call, x: Any, kind: torch.dtype) -> Any:
    """Floats (..., size) as bytes (..., size + SCALE)."""
    x = call(aten._to_copy.default, x, dtype=torch.float32)
    largest = torch.finfo(kind).max if kind.is_floating_point else torch.iinfo(kind).max
    scale = call(aten.div.Tensor, call(aten.amax.default, call(aten.abs.default, x), [-1], True), largest)
    scale = call(aten.clamp.default, scale, torch.finfo(torch.float32).tiny)  # a row of zeros
    numbers = call(aten.div.Tensor, x, scale)
    if not kind.is_floating_point:
        numbers = call(aten.round.default, numbers)
    numbers = call(aten._to_copy.default, numbers, dtype=kind)
    return call(aten.cat.default, [call(aten.view.dtype, part, torch.uint8) for part in (numbers, scale)], -1)


def unpacked(call: Call, x: Any, size: int, kind: torch.dtype, dtype: torch.dtype) -> Any:
    """Bytes (..., size + SCALE) as floats (..., size) of a type."""
    numbers = call(aten.view.dtype, call(aten.slice.Tensor, x, -1, 0, size), kind)
    scale = call(aten.slice.Tensor, x, -1, size, size + SCALE)
    scale = call(aten.clone.default, scale, memory_format=torch.contiguous_format)  # where a float may begin
    scale = call(aten.view.dtype, scale, torch.float32)
    numbers = call(aten._to_copy.default, numbers, dtype=torch.float32)
    return call(aten._to_copy.default, call(aten.mul.Tensor, numbers, scale), dtype=dtype)
