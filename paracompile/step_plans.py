"""Plans of steps for the option `steps`, made before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paracompile.errors import OptionError

__all__ = ["steps_by_magnitude"]


def steps_by_magnitude(ratios: Sequence[float], *, limit: float, most: int, retained: float = 0.2) -> str:
    """Which steps to compute by MagCache's rule (Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware
    Cache", 2025): what blocks add grows and shrinks over the steps alike for all prompts, so that a table of it, taken
    once for a model, tells how wrong it is to reuse it.

    Args:
        ratios: for each step, the magnitude of what the blocks add relative to the step before; the first is not read.
        limit: the largest sum of errors, of steps skipped in a row, at which one more is skipped.
        most: how many may be skipped in a row.
        retained: the part of the steps, at the beginning, that is computed.

    Returns:
        a letter a step for the option `steps`: "1" or "0".

    Raises:
        OptionError: a ratio that is no positive number, a limit or a part that cannot be.
    """
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios[1:]):
        raise OptionError("ratios", list(ratios), "give a positive number for each step")
    if not (math.isfinite(limit) and limit >= 0):
        raise OptionError("limit", limit, "give a finite number of at least 0")
    if most < 0:
        raise OptionError("most", most, "give a whole number of at least 0")
    if not 0 <= retained <= 1:
        raise OptionError("retained", retained, "give a part of the steps, from 0 to 1")
    letters = []
    magnitude, error, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        letter = "1"
        if step > 0 and step >= retained * len(ratios):
            magnitude *= ratio
            error += abs(1 - magnitude)
            skipped += 1
            letter = "0" if error <= limit and skipped <= most else "1"
        if letter == "1":
            magnitude, error, skipped = 1.0, 0.0, 0
        letters.append(letter)
    return "".join(letters)
