"""What only a GPU shows: kernels against float64, small models, ranks in lockstep, host waits, and FLUX.1-dev's size.

    python examples/benchmarks/gpu.py                      # about ten minutes on one H200
    python examples/benchmarks/gpu.py kernels families     # some of the parts
    python examples/benchmarks/gpu.py --device cpu         # everything but the figures, small, on a CPU

Each check's verdict is one line, and all figures end up in one JSON file, which is written anew after each: a run cut
short is still worth it. Weights and inputs are random. Parts, in this order:

    kernels     `attention_with_lse` against its definition in float64: error, kernel, bytes
    families    small models with the first block cache through Inductor: computed and skipped steps
    ranks       the graphs of 2, 4 and 8 ranks side by side on this GPU, against the plain model
    waits       how often a step makes the host wait for the device
    flux        FLUX.1-dev's size, 1024 x 1024, bfloat16: a step, a skipped one, a rank's share, fp8
    video       HunyuanVideo's size, 720p, 129 frames: what one of eight ranks computes in a step
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # the small models, and the ranks in lockstep

Figures = dict[str, Any]
Check = tuple[str, bool, Figures]
"""What was looked at, whether it is as it must be, and the figures."""


def fake_world(ranks: int) -> None:
    """This process is rank 0 of so many; what others would send is never filled in."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def moved(inputs: Figures, device: str, dtype: torch.dtype | None = None) -> Figures:
    """Inputs on a device, those of more than one dimension in a type of one's choice, as pipelines pass them."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        kind = dtype if value.is_floating_point() and value.dim() > 1 else None
        return value.to(device=device, dtype=kind)

    return {name: move(value) for name, value in inputs.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------- kernels


def kernels(device: str) -> Iterator[Check]:
    from paracompile.runtime.kernels import reference

    rows, heads, queries, keys = 2, 3, 577, 300
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 100, 128):
            parts = [
                torch.randn(rows, length, heads, size, device=device, dtype=dtype).transpose(1, 2)
                for length in (queries, keys, keys)
            ]
            hides_keys = torch.ones(rows, 1, 1, keys, dtype=torch.bool, device=device)
            hides_keys[0, ..., 200:] = False
            hides_rows = torch.rand(1, 1, queries, keys, device=device) < 0.5
            hides_rows[..., :5, :] = False
            masks: dict[str, Tensor | None] = {
                "no mask": None,
                "keys hidden": hides_keys,
                "a row's keys all hidden": hides_keys & torch.tensor([[[[True]]], [[[False]]]], device=device),
                "queries without a key": hides_rows,
                "additive": torch.randn(1, heads, queries, keys, device=device, dtype=dtype),
            }
            for name, mask in masks.items():
                scale = size**-0.5
                exact, exact_lse = reference(
                    *(part.double() for part in parts),
                    mask if mask is None or mask.dtype is torch.bool else mask.double(),
                    None,
                    scale,
                )
                (result, lse), kernel, peak = _watched(
                    lambda mask=mask, parts=parts, scale=scale: torch.ops.paracompile.attention_with_lse(
                        *parts, mask, None, scale
                    ),
                    device,
                )
                nothing = exact_lse == -math.inf
                error = relative(result, exact)
                lse_error = float((lse.double() - exact_lse).masked_fill(nothing, 0.0).abs().max())
                allowed = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
                right = error < allowed and lse_error < max(allowed, 1e-4) and bool(((lse == -math.inf) == nothing).all())
                yield (
                    f"{str(dtype)[6:]} {size} {name}",
                    right,
                    {"kernel": kernel, "error": error, "lse error": lse_error, "peak bytes": peak},
                )


def _watched(run: Callable[[], Any], device: str) -> tuple[Any, str, int]:
    """What a call returns, the attention operator that it reached, and the bytes that it allocated at its peak."""
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    reached = [event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product_")]
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    name = reached[-1].removeprefix("aten::_scaled_dot_product_") if reached else "reference"
    return result, name.removesuffix("_attention"), peak


# ---------------------------------------------------------------- families

FAMILIES = ("flux", "stable_diffusion_3", "wan", "hunyuan_video")


def families(device: str, name: str) -> Iterator[Check]:
    import as_used
    from families import ALL_FAMILIES

    for batch in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            model, inputs = ALL_FAMILIES[name].build(batch=batch)
            of = model.requires_grad_(False).to(device=device, dtype=dtype), moved(inputs, device, dtype)
            what = f"{name}, batch {batch}, {str(dtype)[6:]}"
            try:
                found, hits = as_used.steps(of, {})
                expected, _ = as_used.steps(of, {}, compiler="eager")
            except Exception as error:
                yield what, False, {"error": _first_line(error)}
                continue
            difference = as_used.largest_difference(found, expected)
            right = hits == [False, True, True, True] and difference < (1e-4 if dtype is torch.float32 else 0.05)
            yield what, right, {"hits": hits, "difference": difference}


def _first_line(error: BaseException) -> str:
    import traceback

    where = traceback.format_exception(error)
    return f"{type(error).__name__}: {str(error)[:600]} ... {''.join(where[-3:])[-900:]}"


# ---------------------------------------------------------------- ranks

MESHES: tuple[dict[str, int], ...] = (
    {"ulysses": 2},
    {"ulysses": 4},
    {"ulysses": 8},
    {"ring": 4},
    {"ring": 8},
    {"ring": 2, "ulysses": 4},
)


def ranks(device: str, name: str) -> Iterator[Check]:
    """Sharded graphs may be as far from the model in float32 as the model in bfloat16 is itself, and half more."""
    import capture
    from families import ALL_FAMILIES

    model, inputs = ALL_FAMILIES[name].build(heads=8, batch=1)
    model.requires_grad_(False).to(device)
    with torch.no_grad():
        (exact,) = copy.deepcopy(model)(**moved(inputs, device))
    of = capture.capture(model.to(torch.bfloat16), moved(inputs, device, torch.bfloat16))
    plain = relative(of.expected, exact)
    for mesh in MESHES:
        what = f"{name}, {' x '.join(f'{axis} {size}' for axis, size in mesh.items())}"
        try:
            outputs = capture.shard(of, mesh).run(of.arguments)
        except Exception as error:
            yield what, False, {"error": _first_line(error)}
            continue
        same = all(torch.equal(output, outputs[0]) for output in outputs)
        error_ = relative(outputs[0], exact)
        yield what, same and error_ < 1.5 * plain, {"error": error_, "error of the plain model": plain, "alike": same}


# ---------------------------------------------------------------- waits


def waits(device: str, name: str) -> Iterator[Check]:
    """Only the decision of the cache may make the host wait, once a step."""
    from families import ALL_FAMILIES

    import paracompile

    for number in (1, 2):
        if number > 1:
            fake_world(number)
        for rdt in (None, 0.1):
            model, inputs = ALL_FAMILIES[name].build(batch=1)
            model.requires_grad_(False).to(device=device, dtype=torch.bfloat16)
            inputs = moved(inputs, device, torch.bfloat16)
            torch._dynamo.reset()
            call = torch.compile(model, backend="paracompile", options={"rdt": rdt})
            what = f"{name}, {number} ranks, {'a cache' if rdt else 'no cache'}"
            try:
                with torch.no_grad(), paracompile.cache_context("only"):
                    for _ in range(3):
                        call(**inputs)
                    seen = _host_waits(lambda call=call, inputs=inputs: call(**inputs), device)
            except Exception as error:
                yield what, False, {"error": _first_line(error)}
                continue
            yield what, len(seen) == (1 if rdt and device == "cuda" else 0), {"waits": seen}


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
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "called a synchronizing" in str(warning.message)
    ]


# ---------------------------------------------------------------- real sizes


@dataclass(frozen=True)
class Variant:
    """One way to run a model of real size.

    attributes:
        compiled: by what; None runs it eagerly.
        ranks: rank 0 of so many is measured, without what it would exchange.
        rdt: whether the first block cache is on.
        fp8: whether linear layers are quantised, each row with its scale.
    """

    compiled: str | None = None
    ranks: int = 1
    rdt: bool = False
    fp8: bool = False
    options: Figures = field(default_factory=dict)


PARACOMPILE = "paracompile"
VARIANTS: dict[str, dict[str, Variant]] = {
    "flux": {
        "eager": Variant(),
        "torch.compile": Variant("inductor"),
        "paracompile": Variant(PARACOMPILE),
        "paracompile, rdt": Variant(PARACOMPILE, rdt=True),
        "rank of 2": Variant(PARACOMPILE, 2),
        "rank of 4": Variant(PARACOMPILE, 4),
        "rank of 8": Variant(PARACOMPILE, 8),
        "rank of 2, rdt": Variant(PARACOMPILE, 2, rdt=True),
        "fp8, paracompile": Variant(PARACOMPILE, fp8=True),
        "fp8, paracompile, rdt": Variant(PARACOMPILE, rdt=True, fp8=True),
        "fp8, torch.compile": Variant("inductor", fp8=True),
        "max-autotune": Variant(PARACOMPILE, options={"mode": "max-autotune-no-cudagraphs"}),
    },
    "video": {"rank of 8": Variant(PARACOMPILE, 8), "rank of 8, rdt": Variant(PARACOMPILE, 8, rdt=True)},
}
ALWAYS = 1e9


def flux(device: str) -> tuple[nn.Module, Figures]:
    from diffusers import FluxTransformer2DModel

    if device != "cuda":
        from families import flux as small

        return small(batch=1)
    image, text, kind = 4096, 512, torch.bfloat16
    ids = torch.zeros(64, 64, 3)
    ids[..., 1] += torch.arange(64)[:, None]
    ids[..., 2] += torch.arange(64)
    return FluxTransformer2DModel(guidance_embeds=True), dict(
        hidden_states=torch.randn(1, image, 64, dtype=kind),
        encoder_hidden_states=torch.randn(1, text, 4096, dtype=kind),
        pooled_projections=torch.randn(1, 768, dtype=kind),
        timestep=torch.full([1], 0.5, dtype=kind),
        img_ids=ids.reshape(-1, 3).to(device, kind),
        txt_ids=torch.zeros(text, 3, dtype=kind),
        guidance=torch.full([1], 3.5, dtype=torch.float32),
        return_dict=False,
    )


def video(device: str) -> tuple[nn.Module, Figures]:
    from diffusers import HunyuanVideoTransformer3DModel

    if device != "cuda":
        from families import hunyuan_video as small

        return small(batch=1)
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


def measure(device: str, part: str, name: str) -> None:
    """Compiles one variant, says so on standard output, waits for a line on standard input, and prints the figures."""
    import paracompile

    variant = VARIANTS[part][name]
    torch.manual_seed(0)
    begun = time.perf_counter()
    if device == "cuda":
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model, inputs = MODELS[part](device)
        torch.set_default_dtype(torch.float32)
    else:
        model, inputs = MODELS[part](device)
    model.eval().requires_grad_(False)
    if variant.fp8 and device == "cuda":
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(
            model,
            # Left on, torchao has Inductor tune every kernel step by step: the first call takes many minutes.
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
            lambda layer, path: isinstance(layer, nn.Linear) and "blocks" in path and "norm" not in path,
        )
    if variant.ranks > 1:
        fake_world(variant.ranks)
    reports: list[Any] = []
    call: Any = model
    if variant.compiled == PARACOMPILE:
        options = {**variant.options, "rdt": ALWAYS if variant.rdt else None, "report": reports.append}
        call = torch.compile(model, backend=PARACOMPILE, options=options)
    elif variant.compiled is not None:
        call = torch.compile(model, backend=variant.compiled)
    figures: Figures = {"seconds to build the model": time.perf_counter() - begun}

    later = {**inputs, "timestep": inputs["timestep"] * 0.9}  # calls of one timestep are branches of one step

    def timed(given: Figures = inputs) -> tuple[float, float]:
        """Seconds until the host has started it all, and until the device is done."""
        start = time.perf_counter()
        call(**given)
        host = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.synchronize()
        return host, time.perf_counter() - start

    with torch.no_grad(), paracompile.cache_context("first"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figures["first call"] = timed()[1]
        said = sorted({str(warning.message) for warning in caught if "paracompile" in str(warning.message)})
        if said:
            figures["warnings"] = said
        print("READY", flush=True)
        sys.stdin.readline()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        computed, skipped = [], []
        for number in range(5 if part == "video" else 12):
            with paracompile.cache_context(f"generation {number}"):
                computed.append(timed())
                if variant.rdt:
                    skipped.append(timed(later))
        for name, times in (("step", computed), ("skipped step", skipped)):
            if times:
                host, whole = zip(*times[2:], strict=True)
                figures[name], figures[f"{name}, host"] = statistics.median(whole), statistics.median(host)
        if variant.rdt:
            steps = paracompile.cache_stats(model).slots[f"generation {number}"]
            figures["hits"] = [step.hit for step in steps]
        if device == "cuda":
            figures["peak bytes"] = torch.cuda.max_memory_allocated()
            figures["profile"] = _profile(lambda: timed())
            if not variant.rdt:
                figures["step, as a CUDA graph"] = _as_cuda_graph(lambda: call(**inputs))
        if reports and reports[0].compilation is not None:
            figures["regions"] = [reports[0].compilation.regions, reports[0].compilation.different]
        if reports:
            figures["collectives"] = dict(reports[0].collectives)
    print("FIGURES " + json.dumps(figures), flush=True)


def _as_cuda_graph(step: Callable[[], Any]) -> Any:
    """The seconds of a step without the work of the host."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
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
    except Exception as error:
        return _first_line(error)


