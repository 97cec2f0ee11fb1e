"""Writes graphs to a folder, readable, one file a pass."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx


@dataclass
class Dump:
    """Numbers the graphs of one compile into `folder / graph_<compile> / rank_<rank>`; nothing without a folder."""

    folder: str | os.PathLike[str] | None
    compile_name: str
    rank: int
    _written: int = field(default=0, init=False)

    def __call__(self, name: str, gm: fx.GraphModule) -> None:
        """Writes `gm` as the graph after `name`."""
        if self.folder is None:
            return
        folder = Path(self.folder) / self.compile_name / f"rank_{self.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        code = gm.print_readable(print_output=False, include_stride=True, include_device=True)
        (folder / f"{self._written:02d}_{name}.py").write_text(code)
        self._written += 1
