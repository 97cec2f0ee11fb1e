"""Kernels of users' own, which graphs call by name: a graph holds no Python function, and is compared as text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["FUNCTIONS", "named", "takes"]

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Kernels of users' own, by the names that graphs call them by."""


def named(function: Callable[..., Any]) -> str:
    """The name by which graphs call a kernel of a user's own; the same in every process that runs the same program."""
    owner = getattr(function, "__module__", type(function).__module__)
    name = f"{owner}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    others = 0
    while FUNCTIONS.setdefault(called := f"{name}#{others}" if others else name, function) is not function:
        others += 1
    return called


def takes(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a kernel of a user's own has this parameter."""
    return parameter in inspect.signature(function).parameters
