"""Where a value comes from through additions and views: what a residual stream is made of.

A walk goes backwards through what joins tokens to others, takes them out again, brings their dimensions into another
order, or adds to them. It notes which part of each value is met, and where some of the positions that it began with
are in it, so that a stream is told from what only has its shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import fx

from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.layout.sizes import hint, sizes_of
from paracompile.torch_private import OpOverload

__all__ = [
    "CUTS",
    "KEEPS",
    "REARRANGES",
    "Window",
    "covers",
    "origins",
    "residual_sources",
    "shape_of",
    "size_of",
    "steps",
]

aten = torch.ops.aten

KEEPS = {aten.clone.default, aten._to_copy.default, aten.clamp.default, aten.nan_to_num.default, aten.alias.default}
REARRANGES = {aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim}
CUTS = {aten.split.Tensor, aten.split_with_sizes.default}

Window = tuple[int, int, int] | None
"""A part of a value: dimension, first position and length; None for all of it."""

Places = tuple[int | None, ...]
"""Where some positions of a value, counted through all its dimensions, are in another; None: in none of it."""


def residual_sources(value: fx.Node, inside: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The values outside that `value` is the sum of, position by position, beside what was added inside."""
    places = _some_places(value)
    windows: dict[fx.Node, list[Window]] = {}
    for node, window, origin in origins(value, inside, places=places):
        if _alike(node, value) and _stay(places, origin):
            windows.setdefault(node, []).append(window)
    return [node for node, taken in windows.items() if _cover(node, taken)]


def origins(
    value: fx.Node, inside: Callable[[fx.Node], bool], part: Window = None, places: Places = ()
) -> list[tuple[fx.Node, Window, Places]]:
    """The values not inside that `value` (or a part of it) comes from, which parts of them, and where `places` were."""
    found: list[tuple[fx.Node, Window, Places]] = []
    seen: set[tuple[fx.Node, Window]] = set()
    waiting: list[tuple[fx.Node, Window, Places]] = [(value, part, places)]
    while waiting:
        node, window, now = waiting.pop()
        if (node, window) in seen:
            continue
        seen.add((node, window))
        if node.op == "placeholder" or not inside(node):
            if node is not value:
                found.append((node, window, now))
            continue
        waiting.extend((source, taken, _places_before(node, source, now)) for source, taken in steps(node, window))
    return found


def steps(node: fx.Node, window: Window) -> list[tuple[fx.Node, Window]]:
    """Where the stream comes from in one node."""
    if node.target is operator.getitem:
        return _step_of_part(node, window)
    if not isinstance(node.target, OpOverload) or not is_tensor(node):
        return []
    arguments = named_arguments(node)
    operands = [source for source in node.all_input_nodes if is_tensor(source)]
    same = [(source, window) for source in operands if shape_of(source) == shape_of(node)]
    if node.target in KEEPS or (node.target is aten.reshape.default and same):
        return same
    if node.target in REARRANGES:
        return [(arguments["self"], None)] if window is None else []
    if node.target is aten.add.Tensor and arguments["alpha"] == 1:
        return same
    if node.target is aten.slice.Tensor and arguments["step"] == 1 and window is None:
        source, dim = arguments["self"], arguments["dim"] % len(shape_of(node))
        start = arguments["start"] or 0
        first = max(0, start + shape_of(source)[dim] if start < 0 else start)
        return [(source, (dim, first, shape_of(node)[dim]))]
    if node.target is aten.cat.default:
        return _steps_of_cat(arguments["tensors"], arguments["dim"] % len(shape_of(node)), window)
    return []


def _step_of_part(node: fx.Node, window: Window) -> list[tuple[fx.Node, Window]]:
    """A `getitem` of a split takes a window of what is split."""
    split, index = node.args
    if window is not None or not isinstance(split, fx.Node) or split.target not in CUTS:
        return []
    arguments = named_arguments(split)
    dim = arguments["dim"] % len(shape_of(node))
    lengths = [sizes_of(part)[dim] for part in split.meta["val"]]
    assert isinstance(index, int)
    return [(arguments["self"], (dim, sum(lengths[:index]), lengths[index]))]


