"""Decides in the graph whether blocks are skipped, and keeps the record of it.

Every number is computed by the graph itself, so that the host waits for the decision alone: where in a generation a
call is follows from its times, which a generation goes through one way. The sums that decide are taken over all ranks
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from paracompile.cache_options import CacheOptions
from paracompile.layout.sizes import sizes_of
from paracompile.mesh import Ranks
from paracompile.passes.fingerprints import NUMBERS, Habits
from paracompile.passes.writer import GraphWriter, as_float
from paracompile.runtime.collectives import all_reduce

__all__ = ["Clock", "Control", "Decision", "Record", "sign_of", "sum_of_sizes"]

aten = torch.ops.aten


_LETTERS = {"1": 1.0, "0": -1.0, "?": 0.0}


class Control:
    """The places of the numbers in the control: the threshold, what the host knows, what to do in each step."""

    THRESHOLD, UNNAMED, KNOWN, PLAN = range(4)

    @staticmethod
    def plan(rules: CacheOptions) -> tuple[float, ...]:
        """1 to compute, -1 to skip, 0 to decide, for each step; the last is for all that follow."""
        return (*(_LETTERS[letter] for letter in rules.steps or ""), 0.0)

    @staticmethod
    def length(rules: CacheOptions) -> int:
        return Control.PLAN + len(Control.plan(rules))


class Record:
    """The places of the numbers in a record; times, their directions, and what is remembered of inputs follow."""

    RATIO, HIT, STREAK, COMPUTED, STEPS, REUSABLE, DRIFT, TIMES = range(8)

    @staticmethod
    def length(times: int, inputs: int) -> int:
        return Record.habits(times) + NUMBERS * inputs

    @staticmethod
    def habits(times: int) -> int:
        """Where what is remembered of the inputs begins."""
        return Record.TIMES + 2 * times


@dataclass(frozen=True)
class Clock:
    """Where in a generation a call is; numbers of shape ().

    attributes:
        reusable: it follows a step of the same trajectory, of which something is stored.
        streak: hits in a row before it.
        computed: steps computed before it, since something was last found not finite.
        steps: steps before it.
        distance: steps since the last one that was computed.
        drift: what the changes in the skipped steps before it add up to.
        remembered: what the record says behind its numbers.
    """

    reusable: fx.Node
    streak: fx.Node
    computed: fx.Node
    steps: fx.Node
    distance: fx.Node
    drift: fx.Node
    remembered: list[fx.Node]


class Decision:
    """Writes the decision of one graph.

    attributes:
        clock: where in a generation the call is.
    """

    def __init__(
        self,
        write: GraphWriter,
        rules: CacheOptions,
        ranks: Ranks,
        *,
        control: fx.Node,
        record: fx.Node,
        previous: fx.Node,
        times: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        free: int,
    ) -> None:
        """`times` are the inputs that hold them, `inputs` all that a call brings, the last `free` of which a step
        changes; the others are the inputs of these names."""
        self.write = write
        self.rules = rules
        self.ranks = ranks
        self.control = control
        self.record = record
        self.previous = previous
        self.times = self._flat(times)
        self.habits = self._habits(inputs, free)
        self.clock = self._clock()

    def hit(self, watched: fx.Node) -> fx.Node:
        """Whether to skip, where this value tells how much changed: one boolean, the same on all ranks."""
        write = self.write
        clock = self.clock
        change = sum_of_sizes(write, write(aten.sub.Tensor, as_float(write, watched), as_float(write, self.previous)))
        size = sum_of_sizes(write, as_float(write, self.previous))
        threshold = write(aten.select.int, self.control, 0, Control.THRESHOLD)
        allowed = write(aten.logical_and.default, clock.reusable, write(aten.gt.Scalar, threshold, 0))
        steps = write(aten.ge.Scalar, clock.steps, self.rules.warmup_steps)
        allowed = write(aten.logical_and.default, allowed, steps)
        if self.rules.max_consecutive_hits is not None:
            few = write(aten.lt.Scalar, clock.streak, self.rules.max_consecutive_hits)
            allowed = write(aten.logical_and.default, allowed, few)
        planned = self._planned()
        if planned is not None:
            allowed = write(aten.logical_and.default, allowed, write(aten.le.Scalar, planned, 0))
        facts = [change, size, threshold, as_float(write, write(aten.logical_not.default, allowed))]
        if planned is not None:
            facts.append(as_float(write, write(aten.lt.Scalar, planned, 0)))
        known = write(aten.stack.default, facts)
        if self.ranks.size > 1:
            known = all_reduce(write, known, "sum", self.ranks.group)
        change, size, threshold, refusals, *skipped = (
            write(aten.select.int, known, 0, place) for place in range(len(facts))
        )
        self.ratio = write(aten.div.Tensor, change, size)
        limit = write(aten.div.Scalar, threshold, self.ranks.size)
        if self.rules.coefficients is None:
            self.drift = clock.drift
            small = write(aten.lt.Tensor, change, write(aten.mul.Tensor, limit, size))  # false where it is no number
        else:
            self.drift = write(aten.add.Tensor, clock.drift, self._polynomial(self.rules.coefficients))
            small = write(aten.lt.Tensor, self.drift, limit)
        for skips in skipped:
            small = write(aten.logical_or.default, small, write(aten.eq.Scalar, skips, self.ranks.size))
        return write(aten.logical_and.default, small, write(aten.eq.Scalar, refusals, 0))

    def _planned(self) -> fx.Node | None:
        """What the plan says of this step; None without one."""
        if self.rules.steps is None:
            return None
        write = self.write
        plan = write(aten.slice.Tensor, self.control, 0, Control.PLAN, Control.length(self.rules))
        place = write(aten.clamp.default, self.clock.steps, 0, len(self.rules.steps))
        place = write(aten.reshape.default, write(aten._to_copy.default, place, dtype=torch.int64), [1])
        return write(aten.select.int, write(aten.index_select.default, plan, 0, place), 0, 0)

    def _polynomial(self, coefficients: Sequence[float]) -> fx.Node:
        """The polynomial of the relative change, by Horner's scheme."""
        write = self.write
        value = write(aten.full_like.default, self.ratio, coefficients[0])
        for coefficient in coefficients[1:]:
            value = write(aten.add.Scalar, write(aten.mul.Tensor, value, self.ratio), coefficient)
        return value

    def _clock(self) -> Clock:
        """Where in a generation this call is: told from its times, through which a generation goes one way."""
        write = self.write
        entry = {
            name: write(aten.select.int, self.record, 0, place)
            for name, place in (
                ("streak", Record.STREAK),
                ("computed", Record.COMPUTED),
                ("steps", Record.STEPS),
                ("drift", Record.DRIFT),
            )
        }
        unnamed, known = (
            write(aten.gt.Scalar, write(aten.select.int, self.control, 0, place), 0)
            for place in (Control.UNNAMED, Control.KNOWN)
        )
        named = write(aten.logical_not.default, unnamed)
        continues = write(aten.gt.Scalar, entry["steps"], 0)
        remembered = []
        if self.times is not None:
            onward, direction = self._onward(self.times, known)
            continues = write(aten.logical_and.default, continues, onward)
            remembered = [self.times, write(aten.mul.Tensor, direction, as_float(write, continues))]
        # Two images in turn look like one first step after the other. Whose step comes next nobody can say, so it
        # computes as well, and does so in every generation: none must depend on whether there was one before.
        told = write(
            aten.logical_or.default,
            write(aten.logical_or.default, named, known),
            write(aten.gt.Scalar, entry["steps"], 1),
        )
        stored = write(aten.logical_and.default, continues, told)
        reusable = stored
        if self.habits is not None:
            kept = write(aten.logical_or.default, named, self.habits.kept)
            stored = write(aten.logical_and.default, stored, kept)
            learns = write(aten.logical_and.default, continues, self.habits.kept)
            remembered.append(write(aten.where.self, learns, self.habits.numbers, self.habits.anew))
            confirmed = write(aten.logical_or.default, named, self.habits.confirmed)
            reusable = write(aten.logical_and.default, stored, confirmed)
        steps = write(aten.mul.Tensor, entry["steps"], as_float(write, continues))
        streak, computed, drift = (
            write(aten.mul.Tensor, entry[name], as_float(write, stored)) for name in ("streak", "computed", "drift")
        )
        return Clock(
            reusable=write(aten.logical_and.default, reusable, write(aten.gt.Scalar, computed, 0)),
            streak=streak,
            computed=computed,
            steps=steps,
            distance=write(aten.add.Scalar, streak, 1),
            drift=drift,
            remembered=remembered,
        )

    def _onward(self, times: fx.Node, known: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Whether the times go on the way that they went, and that way: -1, 0 for not known, or 1 for each.

        Only where the host knows that a step was made since the last call may all of them stand still.
        """
        write = self.write
        count = count_of(times)
        last = write(aten.slice.Tensor, self.record, 0, Record.TIMES, Record.TIMES + count)
        before = write(aten.slice.Tensor, self.record, 0, Record.TIMES + count, Record.TIMES + 2 * count)
        step = write(aten.sign.default, write(aten.sub.Tensor, times, last))
        still = write(aten.eq.Scalar, step, 0)
        free = write(aten.logical_or.default, still, write(aten.eq.Scalar, before, 0))
        onward = write(aten.all.default, write(aten.logical_or.default, free, write(aten.eq.Tensor, step, before)))
        moved = write(aten.logical_not.default, write(aten.all.default, still))
        moved = write(aten.logical_or.default, moved, known)
        return write(aten.logical_and.default, onward, moved), write(aten.where.self, still, before, step)

    def _habits(self, inputs: Sequence[fx.Node], free: int) -> Habits | None:
        if not inputs:
            return None
        start = Record.habits(0 if self.times is None else count_of(self.times))
        last = self.write(aten.slice.Tensor, self.record, 0, start, start + NUMBERS * len(inputs))
        return Habits(self.write, last, inputs, free=free, device=self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.record.meta["val"].device
        return device

    def _flat(self, times: Sequence[fx.Node]) -> fx.Node | None:
        """All inputs that hold times, as one vector of float32."""
        write = self.write
        if not times:
            return None
        flat = [write(aten.reshape.default, node, [-1]) for node in times]
        return write(aten.cat.default, [as_float(write, each, self._device) for each in flat])

    def new_record(self, hit: fx.Node, fine: fx.Node) -> fx.Node:
        """What the next call is told; `fine` says whether all that was stored is finite."""
        write, clock = self.write, self.clock
        hits = as_float(write, hit)
        streak = write(aten.mul.Tensor, clock.distance, hits)
        computed = write(aten.mul.Tensor, write(aten.add.Scalar, clock.computed, 1), fine)
        computed = write(aten.where.self, hit, clock.computed, computed)
        ratio = write(aten.masked_fill.Scalar, self.ratio, write(aten.eq.Scalar, clock.computed, 0), float("nan"))
        steps = write(aten.add.Scalar, clock.steps, 1)
        drift = write(aten.where.self, hit, self.drift, write(aten.zeros_like.default, hits))
        numbers = [ratio, hits, streak, computed, steps, as_float(write, clock.reusable), drift]
        return write(aten.cat.default, [write(aten.stack.default, numbers), *clock.remembered])


def count_of(times: fx.Node) -> int:
    """How many numbers a time holds: rows of the batch, which the record has a place for each of."""
    return prod(sizes_of(times.meta["val"]))


def sign_of(write: GraphWriter, watched: Sequence[fx.Node], rules: CacheOptions) -> fx.Node:
    """What is compared from step to step, in the channels that count: of two values their difference."""
    values = list(watched)
    if rules.downsample_factor > 1:
        end = torch.iinfo(torch.int64).max
        values = [write(aten.slice.Tensor, value, -1, 0, end, rules.downsample_factor) for value in values]
    return values[0] if len(values) == 1 else write(aten.sub.Tensor, values[1], values[0])


def sum_of_sizes(write: GraphWriter, value: fx.Node) -> fx.Node:
    return write(aten.sum.default, write(aten.abs.default, value))
