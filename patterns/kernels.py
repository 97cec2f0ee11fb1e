"""What each kernel for local attention can serve, as far as a graph tells: device, types, sizes, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import paracompile.runtime.kernels
import paracompile.runtime.visible  # noqa: F401  (registers the operators)
from paracompile.layout.graph import named_arguments
from paracompile.runtime.functions import FUNCTIONS, takes
from paracompile.torch_private import tree_leaves

__all__ = ["attends", "why_not", "why_not_by_name"]

aten = torch.ops.aten
ours = torch.ops.paracompile

_HALF = {torch.float16, torch.bfloat16}
_TYPES = {
    "cudnn": _HALF,
    "flash": _HALF,
    "efficient": _HALF | {torch.float32},
    "flex": _HALF | {torch.float32},
}
_LARGEST_HEAD = {"cudnn": 128, "flash": 256}
_TAKES_MASKS = {"efficient", "math", "flex"}

_TELLS_LSE = {ours.attention_with_lse.default, ours.attention_with_lse_to_visible.default}
_ATTENTIONS = {aten.scaled_dot_product_attention.default, ours.attention_to_visible.default, *_TELLS_LSE}


def attends(node: fx.Node) -> bool:
    """Whether a node is attention on what this rank has."""
    return node.target in _ATTENTIONS


def why_not(kernel: str, node: fx.Node) -> str | None:
    """Why this kernel cannot serve an attention; None if it can."""
    arguments = named_arguments(node)
    if arguments.get("dropout_p"):
        return "it drops out"
    if arguments.get("is_causal"):
        return "it is causal"
    query, key, value = (arguments[name].meta["val"] for name in ("query", "key", "value"))
    masked = arguments.get("mask", arguments.get("attn_mask")) is not None
    in_ring = node.target in _TELLS_LSE
    if kernel in FUNCTIONS:
        return _why_not_function(kernel, masked=masked, in_ring=in_ring)
    dtype = tree_leaves(node.meta["val"])[0].dtype  # where autocast is on, not that of the queries
    sizes = key.shape[-1], value.shape[-1]
    return why_not_by_name(kernel, query.device.type, dtype, sizes, masked=masked, in_ring=in_ring)


def why_not_by_name(
    kernel: str, device: str, dtype: torch.dtype, sizes: tuple[int, int], *, masked: bool, in_ring: bool
) -> str | None:
    """Why one of PyTorch's kernels cannot serve an attention with these head sizes, of keys and of values."""
    if kernel == "math":
        return None
    if device not in (("cpu", "cuda") if kernel in ("flash", "flex") else ("cuda",)):
        return f"it runs on {device}"
    if dtype not in _TYPES[kernel] and not (device == "cpu" and kernel == "flash"):
        return f"it computes in {_short(dtype)}"
    if kernel == "flex" and device == "cpu" and in_ring:
        return "it is in a ring, and flex attention tells no LSE on the CPU"
    if masked and kernel not in _TAKES_MASKS:
        return "it has a mask"
    if device == "cuda" and max(sizes) > _LARGEST_HEAD.get(kernel, max(sizes)):
        return f"its head size {max(sizes)} is above {_LARGEST_HEAD[kernel]}"
    if kernel == "flash" and sizes[0] != sizes[1]:
        return f"its keys have size {sizes[0]} and its values {sizes[1]}"
    return None


def _why_not_function(kernel: str, *, masked: bool, in_ring: bool) -> str | None:
    function: Any = FUNCTIONS[kernel]
    if masked and not takes(function, "mask"):
        return "it has a mask, and the function takes no `mask`"
    if in_ring and not takes(function, "return_lse"):
        return "it is in a ring, and the function takes no `return_lse`"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
