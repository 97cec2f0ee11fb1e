"""Runs of a pipeline, plain and by paracompile, and what the table says of them."""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers

import paracompile
from running.command import Example
from running.shown import Frames, Rows, save, side_by_side, table

__all__ = ["Ranks", "Run", "join_ranks", "load", "parallelize_arguments", "run"]

WARM_UP = 2
"""Steps that compile everything: both transformers, where there are two, and the VAE."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    attributes:
        rank: its number; rank 0 is the one that speaks.
        count: how many there are.
        device: where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def join_ranks(device_type: str) -> Ranks:
    """Joins the other processes that torchrun started, if it did."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        return Ranks(rank=0, count=1, device=device)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size(), device=device)


@dataclass
class Run:
    """One run of the pipeline.

    attributes:
        latents: what the denoising loop ended with.
        frames: the picture, or those of the video, (frames, height, width, 3), float in [0, 1].
        moments: seconds since the pipeline was called, at the end of each step.
        whole: seconds of the call.
    """

    latents: torch.Tensor
    frames: Frames
    moments: list[float] = field(default_factory=list)
    whole: float = 0.0

    @property
    def first_step(self) -> float:
        """Seconds up to the end of the first step: encoding the prompt, compiling and one forward."""
        return self.moments[0]

    @property
    def step(self) -> float | None:
        """Median seconds of a step after the first."""
        return statistics.median(np.diff(self.moments)) if len(self.moments) > 1 else None

    @property
    def later_steps(self) -> float:
        """Seconds of all steps after the first."""
        return self.moments[-1] - self.moments[0]


class Reports:
    """paracompile's reports of a pipeline's graphs, as they come.

    attributes:
        of_steps: those of the transformers.
        of_vae: those that came after the last step.
    """

    def __init__(self) -> None:
        self.of_steps: list[paracompile.Report] = []
        self.of_vae: list[paracompile.Report] = []
        self.decoding = False

    def __call__(self, report: paracompile.Report) -> None:
        (self.of_vae if self.decoding else self.of_steps).append(report)


def load(example: Example, kind: Any, options: argparse.Namespace, ranks: Ranks) -> Any:
    """The small pipeline in float32, or a real one in bfloat16, on this rank's device."""
    if options.model is None or not ranks.is_first:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    if options.model is None:
        pipeline = example.small(options)
    else:
        dtypes = {name: getattr(torch, dtype) for name, dtype in example.dtypes.items()}
        pipeline = kind.from_pretrained(options.model, dtype={"default": torch.bfloat16, **dtypes})
        if example.fps and not options.vae:
            pipeline.vae.enable_tiling()  # untiled it needs more memory than the transformer
    if options.lora:
        pipeline.load_lora_weights(options.lora)
    if options.offload:
        pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(ranks.device)


def arguments_of(example: Example, options: argparse.Namespace) -> dict[str, Any]:
    """Of each call of the pipeline."""
    given = {
        "prompt": options.prompt,
        "num_inference_steps": options.steps,
        "height": options.height,
        "width": options.width,
        "num_frames": getattr(options, "frames", None),
    }
    defaults = example.call if options.model is None else example.model_call
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def generate(
    pipeline: Any, ranks: Ranks, name: str, arguments: Mapping[str, Any], seed: int, reports: Reports | None = None
) -> Run:
    """Calls the pipeline with noise from `seed`, a progress bar on rank 0, and a look at the clock after each step."""
    latents = torch.empty(0)
    moments: list[float] = []
    steps = arguments["num_inference_steps"]

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors["latents"]
        synchronise()
        moments.append(time.perf_counter() - start)
        if reports is not None:
            reports.decoding = step == steps - 1
        return {}

    def synchronise() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    pipeline.set_progress_bar_config(disable=not ranks.is_first, desc=f"{name:>11}")
    if reports is not None:
        reports.decoding = False
    start = time.perf_counter()
    output = pipeline(
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=after_step,
        **arguments,
    )
    synchronise()
    whole = time.perf_counter() - start
    frames = output.images if "images" in output else output.frames[0]
    return Run(latents.float().cpu(), np.asarray(frames, dtype=np.float32), moments, whole)


