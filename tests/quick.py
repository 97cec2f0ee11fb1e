"""Which cases of a test run in `make test` and in continuous integration; `make test-all` runs every one.

A family, a mesh or a setting is left to the latter, or as `slow` to the second, where another runs the same code and
could break only with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(cases: Iterable[Any], *chosen: Any, slow: Iterable[Any] = ()) -> list[Any]:
    """All cases for `pytest.mark.parametrize`; of those that are not chosen some are `slow`, the others `full`."""
    cases, slow = list(cases), list(slow)
    assert all(each in cases for each in [*chosen, *slow]), "a chosen case is none of the cases"

    def marked(case: Any) -> Any:
        mark = pytest.mark.slow if case in slow else pytest.mark.full
        return case if case in chosen else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)

    return list(map(marked, cases))
