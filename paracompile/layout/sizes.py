"""Sizes that stay open: a number for now, and the formula by which it follows from the sizes of the graph's inputs.

The analysis and the passes calculate with sizes as with numbers. Where a size may be another one in the next call
(Dynamo's symbols: a resolution, the length of a prompt) they calculate with a `Size`, which carries the formula along.
Whatever is decided by comparing sizes becomes a guard of the compile, by torch's own `ShapeEnv`: in a call for which it
would be decided otherwise, Dynamo compiles anew. So no decision can be wrong for a later size. What only weighs costs
asks for the `hint`, the number at the first call, and guards nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import gcd
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols, statically_known_true
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "Size",
    "at_least",
    "common_divisor",
    "common_multiple",
    "divides",
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


def _refused(self: Size, *others: Any) -> Any:
    raise TypeError(f"{self.formula} is open, and has no such operation: ask for its hint, or fix it by int()")


class Size(int):
    """A size with its formula.

    Two sizes are equal if they are so at all sizes, which nothing is guarded for: at a size at which they happen to be
    equal, they need not be known to be. Only whether one is 0 or 1 is asked, and guarded. So is what is larger. Sizes
    are hashed by their numbers at the first call.

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

    def __floordiv__(self, other: Any) -> Any:
        return _divided(self, other) if isinstance(other, _NUMBERS) else NotImplemented

    def __rfloordiv__(self, other: Any) -> Any:
        return _divided(other, self) if isinstance(other, _NUMBERS) else NotImplemented

    def __mod__(self, other: Any) -> Any:
        return _rest(self, other) if isinstance(other, _NUMBERS) else NotImplemented

    def __rmod__(self, other: Any) -> Any:
        return _rest(other, self) if isinstance(other, _NUMBERS) else NotImplemented

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __neg__(self) -> Any:
        return size_of(-self.formula)

    __pow__ = __rpow__ = __truediv__ = __rtruediv__ = __round__ = __abs__ = __invert__ = _refused
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __and__ = __rand__ = __or__ = __ror__ = _refused
    __xor__ = __rxor__ = __float__ = _refused

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, _NUMBERS):
            return NotImplemented
        if formula_of(self) == formula_of(other):
            return True
        if isinstance(other, int) and not isinstance(other, Size):
            return bool(self.formula == other) if other in (0, 1) else False
        return super().__eq__(hint(size_of(other))) and statically_known_true(self.formula == formula(other))

    def __ne__(self, other: object) -> Any:
        equal = self == other
        return equal if equal is NotImplemented else not equal

    __lt__ = _decided_by(operator.lt)
    __le__ = _decided_by(operator.le)
    __gt__ = _decided_by(operator.gt)
    __ge__ = _decided_by(operator.ge)

    def __hash__(self) -> int:
        return super().__hash__()

    def __bool__(self) -> bool:
        return self != 0

    def __int__(self) -> int:
        """The number, fixed by a guard: whoever asks needs one."""
        return int(self.formula)

    def __copy__(self) -> Size:
        return self

    def __deepcopy__(self, memo: object) -> Size:
        return self


def same(one: int, other: int) -> bool:
    """Whether two sizes are the same number at the first call; if so, they are guarded to be."""
    return hint(one) == hint(other) and bool(formula(one) == formula(other))


def at_least(size: int, least: int) -> int:
    """The size, guarded to be so large; one that is smaller is fixed."""
    if not isinstance(size, Size):
        return size
    return size if hint(size) >= least and size >= least else int(size)


def divides(divisor: int, size: int) -> bool:
    """Whether it does so at all sizes; nothing is guarded."""
    if isinstance(divisor, Size) or isinstance(size, Size):
        return _quotient(_expression(size), _expression(divisor)) is not None
    return divisor != 0 and size % divisor == 0


def common_divisor(one: int, other: int) -> int:
    """The largest that divides both at all sizes."""
    if isinstance(one, Size) or isinstance(other, Size):
        return _size_like((one, other), _gcd(_expression(one), _expression(other)))
    return gcd(one, other)


def common_multiple(one: int, other: int) -> int:
    """The smallest that both divide at all sizes."""
    return one * (other // common_divisor(one, other)) if one and other else 0


def _divided(size: Any, divisor: Any) -> Any:
    exact = _quotient(_expression(size), _expression(divisor))
    if exact is not None:
        return _size_like((size, divisor), exact)
    return size_of(formula(size) // formula(divisor))


def _rest(size: Any, divisor: Any) -> Any:
    exact = _quotient(_expression(size), _expression(divisor))
    return 0 if exact is not None else size_of(formula(size) % formula(divisor))


def _expression(size: Any) -> sympy.Expr:
    value = formula(size)
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def _size_like(sizes: Sequence[Any], expression: sympy.Expr) -> Any:
    """The size of an expression in the symbols of others."""
    node = next(value.node for value in map(formula, sizes) if isinstance(value, torch.SymInt))
    if expression.is_Integer:
        return int(expression)
    known = {symbol: node.shape_env.create_symintnode(symbol, hint=None) for symbol in expression.free_symbols}
    return size_of(sympy_interp(PythonReferenceAnalysis, known, expression))


@cache
def _quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """What the division of two polynomials gives, if it leaves nothing; calls of functions count as variables."""
    (size, divisor), calls = _polynomials(size, divisor)
    if divisor == 0:
        return None
    variables = sorted(size.free_symbols | divisor.free_symbols, key=str)
    if not variables:
        return size // divisor if size % divisor == 0 else None
    quotient, rest = sympy.div(sympy.Poly(size, *variables, domain="QQ"), sympy.Poly(divisor, *variables, domain="QQ"))
    if not rest.is_zero or not all(coefficient.is_integer for coefficient in quotient.coeffs()):
        return None
    return quotient.as_expr().xreplace(calls)


@cache
def _gcd(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    (one, other), calls = _polynomials(one, other)
    return sympy.gcd(one, other).xreplace(calls)


def _polynomials(*expressions: sympy.Expr) -> tuple[list[sympy.Expr], dict[sympy.Symbol, sympy.Expr]]:
    """The expressions with a variable for each call of a function (rounded quotients), and what these stand for."""
    found = sorted({call for each in expressions for call in each.atoms(sympy.Function)}, key=str)
    variables = {call: sympy.Dummy(f"call_{number}") for number, call in enumerate(found)}
    return [sympy.expand(each.xreplace(variables)) for each in expressions], {v: call for call, v in variables.items()}


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
