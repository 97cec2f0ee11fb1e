"""Has attention computed by the kernel that was asked for, where that can serve it.

    before                                               after
    o = scaled_dot_product_attention(q, k, v)            o = attention_by(q, k, v, by="cudnn")
    o, lse = attention_with_lse(q, k, v)                 o, lse = attention_with_lse(q, k, v, by="cudnn")

Runs where it is known what one rank attends to, and with which masks. What the kernel cannot serve stays as it is, and
is counted with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.passes.found import Found
from paracompile.passes.writer import GraphWriter, in_type
from paracompile.patterns.kernels import attends, why_not
from paracompile.runtime.flash import newest_flash
from paracompile.torch_private import detect_fake_mode

aten = torch.ops.aten


def choose_kernels(gm: fx.GraphModule, example_inputs: Sequence[Any], *, kernel: str, found: Found) -> fx.GraphModule:
    """Gives every attention the kernel, in place; "auto" leaves it to PyTorch, but where a newer flash is installed."""
    attentions = [node for node in gm.graph.nodes if attends(node)]
    if not attentions:
        return gm
    asked = kernel
    if kernel == "auto":
        newest = newest_flash(attentions[0].args[0].meta["val"].device)
        if newest is None:
            return gm
        kernel, asked = "flash", newest
    fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
    assert fake_mode is not None
    write = GraphWriter(fake_mode, gm.graph)
    declined: Counter[str] = Counter()
    for node in attentions:
        reason = why_not(kernel, node)
        if reason is not None:
            declined[reason] += 1
            continue
        _give(write, node, kernel)
    found.kernel, found.kernel_declined = asked, dict(declined)
    found.kernel_serves = len(attentions) - declined.total()
    gm.graph.lint()
    gm.recompile()
    return gm


def _give(write: GraphWriter, node: fx.Node, kernel: str) -> None:
    arguments = named_arguments(node)
    write.origin = node
    if node.target is not aten.scaled_dot_product_attention.default:
        node.kwargs = {**node.kwargs, "by": kernel}
        return
    with node.graph.inserting_before(node):
        dtype = node.meta["val"].dtype  # which autocast may have chosen
        operands = [in_type(write, arguments[name], dtype) for name in ("query", "key", "value")]
        mask = arguments["attn_mask"]
        attended = write(torch.ops.paracompile.attention_by.default, *operands, mask, arguments["scale"], kernel)
        node.replace_all_uses_with(attended)
    node.graph.erase_node(node)
