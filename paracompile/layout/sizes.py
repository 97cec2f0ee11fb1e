"""Sizes that stay open: a number for now, and the formula by which it follows from the sizes of the graph's inputs.

The analysis and the passes calculate with sizes as with numbers. Where a size may be another one in the next call
(Dynamo's symbols: a resolution, the length of a prompt) they calculate with a `Size`, which carries the formula along.
Whatever is decided by comparing sizes becomes a guard of the compile, by torch's own `ShapeEnv`: in a call for which it
would be decided otherwise, Dynamo compiles anew. So no decision can be wrong for a later size. What only weighs costs
asks for the `hint`, the number at the first call, and guards nothing.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import gcd, prod
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols, free_unbacked_symbols, statically_known_true
from torch.fx.node import map_aggregate

from paracompile.torch_private import (
    FloorDiv,
    Max,
    Min,
    Mod,
    PythonMod,
    PythonReferenceAnalysis,
    sympy_interp,
    tree_leaves,
)

__all__ = [
    "Size",
    "at_least",
    "bytes_in",
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


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS)


def _expression(size: Any) -> sympy.Expr:
    if isinstance(size, Size):
        return size.expression
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _symbolic(env: ShapeEnv, expression: sympy.Expr) -> Any:
    if expression.is_Integer:
        return int(expression)
    return env.create_symintnode(expression, hint=int(_at_first_call(env, expression)))


def _at_first_call(env: ShapeEnv, expression: sympy.Expr) -> sympy.Expr:
    return expression.xreplace({symbol: env.backed_var_to_val[symbol] for symbol in expression.free_symbols})


# Calculating with expressions


@cache
def _sum(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    return one + other


@cache
def _difference(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    return one - other


@cache
def _product(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    return sympy.expand(one * other)


@cache
def _quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    exact = _exact_quotient(size, divisor)
    return FloorDiv(size, divisor) if exact is None else exact


@cache
def _rest(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return sympy.Integer(0) if _exact_quotient(size, divisor) is not None else Mod(size, divisor)


@cache
def _exact_quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
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
def _largest_common_divisor(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    (one, other), calls = _polynomials(one, other)
    return sympy.gcd(one, other).xreplace(calls)


def _polynomials(*expressions: sympy.Expr) -> tuple[list[sympy.Expr], dict[sympy.Symbol, sympy.Expr]]:
    """The expressions with a variable for each call of a function (a rounded quotient), and what these stand for."""
    calls: dict[sympy.Expr, sympy.Symbol] = {}

    def polynomial(each: sympy.Expr) -> sympy.Expr:
        if each.is_Symbol or each.is_Integer:
            return each
        if each.is_Add or each.is_Mul or (each.is_Pow and each.exp.is_Integer and each.exp > 0):
            return each.func(*map(polynomial, each.args))
        return calls.setdefault(each, sympy.Dummy(f"call_{len(calls)}", integer=True))

    found = [sympy.expand(polynomial(each)) for each in expressions]
    return found, {variable: call for call, variable in calls.items()}


_NUMBERS = (int, torch.SymInt)


def _calculated(function: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A calculation on sizes as a method, and the one for a `Size` on the right."""

    def method(self: Size, other: Any) -> Any:
        return self.like(function(self.expression, _expression(other))) if _is_number(other) else NotImplemented

    def reflected(self: Size, other: Any) -> Any:
        return self.like(function(_expression(other), self.expression)) if _is_number(other) else NotImplemented

    return method, reflected


