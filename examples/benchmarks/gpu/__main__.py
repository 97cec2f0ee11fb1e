"""What only a GPU shows: kernels against float64, small models, ranks in lockstep, host waits, and FLUX.1-dev's size.

    python examples/benchmarks/gpu                          # ten minutes at most (--limit)
    python examples/benchmarks/gpu kernels families         # some of the parts
    python examples/benchmarks/gpu flux --variants eager paracompile
    python examples/benchmarks/gpu --device cpu             # everything but the figures, small, on a CPU

Each verdict is one line, and all figures are in one JSON file, written anew after each: a run cut short is still worth
it. Weights and inputs are random. The parts, in this order:

    kernels     `attention_with_lse` against its definition in float64: error, kernel, bytes
    families    small models with the first block cache through Inductor: computed and skipped steps
    graphs      the same in CUDA graphs (`mode="reduce-overhead"`, once "max-autotune"), for two prompts
    ranks       the graphs of 2, 4 and 8 ranks side by side on this device, against the plain model
    waits       how often a step makes the host wait for the device
    flux        FLUX.1-dev's size, 1024 x 1024, bfloat16: a step, a skipped one and its lower bound (one block), a rank
                of 2, 4 and 8, CUDA graphs, fp8; first calls, of a second process, too
    video       HunyuanVideo's size, 720p, 129 frames: what one of eight ranks computes in a step

Seconds are medians. Several variants compile at the same time, and are measured one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from checks import CHECKS, Figures, jobs_of
from sizes import AGAIN, VARIANTS, measure

LIMIT_OF_CHECKS = 150.0
"""Seconds for the checks of one process: what hangs must not cost the figures."""

LIMIT_OF_COMPILING = 110.0
"""Seconds that figures wait for the slowest to compile."""


class Run:
    """Parts in processes of their own; what they find goes to the screen and into one file.

    attributes:
        bad, late: how many verdicts were bad, and how many processes ran out of time.
    """

    def __init__(self, device: str, out: Path, limit: float) -> None:
        self.device, self.out, self.deadline = device, out, time.monotonic() + limit
        self.limit_of_checks = LIMIT_OF_CHECKS if device == "cuda" else float("inf")
        self.bad, self.late = 0, 0
        self._caches = tempfile.TemporaryDirectory()
        self._writing, self._measuring = threading.Lock(), threading.Lock()
        self._figures: Figures = {
            "date": str(date.today()),
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            **{name: version(name) for name in ("paracompile", "torch", "diffusers", "torchao")},
        }

    def check(self, arguments: list[str]) -> None:
        """Runs the checks of a part, for one family."""
        with self._process("--check", *arguments, limit=self.limit_of_checks) as lines:
            for line in lines:
                if line.startswith("CHECK "):
                    name, right, figures = json.loads(line.removeprefix("CHECK "))
                    self._note(arguments[0], name, "ok" if right else "BAD", figures)

    def measure(self, part: str, name: str, all_compiled: threading.Barrier) -> None:
        """Compiles a variant, waits for the others to have done so, and measures it while no other is."""
        # A cache of its own for each variant, or the first to compile a block would do so for all.
        cache = Path(self._caches.name, part, re.sub(r"\W+", "-", name.removesuffix(AGAIN)))
        with self._process("--measure", part, name, limit=float("inf"), cache=cache) as lines:
            ready = any(line.startswith("READY") for line in iter(lines.readline, ""))
            alone = True
            try:
                all_compiled.wait(LIMIT_OF_COMPILING)
            except threading.BrokenBarrierError:
                alone = False
            with self._measuring:
                if ready:
                    lines.go()
                for line in lines:
                    if line.startswith("FIGURES "):
                        figures = json.loads(line.removeprefix("FIGURES "))
                        self._note(part, name, "ok", figures if alone else {**figures, "others were compiling": True})

    def _note(self, part: str, name: str, verdict: str, figures: Figures) -> None:
        with self._writing:
            self._figures.setdefault(part, {})[name] = figures
            self.bad += verdict == "BAD"
            self.late += verdict == "late"
            print(f"{verdict:4} {part}: {name}: {_short(figures)}", flush=True)
            self.out.write_text(json.dumps(self._figures, indent=1) + "\n")

    @contextlib.contextmanager
    def _process(self, what: str, part: str, *rest: str, limit: float, cache: Path | None = None) -> Iterator[_Lines]:
        """A process of this program, and a verdict if it does not end well."""
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent), "--device", self.device, what, part, *rest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ if cache is None else {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        )
        lines = _Lines(process)
        out_of_time = threading.Event()
        killer = threading.Timer(
            min(limit, max(0.0, self.deadline - time.monotonic())), lambda: (out_of_time.set(), process.kill())
        )
        killer.start()
        try:
            yield lines
        finally:
            code = process.wait()
            killer.cancel()
            if out_of_time.is_set():
                self._note(part, " ".join([*rest, "had no more time"]), "late", {})
            elif code != 0:
                said = {"code": code, "said": lines.errors()[-1500:]}
                self._note(part, " ".join([*rest, "ended early"]), "BAD", said)


class _Lines:
    """What a process prints, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout, self._errors = process.stdin, process.stdout, []
        self._reader = threading.Thread(target=lambda: self._errors.extend(process.stderr or ()), daemon=True)
        self._reader.start()
        self.readline = self._stdout.readline

    def __iter__(self) -> Iterator[str]:
        return iter(self._stdout.readline, "")

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write("go\n")
            self._stdin.flush()

    def errors(self) -> str:
        self._reader.join()
        return "".join(self._errors)


