"""How close a picture is to the plain one: PSNR and SSIM of scikit-image, and a judge of the user's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from paracompile.errors import ParacompileError

__all__ = ["PSNR_LIMIT", "Judge", "Quality", "load_judge", "quality"]

PSNR_LIMIT = 100.0
"""What equal pictures count, in dB: their PSNR is infinite, and so would be every mean with one of them."""

Judge = Callable[[Image.Image, str], float]


@dataclass(frozen=True)
class Quality:
    """One picture against the plain one of the same prompt and seed.

    attributes:
        psnr: in dB, `PSNR_LIMIT` at most.
        ssim: 1 for equal pictures.
        score: the judge's, in [0, 1]; None without a judge.
    """

    psnr: float
    ssim: float
    score: float | None = None


def quality(picture: Image.Image, plain: Image.Image, prompt: str, judge: Judge | None = None) -> Quality:
    """Compares 8-bit pictures of one size.

    raises:
        ParacompileError: the judge fails, or its score is no number in [0, 1].
    """
    ours, theirs = np.asarray(picture), np.asarray(plain)
    equal = np.array_equal(ours, theirs)
    psnr = PSNR_LIMIT if equal else min(PSNR_LIMIT, peak_signal_noise_ratio(theirs, ours, data_range=255))
    # The window and the constants of the paper (Wang et al., 2004)
    ssim = structural_similarity(
        theirs, ours, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return Quality(float(psnr), float(ssim), None if judge is None else _score(judge, picture, prompt))


def load_judge(path: Path) -> Judge:
    """The function `score(image, prompt)` of a Python file, which may import what lies beside it.

    raises:
        ParacompileError: no such file, or no such function in it.
    """
    if not path.is_file():
        raise ParacompileError(f"--judge {path}: there is no such file")
    name = f"paracompile_judge_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ParacompileError(f"--judge {path}: give a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    judge = getattr(module, "score", None)
    if not callable(judge):
        raise ParacompileError(
            f"--judge {path}: it has no function score(image: PIL.Image.Image, prompt: str) -> float in [0, 1]"
        )
    return judge  # type: ignore[no-any-return]


def _score(judge: Judge, picture: Image.Image, prompt: str) -> float:
    try:
        score: object = judge(picture, prompt)
    except Exception as error:  # whatever a user's function may raise
        raise ParacompileError(f"the judge fails for {prompt!r}: {type(error).__name__}: {error}") from error
    if not isinstance(score, (bool, int, float, np.number)) or not 0 <= score <= 1:
        raise ParacompileError(f"the judge's score is {score!r} for {prompt!r}: it must be a number from 0 to 1")
    return float(score)
