"""Models drawn at random, on meshes of 2 to 4 ranks: equal to the unsharded model, or refused by a readable error.

With a first block cache a computed step is equal to the model, too, and a skipped one to that of one rank.

`PARACOMPILE_RANDOM_CASES=600 pytest tests/test_random_models.py` draws so many, others each time (`--hypothesis-seed`
chooses which), and tells how many are refused, by cause. Without it the same are drawn each time: 2 in `make test`,
16 in continuous integration, 40 in `make test-all`.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from all_ranks import OfRanks, of_all_ranks
from cached import ALWAYS, zeros_like
from hypothesis import HealthCheck, example, given, note, settings
from lockstep import run_lockstep
from random_models import Recipe, build, recipes
from small_models import assert_sharded, close
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from paracompile.cache_options import CacheOptions
from paracompile.errors import ParacompileError
from paracompile.passes.cache_decision import Control, Record

CASES = int(os.environ.get("PARACOMPILE_RANDOM_CASES", "0"))
TOLERANCE = 1e-9
"""In float64: in float32 some of these models make 4e-5 of the largest value of rounding alone."""
ONE_PATCH = Recipe(
    mesh={"ring": 3},
    batch=2,
    grid=(1, 1),
    text=8,
    heads=1,
    head_size=4,
    key_heads=1,
    depth=2,
    streams="joint",
    text_first=False,
    refiner=False,
    mask="none",
    rope="none",
    middles=(),
    between=(),
    convolution="none",
    registers=1,
    shared_batch=(),
    output="tokens",
    skips=True,
)
"""A rank that has none of the image's tokens needs less of the first block than the others do."""
REMEDY = re.compile(r"\b(give|call|pass|use|compile|leave|remove|set|shard|see)\b", re.IGNORECASE)


@pytest.mark.timeout(300 + 30 * CASES)
@pytest.mark.parametrize(
    "cases",
    [CASES] if CASES else [2, pytest.param(16, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.full)],
)
def test_equal_or_refused_by_an_error_with_a_remedy(cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(recipes())
    @example(ONE_PATCH)
    def draw(recipe: Recipe) -> None:
        outcomes[_outcome(recipe)] += 1

    draw()
    if CASES:
        with capsys.disabled():
            sys.stdout.writelines(f"\n{count} of {outcomes.total()} {what}" for what, count in outcomes.most_common())
    refused = sum(count for what, count in outcomes.items() if what.startswith("refused"))
    assert refused < 0.5 * outcomes.total(), outcomes


def _outcome(recipe: Recipe) -> str:
    model, inputs = _in_double(*build(recipe))
    skipped = False
    try:
        assert_sharded(model, inputs, recipe.mesh, tolerance=TOLERANCE, together=recipe.together)
        if recipe.skips:
            skipped = _skips_like_one_rank(model, inputs, recipe)
    except ParacompileError as error:
        message = str(error)
        note(message)
        assert REMEDY.search(message)
        return f"refused: {_cause(message)}"
    return "equal, with a skipped step" if skipped else "equal"


def _in_double(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, Sequence[Any]]:
    return model.double(), [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    ]


@dataclass
class Ranks:
    """The graphs of a mesh's ranks, and what each keeps from step to step; no cache where nothing can be skipped."""

    of: OfRanks
    mesh: Mapping[str, int]
    records: list[Tensor] = field(init=False)
    state: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        caches = [found.cache for found in self.of.found if found.cache is not None]
        self.records = [zeros_like(cache.record) for cache in caches]
        self.state = [[zeros_like(value) for value in cache.state] for cache in caches]

    @property
    def hits(self) -> set[bool]:
        return {bool(record[Record.HIT]) for record in self.records}

    def step(self, arguments: Sequence[Any]) -> list[Any]:
        """The outputs of one step, by rank."""
        control = torch.tensor([ALWAYS, 0.0, 0.0, *Control.plan(CacheOptions())])
        found = run_lockstep(
            self.of.graphs,
            [
                [*pytree.tree_map_only(Tensor, Tensor.clone, arguments), control, record, *state]
                for record, state in zip(self.records, self.state, strict=True)
            ],
            dict(self.mesh),
        )
        self.records = [record for *_, record in found]
        return [outputs for *outputs, _ in found]


def _skips_like_one_rank(model: nn.Module, inputs: Sequence[Any], recipe: Recipe) -> bool:
    """Compares a first step, and a second, of which blocks are skipped if there are any; says whether they were."""
    sides: list[Ranks] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        sides[:] = [
            Ranks(of_all_ranks(gm, example_inputs, mesh, cache=CacheOptions(rdt=1.0)), mesh)
            for mesh in ({"ulysses": 1}, dict(recipe.mesh))
        ]
        one, many = sides
        assert bool(one.records) == bool(many.records)
        return run if one.records else gm.forward

    def run(*arguments: Any) -> Any:
        one, many = sides
        (alone,) = one.step(arguments)
        for outputs in many.step(arguments):
            close(outputs, alone, TOLERANCE)
        assert many.hits == one.hits
        return alone

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    image, text, time, *others = inputs
    with torch.no_grad():
        try:
            close(compiled(*inputs), model(*inputs), TOLERANCE)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        compiled(image * 1.01, text, time - 0.1, *others)
    return sides[0].hits == {True}


def _cause(message: str) -> str:
    """A message without what is particular to one model."""
    return re.sub(r"(?<!\w)'[^']*'|\d+", "_", message.splitlines()[0])[:160]
