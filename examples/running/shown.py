"""Pictures, videos and tables."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Frames", "Rows", "save", "side_by_side", "table"]

Frames = np.ndarray[Any, np.dtype[np.float32]]
"""Pictures of the same size, (frames, height, width, 3), in [0, 1]."""
Rows = list[tuple[str, str]]

SHOWN = 240  # pixels that a picture is shown at, at least


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of text: names to the left, values to the right."""
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    rule = "-" * (names + 2 + values)
    return "\n".join([rule, *(f"{name:<{names}}  {value:>{values}}" for name, value in rows), rule])


def side_by_side(videos: Mapping[str, Frames]) -> Frames:
    """Joins pictures or videos in a row, each under its caption."""
    lengths = {len(frames) for frames in videos.values()}
    assert len(lengths) == 1
    sheets = [_sheet({text: frames[number] for text, frames in videos.items()}) for number in range(*lengths)]
    return np.stack(sheets)


def _sheet(pictures: Mapping[str, Any]) -> Frames:
    margin, caption = 8, 24
    images = {text: _enlarged(_image(pixels)) for text, pixels in pictures.items()}
    width = sum(image.width + margin for image in images.values()) + margin
    height = max(image.height for image in images.values()) + margin + caption
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for text, image in images.items():
        draw.text((left, 6), text, fill="black", font=ImageFont.load_default(12))
        sheet.paste(image, (left, caption))
        left += image.width + margin
    return np.asarray(sheet, dtype=np.float32) / 255


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture, each pixel as a square of several."""
    times = max(1, SHOWN // image.width)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def save(frames: Frames, path: Path, fps: int | None) -> str:
    """Saves a picture, or a video of so many frames a second; what to tell of it.

    Where nothing is installed that writes an mp4, it is a GIF beside where the mp4 would be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fps is None:
        _image(frames[0]).save(path)
        return f"picture: {path}"
    told = f"{len(frames)} frames"
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        path = path.with_suffix(".gif")
        told += ", as there is no imageio-ffmpeg to write an mp4 (pip install 'paracompile[video]')"
    if path.suffix == ".mp4":
        from diffusers.utils import export_to_video

        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # as the codec takes them
        export_to_video(list(even), str(path), fps=fps, macro_block_size=2)
    else:
        first, *others = map(_image, frames)
        first.save(path, save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return f"video: {path} ({told})"
