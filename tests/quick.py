"""Which cases of a test run in `make test` and in continuous integration; `make test-all` runs every one.

A family, a mesh or a setting is left to the latter, or with `left=pytest.mark.slow` to the second, where another runs
the same code and could break only with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(cases: Iterable[Any], *chosen: Any, left: pytest.MarkDecorator = pytest.mark.full) -> list[Any]:
    """All cases for `pytest.mark.parametrize`; those that are not among the chosen bear the mark `left`."""
    cases = list(cases)
    assert all(each in cases for each in chosen), "a chosen case is none of the cases"
    return [
        case if case in chosen else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=left)
        for case in cases
    ]
