"""The first block cache from outside: its threshold, its slots, and what it did."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from paracompile.errors import OptionError
from paracompile.options import number
from paracompile.report.cache_stats import CacheStats, stats_of
from paracompile.runtime.cached_call import caches_of
from paracompile.runtime.slots import named

__all__ = ["cache_context", "cache_stats", "reset_cache", "set_rdt"]


def set_rdt(model: nn.Module, rdt: float) -> None:
    """Changes the threshold of a model that was compiled with `rdt`; nothing is compiled anew.

    What is stored is forgotten, so that the next call computes.

    Args:
        model: what `torch.compile` returned, or the model itself.
        rdt: the largest relative difference of the first block's residual at which blocks are skipped; 0: never.

    Raises:
        OptionError: not a module, or not a finite number of at least 0.
    """
    remedy = "give a finite number of at least 0 (0: always compute)"
    threshold = number("rdt", rdt, remedy)
    if not 0 <= threshold < math.inf:
        raise OptionError("rdt", rdt, remedy)
    for cache in caches_of(_module(model).parameters()):
        cache.threshold = threshold
        cache.end_generation()


def reset_cache(model: nn.Module) -> None:
    """Begins a new generation: forgets what is stored for a model. Pipelines of diffusers do this themselves.

    Raises:
        OptionError: not a module.
    """
    for cache in caches_of(_module(model).parameters()):
        cache.end_generation()


def cache_context(name: str) -> AbstractContextManager[None]:
    """Names the trajectory that calls inside belong to, such as "cond" and "uncond": each has state of its own.

    Pipelines of diffusers that use `transformer.cache_context` need none.

    Raises:
        OptionError: not a name.
    """
    wanted: object = name
    if not isinstance(wanted, str) or not wanted:
        raise OptionError("name", name, 'give a name, such as "cond"')
    return named(name)


def cache_stats(model: nn.Module) -> CacheStats:
    """What the cache did in the present generation of a model, or in its last one. Waits for the device.

    Raises:
        OptionError: not a module.
    """
    return stats_of(cache.history for cache in caches_of(_module(model).parameters()))


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OptionError("model", model, "give the compiled module, or the module that a compiled function calls")
    return model
