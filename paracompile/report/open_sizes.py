"""The sizes that Dynamo opened for one graph: which stay open, and what fixed the others.

After a call of another size Dynamo takes a size for a symbol. Whatever asks for its number while the graph is made, the
model's own code among it, fixes it, and each further size is compiled anew: the report names both kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from paracompile.layout.sizes import free_symbols_of

__all__ = ["FixedSizes", "fixed_sizes", "open_sizes"]


@dataclass(frozen=True)
class FixedSizes:
    """Sizes that Dynamo had opened, and that stand for one number each now.

    attributes:
        names: as the model is given them, like `hidden_states.shape[1]`.
        by: the line of the model that fixed them, with where it stands; None where it was no line of the model.
    """

    names: tuple[str, ...]
    by: str | None

    def __str__(self) -> str:
        by = f"the line {self.by}" if self.by is not None else "paracompile, as the README tells under Sizes"
        return f"compiled anew for each {' and '.join(self.names)}, fixed by {by}"


def open_sizes(values: Iterable[Any], env: ShapeEnv) -> tuple[str, ...]:
    """The names of the sizes that may be others in the next call, of those in the fake inputs of a graph."""
    fixed = _fixed(env)
    return tuple(_name(symbol, env) for symbol in free_symbols_of(list(values)) if symbol not in fixed)


def fixed_sizes(env: ShapeEnv) -> tuple[FixedSizes, ...]:
    """Those that are not open any more, by what fixed them."""
    names: dict[str | None, list[str]] = {}
    for symbol, by in _fixed(env).items():
        names.setdefault(by, []).append(_name(symbol, env))
    return tuple(FixedSizes(tuple(found), by) for by, found in names.items())


def _fixed(env: ShapeEnv) -> dict[sympy.Symbol, str | None]:
    """By symbol, what it was fixed by, directly or by being equal to another."""
    fixed: dict[sympy.Symbol, str | None] = {}
    for guard in env.guards:
        symbols = list(guard.expr.free_symbols)
        if len(symbols) == 1 and _holds_once(guard.expr, symbols[0], env):
            fixed.setdefault(symbols[0], guard.sloc.maybe_user_loc)
    equal = [guard.expr.args for guard in env.guards if isinstance(guard.expr, sympy.Eq)]
    for one, other in [*equal, *(pair[::-1] for pair in equal)]:
        if one.is_Symbol and other in fixed:
            fixed.setdefault(one, fixed[other])
    return fixed


def _holds_once(guard: sympy.Expr, symbol: sympy.Symbol, env: ShapeEnv) -> bool:
    """Whether a guard states the number of a size, and not only what divides it: no multiple of it keeps to it."""
    if not isinstance(guard, sympy.Eq):
        return False
    size = env.backed_var_to_val[symbol]
    return sympy.true not in [guard.xreplace({symbol: size * factor}) for factor in (2, 3, 5)]


def _name(symbol: sympy.Symbol, env: ShapeEnv) -> str:
    """As the model's code spells it: decorators and callers hand on named arguments as `kwargs`."""
    name = re.sub(r"L\['(?:kwargs'\]\[')?(\w+)'\]", r"\1", env.var_to_sources[symbol][0].name)
    return name.replace(".size()[", ".shape[")
