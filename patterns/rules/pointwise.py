"""Elementwise operators: `i, i -> i`, every dimension independent, operands broadcast from the right.

PyTorch tags most of them (`torch.Tag.pointwise`); the lists here are those that lack the tag. Operators that draw
random numbers have no factors: each rank would draw its own.
"""

from __future__ import annotations

import torch

from paracompile.layout.factors import Factor, Local, Op, Rule
from paracompile.patterns.rules.labels import Labels, Table, Target, aligned, factors_of
from paracompile.torch_private import schema_of

aten = torch.ops.aten


def elementwise(op: Op) -> list[Factor]:
    return factors_of(op, map(aligned, op.operands), map(aligned, op.results))


ELEMENTWISE = Rule(elementwise)


def is_pointwise(target: Target) -> bool:
    """Whether PyTorch says that `target` is elementwise, deterministic and functional."""
    return (
        torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not schema_of(target).is_mutable
        and all(str(result.type) == "Tensor" for result in schema_of(target).returns)  # `equal` gives a bool
    )


def _dropout(op: Op) -> list[Factor]:
    return elementwise(op) if not op.arguments["train"] or op.arguments["p"] == 0 else []


def _type_as(op: Op) -> list[Factor]:
    """`other` gives only its dtype. Where it has the same dimension it is cut too, so that it need not be gathered."""
    like, other = op.operands
    sizes = dict(zip(aligned(like), like, strict=True))
    labels = [label if sizes.get(label) == size else None for label, size in zip(aligned(other), other, strict=True)]
    return factors_of(op, [aligned(like), labels], [aligned(like)])


def _prelu(op: Op) -> list[Factor]:
    (result,) = op.results
    labels = aligned(result)
    weight: Labels = labels[1:2] if len(labels) > 1 and op.operands[1] != () else [None] * len(op.operands[1])
    return factors_of(op, [labels, weight], [labels])


def _born(op: Op) -> list[Factor]:
    """`zeros` and its kind: the result's dimensions come from nothing."""
    return factors_of(op, [], map(aligned, op.results))


def _born_size(op: Op, local: Local) -> dict[str, object]:
    return {"size": list(local.results[0])}


def _to_complex(op: Op) -> list[Factor]:
    labels = tuple(range(len(op.results[0])))
    return factors_of(op, [(*labels, None)], [labels])


def _to_real(op: Op) -> list[Factor]:
    labels = tuple(range(len(op.operands[0])))
    return factors_of(op, [labels], [(*labels, None)])


_COPIES: list[Target] = [
    aten.copy.default,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zero.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
]
_COMPLEX: list[Target] = [
    aten.complex.default,
    aten.polar.default,
    aten.real.default,
    aten.imag.default,
    aten.conj.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
]
_ACTIVATIONS: list[Target] = [aten.hardswish.default, aten.log_sigmoid.default]
_CHOICES: list[Target] = [
    aten.masked_fill.Tensor,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.isclose.default,
    aten.isreal.default,
]
# Composite operators keep their own name before autograd; these are other spellings of tagged ones.
_SPELLINGS: list[Target] = [
    aten.absolute.default,
    aten.negative.default,
    aten.fix.default,
    aten.arccos.default,
    aten.arccosh.default,
    aten.arcsin.default,
    aten.arcsinh.default,
    aten.arctan.default,
    aten.arctan2.default,
    aten.arctanh.default,
    aten.subtract.Tensor,
    aten.subtract.Scalar,
    aten.rsub.Tensor,
    aten.multiply.Tensor,
    aten.multiply.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.divide.Tensor_mode,
    aten.divide.Scalar_mode,
    aten.true_divide.Scalar,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.float_power.Tensor_Tensor,
    aten.float_power.Tensor_Scalar,
    aten.float_power.Scalar,
    aten.greater.Tensor,
    aten.greater.Scalar,
    aten.greater_equal.Tensor,
    aten.greater_equal.Scalar,
    aten.less.Tensor,
    aten.less.Scalar,
    aten.less_equal.Tensor,
    aten.less_equal.Scalar,
    aten.not_equal.Tensor,
    aten.not_equal.Scalar,
    aten.__and__.Tensor,
    aten.__and__.Scalar,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
    aten.special_expit.default,
    aten.special_exp2.default,
    aten.special_expm1.default,
    aten.special_log1p.default,
    aten.special_erf.default,
    aten.special_erfc.default,
    aten.special_sinc.default,
    aten.special_round.default,
    aten.special_xlogy.default,
]

RULES: Table = {
    **dict.fromkeys(_COPIES + _COMPLEX + _ACTIVATIONS + _CHOICES + _SPELLINGS, ELEMENTWISE),
    **dict.fromkeys(
        [
            aten.dropout.default,
            aten.feature_dropout.default,
            aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default,
        ],
        Rule(_dropout),
    ),
    **dict.fromkeys(
        [aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.full.default],
        Rule(_born, _born_size),
    ),
    aten.type_as.default: Rule(_type_as),
    aten.prelu.default: Rule(_prelu),
    aten.view_as_complex.default: Rule(_to_complex),
    aten.view_as_real.default: Rule(_to_real),
}
