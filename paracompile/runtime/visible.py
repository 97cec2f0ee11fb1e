"""Attention to the visible keys only, where a mask hides the same keys from every query of a row.

A mask makes `scaled_dot_product_attention` leave its fast kernels, and the hidden keys are computed all the same. Here
the keys that a row can see are found once for all attentions that share the mask, and each attention runs the fast
kernel on those alone, with no mask. Lengths are data: one compiled graph serves every prompt of one padded size. A CUDA
graph does not: it would run the kernels of the lengths that it was recorded with, so the operators are left out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paracompile.runtime.kernels import attention_by, attention_with_lse, precise, tokens_outermost

_NOT_RECORDED = (torch.Tag.cudagraph_unsafe,)
"""Of operators whose kernels depend on numbers that the host reads: Inductor leaves them out of CUDA graphs."""


@torch.library.custom_op("paracompile::visible_keys", mutates_args=(), tags=_NOT_RECORDED)
def visible_keys(mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which keys each row can see, part by part: attention takes one part at a time, in a ring, or all as one.

    args:
        mask: boolean, (rows, keys); True: visible.
        lengths: of the parts, side by side.

    returns:
        order: (rows, keys), in the place of each part its visible keys in order, by their number in it, then the
            others.
        windows: (parts, rows, 2) on the CPU, where the visible keys of a part begin (-1 if they do not lie side by
            side) and how many there are. Reading them waits for the device, once for all that share the mask.
    """
    orders, windows = zip(*map(_look, torch.split(mask, list(lengths), dim=1)), strict=True)
    return torch.cat(orders, dim=1), torch.stack(windows).cpu()


def _look(mask: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(~mask, dim=1, stable=True)
    counts = mask.sum(1)
    if mask.shape[1] == 0:
        return order, torch.stack([counts, counts], dim=1)
    first = order[:, 0]
    last = order.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    adjacent = last - first + 1 == counts
    return order, torch.stack([first.where(adjacent, -1), counts], dim=1)


@visible_keys.register_fake
def _(mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    windows = torch.empty(len(lengths), mask.shape[0], 2, dtype=torch.int64, device="cpu")
    return mask.new_empty(mask.shape, dtype=torch.int64), windows


@torch.library.custom_op("paracompile::attention_to_visible", mutates_args=(), tags=_NOT_RECORDED)
def attention_to_visible(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    windows: Tensor,
    scale: float | None,
    enable_gqa: bool,
    by: str = "auto",
) -> Tensor:
    """Attention of (batch, heads, queries, size) to the keys that `visible_keys` found, for each row or for all.

    A row that sees no key gives 0, as a mask that hides all does.
    """
    parts = _visible_parts(query, key, value, order, windows)
    if len(parts) == 1:
        return _attend(*parts[0], scale, enable_gqa, by)
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    for row, part in enumerate(parts):
        result[row : row + 1] = _attend(*part, scale, enable_gqa, by)
    return result


@attention_to_visible.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *how: Any, **more: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("paracompile::attention_with_lse_to_visible", mutates_args=(), tags=_NOT_RECORDED)
def attention_with_lse_to_visible(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    windows: Tensor,
    scale: float | None,
    by: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same with the LSE of each row, as a ring's steps need it; see `attention_with_lse`."""
    parts = _visible_parts(query, key, value, order, windows)
    attended: list[tuple[Tensor, Tensor]] = [attention_with_lse(*part, None, None, scale, by) for part in parts]
    if len(attended) == 1:
        return attended[0]
    result, lse = (torch.cat([part[place] for part in attended]) for place in (0, 1))
    return tokens_outermost(result), lse


@attention_with_lse_to_visible.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *how: Any, **more: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:-1], value.shape[-1])
    return tokens_outermost(query.new_empty(shape)), query.new_empty(shape[:-1], dtype=precise(query.dtype))


def _visible_parts(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, windows: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries with the keys and values that they see: once where all rows see the same, else for each row."""
    ranges = [(int(start), int(count)) for start, count in windows.tolist()]
    if not ranges:
        return [(query, key, value)]
    if len(set(ranges)) == 1 and (ranges[0][0] >= 0 or len(ranges) == 1):
        return [(query, *_visible(key, value, order[0], *ranges[0]))]
    return [
        (query[row : row + 1], *_visible(key[row : row + 1], value[row : row + 1], order[row], start, count))
        for row, (start, count) in enumerate(ranges)
    ]


def _visible(key: Tensor, value: Tensor, order: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    if start >= 0:
        return key.narrow(-2, start, count), value.narrow(-2, start, count)
    return key.index_select(-2, order[:count]), value.index_select(-2, order[:count])


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool, by: str) -> Tensor:
    if key.shape[-2] == 0:
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    if by == "auto":
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
    else:
        attended = attention_by(query, key, value, None, scale, by)
    return attended.contiguous()
