"""Every rule of the table, checked by brute force on sample calls.

Sizes are pairwise different in a call and even where a missing factor should be found; each call is made for two
lengths `s`. The samples have odd strides, negative dimensions and keyword spellings among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rule_check import check, describe
from torch import Tensor

from paracompile.layout.factors import Factor, Local, Op, Rule, Span, whole
from paracompile.patterns.flops import flops
from paracompile.patterns.rules import RULES, rule_for
from paracompile.patterns.rules.pointwise import is_pointwise

pytestmark = pytest.mark.whole

aten = torch.ops.aten
LENGTHS = (4, 10)


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size * 7**place for place, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=dtype)


def odd(*shape: int) -> Tensor:
    """Random values whose dimensions lie in memory in the reverse order, with gaps."""
    return r(*shape[:0:-1], 2 * shape[0]).permute(*range(len(shape) - 1, -1, -1))[::2]


def ints(high: int, *shape: int) -> Tensor:
    return (r(*shape) * 1000).long() % high


def bools(*shape: int) -> Tensor:
    return r(*shape) > 0


def cplx(*shape: int) -> Tensor:
    return torch.complex(r(*shape), r(*shape).flip(0))


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


Sample = tuple[Any, Callable[[int], Call]]
SAMPLES: list[Sample] = []


def sample(build: Callable[[int], Call], *targets: Any) -> None:
    SAMPLES.extend((target, build) for target in targets)


# Elementwise

sample(
    lambda s: call(odd(2, s, 6)),
    *(aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default),
    *(aten.contiguous.default, aten._to_copy.default, aten.zero.default, aten.zeros_like.default),
    *(aten.ones_like.default, aten.empty_like.default, aten.absolute.default, aten.negative.default, aten.fix.default),
    *(aten.arccos.default, aten.arccosh.default, aten.arcsin.default, aten.arcsinh.default, aten.arctan.default),
    *(aten.arctanh.default, aten.hardswish.default, aten.log_sigmoid.default, aten.special_expit.default),
    *(aten.special_exp2.default, aten.special_expm1.default, aten.special_log1p.default, aten.special_erf.default),
    *(aten.special_erfc.default, aten.special_sinc.default, aten.special_round.default, aten.isreal.default),
    *(aten.silu.default, aten.gelu.default, aten.neg.default, aten.reciprocal.default, aten.clone.default),
)
sample(
    lambda s: call(cplx(2, s, 6)),
    *(aten.real.default, aten.imag.default, aten.conj.default, aten._conj.default, aten.resolve_conj.default),
    *(aten.resolve_neg.default, aten.view_as_real.default, aten.abs.default),
)
sample(
    lambda s: call(r(2, s, 6), 2.5),
    *(aten.fill.Scalar, aten.full_like.default, aten.subtract.Scalar, aten.multiply.Scalar, aten.divide.Scalar),
    *(aten.true_divide.Scalar, aten.floor_divide.Scalar, aten.float_power.Tensor_Scalar, aten.greater.Scalar),
    *(aten.greater_equal.Scalar, aten.less.Scalar, aten.less_equal.Scalar, aten.not_equal.Scalar, aten.mul.Scalar),
)
sample(
    lambda s: call(odd(2, s, 6), r(s, 1)),
    *(aten.copy.default, aten.subtract.Tensor, aten.rsub.Tensor, aten.multiply.Tensor, aten.divide.Tensor),
    *(aten.floor_divide.default, aten.float_power.Tensor_Tensor, aten.greater.Tensor, aten.greater_equal.Tensor),
    *(aten.less.Tensor, aten.less_equal.Tensor, aten.not_equal.Tensor, aten.special_xlogy.default),
    *(aten.arctan2.default, aten.isclose.default, aten.add.Tensor),
)
sample(
    lambda s: call(r(2, s, 1), r(6)),
    *(aten.add.Tensor, aten.mul.Tensor, aten.complex.default, aten.polar.default, aten.maximum.default, aten.max.other),
)
sample(lambda s: call(r(s, 2, 6), r(s, 2, 6)), aten.copy.default, aten.sub.Tensor, aten.eq.Tensor)
sample(lambda s: call(r(2, s), torch.tensor(3.0)), aten.fill.Tensor)
sample(lambda s: call(2.5, r(2, s, 6)), aten.float_power.Scalar, aten.pow.Scalar)
sample(lambda s: call(r(2, s, 6), r(6), rounding_mode="floor"), aten.divide.Tensor_mode, aten.div.Tensor_mode)
sample(lambda s: call(r(2, s, 6), 0.5, rounding_mode="floor"), aten.divide.Scalar_mode)
sample(lambda s: call(bools(2, s, 6), bools(s, 6)), aten.__and__.Tensor, aten.__or__.Tensor, aten.logical_and.default)
sample(lambda s: call(ints(9, 2, s), 3), aten.__and__.Scalar, aten.__or__.Scalar)
sample(lambda s: call(r(2, s, 6), bools(s, 1), torch.tensor(2.0)), aten.masked_fill.Tensor)
sample(lambda s: call(r(2, s, 6), bools(s, 1), 2.0), aten.masked_fill.Scalar)
sample(lambda s: call(bools(s, 1), r(2, s, 6), r(6)), aten.where.self)
sample(lambda s: call(bools(s, 2), r(6, s, 2), 1.5), aten.where.ScalarOther)
sample(lambda s: call(bools(s, 2), 1.5, r(6, s, 2)), aten.where.ScalarSelf)
sample(lambda s: call(bools(s, 2), 1.5, 2.5), aten.where.Scalar)
sample(
    lambda s: call(r(2, s, 6), 0.5, False),
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.feature_alpha_dropout.default,),
)
sample(lambda s: call(r(2, s, 6), p=0.0, train=True), aten.dropout.default)
sample(lambda s: call([2, s, 8]), aten.zeros.default, aten.ones.default, aten.empty.memory_format)
sample(lambda s: call([s, 6], 1.5), aten.full.default)
sample(lambda s: call(r(2, s, 6), r(2, s, 6, dtype=torch.float64)), aten.type_as.default)
sample(lambda s: call(r(2, s, 6), r(s, 8, dtype=torch.float64)), aten.type_as.default)
sample(lambda s: call(r(2, s, 6, 8), r(s)), aten.prelu.default)
sample(lambda s: call(r(6, s), r(1)), aten.prelu.default)
sample(lambda s: call(r(6, s, 2)), aten.view_as_complex.default)

sample(lambda s: call(odd(2, s, 6), -0.5, 0.5), aten.clamp.default, aten.clip.default)
sample(lambda s: call(r(2, s, 6), decimals=1), aten.round.decimals)
sample(lambda s: call(r(2, s, 6), r(2, s, 6)), aten.gelu_backward.default)

# Views

for before, after in (
    ((2, 6, 10), (12, 10)),
    ((12, 10), (2, 6, 10)),
    ((2, 6, 4, 10), (2, 6, 40)),
    ((2, 6, 40), (2, 6, 4, 10)),
    ((2, 6, 40), (2, 6, -1, 10)),
    ((2, 6, 8), (2, 3, 2, 4, 2)),
    ((4, 6), (6, 4)),
    ((4, 9), (6, 6)),
    ((4, 3), (3, 4)),
    ((1, 6, 1, 4), (6, 4, 1)),
    ((6, 4), (1, 6, 1, 4)),
    ((2, 8, 6), (-1,)),
    ((4, 8), (8, 4)),
):
    targets = [aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.view_copy.default]
    sample(lambda s, shape=before, view=after: call(r(*shape), list(view)), *targets)
sample(lambda s: call(odd(2, s, 6), shape=[2 * s, 6]), aten.reshape.default)
sample(lambda s: call(odd(2, s, 6, 4), 1, -2), aten.flatten.using_ints)
sample(lambda s: call(r(2, s, 6)), aten.ravel.default)
sample(lambda s: call(odd(2, 4 * s, 6), -2, [s, 4]), aten.unflatten.int)
sample(lambda s: call(r(2, s, 12), 2, sizes=[-1, 2]), aten.unflatten.int)
sample(lambda s: call(odd(2, s, 6), -2), aten.unsqueeze.default)
sample(lambda s: call(r(2, s, 1, 6)), aten.squeeze.default)
sample(lambda s: call(r(2, s, 1, 6), -2), aten.squeeze.dim)
sample(lambda s: call(r(2, s, 1, 6), 0), aten.squeeze.dim)
sample(lambda s: call(r(2, s, 1, 6), [0, -2]), aten.squeeze.dims)
sample(lambda s: call(odd(2, s, 6, 8), [0, -2, 1, 3]), aten.permute.default)
sample(lambda s: call(odd(2, s, 6, 8), 1, -1), aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
sample(lambda s: call(odd(s, 6)), aten.t.default)
sample(lambda s: call(r(2, s, 6, 8), 1, -1), aten.movedim.int, aten.moveaxis.int)
sample(lambda s: call(r(2, s, 6, 8), [3, 1], [0, -1]), aten.movedim.intlist, aten.moveaxis.intlist)
sample(lambda s: call(r(2, 1, s), [6, 2, 8, -1]), aten.expand.default)
sample(lambda s: call(r(2, 1, s), [2, 6, s]), aten.expand.default, aten.broadcast_to.default)
sample(lambda s: call(r(2, 1, s), r(8, 2, 6, s)), aten.expand_as.default)
sample(lambda s: call(r(2, s, 6, 8), 1, 1, -1), aten.diagonal.default)
sample(lambda s: call(r(2, s), [4, 1, 6]), aten.repeat.default, aten.tile.default)
sample(lambda s: call(r(1, s, 6), [2, 1, 1]), aten.repeat.default)
sample(lambda s: call(r(2, s, 6), [4]), aten.tile.default)
sample(lambda s: call(r(2, s, 6), 4, dim=-2), aten.repeat_interleave.self_int)
sample(lambda s: call(odd(2, s), 4, 1, output_size=4 * s), aten.repeat_interleave.self_int)
sample(lambda s: call(r(2, s), 3), aten.repeat_interleave.self_int)
sample(lambda s: call(r(1, s), 6, 0), aten.repeat_interleave.self_int)
sample(lambda s: call([r(2), r(s), r(6)]), aten.meshgrid.default)
sample(lambda s: call([r(2), r(s), r(6)], indexing="xy"), aten.meshgrid.indexing)
sample(lambda s: call([r(2), r(s)], indexing="ij"), aten.meshgrid.indexing)

# Joins

CATS = (aten.cat.default, aten.concat.default, aten.concatenate.default)
sample(lambda s: call([odd(2, s, 6), r(2, 8, 6), r(2, 1, 6)], dim=-2), *CATS)
sample(lambda s: call([r(s, 2), r(6, 2)]), *CATS)
sample(lambda s: call([r(2, 0, 6), r(2, s, 6)], 1), *CATS)
sample(lambda s: call([odd(2, s), r(2, s), r(2, s)], dim=-1), aten.stack.default)
sample(lambda s: call(odd(2, s, 12), 5, -1), aten.split.Tensor, aten.unsafe_split.Tensor)
sample(lambda s: call(r(2, s, 12), 3, 2), aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections)
sample(
    lambda s: call(odd(2, s + 8, 6), [s, 8], dim=-2),
    *(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default, aten.split.sizes),
)
sample(lambda s: call(r(2, s + 8, 6), [1, s - 1, 8, 0], 1), aten.split_with_sizes.default)
sample(lambda s: call(r(2, s + 8, 6), [2, s], dim=1), aten.tensor_split.indices)
sample(lambda s: call(r(2, s, 6), dim=-1), aten.unbind.int)
sample(lambda s: call(odd(2, s, 6), -1, 3), aten.select.int)
for bounds in ((2, 9223372036854775807), (0, -2), (None, None), (1, 3), (-3, None), (None, 2, 2), (0, 100)):
    sample(lambda s, bounds=bounds: call(odd(2, s, 6), 1, *bounds), aten.slice.Tensor)
sample(lambda s: call(r(2, s, 6), dim=-2, start=1, end=-1), aten.slice.Tensor)
sample(lambda s: call(r(2, s, 6), -2, 1, 3), aten.narrow.default)
sample(lambda s: call(r(2, s, 6), -2, -2, 2), aten.narrow.default)
sample(lambda s: call(r(2, s + 8, 6), r(2, s, 6), 1, 8), aten.slice_scatter.default)
sample(lambda s: call(odd(2, s, 6), r(2, s - 2, 6), dim=-2, start=1, end=-1), aten.slice_scatter.default)
sample(lambda s: call(r(2, s, 6), r(2, s, 3), 2, 1, 9223372036854775807, 2), aten.slice_scatter.default)
sample(lambda s: call(r(2, s, 6), r(2, s), -1, 3), aten.select_scatter.default)

# Contractions

sample(lambda s: call(odd(2, s, 6), r(8, 6), r(8)), aten.linear.default)
sample(lambda s: call(r(2, s, 6), r(8, 6)), aten.linear.default)
sample(lambda s: call(r(2, s, 6), r(6)), aten.linear.default)
for left, right in (
    ((2, 8, 4, 6), (8, 6, 10)),
    ((2, 8, 6), (6, 10)),
    ((6,), (2, 6, 10)),
    ((2, 8, 6), (6,)),
    ((6,), (6,)),
):
    sample(lambda s, left=left, right=right: call(r(*left), r(*right)), aten.matmul.default)
sample(lambda s: call(r(2, 1, s, 6), r(8, 6, 12)), aten.matmul.default)
sample(lambda s: call(odd(s, 6), r(6, 8)), aten.mm.default)
sample(lambda s: call(ints(5, 32, 16).to(torch.int8), ints(5, 16, 8).to(torch.int8)), aten._int_mm.default)
sample(
    lambda s: call(r(s, 32, dtype=torch.bfloat16), ints(9, 64, 32).to(torch.int8), r(64, dtype=torch.bfloat16)),
    aten._weight_int8pack_mm.default,
)
EIGHT = torch.float8_e4m3fn
sample(
    lambda s: call(
        r(s, 32).to(EIGHT), r(64, 32).to(EIGHT).t(), torch.tensor(2.0), torch.tensor(0.5), out_dtype=torch.float32
    ),
    aten._scaled_mm.default,
)
sample(lambda s: call(r(2, s, 6), r(2, 6, 8)), aten.bmm.default)
sample(lambda s: call(r(8), odd(s, 6), r(6, 8)), aten.addmm.default)
sample(lambda s: call(r(s, 1), r(s, 6), r(6, 8), alpha=2), aten.addmm.default)
sample(lambda s: call(r(s, 1), r(2, s, 6), r(2, 6, 8)), aten.baddbmm.default)
sample(lambda s: call(r(8), r(2, s, 6), r(2, 6, 8)), aten.addbmm.default)
sample(lambda s: call(r(s, 6), r(6)), aten.mv.default)
sample(lambda s: call(r(s), r(s, 6), r(6)), aten.addmv.default)
sample(lambda s: call(r(s), r(s)), aten.dot.default)
sample(lambda s: call(r(s), r(6)), aten.outer.default, aten.ger.default)
sample(lambda s: call(r(1), r(s), r(6)), aten.addr.default)
sample(lambda s: call(r(2, s, 6), r(2, s, 8), r(12, 6, 8), r(12)), aten.bilinear.default)
sample(lambda s: call(r(2, s, 6), r(2, 8, 6)), aten.cdist.default)
sample(lambda s: call("nhwpqc->nchpwq", [r(2, 4, 6, 1, 3, s)]), aten.einsum.default)
sample(lambda s: call("bhqd, bhkd -> bhqk", [r(2, 4, s, 6), r(1, 4, 8, 6)]), aten.einsum.default)
sample(lambda s: call("...i,ij", [r(2, s, 6), r(6, 8)]), aten.einsum.default)
sample(lambda s: call("iij,j->ij", [r(6, 6, s), r(s)]), aten.einsum.default)

# Reductions

REDUCING = (
    *(aten.mean.dim, aten.sum.dim_IntList, aten.nansum.default, aten.nanmean.default, aten.amax.default),
    *(aten.amin.default, aten.any.dims, aten.all.dims, aten.var.dim, aten.std.dim, aten.var_mean.dim),
    *(aten.std_mean.dim, aten.logsumexp.default, aten.count_nonzero.dim_IntList),
)
PLAIN = (aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
ONE_DIM = (
    *(aten.prod.dim_int, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.any.dim),
    *(aten.all.dim, aten.median.dim),
)
SCANS = (
    *(aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default),
    *(aten.sort.default, aten.argsort.default, aten.glu.default, aten.softmax.int, aten.log_softmax.int),
    *(aten._safe_softmax.default,),
)
COUNT = aten.count_nonzero.dim_IntList  # which keeps no dimension
sample(lambda s: call(odd(2, s, 6, 8), [-1, 0]), *REDUCING, *PLAIN)
sample(lambda s: call(r(2, s, 6), [1], keepdim=True), *(each for each in REDUCING if each is not COUNT), *PLAIN)
sample(lambda s: call(odd(2, s, 6), -1), *ONE_DIM)
sample(lambda s: call(r(2, s, 6), dim=1, keepdim=True), *ONE_DIM, aten.aminmax.default)
sample(lambda s: call(r(2, s, 6), []), aten.sum.dim_IntList, aten.amax.default)
sample(lambda s: call(r(2, s, 6)), aten.sum.default, aten.mean.default)
sample(lambda s: call(r(2, s)), aten.argmax.default, aten.linalg_vector_norm.default)
sample(lambda s: call(r(2, s, 6), 2.0, -1), aten.linalg_norm.default)
sample(
    lambda s: call(odd(2, s, 6), 2.0, [-1], True),
    *(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.linalg_norm.default),
)
sample(lambda s: call(odd(2, s, 6), 2.0, [-1], True, dtype=torch.float64), aten.norm.ScalarOpt_dim_dtype)
sample(lambda s: call(odd(2, s, 6), -2), *SCANS)
sample(lambda s: call(r(2, s, 6), dim=2, stable=True), aten.sort.stable)
sample(lambda s: call(r(2, s, 6), -1, False), aten._softmax.default, aten._log_softmax.default)
sample(lambda s: call(r(2, s, 6), 3, -1), aten.topk.default)
sample(lambda s: call(r(2, s, 6), [-1]), aten.flip.default)
sample(lambda s: call(r(2, s, 6), [1, 2], [-1, 1]), aten.roll.default)
sample(lambda s: call(r(2, s, 6), [3]), aten.roll.default)
sample(lambda s: call(odd(2, 8, s, 6), 1), aten.triu.default, aten.tril.default)
sample(lambda s: call(cplx(2, s, 6), [1], 0, True), aten._fft_c2c.default)
sample(lambda s: call(r(2, s, 6), [1], 0, True), aten._fft_r2c.default)
sample(lambda s: call(cplx(2, s, 6), [1], 0, s), aten._fft_c2r.default)
sample(
    lambda s: call(r(2, s, 6), dim=-2),
    *(aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default),
)
sample(lambda s: call(r(2, s, 6), [-1]), aten.fft_fftshift.default, aten.fft_ifftshift.default)
TRANSFORMS = (
    *(aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default),
    *(aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default),
)
sample(lambda s: call(r(2, s, 6, 8), dim=[-1, 1]), *TRANSFORMS)
sample(lambda s: call(r(2, s, 6, 8), s=[4, 4]), *TRANSFORMS)
sample(lambda s: call(odd(2, s, 6), [6], r(6), r(6)), aten.layer_norm.default)
sample(lambda s: call(r(2, s, 6, 8), [6, 8], eps=1e-6), aten.layer_norm.default, aten.rms_norm.default)
sample(lambda s: call(odd(2, s, 6), [6], r(6)), aten.rms_norm.default)
sample(lambda s: call(r(2, s, 6), [6], r(6), None, 1e-5), aten.native_layer_norm.default)
sample(lambda s: call(r(2, s, 6), [6], r(6), 1e-5), aten._fused_rms_norm.default)
sample(lambda s: call(r(4, 6, s, 10), 2, r(6), r(6)), aten.group_norm.default)
sample(lambda s: call(r(4, 6, s), r(6), r(6), 4, 6, s, 2, 1e-5), aten.native_group_norm.default)
sample(lambda s: call(r(2, 6, s), r(6), r(6), r(6), r(6).abs(), False, 0.1, 1e-5, False), aten.batch_norm.default)
sample(lambda s: call(r(2, s, 6), [1, 2]), aten.constant_pad_nd.default)
sample(lambda s: call(r(2, s, 6), [0, 0, 3, -1], 1.5), aten.constant_pad_nd.default)
sample(lambda s: call(r(2, 8, s, 6), [1, 0, 1, 1], mode="reflect"), aten.pad.default)
sample(lambda s: call(r(2, 8, s), [0, 1], "constant", 1.0), aten.pad.default)
sample(lambda s: call(r(2, s, 12), -1, 4, 2), aten.unfold.default)
sample(lambda s: call(r(2, s, 6), r(s, 6), dim=-1), aten.cosine_similarity.default)
sample(lambda s: call(r(2, s, 3), r(1, s, 3), dim=-1), aten.linalg_cross.default)
sample(lambda s: call(odd(2, s), torch.linspace(-2, 2, 7)), aten.bucketize.Tensor)

# Look-ups

sample(lambda s: call(r(12, 6), ints(12, 2, s)), aten.embedding.default)
sample(lambda s: call(r(2, 12, 6), -2, ints(12, s)), aten.index_select.default)
sample(lambda s: call(r(2, 12, 6), 1, ints(12, 2, s, 6)), aten.gather.default)
sample(lambda s: call(r(8, 12, 6), dim=-2, index=ints(12, 4, s, 6)), aten.gather.default)
sample(lambda s: call(r(2, 12, 6), ints(12, 1, s, 6), 1), aten.take_along_dim.default)
sample(lambda s: call(r(2, s), ints(8, 6)), aten.take_along_dim.default)
ROWS = torch.randperm(12, generator=torch.Generator().manual_seed(1))


def rows(s: int) -> Tensor:
    """`s` different rows of 12 for each of two batches and six columns, so that no write meets another."""
    return ROWS[:s].view(1, s, 1).expand(2, s, 6).contiguous()


sample(lambda s: call(r(2, 12, 6), 1, rows(s), r(2, s, 6)), aten.scatter.src, aten.scatter_add.default)
sample(lambda s: call(r(2, 12, 6), 1, rows(s), 1.5), aten.scatter.value)
sample(lambda s: call(r(4, 12, 6), 1, rows(s), r(2, s, 8)), aten.scatter.src)
sample(lambda s: call(r(2, 12, 6), 1, rows(s), r(2, s, 6), "amax"), aten.scatter_reduce.two)
sample(lambda s: call(r(2, 12, 6), -2, ROWS[:s], r(2, s, 6)), aten.index_add.default, aten.index_copy.default)
sample(lambda s: call(r(2, 12, 6), 1, ROWS[:s], 1.5), aten.index_fill.int_Scalar)
sample(lambda s: call(r(2, 12, 6), [None, ints(12, s)]), aten.index.Tensor)
sample(lambda s: call(r(12, 6), [ints(12, 2, s)]), aten.index.Tensor)
sample(lambda s: call(r(2, 12, 14, 6), [None, ints(12, 8, 1), ints(14, s)]), aten.index.Tensor)
sample(lambda s: call(r(12, 2, 14, 6), [ints(12, s), None, ints(14, s)]), aten.index.Tensor)
sample(lambda s: call(r(8, 6), [torch.arange(8) < 6]), aten.index.Tensor)
sample(lambda s: call(r(2, s, 6), [bools(2, s)]), aten.index.Tensor)
sample(lambda s: call(r(2, s, 6, 4), [None, bools(s, 6)]), aten.index.Tensor)
sample(lambda s: call(r(2, s, 6), [bools(2, s)], r()), aten.index_put.default)
sample(lambda s: call(r(2, s, 6), [bools(2, s)], r(6)), aten.index_put.default)
sample(lambda s: call(r(2, s, 6), [None, bools(s, 6)], r(2, 1)), aten.index_put.default)
sample(lambda s: call(r(2, s, 6), [bools(2, s), ints(6, int(bools(2, s).sum()))], r()), aten.index_put.default)
sample(lambda s: call(r(2, s, 6), [None, bools(s)], r(6)), aten.index_put.default)
sample(lambda s: call(r(2, 12, 6), [None, ROWS[:s]], r(s, 6)), aten.index_put.default)
sample(lambda s: call(r(2, 12, 6), [None, ROWS[:s]], r(2, s, 6), True), aten.index_put.default)

# Images

sample(lambda s: call(r(2, 6, s, 12), r(8, 6, 2, 3), r(8), [2, 3]), aten.conv2d.default)
sample(lambda s: call(r(2, 6, s, 12), r(8, 6, 1, 1)), aten.conv2d.default)
sample(lambda s: call(r(2, 6, s, 12), r(8, 6, 3, 3), None, [1], [1]), aten.conv2d.default)
sample(lambda s: call(r(2, 6, s, 12), r(6, 1, 3, 3), r(6), padding=[1, 1], groups=6), aten.conv2d.default)
sample(lambda s: call(r(6, s, 12), r(8, 6, 2, 2), stride=[2]), aten.conv2d.default)
sample(lambda s: call(r(2, 6, 3, s, 8), r(12, 6, 1, 2, 2), r(12), [1, 2, 2]), aten.conv3d.default)
sample(lambda s: call(r(2, 6, s), r(8, 6, 3), r(8)), aten.conv1d.default)
sample(lambda s: call(r(2, 6, s), r(8, 6, 3), r(8), padding="same"), aten.conv1d.padding)
sample(lambda s: call(r(2, 6, s, 12), r(8, 6, 2, 1), stride=[2], padding="valid"), aten.conv2d.padding)
sample(lambda s: call(r(2, 6, 3, s, 8), r(12, 6, 1, 2, 3), padding="same"), aten.conv3d.padding)
sample(lambda s: call(r(2, 6, s), r(6, 8, 2), r(8), [2]), aten.conv_transpose1d.default)
sample(lambda s: call(r(2, 6, s, 12), r(6, 4, 2, 3), r(8), groups=2), aten.conv_transpose2d.input)
sample(lambda s: call(r(2, 6, s, 12, 3), r(6, 8, 2, 1, 1)), aten.conv_transpose3d.input)
for transposed in (False, True):
    sample(
        lambda s, transposed=transposed: call(
            r(2, 6, s, 12),
            r(*((6, 8) if transposed else (8, 6)), 2, 2),
            r(8),
            [2, 2],
            [0, 0],
            [1, 1],
            transposed,
            [0, 0],
            1,
        ),
        aten.convolution.default,
    )
IMAGES = {1: (2, 6, 12), 2: (2, 6, 8, 12), 3: (2, 6, 4, 8, 12)}
for count, target in (
    *((1, target) for target in (aten.avg_pool1d.default, aten.max_pool1d.default)),
    *((2, target) for target in (aten.avg_pool2d.default, aten.max_pool2d.default)),
    *((3, target) for target in (aten.avg_pool3d.default, aten.max_pool3d.default)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count][:1], s, *IMAGES[count][2:]), [3] * count, [2] * count), target)
for count, pads in (
    (1, (aten.reflection_pad1d.default, aten.replication_pad1d.default)),
    (2, (aten.reflection_pad2d.default, aten.replication_pad2d.default)),
    (3, (aten.reflection_pad3d.default, aten.replication_pad3d.default)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count]), [1, 2] * count), *pads)
for count, target in (
    *(
        (1, aten.adaptive_avg_pool1d.default),
        (2, aten.adaptive_avg_pool2d.default),
        (3, aten.adaptive_avg_pool3d.default),
    ),
    *((1, aten.upsample_nearest1d.default), (2, aten.upsample_nearest2d.default), (3, aten.upsample_nearest3d.default)),
    *((2, aten._upsample_nearest_exact2d.default), (3, aten._upsample_nearest_exact3d.default)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count]), [3, 7, 5][:count]), target)
for count, target in (
    *(
        (1, aten.upsample_linear1d.default),
        (2, aten.upsample_bilinear2d.default),
        (3, aten.upsample_trilinear3d.default),
    ),
    *((2, aten._upsample_bilinear2d_aa.default), (2, aten.upsample_bicubic2d.default)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count]), [5, 7, 11][:count], False), target)
for count, target in (
    *((1, aten.upsample_nearest1d.vec), (2, aten.upsample_nearest2d.vec), (3, aten.upsample_nearest3d.vec)),
    *((2, aten._upsample_nearest_exact2d.vec), (3, aten._upsample_nearest_exact3d.vec)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count]), None, [1.5] * count), target)
for count, target in (
    *((1, aten.upsample_linear1d.vec), (2, aten.upsample_bilinear2d.vec), (3, aten.upsample_trilinear3d.vec)),
    *((2, aten._upsample_bilinear2d_aa.vec), (2, aten.upsample_bicubic2d.vec)),
):
    sample(lambda s, count=count: call(r(*IMAGES[count]), None, False, [1.5] * count), target)
sample(lambda s: call(r(2, 16, s, 6), 2), aten.pixel_shuffle.default)
sample(lambda s: call(r(2, 3, 2 * s, 6), 2), aten.pixel_unshuffle.default)
sample(lambda s: call(r(2, 6, s, 8), [2, 2], [1, 1], [0, 0], [2, 2]), aten.im2col.default)
sample(lambda s: call(r(2, 24, 4 * s), [8, 2 * s], [2, 2], [1, 1], [0, 0], [2, 2]), aten.col2im.default)
sample(lambda s: call(r(2, 6, s, 8), r(2, 10, 12, 2), 0, 0, False), aten.grid_sampler.default)

# Attention


def attention(length: int, mask: tuple[int, ...] | None = None, **kwargs: Any) -> Call:
    return call(odd(2, 4, length, 6), r(2, 4, 12, 6), r(2, 4, 12, 8), None if mask is None else r(*mask), **kwargs)


ATTENTION = aten.scaled_dot_product_attention.default
sample(lambda s: attention(s), ATTENTION)
sample(lambda s: attention(s, (2, 4, s, 12)), ATTENTION)
sample(lambda s: attention(s, (1, 1, s, 12), scale=0.3), ATTENTION)
sample(lambda s: attention(s, (2, 1, 1, 12)), ATTENTION)
sample(lambda s: attention(s, (s, 12)), ATTENTION)
sample(lambda s: attention(s, is_causal=True), ATTENTION)
sample(lambda s: call(r(2, 8, s, 6), r(2, 4, 12, 6), r(2, 4, 12, 6), enable_gqa=True), ATTENTION)
sample(lambda s: call(r(2, 8, s, 6), r(2, 4, 12, 6), r(2, 4, 12, 6), r(8, 1, 12), enable_gqa=True), ATTENTION)
sample(lambda s: call(r(2, 8, s, 6), r(2, 4, s, 6), r(2, 4, s, 6), is_causal=True, enable_gqa=True), ATTENTION)
sample(lambda s: call(r(2, s, 6), r(2, 12, 6), r(2, 12, 8), bools(s, 12)), ATTENTION)

UNREAD = "an operand gives only its dtype, so that cutting it or not is the same; one way is listed"
EXACT = "the scale happens to divide; in general neighbours reach over a cut"
ACCEPTED: dict[Any, str] = {
    aten.type_as.default: UNREAD,
    **dict.fromkeys([aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec], EXACT),
    aten.im2col.default: "rows of patches that do not overlap",
    **dict.fromkeys([aten.upsample_nearest3d.vec, aten._upsample_nearest_exact2d.vec], EXACT),
    aten._upsample_nearest_exact3d.vec: EXACT,
}
"""Operators that have more factors than their rules list, and why that is on purpose."""


def name(entry: Sample) -> str:
    return str(entry[0])


@pytest.mark.parametrize("entry", SAMPLES, ids=name)
@pytest.mark.parametrize("length", LENGTHS)
def test_rule(entry: Sample, length: int) -> None:
    target, build = entry
    arguments = build(length)
    verdict = check(target, *arguments.args, **arguments.kwargs)
    assert verdict.wrong == []
    assert verdict.missing == [] or target in ACCEPTED


def test_every_entry_has_a_sample() -> None:
    assert [str(target) for target in RULES if target not in {target for target, _ in SAMPLES}] == []


# What needs no entry: everything that PyTorch tags as pointwise

SPELLED = {target for target, _ in SAMPLES}
NEEDS_INTEGERS = {"bitwise", "__", "gcd", "lcm"}


def pointwise_overloads() -> list[Any]:
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    names = sorted({name.removeprefix("aten::") for name in schemas if name.startswith("aten::")})
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return [
        each
        for packet in packets
        for each in (getattr(packet, overload) for overload in packet.overloads())
        if is_pointwise(each)
    ]


def invented(target: Any) -> list[Any]:
    """Arguments made from the schema: tensors that broadcast, and small numbers."""
    integers = any(part in str(target) for part in NEEDS_INTEGERS)
    shapes = iter([(2, 4, 6), (4, 1), (6,), (2, 1, 1), (6,)])
    values: list[Any] = []
    for argument in target._schema.arguments:
        kind = str(argument.real_type)
        if argument.kwarg_only:
            continue
        if kind == "Tensor" or kind == "Optional[Tensor]":
            values.append(ints(5, *next(shapes)) if integers else r(*next(shapes)))
        elif argument.has_default_value():
            values.append(argument.default_value)
        else:
            values.append({"bool": False, "float": 0.7, "str": "none"}.get(kind, 2))
    if "masked_fill" in str(target) or "where" in str(target):
        place = 1 if "masked_fill" in str(target) else 0
        values[place] = values[place] > 0
    return values


@pytest.mark.parametrize("target", [each for each in pointwise_overloads() if each not in SPELLED], ids=str)
def test_pointwise(target: Any) -> None:
    arguments = invented(target)
    kwargs = {"rounding_mode": "floor"} if "_mode" in str(target) else {}
    verdict = check(target, *arguments, search=False, **kwargs)
    assert verdict.wrong == []
    assert verdict.listed == 3


# The checker itself


def test_random_operators_have_no_factors() -> None:
    assert rule_for(aten.rrelu.default) is None
    assert rule_for(aten.bernoulli.default) is None
    assert rule_for(aten.rand_like.default) is None
    assert rule_for(aten.add_.Tensor) is None
    assert rule_for(aten.equal.default) is None
    assert check(aten.dropout.default, r(2, 4), 0.5, True, search=False).listed == 0
    assert check(ATTENTION, *attention(4, dropout_p=0.5).args, dropout_p=0.5, search=False).listed == 0


def test_checker_finds_a_wrong_factor() -> None:
    def every_dim(op: Op) -> list[Factor]:
        (shape,) = op.operands
        return [Factor(size, (whole(shape, dim),), (whole(shape, dim),)) for dim, size in enumerate(shape)]

    verdict = check(aten.softmax.int, r(2, 6), -1, rule=Rule(every_dim))
    assert verdict.missing == []
    assert len(verdict.wrong) == 8  # segments and ranks, all for the second dimension
    assert all("Span(dim=1" in text and "values differ" in text for text in verdict.wrong)


def test_checker_finds_wrong_windows_starts_and_strides() -> None:
    def shifted(op: Op) -> list[Factor]:
        return [Factor(12, (Span(0, 0, 12),), (Span(0, 4, 6),))]

    def local(op: Op, local: Local) -> dict[str, Any]:
        return {"start": local.result_starts[0], "end": local.result_starts[0] + local.results[0][0]}

    assert check(aten.slice.Tensor, r(12), 0, 3, 9, rule=Rule(shifted, local), search=False).wrong
    assert not check(aten.slice.Tensor, r(12), 0, 4, 10, rule=Rule(shifted, local), search=False).wrong
    assert check(aten.slice.Tensor, r(12), 0, 4, 10, rule=Rule(shifted), search=False).wrong  # nothing localised

    def swapped(op: Op) -> list[Factor]:
        return [Factor(4, (whole(op.operands[0], 0),), (Span(0, 0, 4, outer=6),))]

    assert check(aten.reshape.default, r(4, 6), [24], rule=Rule(swapped), search=False).wrong


def test_checker_finds_a_missing_factor() -> None:
    def first_only(op: Op) -> list[Factor]:
        return [Factor(2, (whole(op.operands[0], 0), None), (whole(op.results[0], 0),))]

    verdict = check(aten.add.Tensor, r(2, 4), r(4), rule=Rule(first_only))
    assert verdict.wrong == []
    assert verdict.missing == ["(1, 0) -> (1,)"]


def test_squeeze_keeps_a_part_of_size_one() -> None:
    """Two positions on two ranks: the plain operator would take the dimension away."""
    verdict = check(aten.squeeze.default, r(2, 1, 4))
    assert verdict == check(aten.squeeze.dim, r(2, 1, 4), 1)
    assert verdict.wrong == []
    assert verdict.listed == 2


# Costs


def cost(target: Any, *args: Any, **kwargs: Any) -> int:
    return flops(describe(target, args, kwargs)[0])


def test_flops() -> None:
    assert cost(aten.linear.default, r(2, 4, 6), r(8, 6), r(8)) == 2 * 2 * 4 * 6 * 8
    assert cost(aten.matmul.default, r(2, 1, 4, 6), r(8, 6, 10)) == 2 * 2 * 8 * 4 * 6 * 10
    assert cost(aten.matmul.default, r(6), r(6, 10)) == 2 * 6 * 10
    assert cost(aten.addmm.default, r(8), r(4, 6), r(6, 8)) == 2 * 4 * 6 * 8
    assert cost(aten.baddbmm.default, r(1), r(2, 4, 6), r(2, 6, 8)) == 2 * 2 * 4 * 6 * 8
    assert cost(aten.addbmm.default, r(8), r(2, 4, 6), r(2, 6, 8)) == 2 * 2 * 4 * 6 * 8
    assert cost(aten.einsum.default, "bhqd,bhkd->bhqk", [r(2, 3, 4, 6), r(2, 3, 8, 6)]) == 2 * 2 * 3 * 4 * 6 * 8
    assert cost(aten.einsum.default, "ab->ba", [r(2, 3)]) == 0
    assert cost(ATTENTION, r(2, 3, 4, 6), r(2, 3, 8, 6), r(2, 3, 8, 10)) == 2 * 2 * 3 * 4 * 8 * (6 + 10)
    assert cost(aten.conv2d.default, r(2, 5, 4, 6), r(8, 5, 2, 2), None, [2]) == 2 * 2 * 2 * 3 * 8 * 5 * 4
    assert cost(aten.conv2d.default, r(5, 4, 6), r(8, 5, 2, 2), None, [2]) == 2 * 2 * 3 * 8 * 5 * 4
    assert cost(aten.add.Tensor, r(2), r(2)) == 0
