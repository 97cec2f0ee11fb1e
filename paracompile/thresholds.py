"""Thresholds of the first block cache that are known to keep the picture, by model class.

From ParaAttention: its documentation (FLUX, HunyuanVideo) and the defaults of its adapters (the others).
"""

from __future__ import annotations

from collections.abc import Iterable

from paracompile.errors import OptionError

__all__ = ["default_rdt"]

# Model class -> (as it is, with quantised weights)
_THRESHOLDS = {
    "FluxTransformer2DModel": (0.08, 0.12),
    "HunyuanVideoTransformer3DModel": (0.06, 0.06),
    "MochiTransformer3DModel": (0.035, 0.035),
    "CogVideoXTransformer3DModel": (0.025, 0.025),
}


def default_rdt(classes: Iterable[str], *, quantised: bool) -> float:
    """The threshold for a model.

    Args:
        classes: names of the classes of modules in a graph; the first one known counts.
        quantised: weights are quantised.

    Raises:
        OptionError: none of the classes is known.
    """
    names = list(dict.fromkeys(classes))
    for name in names:
        if name in _THRESHOLDS:
            return _THRESHOLDS[name][quantised]
    raise OptionError(
        "rdt",
        "auto",
        f"no threshold is known for {names[0] if names else 'this model'}: give a number, 0.05 to begin with "
        f"(known: {', '.join(_THRESHOLDS)})",
    )