def _decided(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A comparison of sizes as a method; torch guards what it answers."""

    def method(self: Size, other: Any) -> Any:
        return self.guarded(function, _expression(other)) if _is_number(other) else NotImplemented

    return method


def _refused(self: Size, *others: Any) -> Any:
    raise TypeError(f"{self.expression} is open, and has no such operation: ask for its hint, or fix it by int()")


class Size(int):
    """A size with its formula.

    Two sizes are equal if they are so at all sizes, which nothing is guarded for: where they only happen to be, nobody
    need know. Whether one is 0 or 1 is guarded, as is which one is larger. Sizes are hashed by their numbers at the
    first call.

    attributes:
        original: the formula that it was made with, an expression of torch's symbols.
        env: what torch knows of these symbols.
    """

    original: sympy.Expr
    env: ShapeEnv

    def __new__(cls, formula: torch.SymInt) -> Size:
        """`formula` follows from sizes that are known at the first call."""
        expression, env = formula.node.expr, formula.node.shape_env
        return cls.of(expression, int(_at_first_call(env, expression)), env)

    @classmethod
    def of(cls, expression: sympy.Expr, number: int, env: ShapeEnv) -> Size:
        size = super().__new__(cls, number)
        size.original, size.env = expression, env
        return size

    def like(self, expression: sympy.Expr) -> int:
        """What is calculated with this size."""
        if expression.is_Integer:
            return int(expression)
        return Size.of(expression, int(_at_first_call(self.env, expression)), self.env)

    def guarded(self, function: Callable[[Any, Any], Any], other: sympy.Expr) -> bool:
        """What a comparison with another size answers, now and by a guard at all sizes."""
        known = _decisions.setdefault(self.env, {})
        key = function, self.original, other
        if key not in known:
            known[key] = bool(function(self.formula, _symbolic(self.env, other)))
        return known[key]

    @property
    def expression(self) -> sympy.Expr:
        """The formula in symbols, of which some may by now be known to be others."""
        return self.env.replace(self.original)

    @property
    def formula(self) -> torch.SymInt:
        """Torch's symbolic integer."""
        symbolic: torch.SymInt = _symbolic(self.env, self.expression)
        return symbolic

    __add__, __radd__ = _calculated(_sum)
    __sub__, __rsub__ = _calculated(_difference)
    __mul__, __rmul__ = _calculated(_product)
    __floordiv__, __rfloordiv__ = _calculated(_quotient)
    __mod__, __rmod__ = _calculated(_rest)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __neg__(self) -> Any:
        return 0 - self

    __pow__ = __rpow__ = __truediv__ = __rtruediv__ = __round__ = __abs__ = __invert__ = _refused
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __and__ = __rand__ = __or__ = __ror__ = _refused
    __xor__ = __rxor__ = __float__ = _refused

    def __eq__(self, other: object) -> Any:
        if not _is_number(other):
            return NotImplemented
        mine, theirs = self.expression, _expression(other)
        if mine == theirs or theirs in (0, 1):
            return mine == theirs or self.guarded(operator.eq, theirs)
        if theirs.is_Integer or hint(self) != hint(size_of(other)):
            return False
        return statically_known_true(self.formula == formula(other))

    def __ne__(self, other: object) -> Any:
        equal = self == other
        return equal if equal is NotImplemented else not equal

    __lt__ = _decided(operator.lt)
    __le__ = _decided(operator.le)
    __gt__ = _decided(operator.gt)
    __ge__ = _decided(operator.ge)

    def __hash__(self) -> int:
        return super().__hash__()

    def __repr__(self) -> str:
        """The formula: what is told apart by how it is spelled must not take two sizes for one that only happen to be
        the same number."""
        return str(self.expression)

    def __str__(self) -> str:
        return super().__repr__()

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __int__(self) -> int:
        """The number, fixed by a guard: whoever asks needs one."""
        return int(self.formula)

    def __copy__(self) -> Size:
        return self

    def __deepcopy__(self, memo: object) -> Size:
        return self


_decisions: weakref.WeakKeyDictionary[ShapeEnv, dict[Any, bool]] = weakref.WeakKeyDictionary()
"""What was asked before; torch remembers the guard, and takes long to find that out."""


def same(one: int, other: int) -> bool:
    """Whether two sizes are the same number at the first call; if so, they are guarded to be."""
    return hint(one) == hint(other) and bool(formula(one) == formula(other))


def same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are the same at the first call; if so, their sizes are guarded to be."""
    return len(one) == len(other) and all(map(same, one, other))


def at_least(size: int, least: int) -> int:
    """The size, guarded to be so large; one that is smaller is fixed."""
    if not isinstance(size, Size):
        return size
    return size if hint(size) >= least and size >= least else int(size)


def divides(divisor: int, size: int) -> bool:
    """Whether it does so at all sizes; nothing is guarded."""
    if isinstance(divisor, Size) or isinstance(size, Size):
        return _exact_quotient(_expression(size), _expression(divisor)) is not None
    return divisor != 0 and size % divisor == 0


def common_divisor(one: int, other: int) -> int:
    """The largest that divides both at all sizes."""
    for size in (one, other):
        if isinstance(size, Size):
            return size.like(_largest_common_divisor(_expression(one), _expression(other)))
    return gcd(one, other)


def common_multiple(one: int, other: int) -> int:
    """The smallest that both divide at all sizes."""
    return one * (other // common_divisor(one, other)) if one and other else 0


def size_of(value: Any) -> Any:
    """A plain number for a symbolic integer that is one, a `Size` for one that may change; all else as it is.

    What only the data tells has no number, and stays torch's symbol. What takes more than sums, products, quotients and
    remainders (a root, a choice) is fixed.
    """
    if not isinstance(value, torch.SymInt):
        return value
    if value.node.is_constant() or not value.node.expr.free_symbols:
        return int(value)
    if free_unbacked_symbols(value):
        return value
    return Size(value) if _is_calculable(value.node.expr) else int(value)


@cache
def _is_calculable(expression: sympy.Expr) -> bool:
    plain = expression.is_Symbol or expression.is_Integer or expression.is_Add or expression.is_Mul
    known = plain or expression.is_Pow or isinstance(expression, (FloorDiv, Mod, PythonMod, Max, Min))
    return known and all(map(_is_calculable, expression.args))


def sizes_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor."""
    return tuple(map(size_of, tensor.shape))


def formula_of(size: Any) -> int | sympy.Expr:
    """A number, or a formula in symbols: what tells sizes apart that are not the same at each call."""
    return _expression(size) if isinstance(size, (Size, torch.SymInt)) else size


def sizes_in(tree: Any) -> Any:
    """`size_of` all that is in a tree of arguments."""
    return map_aggregate(tree, lambda leaf: size_of(leaf) if isinstance(leaf, torch.SymInt) else leaf)


def numbers_in(tree: Any) -> Any:
    """A tree of arguments with all sizes in it fixed."""
    return map_aggregate(tree, lambda leaf: int(leaf) if isinstance(leaf, Size) else leaf)


def formula(value: Any) -> Any:
    """Torch's symbolic integer of a `Size`; all else as it is."""
    return value.formula if isinstance(value, Size) else value


def symbols_in(tree: Any) -> Any:
    """The `formula` of all that is in a tree of arguments, as operators on symbolic tensors take it."""
    return map_aggregate(tree, formula)


def free_symbols_of(tree: Any) -> dict[sympy.Symbol, None]:
    """The symbols in the formulas of a tree of arguments, fake tensors included, in the order of their names."""
    leaves = (formula(leaf) for leaf in tree_leaves(tree))
    found = set().union(*(free_symbols(leaf) for leaf in leaves if isinstance(leaf, (torch.Tensor, torch.SymInt))))
    return dict.fromkeys(sorted(found, key=str))


def is_symbol(value: Any) -> TypeGuard[torch.SymInt]:
    """Whether it is a symbol, or known to be one: a call that brings its value brings the symbol's."""
    return isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)


def evaluate(size: Any, symbols: Mapping[sympy.Symbol, Any]) -> Any:
    """A size at the values of its symbols: numbers, or anything that calculates like them."""
    return sympy_interp(PythonReferenceAnalysis, dict(symbols), _expression(size))


def hint(value: int) -> int:
    """The number at the first call, which costs are weighed by; it guards nothing."""
    return int.__int__(value) if isinstance(value, Size) else value


def bytes_in(tensor: torch.Tensor) -> int:
    """What a fake tensor holds at the first call."""
    return prod(map(hint, sizes_of(tensor))) * tensor.element_size()
