"""Checks with small models, each with its verdict: whether on this device everything is right."""

from __future__ import annotations

import copy
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))  # the small models, and the ranks in lockstep

import as_used
import capture
from families import ALL_FAMILIES

import paracompile
from paracompile.patterns.kernels import why_not_by_name
from paracompile.runtime.kernels import reference

Figures = dict[str, Any]
Check = tuple[str, bool, Figures]
"""What was looked at, whether it is as it must be, and the figures."""

FAMILIES = ("flux", "stable_diffusion_3", "wan", "hunyuan_video")
MESHES: tuple[dict[str, int], ...] = (
    {"ulysses": 2},
    {"ulysses": 4},
    {"ulysses": 8},
    {"ring": 4},
    {"ring": 8},
    {"ring": 2, "ulysses": 4},
)


def kernels(device: str) -> Iterator[Check]:
    """`attention_with_lse` against its definition in float64."""
    rows, heads, queries, keys = 2, 3, 577, 300
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 100, 128):
            parts = [
                torch.randn(rows, length, heads, size, device=device, dtype=dtype).transpose(1, 2)
                for length in (queries, keys, keys)
            ]
            for name, mask in _masks(rows, heads, queries, keys, device, dtype).items():
                for by in ("auto", "flash", "cudnn", "efficient", "flex") if dtype is torch.bfloat16 else ("auto",):
                    masked = mask is not None
                    if by == "auto" or not why_not_by_name(
                        by, device, dtype, (size, size), masked=masked, in_ring=True
                    ):
                        case = f"{str(dtype)[6:]}, {size}, {name}" + f", by {by}" * (by != "auto")
                        yield case, *_or_error(partial(_against_float64, parts, mask, device, by))


