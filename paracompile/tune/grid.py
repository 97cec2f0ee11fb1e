"""The pictures in a grid: a row for each prompt, a column for each setting under its figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from paracompile.tune.metrics import PSNR_LIMIT, Quality
from paracompile.tune.settings import PLAIN, Setting
from paracompile.tune.table import Row

__all__ = ["Cell", "grid"]

_MARGIN = 10
_SIDE = 256
"""Of a picture's longer side in the grid, about."""


@dataclass(frozen=True)
class Cell:
    """A picture, and how close it is to the plain one."""

    picture: Image.Image
    quality: Quality


def grid(rows: Sequence[Row], cells: Mapping[Setting, Sequence[Cell]], prompts: Sequence[str]) -> Image.Image:
    """Draws the sheet.

    args:
        rows: the figures of each setting, over all pictures; their order is that of the columns.
        cells: the pictures of each setting, one for each prompt.
        prompts: what stands above the pictures of a row.
    """
    lines = max(len(_names(row.setting)) for row in rows)
    heads = [_head(row, lines) for row in rows]
    line, bold, plain = 19, _font(14, bold=True), _font(13)
    width, height = _shown(cells[rows[0].setting][0].picture.size)
    column = max([width, *(_length(plain, text) for head in heads for text in head), 150]) + _MARGIN
    total = len(rows) * column + _MARGIN
    above = [textwrap.wrap(prompt, max(20, int(total / 7.5)))[:3] for prompt in prompts]
    top = _MARGIN + line * max(map(len, heads)) + _MARGIN
    bands = [line * len(texts) + height + line + _MARGIN for texts in above]
    sheet = Image.new("RGB", (total, top + sum(bands)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, head in enumerate(heads):
        for number, text in enumerate(head):
            left = _MARGIN + place * column
            draw.text((left, _MARGIN + number * line), text, fill="black", font=plain if number else bold)
    for number, texts in enumerate(above):
        for text in texts:
            draw.text((_MARGIN, top), text, fill="black", font=bold)
            top += line
        for place, row in enumerate(rows):
            cell, left = cells[row.setting][number], _MARGIN + place * column
            sheet.paste(_resized(cell.picture, (width, height)), (left, top))
            if row.setting != PLAIN:
                draw.text((left, top + height + 2), _caption(cell.quality), fill="dimgray", font=plain)
        top += height + line + _MARGIN
    return sheet


def _names(setting: Setting) -> list[str]:
    """The setting's name, one knob a line."""
    return setting.name.split(", ")


def _head(row: Row, lines: int) -> list[str]:
    """What stands above a column: the setting in so many lines, and its figures over all pictures."""
    names = _names(row.setting)
    head = [*names, *[""] * (lines - len(names)), f"{row.seconds:#.3g} s ({row.time_ratio:.0%} of no cache)"]
    head.append(f"{row.computed:.0%} of blocks")
    if row.score is not None:
        head.append(f"score {row.score:.3f}")
    return head


def _caption(quality: Quality) -> str:
    return "equal" if quality.psnr >= PSNR_LIMIT else f"{quality.psnr:.1f} dB, SSIM {quality.ssim:.3f}"


def _shown(size: tuple[int, int]) -> tuple[int, int]:
    """Small pictures grow by a whole factor, large ones shrink."""
    longer = max(size)
    if longer <= _SIDE:
        factor = max(1, _SIDE // longer)
        return size[0] * factor, size[1] * factor
    return max(1, round(size[0] * _SIDE / longer)), max(1, round(size[1] * _SIDE / longer))


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    kind = Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.LANCZOS
    return picture.resize(size, kind)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: it has far more letters than Pillow's own."""
    return ImageFont.truetype(
        Path(get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size
    )


def _length(font: ImageFont.FreeTypeFont, text: str) -> int:
    return round(font.getlength(text)) + 1
