"""What sharding writes into a graph that is still the same on every rank: operators that mean nothing on one process.

    paracompile::shard              each rank takes its part of a value that all of them hold
    paracompile::unshard            all ranks' parts are put together again
    paracompile::unified_attention  attention over the tokens of all ranks

With them a graph has whole shapes, runs on one process and computes what the model computes. The pass `lower` writes
what one rank does in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHARD", "UNIFIED_ATTENTION", "UNSHARD"]


@torch.library.custom_op("paracompile::shard", mutates_args=())
def shard(x: Tensor, axis: str, dim: int, segments: Sequence[int]) -> Tensor:
    """The value itself.

    args:
        axis: the ranks of which mesh axis share it.
        dim: the dimension that is cut; it may hold more than what is cut (rows of a batch and tokens, merged).
        segments: the lengths that are cut one by one (text, image).
    """
    return x.clone()


@torch.library.custom_op("paracompile::unshard", mutates_args=())
def unshard(x: Tensor, axis: str, dim: int, segments: Sequence[int]) -> Tensor:
    """The value itself; arguments as in `shard`."""
    return x.clone()


@shard.register_fake
@unshard.register_fake
def _(x: Tensor, axis: str, dim: int, segments: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, of the same arguments."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


torch.library.custom_op("paracompile::unified_attention", _attention, mutates_args=()).register_fake(_attention)

SHARD = torch.ops.paracompile.shard.default
UNSHARD = torch.ops.paracompile.unshard.default
UNIFIED_ATTENTION = torch.ops.paracompile.unified_attention.default
