"""Local attention that also returns the log-sum-exp of each row, as merging partial results needs.

One operator, `paracompile::attention_with_lse`. The kernel is chosen by device and arguments when it runs:

    CUDA, no mask                               flash, cuDNN or efficient, as PyTorch would choose
    CUDA, with a mask                           efficient (the mask as an additive bias, no larger than it came)
    CPU, no mask, values of the keys' size      PyTorch's flash kernel for the CPU
    everything else                             float32 arithmetic, below

No kernel ever sees an empty tensor, and a row that sees no key has the result 0 and the LSE -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten


@torch.library.custom_op("paracompile::attention_with_lse", mutates_args=())
def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of (*batch, heads, queries, size) and its LSE in `precise`, (*batch, heads, queries).

    The batches of query, key and value broadcast; the result has theirs. In memory it is
    (*batch, queries, heads, size), as the kernels make it of queries that lie so.

    args:
        key, value: (*batch, key heads, keys, size); the key heads divide the heads (grouped-query attention).
        mask: boolean (True: sees) or additive, broadcastable to (*batch, heads, queries, keys).
        offset: of an additive mask, (..., queries, 1): taken from each row's scores after the mask is added, and so
            from its LSE. It changes no weight, but keeps the LSE exact where large numbers hide all of a row.
        scale: of the scores; 1/sqrt(size) if None.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    shape = _result_shape(query, key, value)
    *batch, heads, _, _ = shape
    if key.shape[-2] == 0 or math.prod(shape) == 0:
        return tokens_outermost(query.new_zeros(shape)), query.new_full(
            shape[:-1], -math.inf, dtype=precise(query.dtype)
        )
    if key.shape[-3] != heads:
        key, value = (part.repeat_interleave(heads // part.shape[-3], dim=-3) for part in (key, value))
    # Flattened apart, batches that differ would be taken for each other's.
    query, key, value = (
        part.expand(*batch, *part.shape[-3:]).reshape(-1, *part.shape[-3:]) for part in (query, key, value)
    )
    # The kernels step through the last dimension one by one, and the CPU's does not check that it may.
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    mask, offset = _by_row(mask, batch), _by_row(offset, batch)
    kernel = _cuda if query.device.type == "cuda" else _cpu if query.device.type == "cpu" else reference
    result, lse = kernel(query, key, value, mask, offset, scale)
    return tokens_outermost(result.reshape(shape)), lse.reshape(shape[:-1]).contiguous()


@attention_with_lse.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    shape = _result_shape(query, key, value)
    return tokens_outermost(query.new_empty(shape)), query.new_empty(shape[:-1], dtype=precise(query.dtype))


def tokens_outermost(x: Tensor) -> Tensor:
    """(*batch, heads, tokens, size) that lies in memory as (*batch, tokens, heads, size); `x` itself, if it does."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type in which attention of this type is summed up and merged."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _result_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch: torch.Size = torch.broadcast_shapes(*(part.shape[:-3] for part in (query, key, value)))  # type: ignore[no-untyped-call]
    return *batch, *query.shape[-3:-1], value.shape[-1]


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, in `precise`."""
    kind = precise(query.dtype)
    scores = query.to(kind) @ key.to(kind).transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if offset is not None:
        scores = scores - offset
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
    return (weights @ value.to(kind)).to(query.dtype), lse


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if mask is not None or value.shape[-1] != key.shape[-1]:
        return reference(query, key, value, mask, offset, scale)
    result, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    # The kernel's LSE is (batch, heads, queries) in meaning, whatever its strides.
    return result, lse.to(precise(query.dtype))


def _cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    *rows_and_heads, queries, _ = query.shape
    size, keys = value.shape[-1], key.shape[-2]
    query, key, value = (_padded(part, 8) for part in (query, key, value))
    bias = None
    if mask is not None:
        bias = mask
        if mask.dtype is torch.bool:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        if offset is not None:
            bias = bias - offset
        bias = bias.to(query.dtype).expand(*bias.shape[:-1], keys)
        hidden = (bias == -math.inf).all(-1)
        # The kernels want the numbers of a row of the bias side by side, and its start at a multiple of 16 elements.
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias = _padded(bias, 16)[..., :keys].expand(*rows_and_heads, queries, keys)
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, bias, 0.0, False, scale=scale))
    # The members of this enumeration are made anew at each look: `is` never holds.
    if chosen == SDPBackend.FLASH_ATTENTION:
        result, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    elif chosen == SDPBackend.CUDNN_ATTENTION and bias is None:
        result, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
        lse = lse.reshape(*lse.shape[:2], -1)
    elif chosen in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        result, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
    else:
        result, lse = reference(query, key, value, bias, None, scale)
    lse = lse[..., :queries].to(precise(query.dtype))  # kernels pad the LSE to their block size
    if bias is not None:
        lse = lse.masked_fill(hidden, -math.inf)
    return result[..., :size], lse


def _by_row(mask: Tensor | None, batch: Sequence[int]) -> Tensor | None:
    """A mask as (rows or 1, heads or 1, queries or 1, keys or 1): a row for all stays one."""
    if mask is None:
        return None
    *outer, heads, queries, keys = (*[1] * (len(batch) + 3 - mask.dim()), *mask.shape)
    mask = mask.reshape(*outer, heads, queries, keys)
    if math.prod(outer) > 1:
        mask = mask.expand(*batch, heads, queries, keys)
    return mask.reshape(-1, heads, queries, keys)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the end of the last dimension, up to a multiple; they change no score and no result."""
    return F.pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x
