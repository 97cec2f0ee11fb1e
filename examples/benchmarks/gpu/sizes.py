"""Models of real size with random weights: what a step takes, and what keeps the device busy."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from checks import Figures, fake_world, spelled
from families import ALL_FAMILIES
from torch import nn

import paracompile


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    attributes:
        backend: what compiles it; None runs it eagerly.
        ranks: rank 0 of so many is measured, without the time that exchanges take.
        rdt: whether the first block cache is on; it skips whenever it may.
        fp8: whether linear layers of blocks are quantised, each row with a scale.
        blocks: how many blocks are left, from the first; None leaves all.
        options: more options for the backend.
    """

    backend: str | None = None
    ranks: int = 1
    rdt: bool = False
    fp8: bool = False
    blocks: int | None = None
    options: Figures = field(default_factory=dict)


def ours(**how: Any) -> Variant:
    return Variant("paracompile", **how)


AGAIN = ", second start"
"""Ends the name of a variant that finds in Inductor's cache on disk what another process has compiled for it."""

CUDA_GRAPHS: Figures = {"mode": "reduce-overhead"}
FEWER_GUARDS: Figures = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}

VARIANTS: dict[str, dict[str, Variant]] = {
    "flux": {
        "torch.compile": Variant("inductor"),
        "paracompile": ours(),
        "paracompile, rdt": ours(rdt=True),
        "in one piece": ours(options={"regions": False}),
        "one block": Variant("inductor", blocks=1),
        "eager": Variant(),
        "rank of 2": ours(ranks=2),
        "rank of 4": ours(ranks=4),
        "rank of 8": ours(ranks=8),
        "rank of 2, rdt": ours(ranks=2, rdt=True),
        "CUDA graphs": ours(options=CUDA_GRAPHS),
        "CUDA graphs, rdt": ours(rdt=True, options=CUDA_GRAPHS),
        "rank of 8, CUDA graphs": ours(ranks=8, options=CUDA_GRAPHS),
        "fewer guards, rdt": ours(rdt=True, options=FEWER_GUARDS),
        "fp8, paracompile": ours(fp8=True),
        "fp8, paracompile, rdt": ours(rdt=True, fp8=True),
        "fp8, torch.compile": Variant("inductor", fp8=True),
        "max-autotune": ours(options={"mode": "max-autotune-no-cudagraphs"}),
        "torch.compile" + AGAIN: Variant("inductor"),
        "paracompile" + AGAIN: ours(),
        "paracompile, rdt" + AGAIN: ours(rdt=True),
    },
    "video": {"rank of 8": ours(ranks=8), "rank of 8, rdt": ours(ranks=8, rdt=True)},
}


def flux() -> tuple[nn.Module, Figures]:
    """FLUX.1-dev, 1024 x 1024."""
    from diffusers import FluxTransformer2DModel

    text, kind = 512, torch.bfloat16
    ids = torch.zeros(64, 64, 3)
    ids[..., 1] += torch.arange(64)[:, None]
    ids[..., 2] += torch.arange(64)
    return FluxTransformer2DModel(guidance_embeds=True), dict(
        hidden_states=torch.randn(1, 4096, 64, dtype=kind),
        encoder_hidden_states=torch.randn(1, text, 4096, dtype=kind),
        pooled_projections=torch.randn(1, 768, dtype=kind),
        timestep=torch.full([1], 0.5, dtype=kind),
        img_ids=ids.reshape(-1, 3).to(kind),
        txt_ids=torch.zeros(text, 3, dtype=kind),
        guidance=torch.full([1], 3.5, dtype=torch.float32),
        return_dict=False,
    )


def video() -> tuple[nn.Module, Figures]:
    """HunyuanVideo, 720p, 129 frames, 60 of 256 tokens of text."""
    from diffusers import HunyuanVideoTransformer3DModel

    kind = torch.bfloat16
    mask = torch.ones(1, 256, dtype=torch.long)
    mask[:, 60:] = 0
    return HunyuanVideoTransformer3DModel(), dict(
        hidden_states=torch.randn(1, 16, 33, 90, 160, dtype=kind),
        encoder_hidden_states=torch.randn(1, 256, 4096, dtype=kind),
        encoder_attention_mask=mask,
        pooled_projections=torch.randn(1, 768, dtype=kind),
        guidance=torch.full([1], 6000.0, dtype=kind),
        timestep=torch.full([1], 500, dtype=torch.long),
        return_dict=False,
    )


MODELS = {"flux": flux, "video": video}
SMALL = {"flux": "flux", "video": "hunyuan_video"}
"""What stands for a model on a CPU."""