def _steps_of_cat(parts: Sequence[fx.Node], dim: int, window: Window) -> list[tuple[fx.Node, Window]]:
    if window is None or window[0] != dim:
        return [(part, window) for part in parts] if window is None else []
    start = 0
    for part in parts:
        length = shape_of(part)[dim]
        if window[1:] == (start, length):
            return [(part, None)]
        start += length
    return []


def covers(node: fx.Node, window: Window) -> bool:
    """Whether a window takes in the whole value."""
    return window is None or window[1:] == (0, shape_of(node)[window[0]])


def _cover(node: fx.Node, windows: Sequence[Window]) -> bool:
    """Whether windows along one dimension together take in the whole value."""
    if any(covers(node, window) for window in windows):
        return True
    parts = sorted(window for window in windows if window is not None)
    end = 0
    for dim, first, length in parts:
        if dim != parts[0][0] or first > end:
            return False
        end = max(end, first + length)
    return bool(end == shape_of(node)[parts[0][0]])


def _some_places(value: fx.Node) -> Places:
    """Positions enough to tell whether a value lies in another order."""
    return tuple(number * 0x9E3779B1 % max(1, size_of(value)) for number in range(64))


def _stay(places: Places, origin: Places) -> bool:
    """Whether what comes from `origin` lies where it was."""
    return all(before in (None, place) for place, before in zip(places, origin, strict=True))


def _places_before(node: fx.Node, source: fx.Node, places: Places) -> Places:
    """Where positions of what a node makes of `source` are in it."""
    if node.target in (aten.transpose.int, aten.permute.default):
        order = _order(node)
        start = [0] * len(order)
    elif size_of(source) == size_of(node):
        return places
    else:
        order = list(range(len(shape_of(node))))
        start = _start_in(node, source)
    before, after = _strides(_first_shape(source)), _strides(_first_shape(node))

    def moved(place: int | None) -> int | None:
        if place is None:
            return None
        at = [place // stride % size for stride, size in zip(after, _first_shape(node), strict=True)]
        there = {origin: at[dim] + start[dim] for dim, origin in enumerate(order)}
        inside = all(0 <= there[dim] < size for dim, size in enumerate(_first_shape(source)))
        return sum(there[dim] * stride for dim, stride in enumerate(before)) if inside else None

    return tuple(map(moved, places))


def _order(node: fx.Node) -> list[int]:
    """For each dimension of a permuted value which one it was."""
    arguments, rank = named_arguments(node), len(shape_of(node))
    order = [dim % rank for dim in arguments.get("dims", range(rank))]
    if node.target is aten.transpose.int:
        one, other = arguments["dim0"] % rank, arguments["dim1"] % rank
        order[one], order[other] = other, one
    return order


def _start_in(node: fx.Node, source: fx.Node) -> list[int]:
    """Where in `source` a part of it begins, or what it is joined to: before its own beginning."""
    start = [0] * len(shape_of(node))
    if node.target is aten.cat.default:
        arguments = named_arguments(node)
        dim, parts = arguments["dim"] % len(start), arguments["tensors"]
        start[dim] = -sum(_first_shape(part)[dim] for part in parts[: parts.index(source)])
    for _, window in steps(node, None):
        if window is not None:
            start[window[0]] = hint(window[1])
    return start


def _strides(shape: Sequence[int]) -> list[int]:
    """How far apart neighbours along each dimension are, where all positions are counted."""
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return is_tensor(node) and shape_of(node) == shape_of(other) and node.meta["val"].dtype == other.meta["val"].dtype


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return sizes_of(node.meta["val"])


def _first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape at the first call, in which places are counted."""
    return tuple(map(hint, shape_of(node)))


def size_of(node: fx.Node) -> int:
    """How many positions a value has at the first call."""
    return prod(_first_shape(node))
