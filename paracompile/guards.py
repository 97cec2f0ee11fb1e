"""What one rank guards its graph by, all ranks do.

A rank's part of a sequence has sizes of its own, and what torch decides about them while it compiles becomes a guard:
for a size at which that is decided otherwise, Dynamo compiles anew, on this rank. All ranks must do so together.
"""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from paracompile.captured import Captured
from paracompile.layout.sizes import hint, size_of
from paracompile.runtime.agreement import Agreement
from paracompile.torch_private import PythonPrinter, own_expression

__all__ = ["Guards"]


_WITHOUT_GUARDS = {
    "max": lambda *sizes: reduce(torch.sym_max, sizes),
    "min": lambda *sizes: reduce(torch.sym_min, sizes),
}
"""Python's own would compare."""


class Guards:
    """The guards that are added to one graph from now on, until it is compiled."""

    def __init__(self, captured: Captured) -> None:
        self._env = captured.shape_env
        self._before = len(self._env.guards)
        values = {node.name: node.meta.get("example_value") for node in captured.placeholders}
        self._symbols = {
            str(own_expression(value)): value for value in values.values() if isinstance(value, torch.SymInt)
        }

    def share(self, agreement: Agreement) -> None:
        """Adds those of all other ranks.

        raises:
            RankError: a rank was called with other sizes.
        """
        own = [PythonPrinter().doprint(guard.expr) for guard in self._env.guards[self._before :]]
        sizes = {name: hint(size_of(value)) for name, value in self._symbols.items()}
        said = agreement.exchange("guards", facts={"sizes": json.dumps(sizes, sort_keys=True)}, own=json.dumps(own))
        scope: dict[str, Any] = {**SYMPY_INTERP, **_WITHOUT_GUARDS, **self._symbols}
        for text in sorted({text for texts in said for text in json.loads(texts)} - set(own)):
            bool(eval(text, scope))  # asked for its truth, a symbolic comparison is guarded
