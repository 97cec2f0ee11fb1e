"""Ring attention: keys and values travel around a ring of ranks while each attends to the part that it holds.

After Liu et al., Ring Attention (2023). The exchange of the next keys and values is written before the attention on
the present ones. Partial results are merged by their log-sum-exp in float32 (float64 for double). As in `collectives`,
functions take `call(operator, *arguments)`, which runs the operator or writes it into a graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from paracompile.runtime.collectives import Call, all_to_all
from paracompile.runtime.kernels import precise

aten = torch.ops.aten


@dataclass(frozen=True)
class Ring:
    """One ring.

    attributes:
        group: name of the process group.
        rank: this rank's number in it.
        tokens: keys that each member holds at first.
    """

    group: str
    rank: int
    tokens: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.tokens)


def ring_attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    offset: Any | None,
    *,
    key_shape: Sequence[int],
    value_shape: Sequence[int],
    dtype: torch.dtype,
    scale: float | None,
    ring: Ring,
) -> Any:
    """Attention of (*batch, heads, own queries, size) to the keys of all members, in the order of members.

    args:
        mask: boolean or additive, for this rank's queries (or one row for all) and all keys; None where all see all.
        key_shape, value_shape: of this rank's keys and values, (*batch, heads, own keys, size).
        dtype: of the result.
    """
    result, lse = None, None
    for step in range(ring.size):
        holder = (ring.rank - step) % ring.size
        following = None
        if step + 1 < ring.size:
            following = _pass_on(call, key, value, key_shape, value_shape, ring, holder)
        part = None
        if mask is not None:
            start = sum(ring.tokens[:holder])
            part = call(aten.slice.Tensor, mask, -1, start, start + ring.tokens[holder])
        attended = call(torch.ops.paracompile.attention_with_lse.default, query, key, value, part, offset, scale)
        present, present_lse = (call(operator.getitem, attended, index) for index in (0, 1))
        result, lse = (
            (call(aten._to_copy.default, present, dtype=precise(dtype)), present_lse)
            if result is None
            else merge(call, result, lse, present, present_lse)
        )
        if following is not None:
            key, value = following
    return result if dtype is precise(dtype) else call(aten._to_copy.default, result, dtype=dtype)


def merge(call: Call, first: Any, first_lse: Any, second: Any, second_lse: Any) -> tuple[Any, Any]:
    """Merges two partial attentions (*batch, heads, queries, size) with their LSE (*batch, heads, queries).

    A row that sees no key in either part has an LSE of -inf, a weight of 0 in both, and stays 0.
    """
    lse = call(aten.logaddexp.default, first_lse, second_lse)
    nothing = call(aten.eq.Scalar, lse, float("-inf"))
    merged = None
    for part, part_lse in ((first, first_lse), (second, second_lse)):
        weight = call(aten.exp.default, call(aten.sub.Tensor, part_lse, lse))
        weight = call(aten.unsqueeze.default, call(aten.masked_fill.Scalar, weight, nothing, 0.0), -1)
        weighted = call(aten.mul.Tensor, part, weight)
        merged = weighted if merged is None else call(aten.add.Tensor, merged, weighted)
    return merged, lse


def _pass_on(
    call: Call,
    key: Any,
    value: Any,
    key_shape: Sequence[int],
    value_shape: Sequence[int],
    ring: Ring,
    holder: int,
) -> tuple[Any, Any]:
    """Sends the keys and values that `holder` began with to the next member, and takes the previous one's."""
    after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    shapes = [[*shape[:-2], 0, shape[-1]] for shape in (key_shape, value_shape)]

    def sizes(member: int) -> list[int]:
        tokens = ring.tokens[member]
        return [prod(shape[:-2]) * tokens * shape[-1] for shape in shapes]

    sent, arriving = sizes(holder), sizes((holder - 1) % ring.size)
    buffer = call(aten.cat.default, [call(aten.reshape.default, part, [-1]) for part in (key, value)])
    received = all_to_all(
        call,
        buffer,
        [sum(arriving) if member == before else 0 for member in range(ring.size)],
        [sum(sent) if member == after else 0 for member in range(ring.size)],
        ring.group,
    )
    tokens = ring.tokens[(holder - 1) % ring.size]
    parts = [(0, arriving[0]), (arriving[0], sum(arriving))]
    next_key, next_value = (
        call(
            aten.reshape.default,
            call(aten.slice.Tensor, received, 0, start, stop),
            [*shape[:-2], tokens, shape[-1]],
        )
        for (start, stop), shape in zip(parts, shapes, strict=True)
    )
    return next_key, next_value
