"""Tells in the graph whether an input is what it was at the last call, without the host waiting for it.

A fingerprint is a weighted sum of an input's bits, in integers: it does not depend on the order of summation, so that
it is the same on every rank and by every kernel, and inputs that differ have the same one with a probability of about
2^-48. What is remembered of each input is its fingerprint and its habit: the same at every call so far, or another at
every call so far. An input that breaks its habit is a sign that this call is not of the trajectory of which something
is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from paracompile.passes.writer import GraphWriter, as_float

__all__ = ["NUMBERS", "Habits", "changed", "fingerprint"]

aten = torch.ops.aten

NUMBERS = 3
"""How many numbers are remembered of an input: two halves of its fingerprint, and its habit."""

_HALF = 24  # bits: exact in float32
_SAME, _OTHER = 1, -1
"""The two habits; 0 where there was no second call yet."""

_WIDE, _ODD = 0x145F4914D, 0x1E3779B1
"""What places are mixed with: a number of more than 32 bits, and an odd one; what comes of it stays below 2^63, because
a C++ compiler may take for granted that it does."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Habits:
    """Writes what a call's inputs are like beside those of the last call.

    attributes:
        kept: no input broke its habit; bool of shape (). Free inputs may always change again after they did once.
        confirmed: every input but the free ones is what it was, or changes at each call, as was seen before.
        numbers: what is remembered if the call continues a trajectory; float32 of shape (NUMBERS * inputs,).
        anew: what is remembered if it begins one.
    """

    def __init__(
        self, write: GraphWriter, last: fx.Node, inputs: Sequence[fx.Node], *, free: int, device: torch.device
    ) -> None:
        """`last` is what was remembered; the last `free` inputs change in a trajectory: times, a sample."""
        count = len(inputs)
        prints = [fingerprint(write, value) for value in inputs]
        now = write(aten.cat.default, [as_float(write, each, device) for each in prints])
        before = write(aten.slice.Tensor, last, 0, 0, 2 * count)
        habits = write(aten.slice.Tensor, last, 0, 2 * count, NUMBERS * count)
        differs = write(aten.any.dim, write(aten.reshape.default, write(aten.ne.Tensor, now, before), [count, 2]), 1)
        found = write(aten.sub.Scalar, write(aten.mul.Scalar, as_float(write, differs), _OTHER - _SAME), -_SAME)
        unknown = write(aten.eq.Scalar, habits, 0)
        keeps = write(aten.logical_or.default, unknown, write(aten.eq.Tensor, found, habits))
        was_other = write(aten.eq.Scalar, habits, _OTHER)
        is_fine = write(aten.logical_or.default, write(aten.logical_not.default, differs), was_other)
        bound = count - free
        loose = write(aten.slice.Tensor, write(aten.logical_or.default, keeps, was_other), 0, bound, count)
        strict = write(aten.slice.Tensor, keeps, 0, 0, bound)
        self.kept = write(aten.all.default, write(aten.cat.default, [strict, loose]))
        self.confirmed = write(aten.all.default, write(aten.slice.Tensor, is_fine, 0, 0, bound))
        learnt = write(aten.where.self, unknown, found, habits)
        self.numbers = write(aten.cat.default, [now, learnt])
        self.anew = write(aten.cat.default, [now, write(aten.zeros_like.default, learnt)])


def fingerprint(write: GraphWriter, value: fx.Node) -> fx.Node:
    """Two numbers of `_HALF` bits, int64 of shape (2,)."""
    made = value.meta["val"]
    if made.is_complex():
        value = write(aten.view_as_real.default, value)
        made = value.meta["val"]
    if made.dtype is not torch.bool:
        value = write(aten.view.dtype, value, _INTEGERS[made.element_size()])
    bits = write(aten.reshape.default, write(aten._to_copy.default, value, dtype=torch.int64), [-1])
    place = write(aten.arange.start, 1, made.numel() + 1, dtype=torch.int64, device=made.device, pin_memory=False)
    # Inductor computes with places as with indices, in 32 bits where they fit, until a number of 64 bits meets them
    # in an operation that it does not do for indices.
    mixed = write(aten.mul.Scalar, write(aten.bitwise_xor.Scalar, place, _WIDE), _ODD)
    # Weights that grow evenly would not see values change about their middle.
    weight = write(aten.bitwise_xor.Tensor, mixed, write(aten.__rshift__.Scalar, mixed, 15))
    total = write(aten.sum.default, write(aten.mul.Tensor, bits, weight))
    halves = [write(aten.__rshift__.Scalar, total, shift) for shift in (64 - 2 * _HALF, 64 - _HALF)]
    return write(aten.bitwise_and.Scalar, write(aten.stack.default, halves), (1 << _HALF) - 1)


def changed(before: Sequence[float], after: Sequence[float]) -> list[bool]:
    """For each input, of what was remembered at two calls: whether it changed between them."""
    count = len(after) // NUMBERS
    return [before[2 * number : 2 * number + 2] != after[2 * number : 2 * number + 2] for number in range(count)]
