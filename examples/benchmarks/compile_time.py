"""How long a model's first call takes, on a machine that has compiled nothing yet, and on one that has.

    python examples/benchmarks/compile_time.py                  # FLUX, 19 + 38 blocks: half an hour on one CPU thread
    python examples/benchmarks/compile_time.py --model wan      # 30 blocks; hunyuan_video: 20 + 40

diffusers' own model classes with as many blocks as the real ones, 4 heads of 64, and random weights. Every first call
is made by a process of its own, and counts from `torch.compile` to the output; the first one finds an empty cache
folder, the second start what the first one left there. Rows:

    tracing alone           Dynamo's capture, run as it is: what no backend can save
    torch.compile           Inductor
    repeated blocks         diffusers' compile_repeated_blocks
    one piece               paracompile with regions=False
    paracompile             in regions
    ... rdt                 with the first block cache
    ... rank of 2           what one of two ranks compiles ("fake" process group)

The second size is another resolution in the same process. Peak memory is what one later call adds to its process, by
the kernel's count (Linux). On a CPU the ratios count, not the times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from peak_memory import peak_growth
from torch import Tensor, nn

TRACED, PLAIN, REPEATED = "tracing alone", "torch.compile", "repeated blocks"
OURS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, options
    "one piece": (1, {"regions": False}),
    "paracompile": (1, {}),
    "paracompile, rdt": (1, {"rdt": 0.1}),
    "paracompile, rank of 2": (2, {}),
    "paracompile, rdt, rank of 2": (2, {"rdt": 0.1}),
}
VARIANTS = (TRACED, PLAIN, REPEATED, *OURS)
COLUMNS = (
    "first call",
    "of torch.compile",
    "second start",
    "second size",
    "step",
    "peak memory",
    "regions",
    "different",
)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def flux(number: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    image = 512 + 64 * number
    return model, dict(
        hidden_states=draw(1, image, 64),
        encoder_hidden_states=draw(1, 64, 64),
        pooled_projections=draw(1, 64),
        img_ids=torch.zeros(image, 3),
        txt_ids=torch.zeros(64, 3),
        guidance=torch.full([1], 3.5),
        timestep=torch.ones(1),
    )


def wan(number: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_layers=30, num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, text_dim=64, freq_dim=256
    )
    return model, dict(
        hidden_states=draw(1, 16, 2, 32, 32 + 4 * number),
        encoder_hidden_states=draw(1, 64, 64),
        timestep=torch.full([1], 500.0),
    )


def hunyuan_video(number: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        num_layers=20,
        num_single_layers=40,
        num_attention_heads=4,
        attention_head_dim=64,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(16, 24, 24),
    )
    mask = torch.ones(1, 64, dtype=torch.long)
    mask[:, 40:] = 0
    return model, dict(
        hidden_states=draw(1, 16, 2, 32, 32 + 4 * number),
        encoder_hidden_states=draw(1, 64, 64),
        encoder_attention_mask=mask,
        pooled_projections=draw(1, 64),
        guidance=torch.full([1], 3500.0),
        timestep=torch.full([1], 500.0),
    )


MODELS = {"flux": flux, "wan": wan, "hunyuan_video": hunyuan_video}


def compiled(model: Any, variant: str, reports: list[Any]) -> Callable[..., Any]:
    if variant == TRACED:
        return torch.compile(model, backend=lambda gm, example_inputs: gm.forward)
    if variant == PLAIN:
        return torch.compile(model)
    if variant == REPEATED:
        model.compile_repeated_blocks()
        return model
    ranks, options = OURS[variant]
    if ranks > 1:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return torch.compile(model, backend="paracompile", options={**options, "report": reports.append})


def measure(name: str, variant: str, second_size: bool) -> dict[str, Any]:
    """The seconds of the first call in this process, of a later one, and what that adds to its memory."""
    torch.set_num_threads(1)
    model, inputs = MODELS[name](0)
    model.eval().requires_grad_(False)
    reports: list[Any] = []

    def timed(given: dict[str, Any]) -> float:
        start = time.perf_counter()
        call(**given, return_dict=False)
        return time.perf_counter() - start

    with torch.no_grad():
        start = time.perf_counter()
        call = compiled(model, variant, reports)
        call(**inputs, return_dict=False)
        found: dict[str, Any] = {"first": time.perf_counter() - start}
        found["step"] = statistics.median(timed(inputs) for _ in range(5))
        found["peak"] = peak_growth(lambda: call(**inputs, return_dict=False))
        if second_size:
            found["second size"] = timed(MODELS[name](1)[1])
    if reports and reports[0].compilation is not None:
        compilation = reports[0].compilation
        found["regions"] = [compilation.regions, compilation.different, compilation.from_cache, compilation.seconds]
    return found


def in_own_process(name: str, variant: str, caches: str, second_size: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", name, "--one", variant, *(["--second-size"] if second_size else [])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--rows", nargs="+", choices=VARIANTS, default=VARIANTS, help="some of the rows only")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--second-size", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.model, arguments.one, arguments.second_size)))
        return

    print(
        f"{date.today()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("paracompile", "torch", "diffusers"))
        + f", Python {platform.python_version()}"
    )
    print(f"{arguments.model}, CPU, 1 thread, an empty cache folder\n")
    print(f"| {'':27} | {' | '.join(COLUMNS)} |")
    print(f"|{'-' * 29}|{'|'.join('-' * (len(column) + 2) for column in COLUMNS)}|")
    found: dict[str, dict[str, Any]] = {}
    for variant in arguments.rows:
        with tempfile.TemporaryDirectory() as caches:
            cold = in_own_process(arguments.model, variant, caches, variant in OURS)
            warm = in_own_process(arguments.model, variant, caches, False)
        found[variant] = cold
        plain = found.get(PLAIN, dict.fromkeys(("first", "step", "peak"), math.nan))
        count, different, *_ = cold.get("regions", ["", ""])
        if variant not in (TRACED, REPEATED) and "regions" in warm:
            assert warm["regions"][2] == warm["regions"][1], "a region of the second start was not in the cache"
        cells = (
            f"{cold['first']:.1f} s",
            f"{cold['first'] / plain['first']:.3f}",
            f"{warm['first']:.1f} s",
            f"{cold['second size']:.1f} s" if "second size" in cold else "",
            f"{cold['step'] / plain['step']:.3f}",
            f"{cold['peak'] / plain['peak']:.3f}",
            str(count),
            str(different),
        )
        aligned = (f"{cell:>{len(column)}}" for cell, column in zip(cells, COLUMNS, strict=True))
        print(f"| {variant:27} | {' | '.join(aligned)} |", flush=True)


if __name__ == "__main__":
    main()
