"""The command line of an example. Nothing heavy is imported before the arguments are known to be right."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Example", "main", "parse_arguments"]

QUANTIZATIONS = ("none", "int8", "int8-weight", "fp8", "fp8-row", "fp8-weight")
RDT = 0.08
"""The threshold of the first block cache for a real pipeline."""
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math", "flex")

HOW = """
On a CPU, a small pipeline of this family, nothing downloaded, as one process or as two that share each picture:

    python examples/run_{name}.py
    torchrun --nproc-per-node 2 examples/run_{name}.py

On GPUs, one a rank (nccl, bfloat16), a real one, {model}:

    torchrun --nproc-per-node 4 examples/run_{name}.py --model NAME

Rank 0 runs the small pipeline plainly first, while the others wait. Then all ranks run it as paracompile compiled and
sharded it, from the same noise: two steps to warm up, all steps with all blocks computed, and all steps in which the
first block cache may skip blocks. Rank 0 saves what came out side by side and prints what was measured. Of a real
pipeline only the last run is made, unless --plain asks for all.
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is a family's own.

    attributes:
        name: of the family, as in the script's name and in that of the file that it writes.
        pipeline: the class of diffusers.
        model: a real one, or some, for `--help`.
        prompt: what is drawn.
        small: makes the small pipeline; takes the command's options.
        call: arguments of a call of the small one, `height`, `width` and `num_inference_steps` among them.
        model_call: those of a real one.
        fps: frames of a second of video; None where there are pictures.
        rdt: the threshold at which the small one skips some steps; random weights need a larger one than trained ones.
        vae: whether several ranks share the small one's VAE, too; compiling that of videos takes a CPU minutes.
        fullgraph: whether a graph that breaks is an error.
        dtypes: parts of a real one that are not to be in bfloat16.
        flags: adds flags of the family.
        next: what to try after this, in a line.
    """

    name: str
    pipeline: str
    model: str
    prompt: str
    small: Callable[[argparse.Namespace], Any]
    call: Mapping[str, Any]
    model_call: Mapping[str, Any]
    fps: int | None = None
    rdt: float = RDT
    vae: bool = False
    fullgraph: bool = False
    dtypes: Mapping[str, str] = field(default_factory=dict)
    flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    next: str | None = None


def parse_arguments(example: Example, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{sys.modules[example.small.__module__].__doc__}\n"
        + HOW.format(name=example.name, model=example.model),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is made")
    what.add_argument("--model", help="a real pipeline, its name or folder, in place of the small one")
    what.add_argument("--prompt", default=example.prompt)
    what.add_argument("--steps", type=int, help=f"denoising steps ({example.call['num_inference_steps']} of the small)")
    what.add_argument("--height", type=int, help="in pixels")
    what.add_argument("--width", type=int, help="in pixels")
    if example.fps:
        what.add_argument("--frames", type=int, help="of the video")
    what.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    what.add_argument("--lora", help="a LoRA to load, its name, folder or file")
    file = f"{example.name}.{'mp4' if example.fps else 'png'}"
    what.add_argument("--output", type=Path, default=Path("output") / file, help="(%(default)s)")

    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--ulysses", type=int, help="ranks that trade tokens for heads (all that remain)")
    ranks.add_argument("--ring", type=int, help="ranks that pass keys and values around (1)")
    ranks.add_argument("--batch", type=int, help="ranks that share a batch, as of guidance (1)")
    ranks.add_argument("--device", choices=("cpu", "cuda"), help="cuda where each rank of this machine has a GPU")

    how = parser.add_argument_group("how")
    vae_help = "share the VAE, too (several ranks do" + (")" if example.vae else ", but for the small one's)")
    how.add_argument(
        "--rdt", type=float, help=f"threshold of the first block cache; 0: none ({example.rdt:g}, of a --model {RDT:g})"
    )
    how.add_argument("--quantize", choices=QUANTIZATIONS, default="none", help="of the linear layers (%(default)s)")
    how.add_argument("--attention", choices=ATTENTIONS, help="the kernel (the backend chooses)")
    how.add_argument("--vae", action=argparse.BooleanOptionalAction, help=vae_help)
    how.add_argument("--offload", action="store_true", help="keep what is not at work in the host's memory")
    how.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    how.add_argument("--mode", help="Inductor's, such as max-autotune-no-cudagraphs")
    how.add_argument("--plain", action=argparse.BooleanOptionalAction, help="compare with plain diffusers (the small)")
    how.add_argument("--report", action="store_true", help="print paracompile's report of each graph in full")
    example.flags(parser)
    options = parser.parse_args(arguments)

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.device_count() >= ranks_here else "cpu"
    if options.model and options.device != "cuda":
        parser.error("--model needs one CUDA device a rank; leave it out to run the small pipeline on the CPU")
    if options.offload and (options.device != "cuda" or ranks_here > 1):
        parser.error("--offload needs a CUDA device and a single rank; on several ranks leave it out")
    if options.rdt is None:
        options.rdt = example.rdt if options.model is None else RDT
    if options.plain is None:
        options.plain = options.model is None
    return options


def main(example: Example) -> None:
    options = parse_arguments(example)

    from running.quiet import import_class

    pipeline = import_class(example.pipeline)

    import torch.distributed as dist

    from paracompile import OptionError
    from running.runs import join_ranks, run

    ranks = join_ranks(options.device)
    try:
        run(example, pipeline, options, ranks)
    except OptionError as refused:
        sys.exit(f"{refused}" if ranks.is_first else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
