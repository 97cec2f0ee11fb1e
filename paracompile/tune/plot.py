"""Quality against speed: one panel for each measure, one line for each choice of the other knobs, points named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from paracompile.tune.metrics import PSNR_LIMIT
from paracompile.tune.settings import NO_CACHE
from paracompile.tune.table import Limits, Row

__all__ = ["plot"]

# Where a name may stand, in points from its own, and how it is aligned there; the first that is free is taken
_PLACES = [(6, 6), (6, -6), (-6, -6), (-6, 6), (0, 11), (0, -11), (16, 14), (16, -14), (-16, -14), (-16, 14)]


def plot(rows: Sequence[Row], limits: Limits, chosen: Row | None, title: str, path: Path) -> None:
    """Draws the settings with a cache; the limits are lines, the recommended setting has a ring."""
    panels: list[tuple[str, Callable[[Row], float | None], Callable[[Row], float | None], float | None]] = [
        ("PSNR against the plain pictures, dB", lambda row: row.psnr, lambda row: row.psnr_worst, limits.psnr),
        ("SSIM against the plain pictures", lambda row: row.ssim, lambda row: row.ssim_worst, None),
    ]
    if rows[0].score is not None:
        panels.append(("judge's score", lambda row: row.score, lambda row: None, limits.score))
    figure = Figure(figsize=(5.6 * len(panels), 5), layout="constrained")
    drawn: list[tuple[Axes, list[Annotation]]] = []
    for place, (label, mean, worst, limit) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        drawn.append((axes, _panel(axes, rows, mean, worst)))
        if limit is not None:
            axes.axhline(limit, color="black", linestyle=":", linewidth=1, label="limit")
        if chosen is not None and (value := mean(chosen)) is not None:
            ring = dict(marker="o", markersize=14, markerfacecolor="none", markeredgecolor="black", linestyle="none")
            axes.plot([chosen.speed], [value], label="recommended", **ring)  # type: ignore[arg-type]
        axes.set_xlabel("speed, compiled without a cache = 1")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    entries: dict[str, Artist] = {}
    for axes, _ in drawn:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.draw_without_rendering()  # lays out, which says where the points are
    for axes, names in drawn:
        _spread(axes, names)
    figure.savefig(path, dpi=130)


def _panel(
    axes: Axes,
    rows: Sequence[Row],
    mean: Callable[[Row], float | None],
    worst: Callable[[Row], float | None],
) -> list[Annotation]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.setting.rdt is not None:
            others = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in row.setting.others)
            lines.setdefault(others or "rdt alone", []).append(row)
    annotations = []
    for number, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda row: row.setting.rdt or 0)
        speeds, values = [row.speed for row in line], [mean(row) for row in line]
        colour = f"C{number}"
        axes.plot(speeds, values, marker="o", color=colour, label=f"{label} (mean)")  # type: ignore[arg-type]
        lows = [worst(row) for row in line]
        if None not in lows:
            axes.plot(speeds, lows, marker="v", linestyle="none", alpha=0.5, color=colour, label="the worst picture")  # type: ignore[arg-type]
        for row, value in zip(line, values, strict=True):
            if value is not None:
                name = f"rdt {row.setting.rdt:g}"
                annotations.append(
                    axes.annotate(name, (row.speed, value), xytext=(6, 6), textcoords="offset points", fontsize=9)
                )
    (without,) = (row for row in rows if row.setting == NO_CACHE)
    value = mean(without)
    if value is not None and value < PSNR_LIMIT:
        axes.plot([1], [value], marker="*", markersize=11, color="black", linestyle="none", label="no cache")
    return annotations


def _spread(axes: Axes, annotations: Sequence[Annotation]) -> None:
    """Moves each name to where it covers neither a point nor another name, as far as there is such a place."""
    taken = [
        Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)
        for line in axes.get_lines()
        if line.get_marker() not in (None, "None", "")
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    for annotation in annotations:
        covered = []
        for place in _PLACES:
            _put(annotation, place)
            box = annotation.get_window_extent()
            covered.append(sum(box.overlaps(other) for other in taken))
        _put(annotation, _PLACES[covered.index(min(covered))])
        taken.append(annotation.get_window_extent())


def _put(annotation: Annotation, place: tuple[int, int]) -> None:
    annotation.set_position(place)
    x, y = place
    annotation.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    annotation.set_verticalalignment("bottom" if y > 0 else "top")
