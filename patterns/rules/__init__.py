"""The rule table: for each ATen operator, which of its index ranges may be cut over ranks.

Each module holds one kind of operator and a table `RULES`; whatever PyTorch tags as pointwise needs no entry. An
operator without a rule is not an error: its operands are gathered, and it runs whole on every rank.
"""

from __future__ import annotations

from dataclasses import replace

from paracompile.errors import OptionError
from paracompile.layout.factors import Op, Rule
from paracompile.layout.sizes import numbers_in
from paracompile.patterns.rules import attention, contractions, indexing, joins, pointwise, reductions, views, windows
from paracompile.patterns.rules.labels import Table, Target, equation
from paracompile.torch_private import OpOverload, schema_of

__all__ = ["RULES", "register_rule", "rule_for"]

_MODULES = (pointwise, views, joins, contractions, reductions, indexing, windows, attention)

RULES: Table = {target: rule for module in _MODULES for target, rule in module.RULES.items()}

_REGISTERED: Table = {}


def rule_for(target: Target) -> Rule | None:
    """The rule of an operator, or None where it is unknown."""
    rule = RULES.get(target) or _REGISTERED.get(target)
    return pointwise.ELEMENTWISE if rule is None and pointwise.is_pointwise(target) else rule


def register_rule(operator: Target, rule: str | Rule) -> None:
    """Says which index ranges of an operator of one's own may be cut over ranks; on every rank, before compiling.

    Without a rule an operator is right, too: its operands are gathered, and it runs whole on every rank.

    args:
        operator: an overload (`torch.ops.mylib.gate.default`) that writes to none of its operands.
        rule: in einsum's notation, `"btc, bc -> btc"`: a letter is an index range at whose positions the operator works
            independently, `_` a dimension that it mixes or sums up, `...` dimensions that broadcast. A `Rule`
            (`paracompile.layout.factors`) for an operator with arguments that hold sizes; it is told numbers, so that
            sizes of this operator do not stay open: a model with it compiles for each.

    raises:
        OptionError: no such overload, one that has a rule already, or a rule that cannot be read.
    """
    if not isinstance(operator, OpOverload):
        raise OptionError("operator", operator, "give an overload, as torch.ops.mylib.gate.default")
    if operator in RULES or pointwise.is_pointwise(operator):
        raise OptionError("operator", operator, "it has a rule already")
    if schema_of(operator).is_mutable:
        raise OptionError("operator", operator, "it writes to an operand: register one that gives a new tensor")
    if isinstance(rule, str) and (rule.count("->") != 1 or not all(c.isalpha() or c in " ,._->" for c in rule)):
        raise OptionError("rule", rule, 'write it as einsum does, one term an operand: "btc, bc -> btc"')
    _REGISTERED[operator] = Rule(equation(rule)) if isinstance(rule, str) else _of_numbers(rule)


def _of_numbers(rule: Rule) -> Rule:
    """The rule with its operator's sizes fixed: whoever wrote it need not know which calculations keep a formula."""

    def fixed(op: Op) -> Op:
        arguments, operands, results = (numbers_in(sizes) for sizes in (op.arguments, op.operands, op.results))
        return replace(op, arguments=arguments, operands=operands, results=results)

    localise = rule.localise
    return replace(
        rule,
        factors=lambda op: rule.factors(fixed(op)),
        localise=localise and (lambda op, local: localise(fixed(op), replace(local, **numbers_in(vars(local))))),
    )
