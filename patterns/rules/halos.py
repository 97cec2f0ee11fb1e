"""Halos: what convolutions, pools, padding, slices and resizing read beside a position (`paracompile.layout.halos`).

Spatial dimensions come last, so axis 0 of an operator on images of two is the third dimension of four. What is not
described here (aligned corners, sizes that are no multiples, rounding up) has no factor: its operand is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paracompile.layout.factors import Factor, Op, whole
from paracompile.layout.halos import Edge, Halo, Window

Factors = Callable[[Op], list[Factor]]


def factor_of(op: Op, halo: Halo) -> Factor:
    """The factor of an operator whose first operand is read as `halo` says; the others stay whole."""
    others = (None,) * (len(op.operands) - 1)
    operand, result = whole(op.operands[0], halo.dim), whole(op.results[0], halo.dim)
    return Factor(halo.size_out, (operand, *others), (result,), halo)


def along(op: Op, dim: int, **how: Any) -> list[Factor]:
    """The factor along `dim`, if there is anything to cut."""
    size, size_out = op.operands[0][dim], op.results[0][dim]
    return [factor_of(op, Halo(dim, size, size_out, **how))] if size > 1 and size_out > 1 else []


def at(argument: Any, axis: int, default: Any = None) -> Any:
    """A spatial argument's value for one axis: given for all at once, or one by one."""
    if argument is None or argument == []:
        return default
    if isinstance(argument, (list, tuple)):
        return argument[axis if len(argument) > 1 else 0]
    return argument


def instead(argument: Any, axis: int, count: int, value: Any) -> list[Any]:
    """A spatial argument of `count` axes, with another value for one of them."""
    return [value if number == axis else at(argument, number) for number in range(count)]


# Convolutions and pools


def convolution(op: Op) -> list[Factor]:
    """A convolution along each spatial dimension in which its windows reach over to the neighbours."""
    image, weight = op.operands[:2]
    spatial = len(weight) - 2
    padding = _in_numbers(op)
    factors = []
    for axis, kernel in enumerate(weight[2:] if padding is not None else ()):
        stride, dilation = at(op.arguments["stride"], axis), at(op.arguments["dilation"], axis)
        before = at(padding, axis)
        dim = len(image) - spatial + axis
        if (kernel, stride, before) != (1, 1, 0):
            factors += along(op, dim, step=stride, low=-before, high=dilation * (kernel - 1) - before)
    return factors


