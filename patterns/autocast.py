"""The edges of the regions that a model runs under autocast, as nodes of its graph."""

from __future__ import annotations

from paracompile.torch_private import enter_autocast, exit_autocast

__all__ = ["AUTOCAST_EDGES", "ENTER_AUTOCAST", "EXIT_AUTOCAST"]

ENTER_AUTOCAST = enter_autocast
"""Takes what `torch.autocast` takes."""

EXIT_AUTOCAST = exit_autocast
"""Takes the node that entered."""

AUTOCAST_EDGES = frozenset({ENTER_AUTOCAST, EXIT_AUTOCAST})
