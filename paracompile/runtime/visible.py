"""Attention to the visible keys only, where a mask hides the same keys from every query of a row.

A mask makes `scaled_dot_product_attention` leave its fast kernels, and the hidden keys are computed all the same. Here
the keys that a row can see are found once for all attentions that share the mask, and each attention runs the fast
kernel on those alone, with no mask. Lengths are data: one compiled graph serves every prompt of one padded size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("paracompile::visible_keys", mutates_args=())
def visible_keys(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys each row can see.

    args:
        mask: boolean, (rows, keys); True: visible.

    returns:
        order: (rows, keys), the visible keys of each row in order, then the hidden ones.
        windows: (rows, 2) on the CPU, where the visible keys begin (-1 if they do not lie side by side) and how many
            there are. Reading them waits for the device, once for all attentions that share the mask.
    """
    order = torch.argsort(~mask, dim=1, stable=True)
    counts = mask.sum(1)
    first = order[:, 0]
    last = order.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    adjacent = last - first + 1 == counts
    return order, torch.stack([first.where(adjacent, -1), counts], dim=1).cpu()


@visible_keys.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = mask.shape[0]
    return mask.new_empty(mask.shape, dtype=torch.int64), torch.empty(rows, 2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("paracompile::attention_to_visible", mutates_args=())
def attention_to_visible(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, windows: Tensor, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Attention of (batch, heads, queries, size) to the keys that `visible_keys` found, for each row or for all.

    A row that sees no key gives 0, as a mask that hides all does.
    """
    ranges = [(int(start), int(count)) for start, count in windows.tolist()]
    if len(set(ranges)) == 1 and (ranges[0][0] >= 0 or len(ranges) == 1):
        return _attend(query, key, value, order[0], *ranges[0], scale, enable_gqa)
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    for row, (start, count) in enumerate(ranges):
        q, k, v = (part[row : row + 1] for part in (query, key, value))
        result[row : row + 1] = _attend(q, k, v, order[row], start, count, scale, enable_gqa)
    return result


@attention_to_visible.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, windows: Tensor, scale: float | None, enable_gqa: bool
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    start: int,
    count: int,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if count == 0:
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    if start >= 0:
        key, value = (part.narrow(-2, start, count) for part in (key, value))
    else:
        key, value = (part.index_select(-2, order[:count]) for part in (key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
    return attended.contiguous()
