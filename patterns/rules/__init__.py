"""The rule table: for each ATen operator, which of its index ranges may be cut over ranks.

Each module holds one kind of operator and a table `RULES`; whatever PyTorch tags as pointwise needs no entry. An
operator without a rule is not an error: its operands are gathered, and it runs whole on every rank.
"""

from __future__ import annotations

from paracompile.layout.factors import Rule
from paracompile.patterns.rules import attention, contractions, indexing, joins, pointwise, reductions, views, windows
from paracompile.patterns.rules.labels import Table, Target

__all__ = ["RULES", "rule_for"]

_MODULES = (pointwise, views, joins, contractions, reductions, indexing, windows, attention)

RULES: Table = {target: rule for module in _MODULES for target, rule in module.RULES.items()}


def rule_for(target: Target) -> Rule | None:
    """The rule of an operator, or None where it is unknown."""
    rule = RULES.get(target)
    return pointwise.ELEMENTWISE if rule is None and pointwise.is_pointwise(target) else rule