def run(example: Example, kind: Any, options: argparse.Namespace, ranks: Ranks) -> None:
    """All of an example."""
    if options.vae is None:
        options.vae = ranks.count > 1 and (example.vae or options.model is not None)
    pipeline = load(example, kind, options, ranks)
    arguments = arguments_of(example, options)
    runs: dict[str, Run] = {}
    if options.plain:
        if ranks.is_first:
            runs["plain"] = generate(pipeline, ranks, "plain", arguments, options.seed)
        ranks.barrier()

    if options.quantize != "none":  # torch's advice to torchao
        warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
    reports = Reports()
    paracompile.parallelize(
        pipeline, **parallelize_arguments(options, ranks), fullgraph=example.fullgraph, report=reports
    )
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    denoisers = [part for part in parts if part is not None]

    def set_rdt(rdt: float) -> None:
        for denoiser in denoisers if options.rdt else ():
            paracompile.set_rdt(denoiser, rdt)

    def repeated(name: str, steps: int) -> Run:
        return generate(pipeline, ranks, name, {**arguments, "num_inference_steps": steps}, options.seed, reports)

    steps = arguments["num_inference_steps"]
    set_rdt(0)
    warm_up = repeated("warm-up", min(WARM_UP, steps))
    if options.plain or not options.rdt:
        runs["paracompile"] = repeated("paracompile", steps)
    if options.rdt:
        set_rdt(options.rdt)
        runs["rdt"] = repeated(f"rdt {options.rdt:g}", steps)
    if ranks.is_first:
        stats = [paracompile.cache_stats(denoiser) for denoiser in denoisers] if options.rdt else []
        _show(example, options, ranks, runs, warm_up, reports, stats)


