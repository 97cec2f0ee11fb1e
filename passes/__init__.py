"""Graph rewrites, and THE ordered list of them.

A pass is `def name(gm, example_inputs, *, ...) -> GraphModule`. It is a function of its arguments alone: it needs no
process group, and what it needs besides the graph is bound where the list is made. Its contract says what it takes for
granted; `check_contracts` holds the list against the contracts before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from paracompile.cache_options import CacheOptions
from paracompile.errors import GraphError, ParacompileError
from paracompile.mesh import Ranks
from paracompile.passes.attention_on_shards import Lengths, attention_on_shards, local_lengths
from paracompile.passes.choose_kernels import choose_kernels
from paracompile.passes.compose_padding import compose_padding
from paracompile.passes.drop_masked_keys import drop_masked_keys
from paracompile.passes.first_block_cache import first_block_cache
from paracompile.passes.found import CacheLayout, Found
from paracompile.passes.fuse_attention import fuse_attention
from paracompile.passes.lower import lower
from paracompile.passes.mark_blocks import mark_blocks
from paracompile.passes.normalise import normalise
from paracompile.passes.plan_layouts import plan_layouts
from paracompile.passes.regions import cut_into_regions
from paracompile.passes.schedule import schedule
from paracompile.passes.split_and_gather import split_and_gather
from paracompile.passes.static_lengths import static_lengths
from paracompile.passes.subclasses import dispatch_on_subclasses
from paracompile.passes.unified_attention import unified_attention

__all__ = [
    "CacheLayout",
    "Found",
    "Pass",
    "check_contracts",
    "local_lengths",
    "pipeline",
    "run_passes",
]


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
    found: Found | None = None,
    drop_keys: bool = True,
    lengths: Sequence[Lengths] | None = None,
    together: bool = False,
    eight_bits: torch.dtype | None = None,
    kernel: str = "auto",
    cache: CacheOptions | None = None,
    regions: bool | None = None,
) -> list[Pass]:
    """The passes for a graph that is shared by `ranks`, in order.

    args:
        found: where the passes say what they find.
        drop_keys: drop keys that a mask hides from all.
        lengths: the graph's inputs are shards already, of these lengths on each rank (see `local_lengths`).
        together: exchanges that are mostly their start go together.
        eight_bits: the type in which what attention exchanges travels; None: as it is.
        kernel: what computes attention (see `paracompile.patterns.kernels`).
        cache: skip blocks whose effect hardly changes.
        regions: cut the graph for the compiler, along its blocks or (False) at conditionals only; None: leave it whole.
    """
    found = Found() if found is None else found
    aten, static = frozenset({"functional ATen"}), frozenset({"functional ATen", "static lengths"})
    passes = [
        Pass(normalise, provides="functional ATen"),
        Pass(partial(fuse_attention, found=found), requires=aten, provides="fused attention"),
        Pass(static_lengths, requires=aten, provides="static lengths"),
    ]
    if cache is not None:
        mark = partial(
            mark_blocks,
            first_blocks=cache.first_blocks,
            last_blocks=cache.last_blocks,
            watch=cache.watch,
            found=found,
        )
        passes.append(Pass(mark, requires=static, provides="marked blocks", conflicts=frozenset({"shards", "a rank"})))
    how: dict[str, Any] = {"ranks": ranks, "together": together, "eight_bits": eight_bits, "found": found}
    if lengths is not None:
        on_shards = partial(attention_on_shards, lengths=lengths, **how)
        passes.append(Pass(on_shards, requires=static, provides="a rank", conflicts=frozenset({"a rank"})))
    elif not ranks.is_single:
        passes += [
            Pass(compose_padding, requires=static, provides="composed padding"),
            Pass(partial(plan_layouts, ranks=ranks, found=found), requires=static, provides="plans"),
            Pass(
                partial(split_and_gather, found=found),
                requires=frozenset({"plans"}),
                provides="shards",
                conflicts=frozenset({"shards"}),
            ),
            Pass(unified_attention, requires=frozenset({"shards"}), provides="unified attention"),
            Pass(
                partial(lower, **how),
                requires=frozenset({"shards", "unified attention"}),
                provides="a rank",
                conflicts=frozenset({"a rank"}),
            ),
        ]
    if drop_keys:
        passes.append(Pass(partial(drop_masked_keys, found=found), requires=aten, provides="visible keys only"))
    chosen = partial(choose_kernels, kernel=kernel, found=found)
    passes.append(Pass(chosen, requires=aten, provides="kernels"))
    if cache is not None:
        skip = partial(first_block_cache, rules=cache, ranks=ranks, found=found)
        passes.append(Pass(skip, requires=frozenset({"marked blocks"}), provides="first block cache"))
    passes += [
        Pass(schedule, requires=aten, provides="overlap"),
        Pass(dispatch_on_subclasses, requires=aten, provides="subclasses asked"),
    ]
    if regions is not None:
        passes.append(Pass(partial(cut_into_regions, along_blocks=regions), provides="regions"))
    return passes


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
    """Runs the passes in order; `after` is told the name of each and the graph that it made.

    raises:
        GraphError: of a pass, or where one must know a size that only the data tells.
    """
    check_contracts(passes)
    for step in passes:
        try:
            gm = step.run(gm, example_inputs)
        except GuardOnDataDependentSymNode as error:
            raise GraphError(
                None,
                f"the pass {step.name} must know {error.cond}, which only the data tells",
                "leave out fullgraph=True, so that Dynamo breaks the graph where it is read",
            ) from error
        gm.graph.lint()
        after(step.name, gm)
    return gm
