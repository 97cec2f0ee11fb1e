"""What Dynamo hands over: one graph with its example inputs, and what must be known of them before any pass runs."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from traceback import FrameSummary
from types import FrameType
from typing import Any, cast

import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from paracompile.errors import GraphError, OptionError, ParacompileError
from paracompile.layout.graph import is_static
from paracompile.layout.sizes import free_symbols_of, is_symbol
from paracompile.patterns.blocks import find_blocks
from paracompile.patterns.convolutions import overlaps
from paracompile.patterns.numbers import Numbers, find_numbers
from paracompile.report.open_sizes import open_sizes
from paracompile.torch_private import (
    CompileContext,
    InstructionTranslator,
    TracingContext,
    convert_frame,
    eval_frame,
    graph_break_reasons,
    is_traceable_wrapper_subclass,
)

__all__ = ["Captured"]

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Captured:
    """One captured graph; valid while Dynamo compiles it."""

    gm: fx.GraphModule
    example_inputs: Sequence[Any]

    @property
    def name(self) -> str:
        """What this compile is called in dumps: the number of its frame and of the compiles before."""
        identity = CompileContext.current_compile_id()
        return "graph_" + ("0" if identity is None else str(identity).replace("/", "_"))

    # Its inputs

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def static(self) -> dict[int, fx.Node]:
        """The inputs that are the same at each call, and on all ranks: weights and buffers; by their place."""
        return {index: node for index, node in enumerate(self.placeholders) if is_static(node)}

    @property
    def changing(self) -> dict[int, fx.Node]:
        """All other inputs, by their place."""
        return {index: node for index, node in enumerate(self.placeholders) if not is_static(node)}

    @property
    def symbols(self) -> dict[sympy.Symbol, int]:
        """The sizes that may be others in the next call, with the place of each among the inputs."""
        return {
            value.node.expr: place
            for place, node in enumerate(self.placeholders)
            if is_symbol(value := node.meta.get("example_value")) and node not in self.numbers.kept
        }

    @property
    def has_open_sizes(self) -> bool:
        """Whether an input has, or is, a size that may be another one in the next call."""
        return bool(free_symbols_of(self._sized))

    @property
    def _sized(self) -> list[Any]:
        kept = self.numbers.kept
        return [node.meta.get("example_value") for node in self.placeholders if node not in kept]

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """The names of the sizes that may be others in the next call."""
        return open_sizes(self._sized, self.shape_env)

    @property
    def shape_env(self) -> ShapeEnv:
        """What Dynamo knows of sizes, and guards."""
        mode = TracingContext.get().fake_mode
        assert mode is not None
        assert mode.shape_env is not None
        return mode.shape_env

    def fix_sizes(self) -> None:
        """Fixes all open sizes by guards: the graph serves one set of sizes."""
        for place in self.symbols.values():
            int(self.placeholders[place].meta["example_value"])

    @property
    def weights(self) -> list[Any]:
        """The values of the static inputs."""
        return [self.example_inputs[index] for index in self.static]

    @property
    def is_quantised(self) -> bool:
        return any(map(is_traceable_wrapper_subclass, self.example_inputs))

    def wants_gradients(self) -> list[str]:
        """The inputs that gradients are wanted of."""
        if not torch.is_grad_enabled():
            return []
        return [
            node.name
            for node, value in zip(self.placeholders, self.example_inputs, strict=True)
            if isinstance(value, torch.Tensor) and value.requires_grad
        ]

    def check_gradients(self) -> None:
        """Raises a ParacompileError where gradients are wanted."""
        wanted = self.wants_gradients()
        if wanted:
            others = f" and {len(wanted) - 1} more inputs" if wanted[1:] else ""
            raise ParacompileError(
                f"gradients are wanted (of {wanted[0]}{others}), and a graph that is sharded or cached has none: call "
                "the model under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
            )

    def check_static(self) -> None:
        """Raises a GraphError where a parameter is not static: by another torch it may be called otherwise.

        Such a weight would be sent to all ranks at each call, and nothing would tell.
        """
        for index, node in self.changing.items():
            if isinstance(self.example_inputs[index], nn.Parameter):
                raise GraphError(
                    node,
                    f"it is a parameter, and torch {torch.__version__} does not say so as paracompile reads it",
                    "use a version of torch that paracompile was tested with, and report this",
                )

    def check_float8(self) -> None:
        """Raises an OptionError where the GPU has no float8 to travel in."""
        for value in self.example_inputs:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                capability = torch.cuda.get_device_capability(value.device)
                if capability < (8, 9):
                    found = ".".join(map(str, capability))
                    raise OptionError(
                        "exchange_dtype",
                        "fp8",
                        f'GPUs have float8 from compute capability 8.9 on, and this one has {found}: take "int8"',
                    )
                return

    @cached_property
    def numbers(self) -> Numbers:
        """Python's numbers among the inputs that may change from call to call."""
        return find_numbers(self.gm.graph)

    def may_be_constant(self) -> bool:
        """Whether the passes, which know no gradients, may have the graph.

        A number that is no size may change at each step, and some can only be constants.
        """
        return not (self.wants_gradients() or self.numbers.constants)

    # What it is of

    @property
    def why_a_piece(self) -> str | None:
        """Why this graph is only a piece of its model, beside others and code not compiled; None if it is all of it."""
        own = cast(Any, self.gm).compile_subgraph_reason
        running = _running_model()
        if not (own.graph_break or running):
            return None
        before = (each for each in reversed(graph_break_reasons) if _files_of(each.user_stack) & running)
        cause = own if own.graph_break else next(before, None)
        if cause is None:
            return "called by code that Dynamo does not compile"
        where = cause.user_stack[-1]
        why = next(iter(cause.reason.splitlines()), "")
        return f"broken at {where.filename}:{where.lineno}, in {where.name}: {why}"

    @property
    def classes(self) -> list[str]:
        """The names of the classes of the modules in the graph, the outermost first."""
        root = InstructionTranslator.current_tx().f_locals.get("self")  # in no module's stack
        roots = [type(root).__name__] if isinstance(root, nn.Module) else []
        stacks = [node.meta.get("nn_module_stack", {}).values() for node in self.gm.graph.nodes]
        return roots + [getattr(kind, "__name__", str(kind)) for stack in stacks for _, kind in stack]

    @property
    def model(self) -> str:
        """The class of the module that the graph is of."""
        return next(iter(self.classes), "a function")

    def may_be_shared(self) -> bool:
        """Whether there is any attention, or any convolution over neighbours, that ranks may share."""
        return any(
            node.target is F.scaled_dot_product_attention or _mixes_neighbours(node)
            for part in self.gm.modules()
            if isinstance(part, fx.GraphModule)
            for node in part.graph.nodes
        )

    def has_masks(self) -> bool:
        """Whether any attention has a mask."""
        return any(
            node.target is F.scaled_dot_product_attention
            and (len(node.args) > 3 or node.kwargs.get("attn_mask") is not None)
            for node in self.gm.graph.nodes
        )

    def has_repeated_blocks(self) -> bool:
        return bool(find_blocks(self.gm.graph))


def _mixes_neighbours(node: fx.Node) -> bool:
    """Whether a node is a convolution with overlapping windows."""
    if node.target not in _CONVOLUTIONS:
        return False
    named: dict[str, Any] = {**dict(zip(("input", "weight", "bias", "stride"), node.args, strict=False)), **node.kwargs}
    weight = named["weight"].meta.get("example_value")
    return isinstance(weight, torch.Tensor) and overlaps(weight.shape[2:], named.get("stride", 1))


def _running_model() -> set[str]:
    """The files, outside of torch, that are being run between what `torch.compile` returned and Dynamo.

    None where Dynamo has all of the model; else they called Dynamo again, for a piece of it.
    """
    callers = itertools.dropwhile(lambda file: file != convert_frame.__file__, _files())
    return {file for file in itertools.takewhile(lambda file: file != eval_frame.__file__, callers) if _outside(file)}


def _files_of(stack: Iterable[FrameSummary]) -> set[str]:
    return {frame.filename for frame in stack if _outside(frame.filename)}


def _outside(file: str) -> bool:
    return not file.startswith(_TORCH)


def _files() -> Iterator[str]:
    """The files of the functions that are being run, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back
