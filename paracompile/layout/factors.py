"""Factor notation: what an operator does with each of the independent index ranges that run through it.

After XLA's Shardy (https://openxla.org/shardy/propagation): an operator is described by *factors*. In
`linear: (*b, k), (j, k) -> (*b, j)` every `b` and `j` is a factor at whose positions the operator works
independently, so it may be cut over ranks; over `k` it sums, so that ranks may do so over their part of it and add up
what they have. A `Rule` lists the factors that may be cut, for concrete shapes; whatever it does not list is mixed or
unknown, and is gathered before the operator runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paracompile.layout.halos import Halo, Window
from paracompile.layout.sizes import divides
from paracompile.torch_private import OpOverload

Shape = tuple[int, ...]
"""Sizes may be open (`layout.sizes`)."""


@dataclass(frozen=True)
class Span:
    """Where a factor sits in one operand or result.

    Dimension `dim` has the size `outer * length * inner` (row-major) and holds the factor's positions
    `[start, start + length)`. `outer` and `inner` are above 1 where a reshape merged the factor with its neighbours;
    a window smaller than the factor is what `cat`, `split` and `slice` have.
    """

    dim: int
    start: int
    length: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Factor:
    """One index range along which an operator works independently.

    attributes:
        size: the number of positions.
        operands: for each tensor operand its span, or None where the factor is absent (broadcast, a weight): such an
            operand must be whole on every rank.
        results: for each result its span; none where it `sums`.
        halo: a position of the result needs the first operand's positions around it; the spans are then whole
            dimensions, and of different lengths where the operator pads or scales.
        reduces: all positions share moments (mean and variance), which the ranks put together.
        sums: the result lacks this range, over which it is the sum or the mean; ranks add up those of their parts.
        exchanges: for each operand the range of its own along which it is cut as well, though each position needs all
            of it, so that ranks exchange it (attention's keys and values); none where there is no such operand.
    """

    size: int
    operands: tuple[Span | None, ...]
    results: tuple[Span, ...]
    halo: Halo | None = None
    reduces: bool = False
    sums: bool = False
    exchanges: tuple[Span | None, ...] = ()

    @property
    def is_independent(self) -> bool:
        """Whether a rank needs nothing of the others."""
        return self.halo is None and not self.reduces and not self.sums and not self.exchanges


@dataclass(frozen=True)
class Op:
    """An operator applied to concrete shapes: all that a rule may look at.

    attributes:
        target: the ATen overload.
        arguments: every argument by its name in the schema, defaults filled in; tensors stand as `Operand`.
        operands: shapes of the tensors among the arguments, in the schema's order (lists are flattened).
        results: shapes of the tensors that come out.
        dtypes: of the operands; a mask used as an index looks up otherwise than integers.
    """

    target: OpOverload[..., Any]
    arguments: dict[str, Any]
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]

    def shape(self, name: str) -> Shape:
        """The shape of the tensor argument `name`."""
        argument = self.arguments[name]
        if not isinstance(argument, Operand):
            raise TypeError(f"{self.target}: argument {name!r} is not a tensor")
        return self.operands[argument.index]


@dataclass(frozen=True)
class Operand:
    """Stands in `Op.arguments` for the tensor operand with this index."""

    index: int


@dataclass(frozen=True)
class Local:
    """The shapes one rank works on, given to `Rule.localise`.

    attributes:
        operands, results: local shapes, in the order of `Op.operands` and `Op.results`.
        operand_starts, result_starts: where the local part of each span's window begins among the rank's positions of
            the factor (0 where the span has no window or is not cut), in elements of the span's dimension. For a
            result of `slice` that is the local `start`.
    """

    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    operand_starts: tuple[int, ...]
    result_starts: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """What may be cut in an operator, and how its size arguments read on a rank.

    attributes:
        factors: lists the factors that may be cut, for the shapes and arguments of `op`.
        localise: the arguments (by name) whose values must change on a rank, given the local shapes; None where no
            argument holds a size.
        local_target: the overload to call on a rank, where it is another one (`split` into equal parts becomes
            `split_with_sizes`); then `localise` must give all of its non-tensor arguments.
        on_window: the arguments that change where a rank calls the operator on a window of its first operand
            (`Factor.halo`); for operators without such factors None.
        window_target: the overload that is called on a window, where it is another one (padding by a name becomes
            padding in numbers).
        copies: whether the operator only copies what it reads, so that a rank may as well make its neighbours' edges.
    """

    factors: Callable[[Op], Sequence[Factor]]
    localise: Callable[[Op, Local], dict[str, Any]] | None = None
    local_target: OpOverload[..., Any] | None = None
    on_window: Callable[[Op, Halo, Window], dict[str, Any]] | None = None
    window_target: OpOverload[..., Any] | None = None
    copies: bool = False


def whole(shape: Shape, dim: int) -> Span:
    """The span of a factor that is all of dimension `dim`."""
    return Span(dim % len(shape), 0, shape[dim])


@dataclass(frozen=True)
class Place:
    """Where the token factor sits in a value: dimension `dim` of size `before + outer * length * inner + after`.

    Margins (`before`, `after`, only where `outer` is 1) are what padding adds at the edges of an image, to the parts of
    the first and the last rank; below zero they are what a convolution without padding takes away there.
    """

    dim: int
    length: int
    outer: int = 1
    inner: int = 1
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """The size of the dimension."""
        return self.before + self.outer * self.length * self.inner + self.after

    @property
    def has_margins(self) -> bool:
        return self.before != 0 or self.after != 0


def within(place: Place, span: Span, size: int) -> Place | None:
    """`place`, found in a value, as a place in the factor itself, or None if the factor does not contain it.

    The factor is taken as a value of one dimension with `size` positions. A place that is only a part of the factor
    (a merged dimension that passes through unsplit) keeps its `outer` and `inner`; a window is only meaningful for a
    place that is outermost in the factor.
    """
    if place.dim != span.dim or not (divides(span.outer, place.outer) and divides(span.inner, place.inner)):
        return None
    outer, inner = place.outer // span.outer, place.inner // span.inner
    if place.has_margins:
        before, after = place.before // span.inner, place.after // span.inner
        token = Place(0, place.length, outer, inner, before, after)
        exact = place.before == before * span.inner and place.after == after * span.inner
        return token if exact and span.outer == 1 and token.size == span.length == size else None
    if outer * place.length * inner != span.length:
        return None
    if span.length == size:
        return Place(0, place.length, outer, inner)
    if outer != 1 or not (divides(inner, size) and divides(inner, span.start)):
        return None
    return Place(0, size // inner, 1, inner)


def project(token: Place, span: Span, size: int) -> Place | None:
    """The inverse of `within`: where `token`, a place in the factor, sits in the value that `span` describes."""
    if token.has_margins and (span.outer != 1 or span.length != size):
        return None
    if span.length == size:
        length = token.length
    elif token.outer == 1 and divides(token.inner, span.length) and divides(token.inner, span.start):
        length = span.length // token.inner
    else:
        return None
    margins = token.before * span.inner, token.after * span.inner
    return Place(span.dim, length, span.outer * token.outer, span.inner * token.inner, *margins)
