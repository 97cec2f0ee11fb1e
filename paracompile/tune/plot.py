"""Quality against speed: a panel for each measure, a line for each choice of the other knobs, its points named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from paracompile.tune.metrics import PSNR_LIMIT
from paracompile.tune.settings import FLAGS, NO_CACHE, knob_text
from paracompile.tune.table import Limits, Row

__all__ = ["plot"]

# Where a name may stand, in points from its own; the first place that is free is taken
_NEAR = [(6, 6), (6, -6), (-6, -6), (-6, 6), (0, 11), (0, -11)]
_PLACES = [*_NEAR, *((x, y) for y in (17, -17, 29, -29, 41, -41) for x in (6, -6))]


@dataclass(frozen=True)
class _Measure:
    """What a panel shows.

    attributes:
        shown: the mean over the pictures of a setting.
        worst: that of the worst picture, where it is shown as well.
        limit: what the user asks.
        top: values above it are drawn there.
        span: the least that the axis shows, so that nothing small looks large.
    """

    label: str
    shown: Callable[[Row], float]
    worst: Callable[[Row], float] | None = None
    limit: float | None = None
    top: float = float("inf")
    span: float = 0.0


def plot(rows: Sequence[Row], limits: Limits, chosen: Row | None, title: str, path: Path) -> None:
    """Draws the settings with a cache; the limits are lines, the recommended setting has a ring."""
    measures = _measures(rows, limits)
    figure = Figure(figsize=(5.6 * len(measures), 5), layout="constrained")
    panels: list[tuple[Axes, list[Annotation]]] = []
    for place, measure in enumerate(measures, 1):
        axes = figure.add_subplot(1, len(measures), place)
        panels.append((axes, _panel(axes, measure, rows, chosen)))
    entries: dict[str, Artist] = {}
    for axes, _ in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.draw_without_rendering()  # lays out, which says where the points are
    for axes, names in panels:
        _spread(axes, names)
    figure.savefig(path, dpi=130)


def _measures(rows: Sequence[Row], limits: Limits) -> list[_Measure]:
    cached = [psnr for row in rows if row.setting.rdt is not None for psnr in (row.psnr, row.psnr_worst)]
    finite = [psnr for psnr in cached if psnr < PSNR_LIMIT]
    top = max(finite) + max(1.0, 0.1 * (max(finite) - min(finite))) if finite else PSNR_LIMIT
    measures = [
        _Measure(
            "PSNR against plain, dB", lambda row: row.psnr, lambda row: row.psnr_worst, limits.psnr, top, span=2.0
        ),
        _Measure("SSIM against plain", lambda row: row.ssim, lambda row: row.ssim_worst, span=0.01),
    ]
    if rows[0].score is not None:
        measures.append(_Measure("judge's score", lambda row: row.score or 0.0, limit=limits.score, span=0.1))
    return measures


def _panel(axes: Axes, measure: _Measure, rows: Sequence[Row], chosen: Row | None) -> list[Annotation]:
    """Draws one panel; returns the names of its points."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.setting.rdt is not None:
            others = ", ".join(f"{FLAGS[name]} {knob_text(value)}" for name, value in row.setting.others)
            lines.setdefault(others or "rdt alone", []).append(row)
    names = []
    for number, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda row: row.setting.rdt or 0)
        colour = f"C{number}"
        points = [(row.speed, min(measure.shown(row), measure.top)) for row in line]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"{label} (mean)")
        if measure.worst is not None:
            lows = [(row.speed, min(measure.worst(row), measure.top)) for row in line]
            style = dict(marker="v", linestyle="none", alpha=0.5, color=colour, label="worst picture")
            axes.plot(*zip(*lows, strict=True), **style)  # type: ignore[arg-type]
        for row, point in zip(line, points, strict=True):
            names.append(_name(axes, f"rdt {row.setting.rdt}{_beyond(measure, row)}", point, colour))
    (without,) = (row for row in rows if row.setting == NO_CACHE)
    star = _mark(axes, measure, without, marker="*", markersize=11, zorder=3)
    names.append(_name(axes, f"no cache{_beyond(measure, without)}", star, "black"))
    if chosen is not None:
        _mark(axes, measure, chosen, marker="o", markersize=14, markerfacecolor="none", label="recommended")
    axes.margins(0.12)
    if measure.limit is not None:
        axes.axhline(measure.limit, color="black", linestyle=":", linewidth=1, label="limit")
    low, high = axes.get_ylim()
    missing = max(0.0, measure.span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.set_xlabel("speed (1: compiled, no cache)")
    axes.set_ylabel(measure.label)
    axes.grid(alpha=0.3)
    return names


def _beyond(measure: _Measure, row: Row) -> str:
    """What a name says of a value that is above the panel."""
    value = measure.shown(row)
    if value <= measure.top:
        return ""
    return " (equal)" if value >= PSNR_LIMIT else f" ({value:.1f})"


def _mark(axes: Axes, measure: _Measure, row: Row, **style: Any) -> tuple[float, float]:
    point = row.speed, min(measure.shown(row), measure.top)
    axes.plot(*([number] for number in point), linestyle="none", color="black", **style)
    return point


def _name(axes: Axes, text: str, point: tuple[float, float], colour: str) -> Annotation:
    halo = [withStroke(linewidth=2.5, foreground="white")]
    return axes.annotate(
        text, point, xytext=_PLACES[0], textcoords="offset points", fontsize=9, color=colour, path_effects=halo
    )


def _spread(axes: Axes, names: Sequence[Annotation]) -> None:
    """Moves each name to where it covers neither a point nor another name, as far as there is such a place."""
    frame = axes.get_window_extent()
    taken = [
        Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)
        for line in axes.get_lines()
        if line.get_marker() not in (None, "None", "")
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    for name in names:
        covered = []
        for place in _PLACES:
            _put(name, place)
            box = name.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            covered.append(sum(box.overlaps(other) for other in taken) + 10 * outside)
        _put(name, _PLACES[covered.index(min(covered))])
        taken.append(name.get_window_extent())


def _put(name: Annotation, place: tuple[int, int]) -> None:
    name.set_position(place)
    x, y = place
    name.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    name.set_verticalalignment("bottom" if y > 0 else "top")
