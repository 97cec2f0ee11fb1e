"""What the slots of one generation recorded, call by call; the numbers stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["History", "Line"]

_MOST_RECORDS = 4096  # of one slot; one that was not called in as many calls is let go


@dataclass
class Line:
    """The calls of one slot of one graph.

    attributes:
        graph: which graph it is, and at which sizes.
        title: of the slot.
        named: whether that is a name which its calls were given.
        inputs: what a call brings, as the records remember it.
        free: how many of these, the last, change in the course of a generation.
        records: of its calls, in order; the oldest may be gone.
        calls: for each its number among all calls.
    """

    graph: int
    title: str
    named: bool = True
    inputs: tuple[str, ...] = ()
    free: int = 0
    records: list[Tensor] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


@dataclass
class History:
    """The calls of one generation of one model, by slot.

    attributes:
        whole: it is one generation and no more; otherwise the records tell where the last one began.
        lines: by graph and title, in the order of their first calls.
        calls: how many there were.
    """

    whole: bool = False
    lines: dict[tuple[int, str], Line] = field(default_factory=dict)
    calls: int = 0

    def line(self, graph: int, title: str, *, named: bool, inputs: tuple[str, ...], free: int) -> Line:
        """That of a slot; made if it is new."""
        if (graph, title) not in self.lines:
            recent = self.calls - _MOST_RECORDS
            self.lines = {key: line for key, line in self.lines.items() if line.calls[-1] > recent}
            self.lines[graph, title] = Line(graph, title, named, inputs, free)
        return self.lines[graph, title]

    def add(self, line: Line, record: Tensor) -> None:
        """Notes a call."""
        self.calls += 1
        line.records.append(record)
        line.calls.append(self.calls)
        del line.records[:-_MOST_RECORDS], line.calls[:-_MOST_RECORDS]
