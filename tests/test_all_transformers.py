"""Every transformer of diffusers on 2 and 4 ranks: equal to one rank, or refused by an error that names a remedy.

`-rP` shows for each in how many graphs it runs, how many of them are sharded, and which part of their products the
first rank computes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from all_ranks import of_all_ranks
from denoising import ALWAYS
from diffusers import ModelMixin
from families import ALL_FAMILIES
from lockstep import run_lockstep
from more_families import MORE_FAMILIES
from other_families import NOT_BUILT, OTHER_FAMILIES
from pieces import PIECES
from small_models import close, mesh_name
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from paracompile import cache_context, cache_stats
from paracompile.captured import Captured
from paracompile.errors import ParacompileError
from paracompile.mesh import Ranks
from paracompile.report.misses import warn_of_misses
from paracompile.report.report import Report, report_of
from paracompile.runtime.slots import begin_generation, end_step

MESHES: tuple[dict[str, int], ...] = ({"ulysses": 2}, {"ring": 2, "ulysses": 2})
TOLERANCE = 2e-5
COARSE = {"sana_wm": 2.0**-8}
"""Of models that attend in bfloat16, whatever type they have."""

COARSE_BY_INDUCTOR = {"kandinsky_5": 2e-4}
"""Of models that Inductor by itself, with its own backend, computes as far from the model."""

REFUSED_BY_INDUCTOR = {"kandinsky_6_sr": "on a CPU Inductor has no flex attention of five dimensions"}

REMEDY = re.compile(r"\b(give|call|pass|use|compile|leave|remove|set|shard|see)\b", re.IGNORECASE)

ONE_GRAPH = ("mochi",)
"""What users must ask one graph of, as the README says: in pieces no attention is in any of them."""

BUILDERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    **{name: family.build for name, family in ALL_FAMILIES.items()},
    **{name: family.build for name, family in MORE_FAMILIES.items() if "-at-front" not in name},
    **{name: partial(builder, 2) for name, builder in PIECES.items()},
    **OTHER_FAMILIES,
}


@dataclass
class Run:
    """What became of a model on one mesh.

    attributes:
        graphs: how many graphs Dynamo made of it.
        reports: the first rank's, of those that are sharded.
    """

    graphs: int = 0
    reports: list[Report] = field(default_factory=list)

    def __str__(self) -> str:
        own, whole = (sum(getattr(report, name) for report in self.reports) for name in ("flops_rank", "flops_whole"))
        return f"{len(self.reports)} of {self.graphs} sharded, of whose products a rank computes {own / whole:.2f}"


def on_ranks(model: nn.Module, inputs: dict[str, Any], mesh: dict[str, int], **how: Any) -> tuple[Any, Run]:
    """Calls a model whose graphs all ranks of a mesh run in lockstep; a piece without attention runs as it is.

    `how` goes to `torch.compile`. All ranks must return the same of each graph; what the last one returns goes on.
    """
    run = Run()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run.graphs += 1
        captured = Captured(gm, example_inputs)
        if captured.why_a_piece is not None and not captured.may_be_shared():
            return gm.forward
        ints = captured.numbers.ints
        made = of_all_ranks(gm, example_inputs, mesh)
        run.reports.append(report_of(made.found[0], Ranks.simulated(**mesh), made.graphs[0]))

        def call(*args: Any) -> Any:
            given = [torch.tensor(value) if place in ints else value for place, value in enumerate(args)]
            copies = [pytree.tree_map_only(Tensor, Tensor.clone, given) for _ in range(1, prod(mesh.values()))]
            first, *others = run_lockstep(made.graphs, [given, *copies], mesh)
            for other in others:
                close(other, first, 0.0)
            return first

        return call

    torch._dynamo.reset()
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 256}
    with torch.no_grad(), torch._dynamo.config.patch(**limits):
        try:
            return torch.compile(model, backend=backend, **how)(**inputs), run
        except BackendCompilerFailed as error:
            raise error.inner_exception from None


def outcome(name: str, mesh: dict[str, int]) -> str:
    """Calls the model of this name on a mesh, and says what became of it."""
    model, inputs = BUILDERS[name]()
    with torch.no_grad():
        expected = model(**inputs)
    _, inputs = BUILDERS[name]()  # some keep what they saw
    try:
        found, run = on_ranks(model, inputs, mesh, fullgraph=name in ONE_GRAPH)
    except ParacompileError as error:
        message = str(error)
        assert REMEDY.search(message)
        return "refused: " + " ".join(message.split())
    assert run.reports  # else each rank would do everything
    close(found, expected, COARSE.get(name, TOLERANCE))
    return str(run)


@pytest.mark.full
@pytest.mark.parametrize("name", BUILDERS)
def test_every_rank_gives_what_one_gives(name: str) -> None:
    for mesh in MESHES:
        sys.stdout.write(f"{name} on {mesh_name(mesh)}: {outcome(name, mesh)}\n")


NEVER_SKIPPED = {
    "hunyuan_video_15": "hunyuan_video15.py:.* in forward",  # asks whether an image is zeros, orders text row by row
    "framepack": "framepack.py:.* in forward",  # cuts text at a length that the data tells, or row by row
    "hidream": "in moe_infer",  # how many tokens an expert gets, the data tells
    "nucleus_moe": "in _run_experts_for_loop",
    "wan_animate_2": "in rope_apply",  # each block reads the size of its grid from a tensor
}
"""Where Dynamo breaks the graph in or between the blocks, so that none holds two of them."""


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("name", BUILDERS)
def test_blocks_are_skipped_or_a_warning_says_why_not(name: str, compiler: str) -> None:
    """Called once more with the same inputs, what was stored stands for the blocks exactly."""
    coarse = COARSE
    if compiler == "inductor":
        coarse = COARSE | COARSE_BY_INDUCTOR
        if name in REFUSED_BY_INDUCTOR:
            pytest.skip(REFUSED_BY_INDUCTOR[name])
    model, inputs = BUILDERS[name]()
    with torch.no_grad():
        expected = model(**inputs)
    torch._dynamo.reset()
    compiled = torch.compile(
        BUILDERS[name]()[0],
        backend="paracompile",
        fullgraph=name in ONE_GRAPH,
        options={"rdt": ALWAYS, "compiler": compiler},
    )
    generation = begin_generation()
    found = []
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 256}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), torch._dynamo.config.patch(**limits):
        warnings.simplefilter("always")
        for _ in range(4):
            with cache_context("cond"):
                found.append(compiled(**BUILDERS[name]()[1]))
            end_step()
        warn_of_misses(generation)
    generation.over = True
    for each in found:
        close(each, expected, coarse.get(name, TOLERANCE))
    stats = cache_stats(compiled)
    told = [str(each.message) for each in caught if "no step of this generation could be skipped" in str(each.message)]
    if name in NEVER_SKIPPED:
        assert stats.hits == 0
        (message,) = told
        assert re.search(NEVER_SKIPPED[name], message)
    else:
        assert told == []
        assert [[step.hit for step in steps] for steps in stats.slots.values()] == [[False, True, True, True]]
    sys.stdout.write(f"{name}: {stats}\n")


@pytest.mark.full
@pytest.mark.parametrize("name", BUILDERS)
def test_with_every_size_open(name: str) -> None:
    """All dimensions that the model leaves open stay so; a warning that a pass cannot do with it would be an error."""
    model, inputs = BUILDERS[name]()
    for value in pytree.tree_leaves(inputs):
        for dim in range(1, value.dim()) if isinstance(value, torch.Tensor) else ():
            torch._dynamo.maybe_mark_dynamic(value, dim)
    torch._dynamo.reset()
    options = {"rdt": ALWAYS, "compiler": "eager"}
    compiled = torch.compile(model, backend="paracompile", fullgraph=name in ONE_GRAPH, options=options)
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 256}
    with warnings.catch_warnings(), torch.no_grad(), torch._dynamo.config.patch(**limits):
        warnings.filterwarnings("error", message="paracompile: a graph of .* compiles for each size")
        close(compiled(**inputs), model(**inputs), COARSE.get(name, TOLERANCE))


@pytest.mark.full
def test_no_transformer_is_left_out() -> None:
    import diffusers.models.transformers as package

    classes = set()
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        own = [
            value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        classes |= {value.__name__ for value in own if issubclass(value, ModelMixin)}
    built = {type(build()[0]).__name__ for build in BUILDERS.values()}
    assert built | NOT_BUILT.keys() == classes
    assert not built & NOT_BUILT.keys()
