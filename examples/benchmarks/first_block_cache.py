"""What a step costs that the first block cache skips, and one that it does not.

    python examples/benchmarks/first_block_cache.py                                   # minutes, on one CPU thread
    python examples/benchmarks/first_block_cache.py --device cuda --flux-dev          # FLUX.1-dev's size, bfloat16

diffusers' own `FluxTransformer2DModel` with random weights. Each variant is compiled by Inductor, and the timed runs
take turns in one process:

    full step               the model without a cache
    full step, one piece    the same, compiled in one piece instead of in regions
    full step, armed        with the cache, in a step in which all blocks are computed
    skipped step            with the cache, in a step in which blocks 1..N are skipped
    ... fewer guards        the same, where Dynamo does not look through PyTorch's own modules at each call
    one block               the same model with its first block only, in one piece: the lower bound of a skipped step
    diffusers, skipped      diffusers' FirstBlockCache under torch.compile, in a skipped step

On a CPU the ratios count, not the times. At the end it is told how many of the stored tensors a skipped step wrote to.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from types import MethodType
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

import paracompile
from paracompile.runtime.cached_call import caches_of

FULL, WHOLE, ARMED, SKIPPED, UNGUARDED, ONE_BLOCK, PEER = (
    "full step",
    "full step, one piece",
    "full step, armed",
    "skipped step",
    "... fewer guards",
    "one block",
    "diffusers, skipped",
)
ALWAYS = 1e9  # a threshold that no residual's difference reaches

Run = Callable[[], Tensor]


class Size:
    """The model's size and its inputs, small or FLUX.1-dev's."""

    def __init__(self, flux_dev: bool, device: str) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if flux_dev else torch.float32
        self.blocks = (19, 38) if flux_dev else (4, 8)
        self.heads, self.head_size = (24, 128) if flux_dev else (4, 64)
        self.image, self.text = (4096, 512) if flux_dev else (512, 64)
        self.text_width, self.pooled_width = (4096, 768) if flux_dev else (64, 64)
        self.rope = (16, 56, 56) if flux_dev else (16, 24, 24)

    def __str__(self) -> str:
        double, single = self.blocks
        return (
            f"{double} double and {single} single blocks, {self.heads} heads of {self.head_size}, {self.image} image "
            f"and {self.text} text tokens, {str(self.dtype).removeprefix('torch.')}"
        )

    def model(self, double: int, single: int) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = FluxTransformer2DModel(
                num_layers=double,
                num_single_layers=single,
                num_attention_heads=self.heads,
                attention_head_dim=self.head_size,
                joint_attention_dim=self.text_width,
                pooled_projection_dim=self.pooled_width,
                guidance_embeds=True,
                axes_dims_rope=self.rope,
            )
        return model.to(self.dtype).eval().requires_grad_(False)

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        return dict(
            hidden_states=draw(1, self.image, 64),
            encoder_hidden_states=draw(1, self.text, self.text_width),
            pooled_projections=draw(1, self.pooled_width),
            img_ids=torch.zeros(self.image, 3, device=self.device, dtype=self.dtype),
            txt_ids=torch.zeros(self.text, 3, device=self.device, dtype=self.dtype),
            guidance=torch.full([1], 3.5, device=self.device),
            return_dict=False,
        )


def build(size: Size) -> tuple[dict[str, Run], nn.Module]:
    """What one run of each variant is, and the model with the cache."""
    inputs = size.inputs()
    still = torch.ones(1, device=size.device)
    falling = (still - number / 100_000 for number in itertools.count())

    def call(model: Callable[..., Any], timestep: Tensor) -> Tensor:
        with torch.no_grad():
            (output,) = model(**inputs, timestep=timestep)
        return output

    model = size.model(*size.blocks)
    plain = torch.compile(model, backend="paracompile", fullgraph=True)
    cached = torch.compile(model, backend="paracompile", fullgraph=True, options={"rdt": ALWAYS})
    # Options that differ, or Dynamo would take this for the one before, guards and all.
    filtered = {
        "guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe,
        "max_consecutive_hits": 10**6,
    }
    unguarded = torch.compile(model, backend="paracompile", fullgraph=True, options={"rdt": ALWAYS, **filtered})
    one_piece = {"regions": False}
    whole = torch.compile(size.model(*size.blocks), backend="paracompile", fullgraph=True, options=one_piece)
    one_block = torch.compile(size.model(1, 0), backend="paracompile", fullgraph=True, options=one_piece)
    theirs = size.model(*size.blocks)
    # Without its decorator, whose code all models share: where one model's graph breaks, Dynamo gives up that code for
    # all of them.
    theirs.forward = MethodType(FluxTransformer2DModel.forward.__wrapped__, theirs)
    theirs.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    compiled_theirs = torch.compile(theirs)

    def armed() -> Tensor:
        with paracompile.cache_context("full"):  # a time that stands still is no next step: all blocks are computed
            return call(cached, still)

    def skipped() -> Tensor:
        with paracompile.cache_context("skipped"):
            return call(cached, next(falling))

    def skipped_unguarded() -> Tensor:
        with paracompile.cache_context("skipped, fewer guards"):
            return call(unguarded, next(falling))

    def peer() -> Tensor:
        with theirs.cache_context("skipped"):
            return call(compiled_theirs, next(falling))

    return {
        FULL: lambda: call(plain, still),
        WHOLE: lambda: call(whole, still),
        ARMED: armed,
        SKIPPED: skipped,
        UNGUARDED: skipped_unguarded,
        ONE_BLOCK: lambda: call(one_block, still),
        PEER: peer,
    }, model


def median_times(built: dict[str, Run], runs: int, wait: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each variant; the runs take turns."""
    seconds: dict[str, list[float]] = {variant: [] for variant in built}
    for number in range(runs):
        for variant in built if number % 2 == 0 else reversed(built):
            wait()
            start = time.perf_counter()
            built[variant]()
            wait()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(taken) for variant, taken in seconds.items()}