def _in_numbers(op: Op) -> list[int] | None:
    """A convolution's padding, also where it is given by name; None where that pads more at one side than the other."""
    padding, kernels = op.arguments["padding"], op.operands[1][2:]
    if not isinstance(padding, str):
        return [at(padding, axis) for axis in range(len(kernels))]
    if padding == "valid":
        return [0] * len(kernels)
    both = [at(op.arguments["dilation"], axis) * (kernel - 1) for axis, kernel in enumerate(kernels)]
    return [each // 2 for each in both] if all(each % 2 == 0 for each in both) else None


def transposed_convolution(op: Op) -> list[Factor]:
    """What a position is made of in a transposed convolution whose windows overlap."""
    image, weight = op.operands[:2]
    spatial = len(weight) - 2
    factors = []
    for axis, kernel in enumerate(weight[2:]):
        stride, padding = at(op.arguments["stride"], axis), at(op.arguments["padding"], axis)
        reach = at(op.arguments["dilation"], axis) * (kernel - 1)
        if reach >= padding + stride - 1:
            low = padding - reach + stride - 1
            dim = len(image) - spatial + axis
            factors += along(op, dim, scale=stride, low=low, high=padding, edge="clipped")
    return factors


def on_unpadded_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
    """What the operator pads along the halo is in the window already."""
    padding = _in_numbers(op)
    assert padding is not None
    spatial = len(padding)
    return {"padding": instead(padding, halo.dim - (len(op.operands[0]) - spatial), spatial, 0)}


def pool(spatial: int, outside: float) -> Factors:
    """A pool, of which what lies outside counts as `outside`: 0 in a mean that counts it, -inf in a maximum."""

    def factors(op: Op) -> list[Factor]:
        if op.arguments["ceil_mode"]:
            return []
        found = []
        for axis in range(spatial):
            kernel, padding = at(op.arguments["kernel_size"], axis), at(op.arguments["padding"], axis)
            stride, dilation = at(op.arguments["stride"], axis, kernel), at(op.arguments.get("dilation"), axis, 1)
            if padding == 0 or op.arguments.get("count_include_pad", True):
                dim = len(op.operands[0]) - spatial + axis
                high = dilation * (kernel - 1) - padding
                found += along(op, dim, step=stride, low=-padding, high=high, value=outside)
        return found

    return factors


def on_pooled_window(spatial: int) -> Callable[[Op, Halo, Window], dict[str, Any]]:
    def on_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
        axis = halo.dim - (len(op.operands[0]) - spatial)
        return {"padding": instead(op.arguments["padding"], axis, spatial, 0)}

    return on_window


# Padding and slices


def constant_padding(op: Op) -> list[Factor]:
    rank, pad = len(op.operands[0]), list(op.arguments["pad"])
    return _padding(op, pad + [0] * (2 * rank - len(pad)), "padded", op.arguments["value"] or 0.0)


def any_padding(op: Op) -> list[Factor]:
    """`aten.pad`, of any mode but the circular one."""
    if op.arguments["mode"] == "constant":
        return constant_padding(op)
    edges: dict[str, Edge] = {"replicate": "repeated", "reflect": "mirrored"}
    edge = edges.get(op.arguments["mode"])
    return _padding(op, op.arguments["pad"], edge) if edge else []


def edge_padding(edge: Edge) -> Factors:
    """`reflection_pad` and `replication_pad`."""
    return lambda op: _padding(op, op.arguments["padding"], edge)


def _padding(op: Op, pad: Sequence[int], edge: Edge, value: float = 0.0) -> list[Factor]:
    rank = len(op.operands[0])
    factors = []
    for index in range(0, len(pad), 2):
        before, after = pad[index : index + 2]
        if edge == "padded" or min(before, after) >= 0:
            factors += along(op, rank - 1 - index // 2, low=-before, high=-before, edge=edge, value=value)
    return factors


def on_padded_window(name: str) -> Callable[[Op, Halo, Window], dict[str, Any]]:
    """The first and the last rank pad, and only as much as belongs to their part."""

    def on_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
        pad = list(op.arguments[name])
        index = 2 * (len(op.operands[0]) - 1 - halo.dim)
        pad += [0] * (index + 2 - len(pad))
        pad[index : index + 2] = [window.before, window.after]
        return {name: pad}

    return on_window


def slices(op: Op, dim: int, start: int, step: int) -> list[Factor]:
    return along(op, dim, step=step, low=start, high=start)


def on_sliced_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
    return {"start": 0, "end": window.stop - window.start}


def on_narrowed_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
    return {"start": 0, "length": window.stop - window.start}


# Resizing


def nearest(spatial: int) -> Factors:
    """Each position, so many times."""
    return lambda op: [
        factor for dim, times in _times(op, spatial) for factor in along(op, dim, scale=times, edge="clipped")
    ]


def linear(spatial: int) -> Factors:
    """Between the two positions around its own: (o + 1/2) / f - 1/2."""

    def factors(op: Op) -> list[Factor]:
        if op.arguments["align_corners"]:
            return []
        return [
            factor
            for dim, times in _times(op, spatial)
            for how in [dict(step=2, scale=2 * times, low=1 - times, high=1 + times) if times > 1 else {}]
            for factor in along(op, dim, edge="clipped", **how)
        ]

    return factors


def _times(op: Op, spatial: int) -> list[tuple[int, int]]:
    """The dimensions that are resized by a whole number, and the number."""
    (operand,), (result,) = op.operands, op.results
    found = []
    for axis in range(spatial):
        dim = len(operand) - spatial + axis
        times, rest = divmod(result[dim], operand[dim])
        asked = _asked(op, axis)
        if times and not rest and asked in (None, times):
            found.append((dim, times))
    return found


def _asked(op: Op, axis: int) -> float | None:
    """The scale that was asked for along an axis, if one was."""
    if "scale_factors" in op.arguments:
        return at(op.arguments["scale_factors"], axis)  # type: ignore[no-any-return]
    scales = [value for name, value in op.arguments.items() if name.startswith("scales")]
    return scales[axis]  # type: ignore[no-any-return]


def on_resized_window(op: Op, halo: Halo, window: Window) -> dict[str, Any]:
    sizes = op.arguments["output_size"]
    if sizes is None:
        return {}
    spatial = len(sizes)
    axis = halo.dim - (len(op.operands[0]) - spatial)
    times = halo.size_out // halo.size
    return {"output_size": instead(sizes, axis, spatial, times * (window.stop - window.start))}