def _masks(rows: int, heads: int, queries: int, keys: int, device: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    hides_keys = torch.ones(rows, 1, 1, keys, dtype=torch.bool, device=device)
    hides_keys[0, ..., 200:] = False
    hides_a_row = hides_keys.clone()
    hides_a_row[1] = False
    hides_queries = torch.rand(1, 1, queries, keys, device=device) < 0.5
    hides_queries[..., :5, :] = False
    return {
        "no mask": None,
        "keys hidden": hides_keys,
        "all keys of a row hidden": hides_a_row,
        "queries without a key": hides_queries,
        "additive": torch.randn(1, heads, queries, keys, device=device, dtype=dtype),
    }


def _against_float64(parts: list[Tensor], mask: Tensor | None, device: str, by: str) -> tuple[bool, Figures]:
    dtype, scale = parts[0].dtype, parts[0].shape[-1] ** -0.5
    in_float64 = mask if mask is None or mask.dtype is torch.bool else mask.double()
    exact, exact_lse = reference(*(part.double() for part in parts), in_float64, None, scale)
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result, lse = torch.ops.paracompile.attention_with_lse(*parts, mask, None, scale, by)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    reached = [event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product_")]
    hidden = exact_lse == -math.inf
    error = relative(result, exact)
    lse_error = float((lse.double() - exact_lse).masked_fill(hidden, 0.0).abs().max())
    allowed = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    right = error < allowed and lse_error < 1e-4 and torch.equal(lse == -math.inf, hidden)
    kernel = reached[-1].removeprefix("aten::_scaled_dot_product_") if reached else "reference"
    return right, {"kernel": kernel, "error": error, "error of the LSE": lse_error, "peak bytes": peak}


def families(device: str, family: str) -> Iterator[Check]:
    """Through Inductor with blocks skipped, against the same options interpreted."""
    for batch in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            model, inputs = ALL_FAMILIES[family].build(batch=batch)
            of = model.requires_grad_(False).to(device=device, dtype=dtype), moved(inputs, device, dtype)

            def look(of: as_used.Built = of, dtype: torch.dtype = dtype) -> tuple[bool, Figures]:
                found, hits = as_used.steps(of, {})
                expected, _ = as_used.steps(of, {}, compiler="eager")
                difference = as_used.largest_difference(found, expected)
                allowed = 1e-4 if dtype is torch.float32 else 0.05
                right = hits == [False, True, True, True] and difference < allowed
                return right, {"hits": hits, "difference": difference}

            yield f"{family}, batch {batch}, {str(dtype)[6:]}", *_or_error(look)


def graphs(device: str, family: str, mode: str = "reduce-overhead") -> Iterator[Check]:
    """The same with CUDA graphs: of computed and skipped steps, and of other inputs of the same shapes."""
    model, inputs = ALL_FAMILIES[family].build(batch=1)
    inputs = moved(inputs, device, torch.bfloat16)
    others = {name: _fewer_visible(value) if name.endswith("mask") else value for name, value in inputs.items()}
    model.requires_grad_(False).to(device=device, dtype=torch.bfloat16)

    def look() -> tuple[bool, Figures]:
        found = as_used.steps((model, inputs), {"mode": mode}, others)
        expected = as_used.steps((model, inputs), {}, others, compiler="eager")
        difference = as_used.largest_difference(found[0], expected[0])
        return found[1] == expected[1] and difference < 0.05, {"hits": found[1], "difference": difference}

    yield f"{family}, {mode}", *_or_error(look)


def _fewer_visible(mask: Tensor) -> Tensor:
    """A mask of text tokens for a prompt of half as many at most."""
    fewer = mask.clone()
    fewer[..., mask.shape[-1] // 2 :] = 0
    return fewer


def ranks(device: str, family: str) -> Iterator[Check]:
    """Ranks may be as far from the model in float32 as the model in bfloat16 is itself, and half as much again."""
    model, inputs = ALL_FAMILIES[family].build(heads=8, batch=1)
    model.requires_grad_(False).to(device)
    with torch.no_grad():
        (exact,) = copy.deepcopy(model)(**moved(inputs, device))
    of = capture.capture(model.to(torch.bfloat16), moved(inputs, device, torch.bfloat16))
    plain = relative(of.expected, exact)
    for mesh in MESHES:

        def look(mesh: dict[str, int] = mesh) -> tuple[bool, Figures]:
            outputs = capture.shard(of, mesh).run(of.arguments)
            alike = all(torch.equal(output, outputs[0]) for output in outputs)
            error = relative(outputs[0], exact)
            return alike and error < 1.5 * plain, {"error": error, "of the plain model": plain, "ranks alike": alike}

        yield f"{family}, {' x '.join(f'{axis} {size}' for axis, size in mesh.items())}", *_or_error(look)


def waits(device: str, family: str) -> Iterator[Check]:
    """What may make the host wait, once a step each: the cache's decision, and how many keys a mask hides."""
    for number in (1, 2):
        if number > 1:
            fake_world(number)
        for rdt in (None, 0.1):
            model, inputs = ALL_FAMILIES[family].build(batch=1)
            model.requires_grad_(False).to(device=device, dtype=torch.bfloat16)
            inputs = moved(inputs, device, torch.bfloat16)

            def look(model: Any = model, inputs: Figures = inputs, rdt: float | None = rdt) -> tuple[bool, Figures]:
                torch._dynamo.reset()
                call = torch.compile(model, backend="paracompile", options={"rdt": rdt})
                with torch.no_grad(), paracompile.cache_context("only"):
                    for _ in range(3):
                        call(**inputs)
                    seen = _host_waits(lambda: call(**inputs), device)
                allowed = (rdt is not None) + any(name.endswith("attention_mask") for name in inputs)
                return len(seen) == (allowed if device == "cuda" else 0), {"waits": seen}

            yield f"{family}, {number} ranks, {'a cache' if rdt else 'no cache'}", *_or_error(look)


def _host_waits(run: Callable[[], Any], device: str) -> list[str]:
    """Where a call makes the host wait for the device."""
    if device != "cuda":
        run()
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    ]


def _or_error(look: Callable[[], tuple[bool, Figures]]) -> tuple[bool, Figures]:
    """What a look gives; an error is a finding, too."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  (whatever it is, the other checks go on)
        return False, {"error": spelled(error)}


CHECKS: dict[str, Callable[..., Iterator[Check]]] = {
    "kernels": kernels,
    "families": families,
    "graphs": graphs,
    "ranks": ranks,
    "waits": waits,
}


def jobs_of(part: str) -> list[list[str]]:
    """The arguments of each process that a part's checks take."""
    if part == "kernels":
        return [[part]]
    jobs = [[part, family] for family in FAMILIES]
    return [*jobs, [part, FAMILIES[0], "max-autotune"]] if part == "graphs" else jobs


def moved(inputs: Figures, device: str, dtype: torch.dtype | None = None) -> Figures:
    """Inputs on a device, those of more than one dimension in a type of one's choice, as pipelines pass them."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() and value.dim() > 1 else None)

    return {name: move(value) for name, value in inputs.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def fake_world(ranks: int) -> None:
    """Makes this process rank 0 of so many; what others would send is never filled in."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def spelled(error: BaseException) -> str:
    """An error in so many characters as one wants to read in a table."""
    where = "".join(traceback.format_exception(error)[-3:])
    return f"{type(error).__name__}: {str(error)[:600]} ... {where[-900:]}"
