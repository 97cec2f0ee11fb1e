"""Graph rewrites, and THE ordered list of them.

A pass is `def name(gm, example_inputs, *, ...) -> GraphModule`. It is a function of its arguments alone: it needs no
process group, and what it needs besides the graph is bound where the list is made. Its contract says what it takes for
granted; `check_contracts` holds the list against the contracts before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from paracompile.errors import ParacompileError
from paracompile.layout.plan import Plan
from paracompile.mesh import Ranks
from paracompile.passes.attention_on_shards import Lengths, attention_on_shards, local_lengths
from paracompile.passes.cache_decision import CacheRules
from paracompile.passes.context_parallel import batch_parallel, context_parallel
from paracompile.passes.drop_masked_keys import drop_masked_keys
from paracompile.passes.first_block_cache import CacheLayout, first_block_cache
from paracompile.passes.mark_blocks import Skipped, mark_blocks
from paracompile.passes.normalise import normalise
from paracompile.passes.regions import cut_into_regions
from paracompile.passes.schedule import schedule
from paracompile.passes.static_lengths import static_lengths
from paracompile.passes.subclasses import dispatch_on_subclasses

__all__ = [
    "CacheLayout",
    "CachePasses",
    "CacheRules",
    "Pass",
    "check_contracts",
    "local_lengths",
    "pipeline",
    "run_passes",
]


@dataclass(frozen=True)
class CachePasses:
    """The two passes of the first block cache: what they are told, and what they tell.

    attributes:
        first_blocks, last_blocks: blocks at either end that are always computed.
        rules: when the others are skipped.
        laid_out: told what the graph takes and gives besides, if there is anything to skip.
    """

    first_blocks: int = 1
    last_blocks: int = 0
    rules: CacheRules = field(default_factory=CacheRules)
    laid_out: Callable[[CacheLayout], object] = lambda layout: None


@dataclass(frozen=True)
class Pass:
    """A pass with its contract.

    attributes:
        run: the pass, `(gm, example_inputs) -> GraphModule`.
        provides: what holds of the graph afterwards.
        requires: what must hold before.
        conflicts: what must not hold before.
    """

    run: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]
    provides: str
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        run = self.run.func if isinstance(self.run, partial) else self.run
        return run.__name__


def pipeline(
    ranks: Ranks,
    *,
    planned: Callable[[Plan], object] = lambda plan: None,
    drop_keys: bool = True,
    lengths: Sequence[Lengths] | None = None,
    cache: CachePasses | None = None,
    regions: bool | None = None,
) -> list[Pass]:
    """The passes for a graph that is shared by `ranks`, in order.

    args:
        planned: told each plan as it is made.
        drop_keys: drop keys that a mask hides from all.
        lengths: the graph's inputs are shards already, of these lengths on each rank (see `local_lengths`).
        cache: skip blocks whose effect hardly changes.
        regions: cut the graph for the compiler, along its blocks or (False) at conditionals only; None: leave it whole.
    """
    aten, static = frozenset({"functional ATen"}), frozenset({"functional ATen", "static lengths"})

    def shard(run: Callable[..., fx.GraphModule], provides: str) -> Pass:
        return Pass(run, requires=static, provides=provides, conflicts=frozenset({provides}))

    cuts = []
    if lengths is not None:
        cuts.append(shard(partial(attention_on_shards, ranks=ranks, lengths=lengths), "local tokens"))
    if lengths is None and ranks.batch.size > 1:
        cuts.append(shard(partial(batch_parallel, axis=ranks.batch, planned=planned), "local rows"))
    if lengths is None and ranks.sequence_size > 1:
        cuts.append(shard(partial(context_parallel, ranks=ranks, planned=planned), "local tokens"))
    marks, skips = _cache_passes(cache, ranks, static) if cache is not None else ([], [])
    return [
        Pass(normalise, provides="functional ATen"),
        Pass(static_lengths, requires=aten, provides="static lengths"),
        *marks,
        *cuts,
        *([Pass(drop_masked_keys, requires=aten, provides="visible keys only")] if drop_keys else []),
        *skips,
        Pass(schedule, requires=aten, provides="overlap"),
        Pass(dispatch_on_subclasses, requires=aten, provides="subclasses asked"),
        *([Pass(partial(cut_into_regions, along_blocks=regions), provides="regions")] if regions is not None else []),
    ]


def _cache_passes(cache: CachePasses, ranks: Ranks, static: frozenset[str]) -> tuple[list[Pass], list[Pass]]:
    """What comes before the graph is cut, and what after."""
    found: list[Skipped] = []
    mark = partial(mark_blocks, first_blocks=cache.first_blocks, last_blocks=cache.last_blocks, found=found.append)
    skip = partial(
        first_block_cache,
        skipped=lambda: found[-1] if found else None,
        rules=cache.rules,
        ranks=ranks,
        laid_out=cache.laid_out,
    )
    cut = frozenset({"local tokens", "local rows"})
    return (
        [Pass(mark, requires=static, provides="marked blocks", conflicts=cut)],
        [Pass(skip, requires=frozenset({"marked blocks"}), provides="first block cache")],
    )


def check_contracts(passes: Sequence[Pass]) -> None:
    """Raises a ParacompileError naming the pass, what it misses and what ran before, if the list cannot work."""
    held: list[str] = []
    for step in passes:
        missing, clashing = step.requires - set(held), step.conflicts & set(held)
        if missing or clashing:
            what = f"needs {sorted(missing)}" if missing else f"cannot follow {sorted(clashing)}"
            raise ParacompileError(f"pass {step.name!r} {what}; before it there is: {held or 'nothing'}")
        held.append(step.provides)


def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    passes: Sequence[Pass],
    *,
    after: Callable[[str, fx.GraphModule], object] = lambda name, gm: None,
) -> fx.GraphModule:
    """Runs the passes in order; `after` is told the name of each and the graph that it made."""
    check_contracts(passes)
    for step in passes:
        gm = step.run(gm, example_inputs)
        gm.graph.lint()
        after(step.name, gm)
    return gm
