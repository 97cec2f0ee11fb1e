"""What the first block cache did in one generation: a small table, a dict, or lines of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paracompile.passes.cache_decision import Record


@dataclass(frozen=True)
class Step:
    """One call.

    attributes:
        hit: blocks were skipped.
        difference: of the first block's residual, relative to that of the last computed step; None where there is
            nothing to compare with.
    """

    hit: bool
    difference: float | None


@dataclass(frozen=True)
class CacheStats:
    """The calls of the present generation, or of the last one, by slot.

    attributes:
        slots: the steps of each slot, in order.
    """

    slots: Mapping[str, tuple[Step, ...]]

    @property
    def steps(self) -> int:
        return sum(map(len, self.slots.values()))

    @property
    def hits(self) -> int:
        return sum(step.hit for steps in self.slots.values() for step in steps)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """By slot: `steps`, `hits`, and of each step `differences` and `hit`."""
        return {
            name: {
                "steps": len(steps),
                "hits": sum(step.hit for step in steps),
                "differences": [step.difference for step in steps],
                "hit": [step.hit for step in steps],
            }
            for name, steps in self.slots.items()
        }

    def append_to(self, path: str | os.PathLike[str]) -> None:
        """Appends one line of JSON a step: slot, step, hit, difference."""
        with open(path, "a", encoding="utf-8") as file:
            for name, steps in self.slots.items():
                for number, step in enumerate(steps):
                    line = {"slot": name, "step": number, "hit": step.hit, "difference": step.difference}
                    file.write(json.dumps(line) + "\n")

    def __str__(self) -> str:
        if not self.slots:
            return "first block cache: no call yet"
        rows = [("slot", "steps", "hits", "difference of each step (* hit)")]
        for name, steps in self.slots.items():
            marks = [("-" if step.difference is None else f"{step.difference:.3f}") + "*" * step.hit for step in steps]
            rows.append((name, str(len(steps)), str(sum(step.hit for step in steps)), " ".join(marks)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows
        )


def stats_of(histories: Iterable[Mapping[str, list[Tensor]]]) -> CacheStats:
    """Reads records; waits for the device."""
    slots: dict[str, tuple[Step, ...]] = {}
    for number, history in enumerate(histories):
        for name, records in history.items():
            slots[name if name not in slots else f"{name} ({number})"] = _steps(records)
    return CacheStats(slots)


def _steps(records: list[Tensor]) -> tuple[Step, ...]:
    """The steps since the last that began a generation."""
    numbers = [record.tolist() for record in records]
    first = max((index for index, record in enumerate(numbers) if record[Record.STEPS] == 1), default=0)
    return tuple(
        Step(bool(record[Record.HIT]), record[Record.RATIO] if math.isfinite(record[Record.RATIO]) else None)
        for record in numbers[first:]
    )
