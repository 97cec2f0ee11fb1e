"""The first block cache from outside: its threshold, its slots, and what it did."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import nn

from paracompile.checks import number
from paracompile.errors import OptionError
from paracompile.report.cache_stats import CacheStats, stats_of
from paracompile.runtime.cached_call import ModelCache, caches_of
from paracompile.runtime.slots import named
from paracompile.torch_private import OptimizedModule, innermost_backend

__all__ = ["cache_context", "cache_stats", "caches_of_model", "reset_cache", "set_rdt"]


def set_rdt(model: nn.Module, rdt: float) -> None:
    """Changes the threshold of a model that was compiled with `rdt`; nothing is compiled anew.

    What is stored is forgotten, so that the next call computes.

    Args:
        model: what `torch.compile` returned, or the model itself.
        rdt: the largest relative difference of the first block's residual at which blocks are skipped; 0: never.

    Raises:
        OptionError: not a module, one that was compiled without `rdt`, or not a finite number of at least 0.
    """
    remedy = "give a finite number of at least 0 (0: always compute)"
    threshold = number("rdt", rdt, remedy)
    if not 0 <= threshold < math.inf:
        raise OptionError("rdt", rdt, remedy)
    for cache in caches_of_model(model):
        cache.threshold = threshold
        cache.forget()


def reset_cache(model: nn.Module) -> None:
    """Begins a new generation: forgets what is stored for a model. Pipelines of diffusers do this themselves.

    Raises:
        OptionError: not a module.
    """
    for cache in caches_of(_module(model).parameters()):
        cache.forget()


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
        OptionError: not a module, or one that was compiled without `rdt`.
    """
    caches = caches_of_model(model)
    return stats_of((cache.history for cache in caches), plain=sum(cache.plain.total() for cache in caches))


def caches_of_model(model: nn.Module) -> list[ModelCache]:
    """The caches of a model, which may still be compiled.

    Raises:
        OptionError: not a module, or one that was compiled without `rdt`.
    """
    caches = caches_of(_module(model).parameters())
    wanted = _asks_for_cache(model)
    if wanted is None:
        wanted = any(cache.caches is not False for cache in caches)
    if not wanted:
        remedy = 'this model was compiled without a first block cache: give torch.compile options={"rdt": 0.08}'
        raise OptionError("rdt", None, f"{remedy} (set_rdt(model, 0) then turns it off)")
    return caches


def _asks_for_cache(model: nn.Module) -> bool | None:
    """Whether what `torch.compile` returned was given `rdt`; None for a model itself, or another way to compile."""
    if not isinstance(model, OptimizedModule):
        return None
    backend = innermost_backend(cast(Callable[..., Any], model.dynamo_ctx.callback))
    if getattr(backend, "compiler_name", None) != "paracompile":
        return None
    return bool((getattr(backend, "kwargs", {}).get("options") or {}).get("rdt"))


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OptionError("model", model, "give the compiled module, or the module that a compiled function calls")
    return model
