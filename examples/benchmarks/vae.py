"""Decoding by one of several ranks: what it computes, holds and sends, and whether the picture is the same.

    python examples/benchmarks/vae.py                                   # AutoencoderKL, 64 x 64 latents: half an hour
    python examples/benchmarks/vae.py --model AutoencoderKLWan
    python examples/benchmarks/vae.py --rows 16 --columns 16 --runs 1   # a few minutes

diffusers' own classes at their real widths, with random weights, in float32 on one thread. A rank of 2 and one of 4
(the second: it has neighbours on both sides) runs with the "fake" process group, which carries nothing: so its time is
what it computes. It takes turns with the whole decoder, which `--compiler` compiles as well, in one process; time is
the processor's, of which other work on the machine takes less than of the clock's. "time over its share" is the time of
a rank times the number of ranks over the whole's. Peak memory is what a run adds to its process, by the kernel's count
(Linux), in a process of its own in which freed memory goes back to the system at once.

Pictures are compared with the untiled one: those of all ranks, run in one process with real exchanges, and diffusers'
own tiled one, of half the side with its overlap of a quarter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from peak_memory import peak_growth
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # random weights, and the ranks in lockstep

from random_tensors import draw, randomise

BUILD: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": lambda: diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "AutoencoderKLWan": diffusers.AutoencoderKLWan,
}


def decoder_of(vae: Any) -> Callable[[Tensor], Tensor]:
    return lambda latents: vae.decode(latents, return_dict=False)[0]


def build(arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """A model and a latent image (of a video, the first frame)."""
    torch.manual_seed(0)
    vae = randomise(BUILD[arguments.model]())
    frames = () if arguments.model == "AutoencoderKL" else (1,)
    return vae, draw(1, 16, *frames, arguments.rows, arguments.columns)


Call = Callable[[], object]


def whole_and_rank(arguments: argparse.Namespace, ranks: int) -> tuple[dict[str, Call], Any]:
    """Calls of the whole decoder and of one rank, both compiled, and the report of the latter."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    vae, latents = build(arguments)
    reports: list[Any] = []
    options = {"report": reports.append, "inputs": "trust", "compiler": arguments.compiler}
    whole = torch.compile(decoder_of(vae), backend=arguments.compiler, fullgraph=True, dynamic=False)
    rank = torch.compile(decoder_of(vae), backend="paracompile", fullgraph=True, dynamic=False, options=options)
    calls: dict[str, Call] = {"whole": lambda: whole(latents), "rank": lambda: rank(latents)}
    for call in calls.values():
        call()
    (report,) = reports
    return calls, report


def peaks(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """What the whole decoder and one rank add to the memory of the process."""
    calls, _ = whole_and_rank(arguments, ranks)
    return {name: peak_growth(call) for name, call in calls.items()}


def times(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The times of the whole decoder and of one rank, which take turns, and what the rank's report says."""
    calls, report = whole_and_rank(arguments, ranks)
    seconds: dict[str, list[float]] = {"whole": [], "rank": []}
    for number in range(arguments.runs):
        for name in ("whole", "rank")[:: 1 if number % 2 else -1]:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    return {
        **{name: statistics.median(each) for name, each in seconds.items()},
        "bytes": report.bytes_sent,
        "collectives": report.collectives,
        "work": report.flops_rank / report.flops_whole,
        "dimension": report.notes[0],
    }


def pictures(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The largest difference of all ranks' picture, and of diffusers' tiled one, from the untiled one."""
    from small_models import shard

    vae, latents = build(arguments)
    decode = decoder_of(vae)
    with torch.no_grad():
        expected = decode(latents)
        found = {f"{count} ranks": shard(decode, [latents], count).result for count in arguments.ranks}
        rows = 8 * max(arguments.rows, arguments.columns) // 2
        if arguments.model == "AutoencoderKL":
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = rows, rows // 8
        else:
            sizes = dict(tile_sample_min_height=rows, tile_sample_min_width=rows)
            strides = dict(tile_sample_stride_height=3 * rows // 4, tile_sample_stride_width=3 * rows // 4)
            vae.enable_tiling(**sizes, **strides)
        start = time.process_time()
        found["tiled"] = decode(latents)
        seconds = time.process_time() - start
    largest = {name: float((picture - expected).abs().max()) for name, picture in found.items()}
    return {"differences": largest, "largest": float(expected.abs().max()), "tiled seconds": seconds}


MEASURE = {"times": times, "peaks": peaks, "pictures": pictures}


def in_own_process(arguments: argparse.Namespace, what: str, ranks: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, "--of", str(ranks)]
    for name in ("model", "rows", "columns", "runs", "compiler"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--ranks", *map(str, arguments.ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if what == "peaks":  # a fixed threshold: freed tensors go back to the system at once, which takes time
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BUILD, default="AutoencoderKL")
    parser.add_argument("--rows", type=int, default=64, help="of the latent image")
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compiler", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--one", choices=MEASURE, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one is not None:
        with torch.no_grad():
            print(json.dumps(MEASURE[arguments.one](arguments, arguments.of)))
        return

    versions = ", ".join(f"{name} {version(name)}" for name in ("paracompile", "torch", "diffusers"))
    print(f"{date.today()}, {versions}, Python {platform.python_version()}")
    print(
        f"{arguments.model}, {arguments.rows} x {arguments.columns} latents, float32, CPU, 1 thread, compiler "
        f"{arguments.compiler}, median of {arguments.runs}\n"
    )
    print("| ranks | work | time over its share | peak memory | sent by a rank | exchanges |")
    print("|-------|------|---------------------|-------------|----------------|-----------|")
    wholes = []
    for ranks in arguments.ranks:
        found, peak_of = (in_own_process(arguments, what, ranks) for what in ("times", "peaks"))
        over = ranks * found["rank"] / found["whole"]
        peak = peak_of["rank"] / peak_of["whole"]
        sent = f"{found['bytes'] / 2**20:.1f} MiB"
        exchanges = sum(found["collectives"].values())
        wholes.append((found["whole"], peak_of["whole"]))
        print(
            f"| {ranks:5} | {found['work']:3.0%} | {over:19.2f} | {peak:11.1%} | {sent:>14} | {exchanges:9} |",
            flush=True,
        )
    seconds, peak = (statistics.median(each) for each in zip(*wholes, strict=True))
    print(f"\nThe whole: {seconds:.1f} s, {peak / 2**20:.0f} MiB. {found['dimension']}\n")
    compared = in_own_process(arguments, "pictures", 1)
    print(f"| picture | largest difference (largest value {compared['largest']:.2f}) |")
    print("|---------|----------------------------------------|")
    for name, difference in compared["differences"].items():
        print(f"| {name:7} | {difference:38.2e} |")
    print(f"\nTiled, on one rank: {compared['tiled seconds']:.1f} s.")


if __name__ == "__main__":
    main()
