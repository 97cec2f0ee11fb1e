"""Local attention by a kernel of one's choice, and with the log-sum-exp of each row, as merging partial results needs.

Two operators: `paracompile::attention_with_lse`, and `paracompile::attention_by`, its result alone. Where the kernel is
"auto", device and arguments tell which one it is when it runs:

    CUDA, no mask                               flash, cuDNN or efficient, as PyTorch would choose
    CUDA, with a mask                           efficient (the mask as an additive bias, no larger than it came)
    CPU, no mask, values of the keys' size      PyTorch's flash kernel for the CPU
    everything else                             float32 arithmetic, below

The other names are those of `patterns.kernels`, which knows what each can serve, and those of users' own functions
(`runtime.functions`). No kernel ever sees an empty tensor, and a row that sees no key has the result 0 and the LSE
-inf.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from paracompile.runtime.functions import FUNCTIONS
from paracompile.torch_private import fused_sdp_choice

aten = torch.ops.aten


@torch.library.custom_op("paracompile::attention_with_lse", mutates_args=())
def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    offset: Tensor | None,
    scale: float | None,
    by: str = "auto",
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
        by: the name of the kernel. (Called "kernel", it would clash with an argument of Inductor's own.)
    """
    return _attend(query, key, value, mask, offset, scale, by, wants_lse=True)


@attention_with_lse.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *how: Any, **more: Any) -> tuple[Tensor, Tensor]:
    shape = _result_shape(query, key, value)
    return tokens_outermost(query.new_empty(shape)), query.new_empty(shape[:-1], dtype=precise(query.dtype))


@torch.library.custom_op("paracompile::attention_by", mutates_args=())
def attention_by(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, by: str
) -> Tensor:
    """The result of `attention_with_lse` alone, for kernels that do not tell the LSE, too."""
    return _attend(query, key, value, mask, None, scale, by, wants_lse=False)[0]


@attention_by.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *how: Any, **more: Any) -> Tensor:
    return tokens_outermost(query.new_empty(_result_shape(query, key, value)))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    offset: Tensor | None,
    scale: float | None,
    kernel: str,
    *,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
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
    if kernel in FUNCTIONS:
        result, lse = _by_function(FUNCTIONS[kernel], query, key, value, mask, offset, scale, wants_lse=wants_lse)
    else:
        result, lse = _KERNELS[kernel](query, key, value, mask, offset, scale)
    return tokens_outermost(result.reshape(shape)), lse.reshape(shape[:-1]).contiguous()


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


def _auto(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    kernel = {"cuda": _cuda, "cpu": _cpu}.get(query.device.type, reference)
    return kernel(query, key, value, mask, offset, scale)


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    offset: Tensor | None,
    scale: float,
    *,
    backend: SDPBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """By the backend that is named, or that PyTorch would choose."""
    *rows_and_heads, queries, _ = query.shape
    size, keys = value.shape[-1], key.shape[-2]
    query, key, value = (_padded(part, 8) for part in (query, key, value))
    bias = None
    if mask is not None:
        bias = _bias(mask, offset, query.dtype)
        bias = bias.expand(*bias.shape[:-1], keys)
        hidden = (bias == -math.inf).all(-1)
        # The kernels want the numbers of a row of the bias side by side, and its start at a multiple of 16 elements.
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias = _padded(bias, 16)[..., :keys].expand(*rows_and_heads, queries, keys)
    chosen = backend or SDPBackend(fused_sdp_choice(query, key, value, bias, 0.0, False, scale=scale))
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


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        return _cpu(query, key, value, mask, offset, scale)
    return _cuda(query, key, value, mask, offset, scale, backend=SDPBackend.FLASH_ATTENTION)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    biased, options = None, None
    if mask is not None:
        options = {"num_stages": 2}  # of Inductor's three each would have a part of the bias in shared memory: too much
        bias = _bias(mask, offset, precise(query.dtype)).expand(*query.shape[:-1], key.shape[-2])

        def biased(score: Tensor, row: Tensor, head: Tensor, of: Tensor, to: Tensor) -> Tensor:
            return score + bias[row, head, of, to]

    tells = query.device.type != "cpu"  # Inductor's kernel for the CPU does not
    block = _one_block(query.shape[-2], key.shape[-2], query.device)
    aux = AuxRequest(lse=True) if tells else None
    made = _compiled_flex()(
        query, key, value, score_mod=biased, block_mask=block, scale=scale, return_aux=aux, kernel_options=options
    )
    result, lse = (made[0], made[1].lse) if tells else (made, query.new_full(query.shape[:-1], math.nan))
    return result, lse.to(precise(query.dtype))


@functools.cache
def _one_block(queries: int, keys: int, device: torch.device) -> BlockMask:
    """All scores in one block. Flex attention would make it by `vmap`, which a graph's first call does not bear."""
    with torch.inference_mode(False):
        ones = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
        return BlockMask.from_kv_blocks(
            ones,
            torch.zeros_like(ones)[..., None],
            BLOCK_SIZE=2**30,
            seq_lengths=(queries, keys),
            compute_q_blocks=False,
        )


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """Flex attention is a kernel only where it is compiled; by itself, as this runs behind the graph's operator.

    Where Dynamo gives up after too many sizes, `fullgraph` makes that an error: uncompiled it writes out all scores.
    """
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _by_function(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    offset: Tensor | None,
    scale: float,
    *,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {"scale": scale}
    if mask is not None:
        given["mask"] = mask if offset is None else mask - offset
    if wants_lse:
        given["return_lse"] = True
    made = function(query, key, value, **given)
    result, lse = made if wants_lse else (made, query.new_empty(query.shape[:-1]))
    wanted, rows = (*query.shape[:-1], value.shape[-1]), query.shape[:-1]
    if tuple(result.shape) != wanted or result.dtype is not query.dtype or lse.shape != rows:
        raise ValueError(
            f"attention by {function}: of queries {tuple(query.shape)} in {query.dtype} it made {tuple(result.shape)} "
            f"in {result.dtype}" + f" with an LSE {tuple(lse.shape)}" * wants_lse + f", and {wanted} was expected"
        )
    return result, lse.to(precise(query.dtype))


_KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "auto": _auto,
    "math": reference,
    "flash": _flash,
    "cudnn": functools.partial(_cuda, backend=SDPBackend.CUDNN_ATTENTION),
    "efficient": functools.partial(_cuda, backend=SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
}


def _bias(mask: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to scores."""
    bias = mask
    if mask.dtype is torch.bool:
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    return (bias if offset is None else bias - offset).to(dtype)


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
