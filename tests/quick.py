"""Which cases of a test run in `make test` and in continuous integration; `make test-all` runs every one.

A family, a mesh or a setting is left to the latter where another runs the same code and could break only with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """All cases for `pytest.mark.parametrize`; those that are not among the chosen are marked `full`."""
    cases = list(cases)
    assert all(each in cases for each in chosen), "a chosen case is none of the cases"
    left = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        case if case in chosen else pytest.param(*values, marks=pytest.mark.full)
        for case, values in zip(cases, left, strict=True)
    ]
