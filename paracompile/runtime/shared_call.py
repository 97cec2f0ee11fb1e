"""Calls a sharded graph on all of its ranks, or on none.

A rank that is in a collective alone, or in another one than the others, is aborted by gloo and waits for ever on nccl.
So before each call the ranks make sure that all of them make it, on the host and through the store: see
`Agreement.meet`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from paracompile.errors import ParacompileError
from paracompile.runtime.agreement import Agreement
from paracompile.torch_private import group_named

__all__ = ["SharedCall"]

_calling = threading.Lock()


@dataclass(eq=False)
class SharedCall:
    """The callable of one graph on several ranks.

    attributes:
        run: takes the graph's arguments.
        name: of the graph, the same on all ranks.
        inputs: by name, the places of the tensors that a call brings, whose shapes messages tell.
        symbols: the places of sizes that differ from call to call: all ranks must come with the same.
        groups: the names of the process groups that the graph has collectives in.
        compiling, calling: wait for the other ranks, as long as compiling and as long as a call may take.
    """

    run: Callable[..., Any]
    name: str
    inputs: Mapping[str, int]
    groups: Iterable[str]
    compiling: Agreement
    calling: Agreement
    symbols: Sequence[int] = ()
    _made_for: Mapping[str, weakref.ref[Any]] = field(init=False)
    _calls: int = 0

    def __post_init__(self) -> None:
        self._made_for = {name: weakref.ref(_group(name)) for name in self.groups if name}

    def __call__(self, *args: Any) -> Any:
        if not _calling.acquire(blocking=False):
            raise ParacompileError(
                f"{self._call(args)}: another thread of this process is in a call of a sharded graph, and ranks whose "
                "threads come in another order would mix the two. Let one thread make the calls, or put a lock around "
                "whole generations, and see to it that all ranks make them in the same order"
            )
        try:
            return self._first(args) if self._calls == 0 else self._next(args)
        finally:
            _calling.release()

    def _first(self, args: tuple[Any, ...]) -> Any:
        """Kernels may still be built and tuned here, on one rank for longer than on another."""
        call = self._call(args)
        self._meet(self.compiling, call, args)
        with self.compiling.stage(f"end of {call}"):
            result = self.run(*args)
        self._calls += 1
        return result

    def _next(self, args: tuple[Any, ...]) -> Any:
        self._meet(self.calling, self._call(args), args)
        self._calls += 1
        return self.run(*args)

    def _meet(self, agreement: Agreement, call: str, args: tuple[Any, ...]) -> None:
        for name, group in self._made_for.items():
            if group() is None or group() is not _group(name):
                raise ParacompileError(
                    f"{call}: the process group {name!r} that it was compiled for was destroyed. Call "
                    "torch.compiler.reset(), and compile the model for the group that there is now, with a mesh of it"
                )
        shapes = {name: "x".join(map(str, args[place].shape)) for name, place in self.inputs.items()}
        agreement.meet(call, own=", ".join(f"{name} of {shape or 'one number'}" for name, shape in shapes.items()))

    def _call(self, args: tuple[Any, ...]) -> str:
        sizes = f" at sizes {', '.join(str(args[place]) for place in self.symbols)}" if self.symbols else ""
        return f"call {self._calls + 1} of {self.name}{sizes}"


def _group(name: str) -> Any:
    """The group of this name; None if there is none."""
    try:
        return group_named(cast(Any, name))
    except RuntimeError:
        return None
