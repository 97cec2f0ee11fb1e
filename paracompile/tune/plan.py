"""What one run of the command is to do, checked as far as that is possible before anything is loaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paracompile.errors import ParacompileError
from paracompile.options import Compiler
from paracompile.tune.settings import Setting

__all__ = ["Plan", "check_extras", "check_single_process", "device_or_default", "dtype_or_default", "read_prompts"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NEEDED = ("diffusers", "matplotlib", "PIL", "skimage", "tqdm")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run, and what is made of it.

    attributes:
        pipe: the pipeline's folder.
        prompts, seeds: each prompt is run with each seed.
        settings: with a cache, in the order in which they are run.
        magnitudes: of MagCache's rule, limit, most and, where there is a third, retained; one more setting each.
        call: arguments of the pipeline's call besides the prompt and the noise.
        compiler: the option of that name.
        device, dtype: where the pipeline runs, and in which type.
        output: the folder of all results.
        judge: a Python file with a function `score`.
        min_psnr, min_score: what the recommended setting must reach; None: anything will do.
        grid_rows: prompts in the grid at most.
    """

    pipe: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Sequence[Setting]
    magnitudes: Sequence[tuple[float, ...]]
    call: Mapping[str, Any]
    compiler: Compiler
    device: str
    dtype: torch.dtype
    output: Path
    judge: Path | None
    min_psnr: float | None
    min_score: float | None
    grid_rows: int

    def __post_init__(self) -> None:
        if not self.settings and not self.magnitudes:
            raise ParacompileError("nothing to run: give thresholds (--rdt 0.04,0.08), --magnitude or --setting")
        if self.min_score is not None and self.judge is None:
            raise ParacompileError("--min-score needs a judge: give --judge FILE as well")


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty, each once.

    raises:
        ParacompileError: there is no such text file, or no prompt in it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ParacompileError(f"--prompts {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParacompileError(f"--prompts {file}: cannot be read as UTF-8 text ({error})") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ParacompileError(f"--prompts {file}: there is no prompt in it; write one a line")
    return prompts


def device_or_default(device: str | None) -> str:
    """The device, by default a GPU where there is one.

    raises:
        ParacompileError: a GPU is wanted, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ParacompileError("--device cuda: torch finds no CUDA device here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_or_default(dtype: str | None, device: str) -> torch.dtype:
    """The type of all weights, by default what the device is good at."""
    return DTYPES[dtype or ("bfloat16" if device == "cuda" else "float32")]


def check_single_process() -> None:
    """Several processes would all write into one folder.

    raises:
        ParacompileError: torchrun started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ParacompileError("tune runs in a single process: start it without torchrun")


def check_extras() -> None:
    """Whether the libraries of the extra `tune` are there.

    raises:
        ParacompileError: one is missing.
    """
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ParacompileError(f"{error.name} is missing: pip install 'paracompile[tune]'") from error
