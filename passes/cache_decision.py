"""Decides in the graph whether blocks are skipped, and keeps the record of it.

Every number is computed by the graph itself, so that the host waits for the decision alone: where in a generation a
call is follows from its times, which a generation goes through one way. The sums that decide are taken over all ranks
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from paracompile.mesh import Ranks
from paracompile.passes.writer import GraphWriter
from paracompile.runtime.collectives import all_reduce

__all__ = ["CacheRules", "Clock", "Decision", "Record", "as_float", "residual_of", "sum_of_sizes"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheRules:
    """When blocks are skipped, and what stands for them; see the options of the same names."""

    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    downsample_factor: int = 1
    taylor_order: int = 0


class Record:
    """The places of the numbers in a record; times and their directions follow."""

    RATIO, HIT, STREAK, COMPUTED, STEPS, TIMES = range(6)

    @staticmethod
    def length(times: int) -> int:
        return Record.TIMES + 2 * times


@dataclass(frozen=True)
class Clock:
    """Where in a generation a call is; numbers of shape ().

    attributes:
        continues: it follows a step of the same generation, of which something is stored.
        streak: hits in a row before it.
        computed: steps computed before it, since something was last found not finite.
        steps: steps before it.
        distance: steps since the last one that was computed.
        times, direction: the times of this call and the way they go (-1, 0 for not known, 1); None without any.
    """

    continues: fx.Node
    streak: fx.Node
    computed: fx.Node
    steps: fx.Node
    distance: fx.Node
    times: fx.Node | None
    direction: fx.Node | None


class Decision:
    """Writes the decision of one graph.

    attributes:
        clock: where in a generation the call is.
    """

    def __init__(
        self,
        write: GraphWriter,
        rules: CacheRules,
        ranks: Ranks,
        *,
        control: fx.Node,
        record: fx.Node,
        previous: fx.Node,
        times: Sequence[fx.Node],
    ) -> None:
        """`times` are the inputs that hold them; the others are the inputs of these names."""
        self.write = write
        self.rules = rules
        self.ranks = ranks
        self.control = control
        self.record = record
        self.previous = previous
        self.inputs = times
        self.clock = self._clock()

    def hit(self, before: fx.Node, after: fx.Node) -> fx.Node:
        """Whether to skip: one boolean, the same on all ranks."""
        write = self.write
        clock = self.clock
        residual = residual_of(write, before, after, self.rules)
        change = sum_of_sizes(write, write(aten.sub.Tensor, as_float(write, residual), as_float(write, self.previous)))
        size = sum_of_sizes(write, as_float(write, self.previous))
        threshold = write(aten.select.int, self.control, 0, 0)
        allowed = write(aten.logical_and.default, clock.continues, write(aten.gt.Scalar, threshold, 0))
        steps = write(aten.ge.Scalar, clock.steps, self.rules.warmup_steps)
        allowed = write(aten.logical_and.default, allowed, steps)
        if self.rules.max_consecutive_hits is not None:
            few = write(aten.lt.Scalar, clock.streak, self.rules.max_consecutive_hits)
            allowed = write(aten.logical_and.default, allowed, few)
        refusals = as_float(write, write(aten.logical_not.default, allowed))
        facts = write(aten.stack.default, [change, size, threshold, refusals])
        if self.ranks.size > 1:
            facts = all_reduce(write, facts, "sum", self.ranks.group)
        change, size, threshold, refusals = (write(aten.select.int, facts, 0, place) for place in range(4))
        limit = write(aten.mul.Tensor, write(aten.div.Scalar, threshold, self.ranks.size), size)
        small = write(aten.lt.Tensor, change, limit)  # false where either is not a number
        hit = write(aten.logical_and.default, small, write(aten.eq.Scalar, refusals, 0))
        self.ratio = write(aten.div.Tensor, change, size)
        return hit

    def _clock(self) -> Clock:
        """Where in a generation this call is, told from its times: a generation goes one way through them."""
        write = self.write
        entry = {
            name: write(aten.select.int, self.record, 0, place)
            for name, place in (("streak", Record.STREAK), ("computed", Record.COMPUTED), ("steps", Record.STEPS))
        }
        started = write(aten.gt.Scalar, entry["steps"], 0)
        direction = None
        times = self._times()
        continues = started
        if times is not None:
            count = times.meta["val"].numel()
            last = write(aten.slice.Tensor, self.record, 0, Record.TIMES, Record.TIMES + count)
            before = write(aten.slice.Tensor, self.record, 0, Record.TIMES + count, Record.TIMES + 2 * count)
            step = write(aten.sign.default, write(aten.sub.Tensor, times, last))
            still = write(aten.eq.Scalar, step, 0)
            free = write(aten.logical_or.default, still, write(aten.eq.Scalar, before, 0))
            onward = write(aten.logical_or.default, free, write(aten.eq.Tensor, step, before))
            moved = write(aten.logical_not.default, write(aten.all.default, still))
            continues = write(aten.logical_and.default, started, moved)
            continues = write(aten.logical_and.default, continues, write(aten.all.default, onward))
            direction = write(aten.where.self, still, before, step)
            direction = write(aten.mul.Tensor, direction, as_float(write, continues))
        factor = as_float(write, continues)
        streak, computed, steps = (write(aten.mul.Tensor, entry[name], factor) for name in entry)
        valid = write(aten.logical_and.default, continues, write(aten.gt.Scalar, computed, 0))
        return Clock(
            continues=valid,
            streak=streak,
            computed=computed,
            steps=steps,
            distance=write(aten.add.Scalar, streak, 1),
            times=times,
            direction=direction,
        )

    def _times(self) -> fx.Node | None:
        """All inputs that hold times, as one vector of float32."""
        write = self.write
        device = self.record.meta["val"].device
        if not self.inputs:
            return None
        flat = [write(aten.reshape.default, node, [-1]) for node in self.inputs]
        return write(
            aten.cat.default, [write(aten._to_copy.default, x, dtype=torch.float32, device=device) for x in flat]
        )

    def new_record(self, hit: fx.Node, fine: fx.Node) -> fx.Node:
        """What the next call is told; `fine` says whether all that was stored is finite."""
        write, clock = self.write, self.clock
        hits = as_float(write, hit)
        streak = write(aten.mul.Tensor, clock.distance, hits)
        computed = write(aten.mul.Tensor, write(aten.add.Scalar, clock.computed, 1), fine)
        computed = write(aten.where.self, hit, clock.computed, computed)
        # Two images in turn look like one first step after the other. Whose step comes next nobody can say, so it
        # computes as well, and does so in every generation: none must depend on whether there was one before.
        unnamed = write(aten.gt.Scalar, write(aten.select.int, self.control, 0, 1), 0)
        doubt = write(aten.logical_and.default, unnamed, write(aten.eq.Scalar, clock.steps, 0))
        computed = write(aten.masked_fill.Scalar, computed, doubt, 0)
        ratio = write(aten.masked_fill.Scalar, self.ratio, write(aten.eq.Scalar, clock.computed, 0), float("nan"))
        numbers = [ratio, hits, streak, computed, write(aten.add.Scalar, clock.steps, 1)]
        record = write(aten.stack.default, numbers)
        if clock.times is None or clock.direction is None:
            return record
        return write(aten.cat.default, [record, clock.times, clock.direction])


def residual_of(write: GraphWriter, before: fx.Node, after: fx.Node, rules: CacheRules) -> fx.Node:
    """What the first blocks add, in the channels that are compared."""
    values = [before, after]
    if rules.downsample_factor > 1:
        end = torch.iinfo(torch.int64).max
        values = [write(aten.slice.Tensor, value, -1, 0, end, rules.downsample_factor) for value in values]
    return write(aten.sub.Tensor, values[1], values[0])


def as_float(write: GraphWriter, value: fx.Node) -> fx.Node:
    if value.meta["val"].dtype is torch.float32:
        return value
    return write(aten._to_copy.default, value, dtype=torch.float32)


def sum_of_sizes(write: GraphWriter, value: fx.Node) -> fx.Node:
    return write(aten.sum.default, write(aten.abs.default, value))
