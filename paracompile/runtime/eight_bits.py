"""Numbers in eight bits for a journey between ranks: float8 (e4m3) or int8, with a scale for each row.

    packed      (..., size) of floats  ->  (..., size + 4) bytes: the numbers, then the row's scale in float32
    unpacked    the way back

A row is a head of a token where attention's operands travel, so that a large one costs no other its precision. In
float8 a number comes back within 1/16 of itself, or 1/2**18 of its row's largest; in int8 within 1/254 of its row's
largest. As in `collectives`, functions take `call(operator, *arguments)`.

The bytes of a scale are calculated, not looked at as another type of another size, which Inductor leaves to an operator
that asks for strides (and, in torch 2.11, does not get them).
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


def packed(call: Call, x: Any, kind: torch.dtype, device: torch.device) -> Any:
    """Floats (..., size) on this device as bytes (..., size + SCALE)."""
    x = call(aten._to_copy.default, x, dtype=torch.float32)
    largest = torch.finfo(kind).max if kind.is_floating_point else torch.iinfo(kind).max
    scale = call(aten.div.Tensor, call(aten.amax.default, call(aten.abs.default, x), [-1], True), largest)
    scale = call(aten.clamp.default, scale, torch.finfo(torch.float32).tiny)  # a row of zeros
    numbers = call(aten.div.Tensor, x, scale)
    if not kind.is_floating_point:
        numbers = call(aten.round.default, numbers)
    numbers = call(aten._to_copy.default, numbers, dtype=kind)
    bits = call(aten.__rshift__.Tensor, call(aten.view.dtype, scale, torch.int32), _places(call, device))
    scale_bytes = call(aten._to_copy.default, call(aten.bitwise_and.Scalar, bits, 255), dtype=torch.uint8)
    return call(aten.cat.default, [call(aten.view.dtype, numbers, torch.uint8), scale_bytes], -1)


def unpacked(call: Call, x: Any, size: int, kind: torch.dtype, dtype: torch.dtype, device: torch.device) -> Any:
    """Bytes (..., size + SCALE) on this device as floats (..., size) of a type."""
    numbers = call(aten.view.dtype, call(aten.slice.Tensor, x, -1, 0, size), kind)
    scale_bytes = call(aten._to_copy.default, call(aten.slice.Tensor, x, -1, size, size + SCALE), dtype=torch.int32)
    bits = call(aten.__lshift__.Tensor, scale_bytes, _places(call, device))
    scale = call(aten.view.dtype, call(aten.sum.dim_IntList, bits, [-1], True, dtype=torch.int32), torch.float32)
    numbers = call(aten._to_copy.default, numbers, dtype=torch.float32)
    return call(aten._to_copy.default, call(aten.mul.Tensor, numbers, scale), dtype=dtype)


def _places(call: Call, device: torch.device) -> Any:
    """Where in 32 bits each byte begins."""
    return call(aten.arange.start_step, 0, 8 * SCALE, 8, dtype=torch.int32, device=device, pin_memory=False)
