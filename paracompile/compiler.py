"""Compiles a graph of regions: each different region once, by Inductor or what stands in its place."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from paracompile.garbage import no_collections
from paracompile.options import Options
from paracompile.passes.regions import examples_of, regions_of
from paracompile.report.report import Compilation
from paracompile.runtime.program import Boxed, Program
from paracompile.torch_private import TracingContext, counters, detect_fake_mode, is_boxed, tracing
from paracompile.torch_private.compilers import AsyncCompile, aot_eager, compile_fx, config, list_mode_options

__all__ = ["compile_regions", "compile_whole"]

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


@no_collections()
def compile_regions(gm: fx.GraphModule, options: Options, defaults: Mapping[str, Any]) -> tuple[Program, Compilation]:
    """Compiles a graph that `cut_into_regions` cut.

    args:
        defaults: Inductor settings that the user's `mode` and `inductor` override.
    """
    started = time.perf_counter()
    count = regions_of(gm)
    compiled: dict[fx.GraphModule, Boxed] = {}
    from_cache = 0
    bar = tqdm(count, desc="compiling regions", unit="region", leave=False, disable=not sys.stderr.isatty())
    with _kernels_built_meanwhile():
        for region in bar:
            hits = counters["inductor"]["fxgraph_cache_hit"]
            examples = examples_of(region)
            with tracing(None):  # else Dynamo's mode is taken for that of the examples
                fake_mode = detect_fake_mode(examples)
            with tracing(TracingContext(fake_mode)):  # each is a graph of its own to AOTAutograd
                compiled[region] = _boxed(compile_whole(region, examples, options, defaults))
            from_cache += counters["inductor"]["fxgraph_cache_hit"] > hits
    seconds = time.perf_counter() - started
    found = Compilation(sum(count.values()), len(count), from_cache, seconds)
    log.info("compiled %s", found)
    cuda_graphs = _settings(options, defaults).get("triton.cudagraphs", config.triton.cudagraphs)
    return Program(gm, compiled, cuda_graphs=cuda_graphs), found


@contextmanager
def _kernels_built_meanwhile() -> Iterator[None]:
    """Lets the kernels of one graph be built while Inductor writes the next one's; all are there in the end.

    The code that Inductor writes starts to build its kernels in other threads and then waits for them. Kernels for GPUs
    are waited for at once, as what is built goes into Inductor's cache along with the code.
    """
    wait = AsyncCompile.wait
    awaited: list[tuple[AsyncCompile, dict[str, Any]]] = []

    def later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if torch.accelerator.is_available():
            wait(self, scope)
        else:
            awaited.append((self, scope))

    AsyncCompile.wait = later  # type: ignore[method-assign]
    try:
        yield
    finally:  # also where compiling failed: the same code may be loaded again
        AsyncCompile.wait = wait  # type: ignore[method-assign]
        for building, scope in awaited:
            wait(building, scope)


@no_collections()
def compile_whole(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, defaults: Mapping[str, Any]
) -> Compiled:
    """Compiles a graph in one piece; `defaults` as in `compile_regions`."""
    if options.compiler == "eager":
        return gm.forward
    if options.compiler == "aot_eager":
        return aot_eager(gm, list(example_inputs))
    patches = _settings(options, defaults) or None
    return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[return-value]


def _settings(options: Options, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's settings that are others than its own."""
    mode = list_mode_options(options.mode) if options.mode is not None else {}
    return {**defaults, **mode, **options.inductor}


def _boxed(compiled: Compiled) -> Boxed:
    """Calls a compiled region with a list.

    AOTAutograd makes a function that empties such a list, so that memory is free as early as it can be, and wraps it in
    functions that take `*args` and hold them until it returns.
    """
    inner: Any = compiled
    while inspect.isfunction(inner) and inner.__code__.co_flags & inspect.CO_VARARGS:
        inner = getattr(inner, "__wrapped__", None)
    if is_boxed(inner):
        return inner  # type: ignore[no-any-return]

    def call(arguments: list[Any]) -> Any:
        return compiled(*arguments)

    return call