def _short(figures: Figures) -> str:
    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {cell(value)}" for name, value in figures.items() if name != "profile")


def together(jobs: list[Callable[[], None]], at_a_time: int) -> None:
    """Does all jobs, so many at a time."""
    with ThreadPoolExecutor(at_a_time) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def batched(sizes: list[tuple[str, str]], at_a_time: int) -> Iterator[list[tuple[str, str]]]:
    """All of them, so many at a time."""
    for start in range(0, len(sizes), at_a_time):
        yield sizes[start : start + at_a_time]


def main() -> None:
    every = [*CHECKS, *VARIANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(every)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("output/gpu.json"), help="gets the figures")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for all of it")
    parser.add_argument("--variants", nargs="+", help="of flux and video: some only")
    parser.add_argument(
        "--at-a-time", type=int, help="models of real size in memory (28 GB each); as many as fit, or 5"
    )
    parser.add_argument("--check", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(every):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    known = {name for variants in VARIANTS.values() for name in variants}
    variants = known if arguments.variants is None else set(arguments.variants)
    if unknown := variants - known:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    if missing := {name.removesuffix(AGAIN) for name in variants} - variants:
        parser.error(f"a second start needs the first one: {', '.join(sorted(missing))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu runs everything but the figures")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.check:
        part, *rest = arguments.check
        for check in CHECKS[part](arguments.device, *rest):
            print("CHECK " + json.dumps(check), flush=True)
        return
    if arguments.measure:
        measure(arguments.device, *arguments.measure)
        return

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.device, arguments.out, arguments.limit)
    parts = arguments.parts or every
    checks = [partial(run.check, job) for part in CHECKS if part in parts for job in jobs_of(part)]
    together(checks, os.cpu_count() or 1)
    sizes = [(part, name) for part in VARIANTS if part in parts for name in VARIANTS[part] if name in variants]
    at_a_time = arguments.at_a_time or _fitting(arguments.device)
    for again in (False, True):
        for some in batched([size for size in sizes if size[1].endswith(AGAIN) is again], at_a_time):
            all_compiled = threading.Barrier(len(some))
            together([partial(run.measure, *size, all_compiled) for size in some], len(some))
    print(f"{run.bad} bad, {run.late} out of time; all figures are in {arguments.out}")
    sys.exit(1 if run.bad else 2 if run.late else 0)


def _fitting(device: str) -> int:
    """How many models of real size the device holds."""
    if device == "cpu":
        return os.cpu_count() or 1
    return max(1, min(5, torch.cuda.get_device_properties(0).total_memory // 28_000_000_000))


if __name__ == "__main__":
    main()
