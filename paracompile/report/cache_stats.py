"""What the first block cache did in one generation: a small table, a dict, or lines of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from paracompile.passes.cache_decision import Record
from paracompile.runtime.history import History


@dataclass(frozen=True)
class Step:
    """One call.

    attributes:
        hit: blocks were skipped.
        difference: of what is watched, relative to that of the step it is compared with: the last computed one, or with
            `coefficients` the last one; None where there is nothing to compare with.
    """

    hit: bool
    difference: float | None


@dataclass(frozen=True)
class CacheStats:
    """The calls of the present generation, or of the last one, by slot.

    attributes:
        slots: the steps of each slot, in order.
        plain: how many graphs of the model have nothing to skip, so that their calls are in no slot.
    """

    slots: Mapping[str, tuple[Step, ...]]
    plain: int = 0

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
        said = f"graphs of the model without blocks to skip, whose calls are not counted: {self.plain}"
        if not self.slots:
            return f"first block cache: {said if self.plain else 'no call yet'}"
        rows = [("slot", "steps", "hits", "difference of each step (* hit)")]
        for name, steps in self.slots.items():
            marks = [("-" if step.difference is None else f"{step.difference:.3f}") + "*" * step.hit for step in steps]
            rows.append((name, str(len(steps)), str(sum(step.hit for step in steps)), " ".join(marks)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows]
        return "\n".join([*lines, said] if self.plain else lines)


def stats_of(histories: Iterable[History], *, plain: int = 0) -> CacheStats:
    """Reads records; waits for the device."""
    found = [each for history in histories for each in _present(history)]
    names = names_of([title for title, _ in found])
    return CacheStats(dict(zip(names, (steps for _, steps in found), strict=True)), plain)


def names_of(titles: Iterable[str]) -> list[str]:
    """Names for slots: where several graphs have one of the same title, "cond", "cond, graph 2", "cond, graph 3"."""
    names: list[str] = []
    for title in titles:
        others = (f"{title}, graph {number}" for number in count(2))
        names.append(title if title not in names else next(name for name in others if name not in names))
    return names


def _present(history: History) -> list[tuple[str, tuple[Step, ...]]]:
    """The slots of the last generation of a history, and its steps."""
    read = [(line, [record.tolist() for record in line.records]) for line in history.lines.values()]
    if history.whole:
        return [(line.title, _steps(records)) for line, records in read]
    starts = [_beginning(records) for _, records in read]
    # Sizes change from one generation to the next, and graphs with them: those not called since it began are left out.
    graph = max(read, key=lambda each: each[0].calls[-1])[0].graph if read else None
    began = min(
        (line.calls[start] for (line, _), start in zip(read, starts, strict=True) if line.graph == graph), default=0
    )
    return [
        (line.title, _steps(records[start:]))
        for (line, records), start in zip(read, starts, strict=True)
        if line.calls[-1] >= began
    ]


def _beginning(records: Sequence[Sequence[float]]) -> int:
    """Where the last generation among these records begins."""
    return max((index for index, record in enumerate(records) if record[Record.STEPS] == 1), default=0)


def _steps(records: Iterable[Sequence[float]]) -> tuple[Step, ...]:
    return tuple(
        Step(bool(record[Record.HIT]), record[Record.RATIO] if math.isfinite(record[Record.RATIO]) else None)
        for record in records
    )
