"""Halos: what an operator needs of its neighbours along a dimension that is cut.

A convolution, a pool, padding or resizing makes a position of its result of a few positions of its operand. So a rank
that holds the result's positions `[start, stop)` needs a window of the operand's, which is mostly its own and otherwise
its neighbours' edges. What each of these operators reads is the same formula with other numbers:

    result position o reads operand positions  (o * step + low) // scale  to  (o * step + high) // scale

    convolution, pool        scale 1    step = stride   low = -padding   high = dilation * (kernel - 1) - padding
    padding                  scale 1    step 1          low = high = -positions added before
    slice                    scale 1    step 1          low = high = first position
    nearest upsampling, f    scale f    step 1          low = high = 0
    linear upsampling, f     scale 2 f  step 2          low = 1 - f      high = 1 + f     (without aligned corners)

Who holds which positions is free: windows are computed from who holds what, and a rank whose part is smaller than the
halo is sent rows from further away. `forward` and `backward` only choose it such that little is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Halo", "Window"]

Edge = Literal["filled", "padded", "clipped", "repeated", "mirrored"]


@dataclass(frozen=True)
class Window:
    """What a rank's part of the result is made of: positions `[start, stop)` of the operand, and what lies outside.

    attributes:
        before, after: how many positions before the operand's first and after its last one are read besides.
        skip: how many positions the operator makes of the window before the first one that is wanted.
        count: how many are wanted.
    """

    start: int
    stop: int
    before: int
    after: int
    skip: int
    count: int


@dataclass(frozen=True)
class Halo:
    """Which positions of the first operand, along `dim`, a position of the result (along the same) is made of.

    attributes:
        dim: the dimension, in the operand and in the result.
        size, size_out: its size in the operand and in the result.
        step, scale, low, high: as in the formula above.
        edge: what is read outside of the operand. "filled": `value`, put around the window before the operator is
            called without padding of its own; "padded": the operator itself pads with `value`; "clipped": nothing;
            "repeated" and "mirrored": the operator pads with the first and last position, or mirrors at them.
    """

    dim: int
    size: int
    size_out: int
    step: int = 1
    scale: int = 1
    low: int = 0
    high: int = 0
    edge: Edge = "filled"
    value: float = 0.0

    @property
    def reach(self) -> int:
        """How many positions beside its own a rank needs, about."""
        return -(-max(0, self.high - self.low + 1 - self.step) // self.scale)

    def window(self, start: int, stop: int) -> Window:
        """What the result's positions `[start, stop)` are made of."""
        if start >= stop:
            return Window(0, 0, 0, 0, 0, 0)
        first = (start * self.step + self.low) // self.scale
        end = ((stop - 1) * self.step + self.high) // self.scale + 1
        a, b = (min(max(edge, 0), self.size) for edge in (first, end))
        if self.edge in ("filled", "padded"):
            before, after = max(0, min(end, 0) - first), max(0, end - max(first, self.size))
            return Window(a, b, before, after, 0, stop - start)
        if self.edge == "clipped":
            a, b = min(a, self.size - 1), max(b, 1)
            b = max(b, a + 1)
            return Window(a, b, 0, 0, start - a * self.scale // self.step, stop - start)
        before, after = max(0, -first), max(0, end - self.size)
        a, b = min(a, self.size - 1), max(b, 1)
        if self.edge == "mirrored":
            a, b = min(a, self.size - 1 - after) if after else a, max(b, before + 1) if before else b
        return Window(a, b, before, after, start - (a - before - self.low), stop - start)

    # Where a rank's part of the result begins, if its part of the operand begins at `edge`, and the other way round.

    def forward(self, edge: int) -> int:
        return (edge * self.scale - self._centre) // self.step

    def backward(self, edge: int) -> int:
        return (edge * self.step + self._centre) // self.scale

    @property
    def _centre(self) -> int:
        """The middle of what a position reads, so that as much is sent up as down; rounded towards zero."""
        return int((self.low + self.high + 1 - self.step) / 2)
