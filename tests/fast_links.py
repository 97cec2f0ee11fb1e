"""Links so fast that rows of tokens are worth cutting in small models, which are too narrow for it on real ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

from paracompile.layout.boundaries import Machine
from paracompile.passes import plan_layouts

FAST = Machine(link=1e15, start=1e-5)


def fast_links() -> Any:
    """A context in which transformers are planned for such links."""
    return mock.patch.dict(plan_layouts.__globals__, Machine=lambda: FAST)
