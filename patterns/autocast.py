"""The edges of the regions that a model runs under autocast, as nodes of its graph."""

from __future__ import annotations

import torch

__all__ = ["AUTOCAST_EDGES", "ENTER_AUTOCAST", "EXIT_AUTOCAST"]

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
"""Takes what `torch.autocast` takes."""

EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
"""Takes the node that entered."""

AUTOCAST_EDGES = frozenset({ENTER_AUTOCAST, EXIT_AUTOCAST})
