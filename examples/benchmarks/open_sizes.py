"""What it costs to serve every size by one compile: a step and a first call, sizes open against sizes fixed.

    python examples/benchmarks/open_sizes.py                    # FLUX, 19 + 38 blocks: ten minutes on one CPU thread
    python examples/benchmarks/open_sizes.py --model wan        # 30 blocks; hunyuan_video: 20 + 40

The models of compile_time.py. Of each row two are compiled by Inductor in one process, one with `dynamic=False` and
one whose token, row, column and frame dimensions are marked; their steps are timed in turn, at the size that both were
compiled for, and at another one, for which only the first one compiles again. Rows: one rank, and what one of two ranks
computes ("fake" process group). On a CPU the ratios count, not the times.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from compile_time import MODELS
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

Call = Callable[..., Any]

ROUNDS = 9
COLUMNS = ("first call, fixed", "open", "ratio", "step", "another size, fixed", "open", "step")


def open_sizes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Marks every dimension but batches, channels and widths."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() > 1 and "pooled" not in name:
            first = 2 if value.dim() > 3 else value.dim() - 2 if "mask" not in name else 1
            for dim in range(first, value.dim() if value.dim() > 3 or "mask" in name else value.dim() - 1):
                torch._dynamo.maybe_mark_dynamic(value, dim)
    return inputs


def timed(call: Call, inputs: dict[str, Any]) -> float:
    start = time.perf_counter()
    call(**inputs, return_dict=False)
    return time.perf_counter() - start


def steps(calls: list[Call], inputs: dict[str, Any]) -> list[float]:
    """The median seconds of each, called in turn."""
    seconds = [[timed(call, inputs) for call in calls] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def row(build: Callable[[int], tuple[nn.Module, dict[str, Any]]], ranks: int) -> list[str]:
    torch._dynamo.reset()
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    model = build(0)[0].eval().requires_grad_(False)
    fixed = torch.compile(model, backend="paracompile", dynamic=False)
    opened = torch.compile(copy.deepcopy(model), backend="paracompile")
    cells = []
    with torch.no_grad():
        for number in (0, 1):
            first = [timed(fixed, build(number)[1]), timed(opened, open_sizes(build(number)[1]))]
            one, other = steps([fixed, opened], build(number)[1])
            cells += [f"{seconds:.1f} s" for seconds in first]
            cells += [f"{first[1] / first[0]:.2f}"] if number == 0 else []
            cells += [f"{other / one:.3f}"]
    if ranks > 1:
        dist.destroy_process_group()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    versions = ", ".join(f"{name} {version(name)}" for name in ("paracompile", "torch", "diffusers"))
    print(f"{date.today()}, {versions}, Python {platform.python_version()}")
    print(f"{arguments.model}, CPU, 1 thread, caches off\n")
    print(f"| {'ranks':5} | {' | '.join(COLUMNS)} |")
    print(f"|{'-' * 7}|{'|'.join('-' * (len(column) + 2) for column in COLUMNS)}|")
    for ranks in arguments.ranks:
        cells = zip(row(MODELS[arguments.model], ranks), COLUMNS, strict=True)
        print(f"| {ranks:5} | {' | '.join(f'{cell:>{len(column)}}' for cell, column in cells)} |", flush=True)


if __name__ == "__main__":
    main()