def _profile(step: Callable[[], object]) -> Figures:
    """Of one step: how long the device was idle between its first and last kernel, and the longest ten kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    if not spans:
        return {}
    reached, idle, gaps, before = spans[0][1], 0.0, [], spans[0][2]
    by_name: dict[str, list[float]] = {}
    for start, end, kernel in spans:
        if start > reached:
            idle += start - reached
            gaps.append((start - reached, before[:60], kernel[:60]))
        reached, before = max(reached, end), kernel
        by_name.setdefault(kernel, []).append(end - start)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "milliseconds": (reached - spans[0][0]) / 1e3,
        "idle milliseconds": idle / 1e3,
        "kernels": len(spans),
        "longest gaps": sorted(gaps, reverse=True)[:12],
        "longest": [[kernel[:120], len(times), sum(times) / 1e3] for kernel, times in longest],
    }


# ---------------------------------------------------------------- all of it

CHECKS: dict[str, Callable[..., Iterator[Check]]] = {
    "kernels": kernels,
    "families": families,
    "ranks": ranks,
    "waits": waits,
}
PER_FAMILY = ("families", "ranks", "waits")
LIMIT_OF_CHECKS = 150.0
"""Seconds for each check of small models: what hangs must not cost the figures."""


LIMIT_OF_COMPILING = 110.0
"""Seconds that figures wait for the slowest to compile."""


class Run:
    """Parts in processes of their own; what they find, on the screen and in one file."""

    def __init__(self, device: str, out: Path, limit: float) -> None:
        self.device, self.out, self.deadline = device, out, time.monotonic() + limit
        self.lock, self.measuring = threading.Lock(), threading.Lock()
        self.figures: Figures = {
            "date": str(date.today()),
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
            **{name: version(name) for name in ("paracompile", "torch", "diffusers", "torchao")},
        }
        self.failed = 0

    def note(self, part: str, name: str, right: bool, figures: Figures) -> None:
        with self.lock:
            self.figures.setdefault(part, {})[name] = figures
            self.failed += not right
            print(f"{'ok    ' if right else 'FAILED'} {part}: {name}: {_short(figures)}", flush=True)
            self.out.write_text(json.dumps(self.figures, indent=1))

    def _process(self, *arguments: str, limit: float = math.inf) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, "--device", self.device, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        killer = threading.Timer(min(limit, max(1.0, self.deadline - time.monotonic())), process.kill)
        killer.daemon = True
        killer.start()
        self.errors: dict[int, list[str]] = getattr(self, "errors", {})
        lines = self.errors.setdefault(process.pid, [])
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        return process

    def check(self, part: str, *family: str) -> None:
        process = self._process("--check", part, *family, limit=LIMIT_OF_CHECKS)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("CHECK "):
                name, right, figures = json.loads(line.removeprefix("CHECK "))
                self.note(part, name, right, figures)
        self._ended(process, part, " ".join(family))

    def _ended(self, process: subprocess.Popen[str], part: str, name: str) -> None:
        if process.wait() != 0:
            said = "".join(self.errors[process.pid])
            self.note(part, f"{name} ended early", False, {"code": process.returncode, "said": said[-1500:]})

    def measured(self, part: str, name: str, all_compiled: threading.Barrier) -> None:
        process = self._process("--measure", part, name)
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            if line.startswith("READY"):
                break
        with contextlib.suppress(threading.BrokenBarrierError):
            all_compiled.wait(LIMIT_OF_COMPILING)
        with self.measuring:
            try:
                process.stdin.write("go\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
            for line in process.stdout:
                if line.startswith("FIGURES "):
                    self.note(part, name, True, json.loads(line.removeprefix("FIGURES ")))
            self._ended(process, part, name)


def _short(figures: Figures) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {cell(value)}" for name, value in figures.items() if name != "profile")


def together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="kernels, families, ranks, waits, flux, video")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("output/gpu.json"))
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--variants", nargs="+", help="of flux and video: some only")
    parser.add_argument("--together", type=int, default=4, help="models of real size in memory at a time")
    parser.add_argument("--check", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    if arguments.check:
        part, *rest = arguments.check
        for check in CHECKS[part](device, *rest):
            print("CHECK " + json.dumps(check), flush=True)
        return
    if arguments.measure:
        measure(device, *arguments.measure)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(device, arguments.out, arguments.limit)
    parts = arguments.parts or [*CHECKS, *VARIANTS]
    jobs = []
    for part in CHECKS:
        if part in parts:
            for family in FAMILIES if part in PER_FAMILY else [None]:
                jobs.append(lambda part=part, family=family: run.check(part, *([family] if family else [])))
    together(jobs)
    sizes = [
        (part, name)
        for part in VARIANTS
        if part in parts
        for name in VARIANTS[part]
        if arguments.variants is None or name in arguments.variants
    ]
    for start in range(0, len(sizes), arguments.together):
        some = sizes[start : start + arguments.together]
        compiled = threading.Barrier(len(some))
        together([lambda which=which: run.measured(*which, compiled) for which in some])
    print(f"{run.failed} failed; figures in {arguments.out}")
    sys.exit(run.failed > 0)


if __name__ == "__main__":
    main()
