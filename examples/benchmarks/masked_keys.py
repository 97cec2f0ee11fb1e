"""What padded prompts cost: HunyuanVideo's layout with its key padding mask, against the same without any mask.

    python examples/benchmarks/masked_keys.py                           # a minute or two on one CPU thread
    python examples/benchmarks/masked_keys.py --compiler inductor
    python examples/benchmarks/masked_keys.py --tokens 4096 --runs 3

diffusers' own `HunyuanVideoTransformer3DModel`, narrow, with random weights, one double and one single block, runs on
image tokens and 256 text tokens of which 40 are real:

    no mask                 the model with the mask taken away from its attentions: the lower bound
    mask                    the model as it is
    no mask, paracompile    the first, compiled by paracompile on one rank
    mask, paracompile       the second, compiled by paracompile on one rank ("drop_masked_keys" is the default)

With `--compiler inductor` the first two are compiled by Inductor alone. Times are medians of runs that take turns in
one process; peak memory is what one run adds to the memory of its own process, by the kernel's count (Linux), after a
run to warm up. Everything is given as a ratio to "no mask": on a CPU the figures themselves mean little.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video
from peak_memory import peak_growth
from torch import Tensor, nn

TEXT, REAL_TEXT = 256, 40
HEADS, HEAD_SIZE = 2, 128
CHANNELS = 4
FRAMES, COLUMNS = 8, 32  # the image tokens' grid; the rows are what is left

NO_MASK, MASK = "no mask", "mask"
NO_MASK_COMPILED, MASK_COMPILED = (f"{name}, paracompile" for name in (NO_MASK, MASK))
VARIANTS = (NO_MASK, MASK, NO_MASK_COMPILED, MASK_COMPILED)

Run = Callable[[], Tensor]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(16, 56, 56),
    )
    return model.eval().requires_grad_(False)


def build_inputs(tokens: int) -> dict[str, Any]:
    rows = (tokens - TEXT) // (FRAMES * COLUMNS)
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(1, CHANNELS, FRAMES, 2 * rows, 2 * COLUMNS, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, TEXT, 64, generator=generator),
        encoder_attention_mask=(torch.arange(TEXT) < REAL_TEXT).long()[None],
        pooled_projections=torch.randn(1, 64, generator=generator),
        guidance=torch.tensor([6000.0]),
        return_dict=False,
    )


class WithoutMask(nn.Module):
    """A HunyuanVideo whose blocks' attentions get no mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.attend = transformer_hunyuan_video.dispatch_attention_fn

    def forward(self, **inputs: Any) -> Any:
        def unmasked(*args: Any, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
            return self.attend(*args, attn_mask=None, **how)

        transformer_hunyuan_video.dispatch_attention_fn = unmasked
        try:
            return self.model(**inputs)
        finally:
            transformer_hunyuan_video.dispatch_attention_fn = self.attend


def build(variant: str, compiler: str, tokens: int) -> Run:
    """What one run of a variant is, compiled and warm."""
    model, inputs = build_model(), build_inputs(tokens)
    call: Callable[..., Any] = WithoutMask(model) if variant in (NO_MASK, NO_MASK_COMPILED) else model
    if variant in (NO_MASK_COMPILED, MASK_COMPILED):
        call = torch.compile(call, backend="paracompile", fullgraph=True, options={"compiler": compiler})
    elif compiler == "inductor":
        call = torch.compile(call, fullgraph=True)

    def run() -> Tensor:
        with torch.no_grad():
            (output,) = call(**inputs)
        return output

    run()
    return run


def median_times(compiler: str, tokens: int, runs: int) -> dict[str, float]:
    """The median seconds of each variant; the runs take turns."""
    built = {variant: build(variant, compiler, tokens) for variant in VARIANTS}
    torch.testing.assert_close(built[MASK_COMPILED](), built[MASK](), rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(runs):
        for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            start = time.perf_counter()
            built[variant]()
            seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(taken) for variant, taken in seconds.items()}


def peak_in_own_process(variant: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory-of", variant]
    for name in ("tokens", "compiler", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    # A fixed threshold: freed tensors go back to the system at once, and are not kept for the next run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="image and text tokens in all, a multiple of 256")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each variant")
    parser.add_argument("--compiler", choices=["eager", "inductor"], default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens % (FRAMES * COLUMNS) or arguments.tokens <= TEXT:
        parser.error(f"--tokens must be a multiple of {FRAMES * COLUMNS}, and more than {TEXT}")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(peak_growth(build(arguments.memory_of, arguments.compiler, arguments.tokens)))
        return

    peaks = {variant: peak_in_own_process(variant, arguments) for variant in VARIANTS}
    times = median_times(arguments.compiler, arguments.tokens, arguments.runs)
    versions = ", ".join(f"{name} {version(name)}" for name in ("paracompile", "torch", "diffusers"))
    print(f"{date.today()}, {versions}, Python {platform.python_version()}")
    print(
        f"{arguments.tokens} tokens, {TEXT} of them text ({REAL_TEXT} real), {HEADS} heads of {HEAD_SIZE}, 1 double "
        f"and 1 single block, float32, CPU, {arguments.threads} thread(s), compiler {arguments.compiler}, median of "
        f"{arguments.runs}\n"
    )
    print("|                      |  time | peak memory |")
    print("|----------------------|-------|-------------|")
    for variant in VARIANTS:
        time_ratio, peak_ratio = times[variant] / times[NO_MASK], peaks[variant] / peaks[NO_MASK]
        print(f"| {variant:20} | {time_ratio:5.2f} | {peak_ratio:11.2f} |")
    print(f"\n1.00: {times[NO_MASK]:.2f} s, {peaks[NO_MASK] / 2**20:.0f} MiB more than before the run")


if __name__ == "__main__":
    main()
