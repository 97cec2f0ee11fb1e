"""One row for each setting, over all prompts and seeds: as text, as CSV, and which of them to take."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paracompile.tune.metrics import PSNR_LIMIT, Quality
from paracompile.tune.results import Figures
from paracompile.tune.settings import KNOBS, NO_CACHE, Setting, knob_text

__all__ = ["Limits", "Row", "advice", "csv_file", "recommended", "rows_of", "text"]


@dataclass(frozen=True)
class Row:
    """A setting's figures.

    attributes:
        setting: the setting.
        computed: share of all blocks of all steps of all pictures.
        seconds: median wall time of a picture.
        time_ratio: median over the pictures of the wall time, divided by that without a cache.
        psnr, ssim: means over the pictures.
        psnr_worst, ssim_worst: of the picture that came off worst.
        score: mean of the judge's; None without a judge.
    """

    setting: Setting
    computed: float
    seconds: float
    time_ratio: float
    psnr: float
    psnr_worst: float
    ssim: float
    ssim_worst: float
    score: float | None = None

    @property
    def speed(self) -> float:
        """How many times as fast as without a cache."""
        return 1 / self.time_ratio


@dataclass(frozen=True)
class Limits:
    """What the user asks of the pictures, on average; None: nothing."""

    psnr: float | None = None
    score: float | None = None

    def __bool__(self) -> bool:
        return self.psnr is not None or self.score is not None

    def __str__(self) -> str:
        parts = []
        if self.psnr is not None:
            parts.append(f"a mean PSNR of at least {self.psnr:g} dB")
        if self.score is not None:
            parts.append(f"a mean score of at least {self.score:g}")
        return " and ".join(parts)

    def allow(self, row: Row) -> bool:
        """Whether a setting is good enough."""
        good = self.psnr is None or row.psnr >= self.psnr
        return good and (self.score is None or (row.score is not None and row.score >= self.score))


def rows_of(figures: Mapping[Setting, Sequence[Figures]], qualities: Mapping[Setting, Sequence[Quality]]) -> list[Row]:
    """The rows, in the order of the settings; pictures come in the same order for each."""
    return [_row(setting, figures[setting], figures[NO_CACHE], qualities[setting]) for setting in figures]


def _row(setting: Setting, figures: Sequence[Figures], without: Sequence[Figures], qualities: Sequence[Quality]) -> Row:
    steps = [each.steps * each.blocks for each in figures]
    computed = [each.computed for each in figures]
    scores = [each.score for each in qualities if each.score is not None]
    return Row(
        setting=setting,
        computed=statistics.fmean(computed, steps) if sum(steps) else 1.0,
        seconds=statistics.median(each.seconds for each in figures),
        time_ratio=statistics.median(each.seconds / base.seconds for each, base in zip(figures, without, strict=True)),
        psnr=statistics.fmean(each.psnr for each in qualities),
        psnr_worst=min(each.psnr for each in qualities),
        ssim=statistics.fmean(each.ssim for each in qualities),
        ssim_worst=min(each.ssim for each in qualities),
        score=statistics.fmean(scores) if scores else None,
    )


def recommended(rows: Sequence[Row], limits: Limits) -> Row | None:
    """The fastest setting that is good enough, skips anything, and is faster than no cache; None: there is none."""
    allowed = [row for row in rows if row.computed < 1 and row.time_ratio < 1 and limits.allow(row)]
    return min(allowed, key=lambda row: row.time_ratio, default=None)


def advice(rows: Sequence[Row], limits: Limits) -> str:
    """The recommendation in words, with the options to write."""
    chosen = recommended(rows, limits)
    if chosen is not None:
        options = dict(chosen.setting.knobs)
        return (
            f"Recommended: {chosen.setting.name}, {chosen.speed:.2f} times as fast as without a cache\n"
            f"  the fastest with {limits}\n"
            f"  options={options}"
        )
    good = [row for row in rows if row.setting.rdt is not None and limits.allow(row)]
    if good:
        return f"No recommendation: no setting with {limits} skips anything and is faster than no cache."
    without = next(row for row in rows if row.setting == NO_CACHE)
    if not limits.allow(without):
        return (
            f"No recommendation: not even the pictures without a cache have {limits}, but {_quality(without)}: "
            "no threshold can be expected to do better; lower the limit."
        )
    best = max((row for row in rows if row.setting.rdt is not None), key=lambda row: row.psnr)
    return (
        f"No recommendation: no setting reaches {limits}. The closest to the plain pictures is {best.setting.name} "
        f"with {_quality(best)}: try smaller thresholds."
    )


def _quality(row: Row) -> str:
    return f"{row.psnr:.2f} dB" + ("" if row.score is None else f" and score {row.score:.3f}")


def text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    heads = ["setting", "blocks computed", "seconds", "time ratio", "PSNR", "worst", "SSIM", "worst"]
    lines = [heads + ["score"] * (rows[0].score is not None)]
    for row in rows:
        cells = [row.setting.name, f"{row.computed:.1%}", f"{row.seconds:.3f}", f"{row.time_ratio:.3f}"]
        cells += [_decibels(row.psnr), _decibels(row.psnr_worst), f"{row.ssim:.4f}", f"{row.ssim_worst:.4f}"]
        lines.append(cells + ([] if row.score is None else [f"{row.score:.3f}"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _decibels(psnr: float) -> str:
    return "equal" if psnr >= PSNR_LIMIT else f"{psnr:.2f}"


def csv_file(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows with all their digits, each knob in a column of its own (empty: the default)."""
    heads = ["blocks_computed", "seconds", "time_ratio", "psnr_mean", "psnr_worst", "ssim_mean", "ssim_worst"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", *KNOBS, *heads, "score_mean"])
        for row in rows:
            knobs = dict(row.setting.knobs)
            numbers = [row.computed, row.seconds, row.time_ratio, row.psnr, row.psnr_worst, row.ssim, row.ssim_worst]
            writer.writerow(
                [
                    row.setting.name,
                    *(knob_text(knobs[name]) if name in knobs else None for name in KNOBS),
                    *numbers,
                    row.score,
                ]
            )
