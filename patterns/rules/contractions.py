"""Products with sums: linear, matmul, einsum and their kin.

Every letter is a factor; the summed one where nothing is added to the product.
"""

from __future__ import annotations

import torch

from paracompile.layout.factors import Factor, Op, Rule
from paracompile.patterns.rules.labels import Labels, Table, equation, factors_of, product

aten = torch.ops.aten

_VECTOR_TIMES_VECTOR = product("k,k->")
_VECTOR_TIMES_MATRIX = product("k,...kn->...n")
_MATRIX_TIMES_VECTOR = product("...mk,k->...m")
_MATRIX_TIMES_MATRIX = product("...mk,...kn->...mn")


def _matmul(op: Op) -> list[Factor]:
    left, right = (len(shape) > 1 for shape in op.operands)
    if left:
        return _MATRIX_TIMES_MATRIX(op) if right else _MATRIX_TIMES_VECTOR(op)
    return _VECTOR_TIMES_MATRIX(op) if right else _VECTOR_TIMES_VECTOR(op)


def _linear(op: Op) -> list[Factor]:
    return equation("...k,nk,n->...n" if len(op.operands[1]) == 2 else "...k,k->...")(op)


def _einsum(op: Op) -> list[Factor]:
    text = str(op.arguments["equation"]).replace(" ", "")
    left, arrow, right = text.partition("->")
    if not arrow:  # implicit: the letters that occur once, in alphabetical order, after the broadcast dimensions
        letters = left.replace(",", "").replace("...", "")
        right = "..." * ("..." in left) + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    return product(f"{left}->{right}")(op)


def _scaled_mm(op: Op) -> list[Factor]:
    """`mk, kn -> mn` with a scale for each row of the one and each column of the other, or one for all."""

    def scale(name: str, letter: int) -> Labels:
        shape = op.shape(name)
        labels: list[str | None] = ["m", "n"] if len(shape) == 2 else [None] * len(shape)
        return [label if index == letter else None for index, label in enumerate(labels)]

    operands: list[Labels] = [("m", None), (None, "n"), scale("scale_a", 0), scale("scale_b", 1)]
    if op.arguments["bias"] is not None:
        operands.append(("n",))
    if op.arguments["scale_result"] is not None:
        operands.append([None] * len(op.shape("scale_result")))
    return factors_of(op, operands, [("m", "n")])


RULES: Table = {
    aten.linear.default: Rule(_linear),
    aten.matmul.default: Rule(_matmul),
    aten.mm.default: Rule(product("mk,kn->mn")),
    aten._int_mm.default: Rule(equation("mk,kn->mn")),
    aten._weight_int8pack_mm.default: Rule(equation("mk,nk,n->mn")),
    aten._scaled_mm.default: Rule(_scaled_mm),
    aten.bmm.default: Rule(product("bmk,bkn->bmn")),
    aten.addmm.default: Rule(equation("mn,mk,kn->mn")),
    aten.baddbmm.default: Rule(equation("bmn,bmk,bkn->bmn")),
    aten.addbmm.default: Rule(equation("mn,bmk,bkn->mn")),
    aten.mv.default: Rule(product("mk,k->m")),
    aten.addmv.default: Rule(equation("m,mk,k->m")),
    aten.dot.default: Rule(product("k,k->")),
    aten.outer.default: Rule(equation("m,n->mn")),
    aten.ger.default: Rule(equation("m,n->mn")),
    aten.addr.default: Rule(equation("mn,m,n->mn")),
    aten.bilinear.default: Rule(equation("...j,...k,ijk,i->...i")),
    aten.cdist.default: Rule(equation("...mk,...nk->...mn")),
    aten.einsum.default: Rule(_einsum),
}
