"""Runs the original graph beside the first call of a compiled one, and raises where the two differ.

This is `options={"verify": True}`. The original runs first, whole and eagerly on this rank, on copies of all that it
might write to; what the compiled graph writes to its inputs is compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paracompile.errors import ParacompileError

__all__ = ["VerifiedCall"]


@dataclass(eq=False)
class VerifiedCall:
    """Calls a compiled graph.

    attributes:
        run: the compiled graph. It may take and return more than the original, which comes last.
        original: what it was compiled from, with all its inputs and outputs; None as soon as the two were compared.
        inputs, outputs: what the original's are called in messages.
        tolerance: the largest difference that is rounding, relative to the largest value.
    """

    run: Callable[..., Any]
    original: Callable[..., Any] | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    tolerance: float

    def __call__(self, *args: Any) -> Any:
        if self.original is None:
            return self.run(*args)
        copies = [_copy(value) for value in args[: len(self.inputs)]]
        with torch.no_grad():
            expected = self.original(*copies)
        found = self.run(*args)
        names = [f"output {name}" for name in self.outputs] + [f"input {name} after the call" for name in self.inputs]
        pairs = zip(names, [*found[: len(expected)], *args[: len(copies)]], [*expected, *copies], strict=True)
        problems = [problem for name, one, other in pairs if (problem := self._difference(name, one, other))]
        if problems:
            raise ParacompileError(
                f'"verify": the compiled graph and the original differ in {"; ".join(problems)}. Please report it with '
                'the model and what options={"dump": folder} writes. Which part of paracompile it is show "rdt": None, '
                '"drop_masked_keys": False and "compiler": "eager", one after the other'
            )
        self.original = None
        return found

    def _difference(self, name: str, found: Any, expected: Any) -> str | None:
        """What is different, in words."""
        if found is expected:  # a weight
            return None
        if not isinstance(expected, Tensor):
            return None if found == expected else f"{name}: {found} instead of {expected}"
        kinds = [
            f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}" for value in (found, expected)
        ]
        if kinds[0] != kinds[1]:
            return f"{name}: {kinds[0]} instead of {kinds[1]}"
        wide = torch.complex128 if expected.is_complex() else torch.float64
        one, other = found.detach().to(wide), expected.detach().to(wide)
        equal = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(torch.inf, posinf=torch.inf)
        largest = float(torch.where(other.isfinite(), other.abs(), 0.0).max()) if other.numel() else 0.0
        tolerance = self.tolerance * largest if expected.is_floating_point() or expected.is_complex() else 0.0
        worst = float(difference.max()) if difference.numel() else 0.0
        if worst <= tolerance:
            return None
        return f"{name}: by {worst:.3g}, and {tolerance:.3g} is the tolerance (its largest value is {largest:.3g})"


def _copy(value: Any) -> Any:
    """A copy of what a graph may write to: of all tensors but parameters."""
    return value if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) else value.detach().clone()
