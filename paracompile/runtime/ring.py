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
from paracompile.runtime.eight_bits import SCALE, packed, unpacked
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
    device: torch.device,
    scale: float | None,
    ring: Ring,
    eight_bits: torch.dtype | None = None,
) -> Any:
    """Attention of (*batch, heads, own queries, size) to the keys of all members, in the order of members.

    args:
        mask: boolean or additive, for this rank's queries (or one row for all) and all keys; None where all see all.
        key_shape, value_shape: of this rank's keys and values, (*batch, heads, own keys, size).
        dtype, device: of the result, and of keys and values.
        eight_bits: the type in which keys and values travel; None: as they are.
    """
    result, lse = None, None
    sizes = key_shape[-1], value_shape[-1]
    if eight_bits is not None:
        carried = [packed(call, part, eight_bits, device) for part in (key, value)]
        key_shape, value_shape = ([*shape[:-1], shape[-1] + SCALE] for shape in (key_shape, value_shape))
    else:
        carried = [key, value]
    travelling = call(aten.cat.default, [call(aten.reshape.default, part, [-1]) for part in carried])
    for step in range(ring.size):
        holder = (ring.rank - step) % ring.size
        following = None
        if step + 1 < ring.size:
            following = _pass_on(call, travelling, key_shape, value_shape, ring, holder)
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
            travelling, *arrived = following
            if eight_bits is not None:
                arrived = [
                    unpacked(call, part, size, eight_bits, dtype, device)
                    for part, size in zip(arrived, sizes, strict=True)
                ]
            key, value = arrived
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
    call: Call, travelling: Any, key_shape: Sequence[int], value_shape: Sequence[int], ring: Ring, holder: int
) -> tuple[Any, Any, Any]:
    """Sends the keys and values that `holder` began with, as one flat tensor, to the next member.

    returns: the same of the member before, and the keys and values in it.
    """
    after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    previous = (holder - 1) % ring.size

    def shapes(member: int) -> list[list[int]]:
        return [[*shape[:-2], ring.tokens[member], shape[-1]] for shape in (key_shape, value_shape)]

    sent, arriving = (sum(map(prod, shapes(member))) for member in (holder, previous))
    received = all_to_all(
        call,
        travelling,
        [arriving if member == before else 0 for member in range(ring.size)],
        [sent if member == after else 0 for member in range(ring.size)],
        ring.group,
    )
    key, value = shapes(previous)
    parts = ((key, 0, prod(key)), (value, prod(key), arriving))
    return received, *(
        call(aten.reshape.default, call(aten.slice.Tensor, received, 0, start, stop), shape)
        for shape, start, stop in parts
    )
