"""The output folder: finished pictures with their figures, so that a second start goes on where the first stopped.

run.json                            what all pictures have in common; another run does not go into the same folder
magnitudes.json                     how large what blocks add is in each step, where that was asked for
pictures/<setting>/<picture>.png    a picture
pictures/<setting>/<picture>.json   its figures, written last: without them the picture does not count
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from paracompile.errors import ParacompileError
from paracompile.tune.settings import Setting

__all__ = ["Figures", "Job", "Results"]


@dataclass(frozen=True)
class Job:
    """One picture: how, what and from which noise."""

    setting: Setting
    prompt: str
    seed: int

    @property
    def picture(self) -> str:
        """A name that is the same whatever other prompts there are."""
        words = re.sub(r"[^a-z0-9]+", "_", self.prompt.lower()).strip("_")[:40].strip("_")
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        return "-".join(filter(None, [words, digest, str(self.seed)]))


@dataclass(frozen=True)
class Figures:
    """What was measured while a picture was made.

    attributes:
        seconds: wall time of the whole call of the pipeline.
        steps: calls of the transformer that the cache saw; 0 without a cache.
        hits: how many of them skipped blocks.
        blocks: blocks in the transformer.
        blocks_skipped: how many of them a hit skips.
    """

    seconds: float
    steps: int = 0
    hits: int = 0
    blocks: int = 0
    blocks_skipped: int = 0

    @property
    def computed(self) -> float:
        """The share of all blocks of all steps that was computed."""
        return 1 - self.hits * self.blocks_skipped / (self.steps * self.blocks) if self.hits else 1.0


class Results:
    """The pictures that are done.

    args:
        folder: made when needed.
        facts: what all pictures in it have in common, as JSON can hold it.

    raises:
        ParacompileError: the folder holds pictures of another run, or cannot be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ParacompileError(f"cannot make the output folder {folder}: {error.strerror}") from error
        known = _read(folder / "run.json")
        if known is None:
            _write(folder / "run.json", lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))
        elif different := [name for name in {**known, **facts} if known.get(name) != facts.get(name)]:
            changes = "; ".join(f"{name}: {known.get(name)!r}, now {facts.get(name)!r}" for name in different)
            raise ParacompileError(
                f"{folder} holds pictures of another run ({changes}): give another --output, or remove that folder"
            )

    def done(self, job: Job) -> Figures | None:
        """The figures of a finished picture; None where it is still to be made."""
        known = _read(self._path(job, ".json"))
        return Figures(**known["figures"]) if known is not None and self._path(job, ".png").exists() else None

    def magnitudes(self, measure: Callable[[], list[float]]) -> list[float]:
        """The ratios of magnitudes; measured once."""
        path = self.folder / "magnitudes.json"
        if not path.exists():
            found = measure()
            _write(path, lambda half: half.write_text(json.dumps(found) + "\n"))
        ratios: list[float] = json.loads(path.read_text())
        return ratios

    def picture(self, job: Job) -> Image.Image:
        """A finished picture."""
        with Image.open(self._path(job, ".png")) as image:
            return image.convert("RGB")

    def save(self, job: Job, picture: Image.Image, figures: Figures) -> None:
        """Keeps a picture and its figures: both are there whole, or the picture is not done."""
        self._path(job, "").parent.mkdir(parents=True, exist_ok=True)
        _write(self._path(job, ".png"), lambda path: picture.save(path, format="PNG"))
        about = {"setting": job.setting.name, "prompt": job.prompt, "seed": job.seed, "figures": asdict(figures)}
        _write(self._path(job, ".json"), lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))

    def _path(self, job: Job, suffix: str) -> Path:
        return self.folder / "pictures" / job.setting.folder / (job.picture + suffix)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the file first: under its own name it is there whole, or not at all."""
    half = path.with_name(path.name + ".part")
    write(half)
    os.replace(half, path)
