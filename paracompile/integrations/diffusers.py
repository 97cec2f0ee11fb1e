"""Listens to diffusers: which pass a pipeline is in, and when a step ends, and a generation begins and ends.

Three methods of base classes, and one of schedulers, are wrapped, once, when both diffusers and the backend are loaded;
they do what they did, and

- `CacheMixin.cache_context(name)` also names the slot of the first block cache ("cond", "uncond");
- `CacheMixin._reset_stateful_cache()`, which pipelines call at their end, also forgets the model's state;
- `progress_bar`, which every denoising loop of a pipeline starts with, also begins a generation, which ends when the
  bar is closed or gone. So a generation starts clean after one that was cut off, and a pipeline that is called in a
  step of another one, in a callback, leaves that one's state alone;
- `step` of a scheduler, which denoising loops call between the passes of one step and those of the next, and `update`
  of a progress bar, end a step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from paracompile.report.misses import warn_of_misses
from paracompile.runtime.cached_call import caches_of, forget_all
from paracompile.runtime.slots import Generation, begin_generation, current_generation, end_step, named

_MARK = "_paracompile_listens"


def listen() -> None:
    """Wraps what diffusers has loaded, and what it loads from now on; does nothing a second time."""
    for name, module in list(sys.modules.items()):
        if _wrappers(name):
            _wrap(module)
    if not any(isinstance(finder, _Listener) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Listener())


class _Listener(MetaPathFinder):
    """Wraps modules as soon as they are loaded: within `cache_context` it would be too late."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if _wrappers(fullname) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType) -> None:
    """Wraps the methods of the classes that a module defines; warns of those that it has no more."""
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    for name, wrapper in _wrappers(module.__name__).items():
        holders = [holder for holder in classes if name in vars(holder)]
        if not holders and module.__name__ in _WRAPPED:
            warnings.warn(
                f"paracompile: {module.__name__} has no {name}: the first block cache does not hear of it. Name passes "
                "by paracompile.cache_context, call paracompile.reset_cache before each generation, and report this",
                stacklevel=2,
            )
        for holder in holders:
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


def _stepping(original: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        end_step()
        return result

    return method


def _end_with(bar: Any, generation: Generation) -> None:
    """Ends a generation when its progress bar is closed: by `with`, at the end of a loop, or as nobody has it."""
    reference = weakref.ref(bar)

    def close() -> None:
        if not generation.over:
            generation.over = True
            warn_of_misses(generation)
            forget_all(generation)
        if (it := reference()) is not None:
            type(it).close(it)

    def update(n: float | None = 1) -> Any:
        generation.steps += 1
        return None if (it := reference()) is None else type(it).update(it, n)

    bar.close = close
    bar.update = update


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


_WRAPPED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "diffusers.models.cache_utils": {"cache_context": _naming, "_reset_stateful_cache": _forgetting},
    "diffusers.pipelines.pipeline_utils": {"progress_bar": _beginning},
    "diffusers.modular_pipelines.modular_pipeline": {"progress_bar": _beginning},
}
"""By module, what wraps the methods of its classes."""


def _wrappers(module: str) -> dict[str, Callable[[Any], Any]]:
    """What wraps the methods of a module's classes; of the schedulers, of which there are many, those that step."""
    if module.startswith("diffusers.schedulers.scheduling_"):
        return {"step": _stepping}
    return _WRAPPED.get(module, {})
