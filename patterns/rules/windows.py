"""Operators on images: convolutions, pools, resizing, patches.

    conv    nc__, oc__, o -> no__       groups = 1 only: with groups the channels of both belong together
    pool    nc__ -> nc__

A convolution that steps by its own kernel or more (patch embedding) is independent along height and width as well: the
factor is the patches, of which each holds `stride` positions of the image (of the result, if transposed). Along others
there is a halo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from paracompile.layout.factors import Factor, Op, Rule, Span, whole
from paracompile.layout.halos import Edge
from paracompile.patterns.rules import halos
from paracompile.patterns.rules.labels import Label, Table, Target, equation, factors_of
from paracompile.patterns.rules.reductions import last

aten = torch.ops.aten


def _convolution(op: Op, transposed: bool) -> list[Factor]:
    image, weight = op.operands[:2]
    (result,) = op.results
    spatial = len(weight) - 2
    batch: list[Label] = ["n"] * (len(image) - spatial - 1)
    rest: list[Label] = [None] * spatial
    channel = "o" if op.arguments["groups"] == 1 else None
    filters: list[Label] = [None, channel] if transposed else [channel, None]
    labels: list[list[Label]] = [[*batch, None, *rest], [*filters, *rest], [channel]]
    factors = factors_of(op, labels[: len(op.operands)], [[*batch, channel, *rest]])
    pixels, patches = (result, image) if transposed else (image, result)
    for axis, kernel in enumerate(weight[2:]):
        dim = len(image) - spatial + axis
        count, stride = patches[dim], _stride_apart(op, axis, kernel)
        if stride and pixels[dim] == count * stride and count > 1 and 0 not in image:
            fine, coarse = Span(dim, 0, count, inner=stride), whole(patches, dim)
            operand, out = (coarse, fine) if transposed else (fine, coarse)
            factors.append(Factor(count, (operand, *[None] * (len(op.operands) - 1)), (out,)))
    return factors + (halos.transposed_convolution(op) if transposed else halos.convolution(op))


def _stride_apart(op: Op, axis: int, kernel: int) -> int:
    """The stride along a spatial dimension if windows neither overlap nor reach over the edge, otherwise 0."""
    padding = op.arguments["padding"]
    if isinstance(padding, str):
        padding = 0 if padding == "valid" else kernel - 1
    stride, padding, dilation = (
        value if isinstance(value, int) else value[axis if len(value) > 1 else 0]
        for value in (op.arguments["stride"], padding, op.arguments["dilation"])
    )
    return stride if padding == 0 and (kernel - 1) * dilation < stride else 0


def _pixel_shuffle(op: Op) -> list[Factor]:
    """`...(c r r') h w -> ... c (h r) (w r')`, where cutting stays outermost in each merged dimension."""
    operand = op.operands[0]
    rank, scale = len(operand), op.arguments["upscale_factor"]
    labels: list[Label] = [*range(rank - 3), None, None, None]
    factors = factors_of(op, [labels], [labels])
    for dim, inner, inner_out in ((rank - 3, scale * scale, 1), (rank - 2, 1, scale), (rank - 1, 1, scale)):
        size = operand[dim] // inner
        if size > 1 and 0 not in operand:
            factors.append(Factor(size, (Span(dim, 0, size, inner=inner),), (Span(dim, 0, size, inner=inner_out),)))
    return factors


def _pixel_unshuffle(op: Op) -> list[Factor]:
    """`... c (h r) (w r') -> ...(c r r') h w`, the inverse."""
    operand = op.operands[0]
    rank, scale = len(operand), op.arguments["downscale_factor"]
    labels: list[Label] = [*range(rank - 3), None, None, None]
    factors = factors_of(op, [labels], [labels])
    for dim, inner, inner_out in ((rank - 3, 1, scale * scale), (rank - 2, scale, 1), (rank - 1, scale, 1)):
        size = operand[dim] // inner
        if size > 1 and 0 not in operand:
            factors.append(Factor(size, (Span(dim, 0, size, inner=inner),), (Span(dim, 0, size, inner=inner_out),)))
    return factors


def _columns(spatial: int) -> Rule:
    """im2col and col2im, whose one side has the kernel's positions merged into the channels: `n c _ _ -> n (c k) _`."""

    def factors(op: Op) -> list[Factor]:
        (operand,), (result,) = op.operands, op.results
        channel = len(operand) - 1 - spatial
        channels = min(operand[channel], result[channel])
        labels: list[list[Label]] = [["n"] * channel + [None] * (len(shape) - channel) for shape in (operand, result)]
        listed = factors_of(op, labels[:1], labels[1:])
        if channels > 1 and 0 not in operand:
            span, span_out = (Span(channel, 0, channels, inner=x[channel] // channels) for x in (operand, result))
            listed.append(Factor(channels, (span,), (span_out,)))
        return listed

    return Rule(factors)


def _grid_sampler(op: Op) -> list[Factor]:
    return equation("nc__,nhw_->nchw" if len(op.operands[0]) == 4 else "nc___,ndhw_->ncdhw")(op)


def _resized(spatial: int, factors: Callable[[int], halos.Factors]) -> Rule:
    mixed, scaled = last(spatial).factors, factors(spatial)
    return Rule(lambda op: [*mixed(op), *scaled(op)], on_window=halos.on_resized_window, copies=True)


def _pool(spatial: int, outside: float) -> Rule:
    mixed, windows = last(spatial).factors, halos.pool(spatial, outside)
    return Rule(lambda op: [*mixed(op), *windows(op)], on_window=halos.on_pooled_window(spatial))


def _edge_pad(spatial: int, edge: Edge) -> Rule:
    mixed, padded = last(spatial).factors, halos.edge_padding(edge)
    return Rule(lambda op: [*mixed(op), *padded(op)], on_window=halos.on_padded_window("padding"), copies=True)


_CONVOLUTION = Rule(lambda op: _convolution(op, False), on_window=halos.on_unpadded_window)
_TRANSPOSED = Rule(lambda op: _convolution(op, True), on_window=lambda op, halo, window: {})
_NEAREST: dict[int, list[Target]] = {
    1: [aten.upsample_nearest1d.default, aten.upsample_nearest1d.vec],
    2: [
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
        aten._upsample_nearest_exact2d.default,
        aten._upsample_nearest_exact2d.vec,
    ],
    3: [
        aten.upsample_nearest3d.default,
        aten.upsample_nearest3d.vec,
        aten._upsample_nearest_exact3d.default,
        aten._upsample_nearest_exact3d.vec,
    ],
}
_LINEAR: dict[int, list[Target]] = {
    1: [aten.upsample_linear1d.default, aten.upsample_linear1d.vec],
    2: [aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec],
    3: [aten.upsample_trilinear3d.default, aten.upsample_trilinear3d.vec],
}
_POOLS: dict[int, tuple[Target, Target]] = {
    1: (aten.avg_pool1d.default, aten.max_pool1d.default),
    2: (aten.avg_pool2d.default, aten.max_pool2d.default),
    3: (aten.avg_pool3d.default, aten.max_pool3d.default),
}
_PADS: dict[Target, tuple[int, Edge]] = {
    aten.reflection_pad1d.default: (1, "mirrored"),
    aten.reflection_pad2d.default: (2, "mirrored"),
    aten.reflection_pad3d.default: (3, "mirrored"),
    aten.replication_pad1d.default: (1, "repeated"),
    aten.replication_pad2d.default: (2, "repeated"),
    aten.replication_pad3d.default: (3, "repeated"),
}
_PLANES: dict[int, list[Target]] = {
    1: [aten.adaptive_avg_pool1d.default],
    2: [
        aten.adaptive_avg_pool2d.default,
        aten._upsample_bilinear2d_aa.default,
        aten._upsample_bilinear2d_aa.vec,
        aten.upsample_bicubic2d.default,
        aten.upsample_bicubic2d.vec,
    ],
    3: [aten.adaptive_avg_pool3d.default],
}

RULES: Table = {
    **dict.fromkeys(
        [
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
        ],
        _CONVOLUTION,
    ),
    **{
        by_name: replace(_CONVOLUTION, window_target=in_numbers)
        for by_name, in_numbers in (
            (aten.conv1d.padding, aten.conv1d.default),
            (aten.conv2d.padding, aten.conv2d.default),
            (aten.conv3d.padding, aten.conv3d.default),
        )
    },
    **dict.fromkeys(
        [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input], _TRANSPOSED
    ),
    aten.convolution.default: Rule(
        lambda op: _convolution(op, bool(op.arguments["transposed"])),
        on_window=lambda op, halo, window: (
            {} if op.arguments["transposed"] else halos.on_unpadded_window(op, halo, window)
        ),
    ),
    **{target: last(count) for count, targets in _PLANES.items() for target in targets},
    **{target: _resized(count, halos.nearest) for count, targets in _NEAREST.items() for target in targets},
    **{target: _resized(count, halos.linear) for count, targets in _LINEAR.items() for target in targets},
    **{
        target: _pool(count, outside)
        for count, targets in _POOLS.items()
        for target, outside in zip(targets, (0.0, float("-inf")), strict=True)
    },
    **{target: _edge_pad(count, edge) for target, (count, edge) in _PADS.items()},
    aten.pixel_shuffle.default: Rule(_pixel_shuffle),
    aten.pixel_unshuffle.default: Rule(_pixel_unshuffle),
    aten.im2col.default: _columns(2),
    aten.col2im.default: _columns(1),
    aten.grid_sampler.default: Rule(_grid_sampler),
}
