"""Compiles a graph of regions: each different region once, by Inductor or what stands in its place."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.utils import counters
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from tqdm import tqdm

from paracompile.options import Options
from paracompile.passes.regions import examples_of, regions_of
from paracompile.report.report import Compilation
from paracompile.runtime.program import Boxed, Program

__all__ = ["compile_regions", "compile_whole"]

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


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
    for region in bar:
        hits = counters["inductor"]["fxgraph_cache_hit"]
        examples = examples_of(region)
        fake_mode = detect_fake_mode(examples)
        with tracing(TracingContext(fake_mode)):  # each is a graph of its own to AOTAutograd
            compiled[region] = _boxed(compile_whole(region, examples, options, defaults))
        from_cache += counters["inductor"]["fxgraph_cache_hit"] > hits
    seconds = time.perf_counter() - started
    found = Compilation(sum(count.values()), len(count), from_cache, seconds)
    log.info("compiled %s", found)
    return Program(gm, compiled), found


def compile_whole(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, defaults: Mapping[str, Any]
) -> Compiled:
    """Compiles a graph in one piece; `defaults` as in `compile_regions`."""
    if options.compiler == "eager":
        return gm.forward
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    mode = list_mode_options(options.mode) if options.mode is not None else {}
    patches = {**defaults, **mode, **options.inductor}
    return compile_fx(gm, list(example_inputs), config_patches=patches or None)  # type: ignore[return-value]


def _boxed(compiled: Compiled) -> Boxed:
    """Calls a compiled region with a list.

    AOTAutograd makes a function that empties such a list, so that memory is free as early as it can be, and wraps it in
    functions that take `*args` and hold them until it returns. (Seen with torch 2.13: code that comes from the cache on
    disk leaves the list as it is, so that in a second start arguments live until the region returns.)
    """
    inner: Any = compiled
    while inspect.isfunction(inner) and inner.__code__.co_flags & inspect.CO_VARARGS:
        inner = getattr(inner, "__wrapped__", None)
    if inspect.isfunction(inner) and getattr(inner, "_boxed_call", False):
        return inner

    def call(arguments: list[Any]) -> Any:
        return compiled(*arguments)

    return call
