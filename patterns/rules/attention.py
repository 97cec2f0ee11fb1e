"""Scaled dot product attention: `...le, ...se, ...sf, ...ls -> ...lf`.

Batch, heads, the queries' length and the values' size are independent; the keys' length is mixed. With `is_causal` a
query's position matters, so the length is no factor. Where ranks exchange keys and values, which are then tokens as the
queries are, a rank is given all that its heads need, and the length is one whatever the mask.
"""

from __future__ import annotations

import torch

from paracompile.layout.factors import Factor, Op, Rule, Span, whole
from paracompile.patterns.rules.labels import Table, equation

aten = torch.ops.aten

_EQUATIONS = {
    # (causal, grouped): the letter h stands for heads that may be cut
    (False, False): equation("...le,...se,...sf,...ls->...lf"),
    (True, False): equation("..._e,...se,...sf,..._s->..._f"),
    (False, True): equation("..._le,..._se,..._sf,..._ls->..._lf"),
    (True, True): equation("...__e,..._se,..._sf,...__s->...__f"),
}


def _attention(op: Op) -> list[Factor]:
    if op.arguments["dropout_p"] > 0:
        return []  # drops at random
    query, key, value = op.operands[:3]
    grouped = bool(op.arguments["enable_gqa"]) and len(query) > 2 and query[-3] != key[-3]
    factors = [*_EQUATIONS[bool(op.arguments["is_causal"]), grouped](op), *_exchanged(op)]
    if grouped and key[-3] == value[-3]:
        factors += _groups(op)
    return factors


def _exchanged(op: Op) -> list[Factor]:
    """The queries' length, with keys and values cut along theirs; a mask is whole, in the order of all keys."""
    query, key, value, *masks = op.operands
    if min(map(len, (query, key, value))) < 3:
        return []
    others = (None,) * len(masks)
    span = whole(query, -2)
    exchanged = (None, whole(key, -2), whole(value, -2), *others)
    return [Factor(span.length, (span, None, None, *others), (whole(op.results[0], -2),), exchanges=exchanged)]


def _groups(op: Op) -> list[Factor]:
    """Grouped queries: query head `g * members + m` attends with key head `g`."""
    query, key, value = op.operands[:3]
    (result,) = op.results
    groups, members = key[-3], query[-3] // key[-3]
    if groups < 2:
        return []
    masks: list[Span | None] = []
    for mask in op.operands[3:]:
        one_for_all = len(mask) < 3 or mask[-3] == 1
        masks.append(None if one_for_all else Span(len(mask) - 3, 0, groups, inner=members))
    split = Span(len(query) - 3, 0, groups, inner=members)
    return [
        Factor(
            groups,
            (split, whole(key, -3), whole(value, -3), *masks),
            (Span(len(result) - 3, 0, groups, inner=members),),
        )
    ]


RULES: Table = {aten.scaled_dot_product_attention.default: Rule(_attention)}
