"""Any number of sizes: none of them runs plainly, and what is compiled does not pile up.

Dynamo compiles a function anew for each size, eight times, and from then on runs it as it was written: slow, and on
several ranks the whole model on each. Here the limit rises with each compile. When more than `MOST_GRAPHS` graphs of
one function are held, the one that was used least recently is let go; it is compiled again if its size comes again,
mostly from Inductor's cache on disk. The limit is a setting of Dynamo's for the whole process.
"""

from __future__ import annotations

import warnings
from types import CodeType
from typing import Any

import torch

from paracompile.torch_private import CompileContext, DeletedGuardManagerWrapper, InstructionTranslator, graphs_of

__all__ = ["MOST_GRAPHS", "make_room"]

MOST_GRAPHS = 64

_ours: set[Any] = set()
"""What Dynamo calls the compiles that were made here."""


def make_room() -> None:
    """While a graph is compiled: sees to it that Dynamo will compile the next one, too."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_compile_id is None:
        return
    _ours.add(compile_id)
    settings = torch.compiler.config
    settings.recompile_limit = max(settings.recompile_limit, compile_id.frame_compile_id + 2)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, compile_id.frame_compile_id + 2)
    _let_go(InstructionTranslator.current_tx().f_code)


def _let_go(code: CodeType) -> None:
    """Lets the oldest graphs of a function go."""
    held = [
        entry
        for entry in graphs_of(code)  # the one used last comes first
        if entry.compile_id in _ours and not isinstance(entry.guard_manager, DeletedGuardManagerWrapper)
    ]
    for entry in held[MOST_GRAPHS - 1 :]:  # one more is about to come
        warnings.warn(
            f"paracompile: more than {MOST_GRAPHS} sizes of one model are in use, and what was compiled for the one "
            "that was used least recently is let go. Use fewer resolutions and prompt lengths in one process.",
            stacklevel=2,
        )
        state: Any = entry.guard_manager.extra_state
        state.invalidate(entry, DeletedGuardManagerWrapper("paracompile: used least recently"))