def written(model: nn.Module, run: Run, name: str) -> str:
    """How many of the tensors that are stored for skipped steps one run writes to, of how many."""
    slots = [slot for cache in caches_of(model.parameters()) for slot in cache.slots()]
    state = [tensor for slot in slots if slot.name == name for tensor in slot.state]
    before = [tensor._version for tensor in state]
    run()
    count = sum(tensor._version != version for tensor, version in zip(state, before, strict=True))
    return f"{count} of {len(state)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each variant")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--flux-dev", action="store_true", help="FLUX.1-dev's size in bfloat16 (64 GB of GPU memory)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    size = Size(arguments.flux_dev, arguments.device)
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None

    built, cached = build(size)
    graphs: dict[str, tuple[int, int]] = {}
    for variant, run in built.items():
        counters.clear()
        run()
        run()  # the second call of a cache may compile once more, and is the first that is skipped
        run()
        graphs[variant] = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    graphs[SKIPPED] = graphs[ARMED]  # the same graph
    times = median_times(built, arguments.runs, wait)

    names = ("paracompile", "torch", "diffusers")
    print(
        f"{date.today()}, {', '.join(f'{name} {version(name)}' for name in names)}, Python {platform.python_version()}"
    )
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    print(f"{size}, {where}, Inductor, median of {arguments.runs}\n")
    print("|                      |      time | of a full step | of one block | graphs | graph breaks |")
    print("|----------------------|-----------|----------------|--------------|--------|--------------|")
    for variant, taken in times.items():
        count, breaks = graphs[variant]
        print(
            f"| {variant:20} | {taken * 1000:6.1f} ms | {taken / times[FULL]:14.3f} | {taken / times[ONE_BLOCK]:12.3f} "
            f"| {count:6} | {breaks:12} |"
        )
    print(
        f"\nstored tensors that a skipped step writes to: {written(cached, built[SKIPPED], 'skipped')}; "
        f"a computed one: {written(cached, built[ARMED], 'full')}"
    )


if __name__ == "__main__":
    main()
