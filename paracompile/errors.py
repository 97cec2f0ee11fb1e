"""What paracompile raises.

Every error says what was met, where it was met and what to do about it. The texts hold nothing that differs between
ranks by nature (addresses, temporary names), so that ranks that fail alike print alike.

All of them survive pickling, although their constructors take more than a message: a test pool, or a launcher that
collects the errors of its workers, gets the same text back.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from paracompile.torch_private import OpOverload

if TYPE_CHECKING:
    from torch.fx import Node

__all__ = ["GraphError", "OptionError", "ParacompileError", "RankError", "module_path", "module_paths", "source_line"]

_TORCH_FOLDER = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n[ \t]*(?P<code>[^\n]*)')
# Dynamo's own spellings of an access: L['self'].blocks.0, L['self']._modules['blocks']._modules['0'], G['m'].blocks[0],
# and where a model has its own __getattr__ (all of diffusers') L['self'].__dict__['_modules']['blocks'].0.
_ROOT = re.compile(r"^[LG]\[(?:'[^']*'|\"[^\"]*\")\]")
_KEYED = re.compile(r"(?:\.__dict__\['_modules'\]|\._modules)?\[['\"]?(?P<key>[^'\"\]]+)['\"]?\]")
_VALUE_LIMIT = 200


class ParacompileError(RuntimeError):
    """Anything that paracompile refuses to do, or finds wrong."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[ParacompileError], arguments: tuple[Any, ...], state: dict[str, Any]) -> ParacompileError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(state)
    return error


class OptionError(ParacompileError, ValueError):
    """An option, or an argument of a public function, that cannot work.

    Args:
        key: the option's name, as the user wrote it.
        value: what was given; shown by its ``repr``, cut to 200 characters.
        remedy: what is wrong with it and what to write instead.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        shown = repr(value)
        if len(shown) > _VALUE_LIMIT:
            shown = shown[:_VALUE_LIMIT] + "..."
        super().__init__(f"paracompile option {key!r} = {shown}: {remedy}")
        self.key = key
        self.remedy = remedy


class GraphError(ParacompileError):
    """A place in the captured graph that cannot be compiled as asked.

    The message names the node and its operator, the module and the line of the model it came from (as far as the
    node's metadata tells), the problem and the remedy. The node itself is not kept: an error that is logged or stored
    must not keep a graph with its weights alive.

    Args:
        node: the node; None where no single one is to blame.
        problem: what is wrong, a clause without a full stop.
        remedy: what the user can do, a clause without a full stop.
    """

    def __init__(self, node: Node | None, problem: str, remedy: str) -> None:
        self.node_name: str | None = None if node is None else node.name
        self.module: str | None = None if node is None else module_path(node)
        self.source: str | None = None if node is None else source_line(node)
        self.problem = problem
        self.remedy = remedy
        lines = [problem if node is None else f"{_operator(node)} (node {node.name!r}): {problem}"]
        if self.module:
            lines.append(f"  in module {self.module}")
        if self.source:
            lines.append(f"  at {self.source}")
        lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


class RankError(ParacompileError):
    """What other ranks said, or that they said nothing: a failure elsewhere, different facts, an absent rank."""


def module_path(node: Node) -> str | None:
    """The module a node was captured in, as ``transformer_blocks.0.attn``.

    Returns:
        the last entry of ``node.meta["nn_module_stack"]`` without Dynamo's spelling of the root; None where the node
        belongs to the root module itself, or has no such metadata.
    """
    paths = module_paths(node)
    return (paths[-1] or None) if paths else None


def module_paths(node: Node) -> list[str]:
    """The modules that a node was captured in, outermost first, each spelled as by `module_path`; "" is the root."""
    entries = node.meta.get("nn_module_stack", {}).values()
    return [_spelled(str(entry[0] if isinstance(entry, tuple) else entry)) for entry in entries]


@lru_cache(maxsize=1 << 14)  # each node of a block is asked, by several passes
def _spelled(path: str) -> str:
    return _KEYED.sub(r".\g<key>", _ROOT.sub("", path)).strip(".")


def source_line(node: Node) -> str | None:
    """The innermost line outside torch that a node came from, as ``model.py:12, in forward: x = self.attn(x)``.

    Returns:
        file with its whole path, line, function and code; None without ``node.meta["stack_trace"]``. Where every frame
        is torch's own (a graph traced from torch.nn modules only), the innermost of these.
    """
    trace = node.meta.get("stack_trace")
    frames = list(_FRAME.finditer(trace)) if isinstance(trace, str) else []
    if not frames:
        return None
    outside = [frame for frame in frames if not frame["file"].startswith(_TORCH_FOLDER)]
    frame = (outside or frames)[-1]
    where = f"{frame['file']}:{frame['line']}, in {frame['function']}"
    return f"{where}: {frame['code'].strip()}" if frame["code"].strip() else where


def _operator(node: Node) -> str:
    """The node's operator in the user's words: a function's or method's name, not an address."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}" if node.op != node.target else node.op
    if isinstance(node.target, OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", None) or type(node.target).__name__)
