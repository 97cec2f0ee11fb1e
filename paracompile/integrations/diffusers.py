"""Listens to diffusers: which pass a pipeline is in, and when a generation begins and ends.

Three methods of base classes are wrapped, once, when the backend is loaded; they do what they did, and

- `CacheMixin.cache_context(name)` also names the slot of the first block cache ("cond", "uncond");
- `CacheMixin._reset_stateful_cache()`, which pipelines call at their end, also forgets the model's state;
- `progress_bar`, which every denoising loop of a pipeline starts with, also begins a generation, which ends when the
  bar is closed or gone. So a generation starts clean after one that was cut off, and a pipeline that is called in a
  step of another one, in a callback, leaves that one's state alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from paracompile.runtime.cached_call import caches_of, forget_all
from paracompile.runtime.slots import Generation, begin_generation, current_generation, named

_MARK = "_paracompile_listens"


def listen() -> None:
    """Wraps what diffusers has loaded; does nothing without diffusers, or a second time."""
    if "diffusers" not in sys.modules:
        return
    from diffusers import CacheMixin, DiffusionPipeline
    from diffusers.modular_pipelines import modular_pipeline

    _wrap(CacheMixin, "cache_context", _naming)
    _wrap(CacheMixin, "_reset_stateful_cache", _forgetting)
    _wrap(DiffusionPipeline, "progress_bar", _beginning)
    for holder in vars(modular_pipeline).values():
        if isinstance(holder, type) and "progress_bar" in vars(holder):
            _wrap(holder, "progress_bar", _beginning)


def _wrap(holder: type, name: str, wrapper: Any) -> None:
    original = vars(holder)[name]
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _MARK, True)
        setattr(holder, name, wrapped)


def _naming(original: Any) -> Any:
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
        with named(name), original(self, name, **kwargs):
            yield

    return cache_context


def _forgetting(original: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _forget(self)
        return original(self, *args, **kwargs)

    return method


def _beginning(original: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bar = original(self, *args, **kwargs)
        _forget(self)
        _end_with(bar, begin_generation())
        return bar

    return method


def _end_with(bar: Any, generation: Generation) -> None:
    """Ends a generation when its progress bar is closed: by `with`, at the end of a loop, or as nobody has it."""
    reference = weakref.ref(bar)

    def close() -> None:
        generation.over = True
        forget_all(generation)
        if (it := reference()) is not None:
            type(it).close(it)

    bar.close = close


def _forget(owner: Any) -> None:
    """Forgets the state of a model, of a pipeline's models, or, of whom it is not known, all; but never within a loop,
    whose pipeline would be another one then."""
    generation = current_generation()
    if generation.outer is not None:
        return
    if isinstance(owner, nn.Module):
        models = [owner]
    elif models := [part for part in vars(owner).values() if isinstance(part, nn.Module)]:
        pass
    else:
        forget_all(generation)
        return
    for model in models:
        for cache in caches_of(model.parameters(), make=False):
            cache.forget(generation)
