"""FLUX plainly, sharded over the ranks, and sharded with blocks skipped by the first block cache: what differs.

On a CPU, the small FluxPipeline in the folder `tiny_flux`, trained on drawn shapes, nothing downloaded:

    torchrun --nproc-per-node 2 examples/run_flux.py

On GPUs, one a rank (nccl, bfloat16):

    torchrun --nproc-per-node 4 examples/run_flux.py --model black-forest-labs/FLUX.1-dev

Rank 0 runs the pipeline by itself first, the others wait. Then all ranks run it with the transformer and the VAE's
decoder compiled by paracompile, from the same noise: with all blocks computed at each step, then with a threshold for
the first block cache (one compile serves both). Rank 0 saves the pictures side by side and prints what was measured.
Without torchrun there is one rank, and nothing is sharded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

import paracompile

EMBEDDED = Path(__file__).parent / "tiny_flux"
PROMPT = "a large red circle on a blue background in the middle"
SHOWN = 240  # pixels that a picture is shown at, at least


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


@dataclass
class Run:
    """One run of the pipeline.

    attributes:
        latents: what the denoising loop ended with.
        pixels: the picture, (height, width, 3), float in [0, 1].
        moments: seconds since the pipeline was called, at the end of each step.
    """

    latents: torch.Tensor
    pixels: np.ndarray[Any, np.dtype[np.float32]]
    moments: list[float] = field(default_factory=list)

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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a FLUX model to load in place of the small one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--height", type=int, help="in pixels (the size that the model was trained for)")
    parser.add_argument("--width", type=int, help="in pixels (the size that the model was trained for)")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (28)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same on all ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where each rank of this machine has a GPU")
    parser.add_argument("--ulysses", type=int, help="ranks that share the heads of an attention (all)")
    parser.add_argument("--rdt", type=float, default=0.08, help="threshold of the first block cache (0.08; 0: none)")
    parser.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--output", type=Path, default=Path("output/flux.png"))
    parser.add_argument("--report", action="store_true", help="print paracompile's report of each graph in full")
    options = parser.parse_args(arguments)

    if options.device is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        options.device = "cuda" if torch.cuda.device_count() >= ranks_here else "cpu"
    if options.model and options.device != "cuda":
        parser.error("--model needs one CUDA device a rank; leave it out to run the small model on the CPU")
    return options


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


def load_pipeline(model: str | None, ranks: Ranks) -> FluxPipeline:
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    return FluxPipeline.from_pretrained(model or EMBEDDED, dtype=dtype).to(ranks.device)


def generate(pipeline: FluxPipeline, ranks: Ranks, name: str, seed: int, **arguments: Any) -> Run:
    """Calls the pipeline with noise from `seed`, a progress bar on rank 0, and a look at the clock after each step."""
    latents = torch.empty(0)
    moments: list[float] = []

    def after_step(pipeline: FluxPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors["latents"]
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter() - start)
        return {}

    pipeline.set_progress_bar_config(disable=not ranks.is_first, desc=f"{name:>11}")
    start = time.perf_counter()
    output = pipeline(
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=after_step,
        **arguments,
    )
    return Run(latents.float().cpu(), output.images[0], moments)


def side_by_side(pictures: dict[str, np.ndarray[Any, Any]]) -> Image.Image:
    """Joins pictures (float in [0, 1]) in a row, each under its caption."""
    margin, caption = 8, 24
    images = {
        text: enlarged(Image.fromarray((pixels * 255).round().astype(np.uint8))) for text, pixels in pictures.items()
    }
    width = sum(image.width + margin for image in images.values()) + margin
    height = max(image.height for image in images.values()) + margin + caption
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for text, image in images.items():
        draw.text((left, 6), text, fill="black", font=ImageFont.load_default(12))
        sheet.paste(image, (left, caption))
        left += image.width + margin
    return sheet


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture, each pixel as a square of several."""
    times = max(1, SHOWN // image.width)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of text: names to the left, values to the right."""
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    rule = "-" * (names + 2 + values)
    return "\n".join([rule, *(f"{name:<{names}}  {value:>{values}}" for name, value in rows), rule])


def differences(plain: Run, other: Run) -> tuple[str, str]:
    """The largest differences of latents and pictures."""
    latents = (plain.latents - other.latents).abs().max().item()
    pixels = np.abs(plain.pixels - other.pixels).max()
    steps_of_255 = np.abs((plain.pixels * 255).round() - (other.pixels * 255).round()).max()
    largest = plain.latents.abs().max().item()
    return f"{latents:.2e} (largest value {largest:.2f})", f"{pixels:.2e} ({steps_of_255:.0f} of 255)"


def sharding_rows(plain: Run, sharded: Run, reports: Sequence[paracompile.Report], count: int) -> list[tuple[str, str]]:
    """What was done to the graphs, and what differs."""
    latents, pixels = differences(plain, sharded)
    collectives = sum((Counter(report.collectives) for report in reports), Counter[str]())
    flops_whole = sum(report.flops_whole for report in reports)
    flops_rank = sum(report.flops_rank for report in reports)
    rows = [
        ("ranks", f"{count}"),
        ("largest difference, latents", latents),
        ("largest difference, picture", pixels),
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


def decoder_rows(reports: Sequence[paracompile.Report]) -> list[tuple[str, str]]:
    """How the ranks share the VAE's decoder."""
    (report,) = reports
    return [
        ("VAE decoder, cut along its", f"{report.dimension}"),
        ("VAE decoder, share of the flops on a rank", f"{report.flops_rank / report.flops_whole:.1%}"),
        ("VAE decoder, collectives per picture", f"{sum(report.collectives.values())}"),
        ("VAE decoder, bytes sent by a rank per picture", f"{report.bytes_sent:,}"),
    ]


def cache_rows(
    plain: Run, cached: Run, reports: Sequence[paracompile.Report], stats: paracompile.CacheStats, rdt: float
) -> list[tuple[str, str]]:
    """What the first block cache skipped, and what differs."""
    latents, pixels = differences(plain, cached)
    rows = [(f"hits with rdt {rdt:g}, slot {name!r}", figures(steps)) for name, steps in stats.slots.items()]
    return [
        *rows,
        ("blocks that may be skipped", f"{sum(r.blocks_skipped for r in reports)} of {sum(r.blocks for r in reports)}"),
        ("bytes stored by a rank for each slot", f"{sum(report.state_bytes for report in reports):,}"),
        ("largest difference with hits, latents", latents),
        ("largest difference with hits, picture", pixels),
    ]


def figures(steps: Sequence[Any]) -> str:
    hits = sum(step.hit for step in steps)
    return f"{hits} of {len(steps)} steps, {len(steps) - hits} computed"


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    pipeline = load_pipeline(options.model, ranks)
    size = pipeline.vae.config.sample_size
    arguments = dict(
        prompt=options.prompt,
        height=options.height or size,
        width=options.width or size,
        num_inference_steps=options.steps,
        max_sequence_length=min(512, pipeline.tokenizer_2.model_max_length),  # FLUX takes 512 at most
        seed=options.seed,
    )

    plain = generate(pipeline, ranks, "plain", **arguments) if ranks.is_first else None
    ranks.barrier()

    reports: list[paracompile.Report] = []
    backend_options: dict[str, Any] = {"compiler": options.compiler, "report": reports.append}
    if options.rdt:
        backend_options["rdt"] = options.rdt
    if ranks.count > 1:
        backend_options["mesh"] = paracompile.init_mesh(ranks.device.type, max_ulysses_dim_size=options.ulysses)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="paracompile", options=backend_options)
    decoder_reports: list[paracompile.Report] = []
    if ranks.count > 1:
        decoder_options = {
            "compiler": options.compiler,
            "report": decoder_reports.append,
            "mesh": backend_options["mesh"],
        }
        pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, backend="paracompile", options=decoder_options)
    if options.rdt:
        paracompile.set_rdt(pipeline.transformer, 0)
    sharded = generate(pipeline, ranks, "paracompile", **arguments)
    cached = None
    if options.rdt:
        paracompile.set_rdt(pipeline.transformer, options.rdt)
        cached = generate(pipeline, ranks, f"rdt {options.rdt:g}", **arguments)

    if plain is None:
        return
    if options.report:
        print(*reports, *decoder_reports, sep="\n\n")
    count = f"{ranks.count} rank{'s' * (ranks.count > 1)}"
    rows = sharding_rows(plain, sharded, reports, ranks.count)
    if decoder_reports:
        rows += decoder_rows(decoder_reports)
    pictures = {
        f"plain, 1 rank, {seconds(plain.step)} a step": plain.pixels,
        f"paracompile, {count}, {seconds(sharded.step)} a step": sharded.pixels,
    }
    times = [
        ("first step, plain", seconds(plain.first_step)),
        ("first step, sharded (it compiles)", seconds(sharded.first_step)),
        ("a later step, plain on one rank", seconds(plain.step)),
        (f"a later step, sharded over {ranks.count}", seconds(sharded.step)),
    ]
    if cached is not None:
        stats = paracompile.cache_stats(pipeline.transformer)
        rows += cache_rows(plain, cached, reports, stats, options.rdt)
        pictures[f"rdt {options.rdt:g}: {stats.hits} of {stats.steps} steps skipped"] = cached.pixels
        times += [
            ("all steps but the first, sharded", seconds(sharded.later_steps)),
            (f"all steps but the first, sharded, rdt {options.rdt:g}", seconds(cached.later_steps)),
        ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(pictures).save(options.output)
    print(table(rows + times))
    print(f"pictures: {options.output}")


def main() -> None:
    options = parse_arguments()
    ranks = join_ranks(options.device)
    try:
        run(options, ranks)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