def parallelize_arguments(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """What `parallelize` is told."""
    how: dict[str, Any] = {"compiler": options.compiler, "vae": options.vae}
    if ranks.count > 1:
        how["mesh"] = paracompile.init_mesh(
            ranks.device.type,
            max_batch_dim_size=options.batch,
            max_ring_dim_size=options.ring,
            max_ulysses_dim_size=options.ulysses,
        )
    if options.quantize != "none":
        how["quantize"] = options.quantize
    for name in ("rdt", "attention", "mode"):
        if getattr(options, name):
            how[name] = getattr(options, name)
    return how


# What is shown


def _show(
    example: Example,
    options: argparse.Namespace,
    ranks: Ranks,
    runs: Mapping[str, Run],
    warm_up: Run,
    reports: Reports,
    stats: Sequence[paracompile.CacheStats],
) -> None:
    if options.report:
        print(*reports.of_steps, *reports.of_vae, sep="\n\n")
    plain, sharded, cached = (runs.get(name) for name in ("plain", "paracompile", "rdt"))
    rows = [("ranks", f"{ranks.count}")]
    if plain and sharded:
        rows += difference_rows("", plain, sharded)
    rows += sharding_rows(reports.of_steps, ranks.count)
    if ranks.count > 1 and reports.of_vae:
        rows += decoder_rows(reports.of_vae)
    if cached:
        rows += cache_rows(reports.of_steps, stats, options.rdt)
    if plain and cached:
        rows += difference_rows(" with hits", plain, cached)
    rows += time_rows(plain, warm_up, sharded, cached, ranks.count, options.rdt)

    hits, steps = sum(each.hits for each in stats), sum(each.steps for each in stats)
    count = f"{ranks.count} rank{'s' * (ranks.count > 1)}"
    captions = {
        "plain": f"plain, 1 rank, {seconds(plain and plain.step)} a step",
        "paracompile": f"paracompile, {count}, {seconds(sharded and sharded.step)} a step",
        "rdt": f"rdt {options.rdt:g}: {hits} of {steps} steps skipped",
    }
    made = {captions[name]: each.frames for name, each in runs.items()}
    frames = side_by_side(made) if len(made) > 1 else next(iter(made.values()))
    saved = save(frames, options.output, example.fps)
    print(table(rows))
    print(saved)
    if example.next and options.model is None:
        print(f"try next: {example.next}")


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def difference_rows(when: str, plain: Run, other: Run) -> Rows:
    """The largest differences of latents and pictures."""
    latents = (plain.latents - other.latents).abs().max().item()
    largest = plain.latents.abs().max().item()
    pixels = np.abs(plain.frames - other.frames).max()
    steps_of_255 = np.abs((plain.frames * 255).round() - (other.frames * 255).round()).max()
    return [
        (f"largest difference{when}, latents", f"{latents:.2e} (largest value {largest:.2f})"),
        (f"largest difference{when}, picture", f"{pixels:.2e} ({steps_of_255:.0f} of 255)"),
    ]


def sharding_rows(reports: Sequence[paracompile.Report], count: int) -> Rows:
    """What was done to the transformers' graphs."""
    collectives = sum((Counter(report.collectives) for report in reports), Counter[str]())
    flops_whole = sum(report.flops_whole for report in reports)
    flops_rank = sum(report.flops_rank for report in reports)
    rows = [
        ("graphs", f"{len(reports)}"),
        ("attentions rewritten", f"{sum(report.attentions for report in reports)}"),
        ("cross attentions kept local", f"{sum(report.cross_attentions for report in reports)}"),
    ]
    rows += [(f"collectives per forward: {name}", f"{number}") for name, number in sorted(collectives.items())]
    if len(collectives) != 1:
        rows += [("collectives per forward", f"{collectives.total()}")]
    rows += [("bytes sent by a rank per forward", f"{sum(report.bytes_sent for report in reports):,}")]
    if flops_whole:
        rows += [("share of the flops on a rank", f"{flops_rank / flops_whole:.1%}")]
    return rows


def decoder_rows(reports: Sequence[paracompile.Report]) -> Rows:
    """How the ranks share the VAE's decoder."""
    flops_whole = sum(report.flops_whole for report in reports)
    return [
        ("VAE decoder, cut along its", " and ".join(dict.fromkeys(f"{report.dimension}" for report in reports))),
        ("VAE decoder, share of the flops on a rank", f"{sum(r.flops_rank for r in reports) / flops_whole:.1%}"),
        ("VAE decoder, collectives per picture", f"{sum(sum(r.collectives.values()) for r in reports)}"),
        ("VAE decoder, bytes sent by a rank per picture", f"{sum(r.bytes_sent for r in reports):,}"),
    ]


def cache_rows(reports: Sequence[paracompile.Report], stats: Sequence[paracompile.CacheStats], rdt: float) -> Rows:
    """What the first block cache skipped."""
    rows = []
    for number, each in enumerate(stats, start=1):
        of = f" of transformer {number}" if len(stats) > 1 else ""
        rows += [(f"hits with rdt {rdt:g}, slot {name!r}{of}", figures(steps)) for name, steps in each.slots.items()]
    return [
        *rows,
        ("blocks that may be skipped", f"{sum(r.blocks_skipped for r in reports)} of {sum(r.blocks for r in reports)}"),
        ("bytes stored by a rank for each slot", f"{sum(report.state_bytes for report in reports):,}"),
    ]


def figures(steps: Sequence[Any]) -> str:
    hits = sum(step.hit for step in steps)
    return f"{hits} of {len(steps)} steps, {len(steps) - hits} computed"


def time_rows(plain: Run | None, warm_up: Run, sharded: Run | None, cached: Run | None, count: int, rdt: float) -> Rows:
    rows = [("first step, plain", seconds(plain.first_step))] if plain else []
    rows += [("first step, sharded (it compiles)", seconds(warm_up.first_step))]
    if plain:
        rows += [("a later step, plain on one rank", seconds(plain.step))]
    if sharded:
        rows += [
            (f"a later step, sharded over {count}", seconds(sharded.step)),
            ("all steps but the first, sharded", seconds(sharded.later_steps)),
        ]
    if cached:
        rows += [(f"all steps but the first, sharded, rdt {rdt:g}", seconds(cached.later_steps))]
    last = cached or sharded
    assert last is not None
    return [*rows, ("the whole call, the last run", seconds(last.whole))]
