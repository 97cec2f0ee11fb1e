"""Plans of steps for the option `steps`, made before anything runs, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paracompile.cache import caches_of_model
from paracompile.errors import OptionError
from paracompile.report.cache_stats import names_of
from paracompile.runtime.cached_call import Slot

__all__ = ["magnitude_ratios", "steps_by_magnitude"]


def magnitude_ratios(model: nn.Module, generate: Callable[[], object]) -> dict[str, list[float]]:
    """How large what the blocks add is in each step of a generation, relative to the step before: MagCache's table.

    Run on one rank; what it gives serves on several as well.

    Args:
        model: compiled with `rdt`; nothing is skipped while it is measured.
        generate: makes one picture or video with it.

    Returns:
        by slot, as `cache_stats` calls it: for each step the mean over tokens of the ratio of the two lengths of what
        is added to the token, the first 1. For `steps_by_magnitude`.

    Raises:
        OptionError: a model that was compiled without `rdt`, or of which no step was made.
    """
    sizes: dict[Slot, list[Tensor]] = {}

    def observe(slot: Slot, added: Sequence[Tensor]) -> None:
        length = torch.cat([each.detach().float().norm(dim=-1).flatten() for each in added])
        sizes.setdefault(slot, []).append(length)

    caches = caches_of_model(model)
    before = [cache.threshold for cache in caches]
    for cache in caches:
        cache.threshold = 0.0
        cache.forget()
        cache.observers.append(observe)
    try:
        generate()
    finally:
        for cache, threshold in zip(caches, before, strict=True):
            cache.threshold = threshold
            cache.observers.remove(observe)
    if not sizes:
        raise OptionError("generate", generate, "it calls no graph of the model that has blocks to skip")
    names = names_of(slot.title for slot in sizes)
    return {name: [1.0, *map(_ratio, steps[1:], steps)] for name, steps in zip(names, sizes.values(), strict=True)}


def _ratio(now: Tensor, before: Tensor) -> float:
    return float((now / before).nanmean())  # nothing is added to padding


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
