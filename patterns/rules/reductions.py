"""Operators that mix some dimensions of one operand and leave the others alone.

Means, norms, softmax, cumulative sums, sorting, flips, pads, transforms and pools differ only in which dimensions they
mix, and in whether those survive (`keepdim`), which the result's shape tells: `i_ -> i_` or `i_ -> i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from paracompile.layout.factors import Factor, Local, Op, Rule, whole
from paracompile.patterns.rules import halos
from paracompile.patterns.rules.labels import (
    Table,
    Target,
    aligned,
    dim_of,
    dims_of,
    dropping,
    equation,
    factors_of,
    mixing,
    sums_of,
)

aten = torch.ops.aten


def spare(op: Op, dims: Iterable[int]) -> list[Factor]:
    """The dimensions of the first operand other than `dims`; further operands are weights and stay whole."""
    operand, dims = op.operands[0], set(dims)
    labels = mixing(range(len(operand)), dims)
    results = [labels if len(shape) == len(operand) else dropping(labels, dims) for shape in op.results]
    if any(len(labels) != len(shape) for labels, shape in zip(results, op.results, strict=True)):
        return []  # a whole reduction
    return factors_of(op, [labels], results)


def along(name: str) -> Rule:
    """Mixes the dimensions that the argument `name` gives."""
    return Rule(lambda op: spare(op, dims_of(op, name, len(op.operands[0]))))


def last(count: int) -> Rule:
    """Mixes the last `count` dimensions."""
    return Rule(lambda op: spare(op, range(len(op.operands[0]))[-count:]))


def _summed(op: Op) -> list[Factor]:
    """Sums and means over some dimensions, or all of them."""
    operand = op.operands[0]
    dims = dims_of(op, "dim", len(operand))
    labels = range(len(operand))
    return spare(op, dims) + sums_of(op, [labels], [label for label in labels if label not in dims])


def _normalised(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    return spare(op, range(rank - len(op.arguments["normalized_shape"]), rank))


def _group_norm(op: Op) -> list[Factor]:
    """Rows are independent; pixels of one share the moments of each group."""
    image = op.operands[0]
    others = (None,) * (len(op.operands) - 1)
    pixels = [whole(image, dim) for dim in range(2, len(image)) if image[dim] > 1 and 0 not in image]
    shared = [Factor(span.length, (span, *others), (span,), reduces=True) for span in pixels]
    return spare(op, range(1, len(image))) + shared


def _native_group_norm(op: Op) -> list[Factor]:
    operand = op.operands[0]
    return factors_of(
        op, [mixing(range(len(operand)), range(1, len(operand)))], [(0, *[None] * (len(operand) - 1)), (0, 1), (0, 1)]
    )


def _local_group_norm(op: Op, local: Local) -> dict[str, Any]:
    return {"N": local.operands[0][0]}


def _batch_norm(op: Op) -> list[Factor]:
    """With stored statistics all is elementwise, with one weight for each channel."""
    if op.arguments["training"]:
        return []
    labels = range(len(op.operands[0]))
    return factors_of(op, [labels, *[(1,)] * (len(op.operands) - 1)], [labels])


def _padded(factors: halos.Factors) -> Rule:
    def all_factors(op: Op) -> list[Factor]:
        rank, pad = len(op.operands[0]), op.arguments["pad"]
        return spare(op, [rank - 1 - index // 2 for index, width in enumerate(pad) if width != 0]) + factors(op)

    return Rule(all_factors, on_window=halos.on_padded_window("pad"), copies=True)


def _transform(sizes: str) -> Rule:
    """n-dimensional transforms: without `dim` they take the last ones, as many as there are sizes."""

    def factors(op: Op) -> list[Factor]:
        rank = len(op.operands[0])
        if op.arguments["dim"] is None and op.arguments[sizes] is not None:
            return spare(op, range(rank - len(op.arguments[sizes]), rank))
        return spare(op, dims_of(op, "dim", rank))

    return Rule(factors)


def _unfold(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    labels = mixing(range(rank), {dim_of(op, "dimension", rank)})
    return factors_of(op, [labels], [(*labels, None)])


def _paired(drop: bool) -> Callable[[Op], list[Factor]]:
    """Two operands that broadcast, mixed along `dim`."""

    def factors(op: Op) -> list[Factor]:
        rank = max(map(len, op.operands))
        dim = dim_of(op, "dim", rank) - rank
        operands = [[None if label == dim else label for label in aligned(shape)] for shape in op.operands]
        labels = range(-rank, 0)
        result = [label for label in labels if label != dim] if drop else [None if x == dim else x for x in labels]
        return factors_of(op, operands, [result])

    return factors


_SUMS: list[Target] = [aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default]
_REDUCTIONS: list[Target] = [
    aten.nansum.default,
    aten.nanmean.default,
    aten.prod.dim_int,
    aten.amax.default,
    aten.amin.default,
    aten.aminmax.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.all.dims,
    aten.count_nonzero.dim_IntList,
    aten.var.dim,
    aten.var.correction,
    aten.std.dim,
    aten.std.correction,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.logsumexp.default,
    aten.median.dim,
    aten.linalg_vector_norm.default,
    aten.linalg_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
]
_SCANS: list[Target] = [
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.topk.default,
    aten.glu.default,
    aten._fft_c2c.default,
    aten._fft_r2c.default,
    aten._fft_c2r.default,
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_rfft.default,
    aten.fft_irfft.default,
    aten.fft_fftshift.default,
    aten.fft_ifftshift.default,
]

RULES: Table = {
    **dict.fromkeys(_SUMS, Rule(_summed)),
    **dict.fromkeys(_REDUCTIONS + _SCANS, along("dim")),
    **dict.fromkeys([aten.flip.default, aten.roll.default], along("dims")),
    **dict.fromkeys([aten.triu.default, aten.tril.default], last(2)),
    **dict.fromkeys(
        [
            aten.fft_fftn.default,
            aten.fft_ifftn.default,
            aten.fft_rfftn.default,
            aten.fft_irfftn.default,
            aten.fft_fft2.default,
            aten.fft_ifft2.default,
            aten.fft_rfft2.default,
            aten.fft_irfft2.default,
        ],
        _transform("s"),
    ),
    **dict.fromkeys(
        [aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default, aten._fused_rms_norm.default],
        Rule(_normalised),
    ),
    aten.group_norm.default: Rule(_group_norm),
    aten.native_group_norm.default: Rule(_native_group_norm, _local_group_norm),
    aten.batch_norm.default: Rule(_batch_norm),
    aten.constant_pad_nd.default: _padded(halos.constant_padding),
    aten.pad.default: _padded(halos.any_padding),
    aten.unfold.default: Rule(_unfold),
    aten.cosine_similarity.default: Rule(_paired(drop=True)),
    aten.linalg_cross.default: Rule(_paired(drop=False)),
    aten.bucketize.Tensor: Rule(equation("...,_->...")),
}