def _build(device: str, part: str) -> tuple[nn.Module, Figures]:
    torch.manual_seed(0)
    if device == "cpu":
        return ALL_FAMILIES[SMALL[part]].build(batch=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MODELS[part]()
    finally:
        torch.set_default_dtype(torch.float32)


def _keep_blocks(model: nn.Module, count: int) -> None:
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            del blocks[count:]
            count -= len(blocks)


def _quantise(model: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # Left alone, torchao has Inductor tune each kernel step by step, and a first call takes many minutes.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(
        model, config, lambda layer, path: isinstance(layer, nn.Linear) and "blocks" in path and "norm" not in path
    )


def measure(device: str, part: str, name: str) -> None:
    """Compiles a variant, says READY on standard output, waits for a line of standard input, and prints FIGURES."""
    variant = VARIANTS[part][name]
    model, inputs = _build(device, part)
    model.eval().requires_grad_(False)
    if variant.blocks is not None:
        _keep_blocks(model, variant.blocks)
    if variant.fp8 and device == "cuda":
        _quantise(model)
    if variant.ranks > 1:
        fake_world(variant.ranks)
    reports: list[Any] = []
    call: Any = model
    if variant.backend == "paracompile":
        options = {**variant.options, "rdt": 1e9 if variant.rdt else None, "report": reports.append}
        call = torch.compile(model, backend="paracompile", options=options)
    elif variant.backend is not None:
        call = torch.compile(model, backend=variant.backend)
    later = {**inputs, "timestep": inputs["timestep"] * 0.9}  # calls of one timestep are branches of one step

    def timed(given: Figures = inputs) -> tuple[float, float]:
        """Seconds until the host has started it all, and until the device is done."""
        start = time.perf_counter()
        call(**given)
        host = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.synchronize()
        return host, time.perf_counter() - start

    figures: Figures = {}
    with torch.no_grad():
        with warnings.catch_warnings(record=True) as caught, paracompile.cache_context("first"):
            warnings.simplefilter("always")
            figures["first call"] = timed()[1]
        said = {str(warning.message) for warning in caught if "paracompile" in str(warning.message)}
        figures.update({"warnings": sorted(said)} if said else {})
        print("READY", flush=True)
        sys.stdin.readline()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: dict[str, list[tuple[float, float]]] = {"step": [], "skipped step": []}
        for number in range(5 if part == "video" else 12):
            with paracompile.cache_context(f"generation {number}"):
                times["step"].append(timed())
                if variant.rdt:
                    times["skipped step"].append(timed(later))
        for what, of_each in times.items():
            if of_each:
                host, whole = zip(*of_each[2:], strict=True)
                figures[what], figures[f"{what}, host"] = statistics.median(whole), statistics.median(host)
        if variant.rdt:
            figures["hits"] = [step.hit for step in paracompile.cache_stats(model).slots["generation 4"]]
        if device == "cuda":
            figures["peak bytes"] = torch.cuda.max_memory_allocated()
            figures["profile"] = _profile(timed)
            if not variant.rdt and not variant.options:
                figures["step, as a CUDA graph"] = _as_cuda_graph(lambda: call(**inputs))
    for report in reports[:1]:
        figures["collectives"] = report.collectives
        if report.compilation is not None:
            figures["regions"] = [report.compilation.regions, report.compilation.different]
    print("FIGURES " + json.dumps(figures), flush=True)


def _as_cuda_graph(step: Callable[[], Any]) -> float | str:
    """Seconds of a step without the work of the host; or why it cannot be recorded."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])
    except Exception as error:  # noqa: BLE001  (whatever it is, the other figures are there)
        return spelled(error)


def _profile(step: Callable[[], object]) -> Figures:
    """Of one step, in milliseconds: how long the device was idle between its kernels, and what took longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
    spans = sorted(
        (event.time_range.start / 1e3, event.time_range.end / 1e3, event.name)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    start, reached, before = spans[0]
    gaps: list[tuple[float, str, str]] = []
    by_name: dict[str, list[float]] = {}
    for begin, end, kernel in spans:
        if begin > reached:
            gaps.append((begin - reached, before[:60], kernel[:60]))
        reached, before = max(reached, end), kernel
        by_name.setdefault(kernel, []).append(end - begin)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "whole": reached - start,
        "idle": sum(gap for gap, *_ in gaps),
        "kernels": len(spans),
        "longest gaps": sorted(gaps, reverse=True)[:10],
        "longest kernels": [[kernel[:120], len(times), sum(times)] for kernel, times in longest],
    }
