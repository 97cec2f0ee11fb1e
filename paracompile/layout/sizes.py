"""Sizes that stay open: a number for now, and the formula by which it follows from the sizes of the graph's inputs.

The analysis and the passes calculate with sizes as with numbers. Where a size may be another one in the next call
(Dynamo's symbols: a resolution, the length of a prompt) they calculate with a `Size`, which carries the formula along.
Whatever is decided by comparing sizes becomes a guard of the compile, by torch's own `ShapeEnv`: in a call for which it
would be decided otherwise, Dynamo compiles anew. So no decision can be wrong for a later size. What only weighs costs
asks for the `hint`, the number at the first call, and guards nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "Size",
    "evaluate",
    "formula",
    "formula_of",
    "free_symbols_of",
    "hint",
    "size_of",
    "sizes_in",
    "sizes_of",
    "symbols_in",
]


_NUMBERS = (int, torch.SymInt)


def _made_of(function: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A calculation on sizes as a method, and the one for a `Size` on the right."""

    def method(self: Size, other: Any) -> Any:
        return size_of(function(self.formula, formula(other))) if isinstance(other, _NUMBERS) else NotImplemented

    def reflected(self: Size, other: Any) -> Any:
        return size_of(function(formula(other), self.formula)) if isinstance(other, _NUMBERS) else NotImplemented

    return method, reflected


def _decided_by(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A comparison of sizes as a method; torch guards what it answers."""

    def method(self: Size, other: Any) -> Any:
        return bool(function(self.formula, formula(other))) if isinstance(other, _NUMBERS) else NotImplemented

    return method


class Size(int):
    """A size with its formula.

    It is hashed by its number, so that it may be looked up; two that look equal are compared by their formulas, which
    guards.

    attributes:
        formula: torch's symbolic integer.
    """

    formula: torch.SymInt

    def __new__(cls, formula: torch.SymInt) -> Size:
        """`formula` follows from sizes that are known at the first call."""
        size = super().__new__(cls, formula.node.hint)
        size.formula = formula
        return size

    __add__, __radd__ = _made_of(operator.add)
    __sub__, __rsub__ = _made_of(operator.sub)
    __mul__, __rmul__ = _made_of(operator.mul)
    __floordiv__, __rfloordiv__ = _made_of(operator.floordiv)
    __mod__, __rmod__ = _made_of(operator.mod)

    __eq__ = _decided_by(operator.eq)
    __ne__ = _decided_by(operator.ne)
    __lt__ = _decided_by(operator.lt)
    __le__ = _decided_by(operator.le)
    __gt__ = _decided_by(operator.gt)
    __ge__ = _decided_by(operator.ge)

    def __hash__(self) -> int:
        return super().__hash__()

    def __neg__(self) -> Any:
        return size_of(-self.formula)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __bool__(self) -> bool:
        return bool(self.formula != 0)

    def __int__(self) -> int:
        """The number, fixed by a guard: whoever asks needs one."""
        return int(self.formula)

    def __copy__(self) -> Size:
        return self

    def __deepcopy__(self, memo: object) -> Size:
        return self


def size_of(value: Any) -> Any:
    """A plain number for a symbolic integer that is one, a `Size` for one that may change; all else as it is.

    What only the data tells has no number, and stays torch's symbol.
    """
    if not isinstance(value, torch.SymInt):
        return value
    if value.node.is_constant() or not value.node.expr.free_symbols:
        return int(value)
    return value if free_unbacked_symbols(value) else Size(value)


def sizes_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor."""
    return tuple(map(size_of, tensor.shape))


def formula_of(size: Any) -> int | str:
    """A number, or the text of a formula: what tells sizes apart that are not the same at each call."""
    value = formula(size)
    return str(value.node.expr) if isinstance(value, torch.SymInt) else value


def sizes_in(tree: Any) -> Any:
    """`size_of` all that is in a tree of arguments."""
    return tree_map_only(torch.SymInt, size_of, tree)


def formula(value: Any) -> Any:
    """Torch's symbolic integer of a `Size`; all else as it is."""
    return value.formula if isinstance(value, Size) else value


def symbols_in(tree: Any) -> Any:
    """The `formula` of all that is in a tree of arguments, as operators on symbolic tensors take it."""
    return tree_map_only(Size, formula, tree)


def free_symbols_of(tree: Any) -> dict[sympy.Symbol, None]:
    """The symbols in the formulas of a tree of arguments, fake tensors included, in the order of their names."""
    leaves = (formula(leaf) for leaf in tree_leaves(tree))
    found = set().union(*(free_symbols(leaf) for leaf in leaves if isinstance(leaf, (torch.Tensor, torch.SymInt))))
    return dict.fromkeys(sorted(found, key=str))


def is_symbol(value: Any) -> bool:
    """Whether it is a symbol itself, whose value a call brings."""
    return isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)


def evaluate(size: Any, symbols: Mapping[sympy.Symbol, Any]) -> Any:
    """A size at the values of its symbols: numbers, or anything that calculates like them."""
    value = formula(size)
    return sympy_interp(PythonReferenceAnalysis, symbols, value.node.expr) if isinstance(value, torch.SymInt) else value


def hint(value: int) -> int:
    """The number at the first call, which costs are weighed by; it guards nothing."""
    return int.__int__(value) if isinstance(value, Size) else value
