"""Gives padding with zeros to the convolution behind it, which pads without a copy.

    before                                                    after
    y = pad(x, [1, 1, 1, 1, 2, 0])                            y = pad(x, [0, 0, 0, 0, 2, 0])
    z = conv3d(y, w, b, padding=[0, 0, 0])                    z = conv3d(y, w, b, padding=[0, 1, 1])

A convolution pads as much before as after. So what is padded at both edges of a dimension goes to it, and what is left
(a causal convolution's in time) stays: zeros beside zeros. Padding of which nothing is left is gone, and with it a copy
of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.layout.graph import named_arguments
from paracompile.passes.mark_blocks import roles_of
from paracompile.passes.writer import GraphWriter
from paracompile.torch_private import OpOverload

__all__ = ["compose_padding"]

aten = torch.ops.aten

_SPATIAL: dict[OpOverload[..., Any], int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


def compose_padding(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Moves zeros from padding to convolutions, in place."""
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.target in _SPATIAL else None
        if isinstance(source, fx.Node) and (pad := _zeros_of(source)):
            _compose(gm.graph, node, source, pad)
    gm.graph.lint()
    gm.recompile()
    return gm


def _zeros_of(node: fx.Node) -> list[int] | None:
    """How much a node pads with zeros, two edges a dimension, the last one first; None where it does something else."""
    if node.target not in (aten.constant_pad_nd.default, aten.pad.default) or roles_of(node):
        return None
    arguments = named_arguments(node)
    is_zero = arguments.get("mode", "constant") == "constant" and arguments["value"] in (None, 0)
    return list(arguments["pad"]) if is_zero else None


def _compose(graph: fx.Graph, convolution: fx.Node, source: fx.Node, pad: list[int]) -> None:
    """Gives a convolution what `source`, before it, pads at both edges alike."""
    arguments = named_arguments(convolution)
    x, padding = source.args[0], list(arguments["padding"])
    assert isinstance(x, fx.Node)
    spatial = _SPATIAL[convolution.target]  # type: ignore[index]
    padding = padding * spatial if len(padding) == 1 else padding
    for axis in range(min(len(pad) // 2, spatial)):
        both = max(0, min(pad[2 * axis : 2 * axis + 2]))
        padding[-1 - axis] += both
        pad[2 * axis] -= both
        pad[2 * axis + 1] -= both
    if padding == list(arguments["padding"]):
        return
    if any(pad):
        with graph.inserting_before(convolution):
            write = GraphWriter(x.meta["val"].fake_mode, graph)
            write.origin = source
            x = write(aten.constant_pad_nd.default, x, pad, 0.0)
    convolution.args = tuple({**arguments, "input": x, "padding": padding}.values())
    convolution.kwargs = {}
    if not source.users:
        graph.erase_node(source)
