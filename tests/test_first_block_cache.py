"""The first block cache: what a computed step gives, what a skipped one, and who decides.

What it must give is worked out by hand in `by_hand`, on the model itself in float64.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from by_hand import ByHand, by_formula, check_generation, ratio_of
from cached import ALWAYS, NEVER, CachedGraphs, Step, arguments_of, cached, cached_family, not_cached, step
from capture import Captured, assert_equal, capture, captured, sharded
from families import ALL_FAMILIES, Inputs
from quick import quick
from random_tensors import randomise
from small_models import BATCH, IMAGE, WIDTH, Block, Denoiser, count, image_tokens, mesh_name
from torch import Tensor, fx, nn

from paracompile.passes.cache_decision import Record
from paracompile.passes.first_block_cache import COMPUTE, COND, REUSE

UNEVEN: dict[str, dict[str, Any]] = {
    "flux": {"heads": 3, "image": (5, 7), "text": 13, "batch": 2},
    "wan": {"heads": 3, "size": (3, 6, 10), "text": 7, "image": 9},
}
"""Lengths and heads that do not divide, as in the tests of the families on meshes."""
NO_TOKEN = {"image": (1, 2), "text": 1}

CASES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("wan", {}, {}),
    *((family, {"ulysses": 2}, {}) for family in ("flux", "wan", "stable_diffusion_3", "mochi")),
    ("ltx_video", {"ring": 2}, {}),
    ("wan", {"ring": 2}, {}),
    ("ltx_video", {"batch": 2, "ulysses": 2}, {}),
    ("flux", {"ulysses": 2}, UNEVEN["flux"]),
]
FULL: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    *((family, {}, {}) for family in ALL_FAMILIES if family != "wan"),
    *((family, {"ulysses": 2}, {}) for family in ("cogvideox", "hunyuan_video", "ltx_video", "qwen_image")),
    ("flux", {"ulysses": 3}, NO_TOKEN),
    ("wan", {"ring": 2}, UNEVEN["wan"]),
    *((family, mesh, {}) for family in ALL_FAMILIES for mesh in ({"ring": 2}, {"ring": 2, "ulysses": 2})),
    *((family, {"batch": 2}, {"batch": 2}) for family in ALL_FAMILIES),
]


def name_of(case: tuple[str, dict[str, int], dict[str, Any]]) -> str:
    family, mesh, sizes = case
    return "-".join(filter(None, [family, mesh_name(mesh) or "one rank", sizes and "odd"]))


# The families


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=lambda case: name_of(case)
)
def test_a_family(case: tuple[str, dict[str, int], dict[str, Any]]) -> None:
    """Computed, skipped, computed; each on every rank, against the model and the formula."""
    family, mesh, sizes = case
    graphs = cached_family(family, mesh, sizes)
    check_generation(graphs, ByHand.of_family(family, graphs.of))


TWO_FAMILIES = ("flux", "wan")
"""With a stream for the text, and without."""


@pytest.mark.parametrize(
    "family, mesh",
    quick(
        [*((family, {}) for family in ALL_FAMILIES), *((family, {"ulysses": 2}) for family in TWO_FAMILIES)],
        *((family, {"ulysses": 2}) for family in TWO_FAMILIES),
        ("wan", {}),
    ),
)
def test_computed_steps_are_those_of_the_graph_without_a_cache_bit_for_bit(family: str, mesh: dict[str, int]) -> None:
    """At the threshold 0 nothing is ever skipped, not even where nothing changed at all."""
    graphs = cached_family(family, mesh)
    plain = sharded(family, 2) if mesh else not_cached(graphs.of)
    inputs = [step(graphs.of, number) for number in range(2)]
    inputs.append({**inputs[1], "timestep": inputs[1]["timestep"] * 0.999999})  # as good as the same
    for inputs_of_step, found in zip(inputs, graphs.run(inputs, NEVER), strict=True):
        assert not found.hit
        for output, expected in zip(found.outputs, plain.run(arguments_of(graphs.of, inputs_of_step)), strict=True):
            assert torch.equal(output, expected)


# Hand-written models


TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def noisy(number: int, change: float = 0.1, *, time: float | None = None) -> Inputs:
    """The inputs of a step; `time` other than that of its number."""
    sample = image_tokens() + number * change * image_tokens(seed=100 + number)
    return {"hidden_states": sample, "timestep": torch.tensor(TIMES[number] if time is None else time).repeat(BATCH)}


def of_model(model: nn.Module, inputs: Inputs | None = None) -> Captured:
    return capture(randomise(model), inputs or noisy(0))


@cache
def denoiser(depth: int = 3) -> Captured:
    return of_model(Denoiser(depth))


@cache
def graphs_of(depth: int = 3, ranks: int = 1, **rules: Any) -> CachedGraphs:
    return cached(denoiser(depth), {"ulysses": ranks} if ranks > 1 else None, **rules)


def hits(steps: Sequence[Step]) -> str:
    """One letter a step: c computed, s skipped."""
    return "".join("s" if each.hit else "c" for each in steps)


def follow(graphs: CachedGraphs, pattern: str, inputs: Sequence[Inputs]) -> list[Step]:
    """A generation whose steps are computed and skipped as `pattern` says."""
    generation = graphs.begin()
    for letter, each in zip(pattern, inputs, strict=True):
        generation.step(each, ALWAYS if letter == "s" else NEVER)
    assert hits(generation.steps) == pattern
    return generation.steps


# Who decides


@cache
def local_model() -> Captured:
    """In the first block tokens do not see each other, so that each rank's residual is of its own tokens."""
    model = randomise(Denoiser(3))
    model.blocks[0].attention.to_out.weight.zero_()
    return capture(model, noisy(0))


def one_half_changed() -> list[Inputs]:
    """Two steps: the first rank's tokens stay, the second's are others altogether."""
    first, second = noisy(0), noisy(1, 0.0, time=0.8999)
    second["hidden_states"][:, IMAGE // 2 :] = image_tokens(seed=77)[:, IMAGE // 2 :]
    return [first, second]


def test_ranks_whose_residuals_differ_widely_decide_as_one() -> None:
    inputs = one_half_changed()
    model = ByHand(local_model())
    previous, residual = (model.computed(each).residual for each in inputs)
    whole = ratio_of(residual, previous)
    halves = zip(residual.chunk(2, dim=1), previous.chunk(2, dim=1), strict=True)
    calm, wild = (ratio_of(*half) for half in halves)
    assert calm < whole / 100
    assert wild > 1.5 * whole

    graphs = cached(local_model(), {"ulysses": 2})
    computed = graphs.run(inputs, math.sqrt(calm * whole))[1]
    skipped = graphs.run(inputs, (whole + wild) / 2)[1]
    assert (computed.hit, skipped.hit) == (False, True)
    for found in (computed, skipped):
        assert [float(record[Record.RATIO]) for record in found.records] == pytest.approx([whole] * 2, rel=1e-4)
    by_formula(skipped.output, model.skipped(inputs[1], model.computed(inputs[0]).added))
    with torch.no_grad():
        assert_equal(computed.output, local_model().model(**inputs[1])[0])


@pytest.mark.parametrize(
    "shares, hit", [((1.3, 0.8), True), ((0.8, 1.3), True), ((1.2, 0.7), False), ((0.0, 1e9), False), ((1e9, 0), False)]
)
def test_ranks_that_were_told_different_thresholds_decide_as_one(shares: tuple[float, float], hit: bool) -> None:
    """They take the mean; one rank that was told to compute has all compute."""
    graphs = graphs_of(ranks=2)
    ratio = graphs.run([noisy(0), noisy(1)], NEVER)[1].ratio
    generation = graphs.begin()
    generation.step(noisy(0), ALWAYS)
    assert generation.step(noisy(1), [share * ratio for share in shares]).hit is hit


def test_the_threshold_is_compared_with_the_ratio() -> None:
    ratio = graphs_of().run([noisy(0), noisy(1)], NEVER)[1].ratio
    assert ratio == pytest.approx(ratio_by_hand([noisy(0), noisy(1)]), rel=1e-4)
    assert hits(graphs_of().run([noisy(0), noisy(1)], 0.999 * ratio)) == "cc"
    assert hits(graphs_of().run([noisy(0), noisy(1)], 1.001 * ratio)) == "cs"


def ratio_by_hand(inputs: Sequence[Inputs], factor: int = 1, **kept: int) -> float:
    model = ByHand(denoiser(), **kept)
    previous, residual = (model.computed(each).residual[..., ::factor] for each in inputs)
    return ratio_of(residual, previous)


def test_what_is_compared_with_is_of_the_last_computed_step() -> None:
    """Not of the last step: small changes add up until they are seen."""
    inputs = [noisy(0), *(noisy(number, 0.05) for number in range(1, 6))]
    ratios = [step.ratio for step in follow(graphs_of(), "csssss", inputs)]
    for number in range(1, 6):
        assert ratios[number] == pytest.approx(ratio_by_hand([inputs[0], inputs[number]]), rel=1e-4)


# Times


def test_a_generation_that_goes_on() -> None:
    steps = graphs_of().run([noisy(number) for number in range(5)], ALWAYS)
    assert hits(steps) == "cssss"
    assert [float(each.records[0][Record.STEPS]) for each in steps] == [1, 2, 3, 4, 5]
    assert [float(each.records[0][Record.STREAK]) for each in steps] == [0, 1, 2, 3, 4]
    assert {float(each.records[0][Record.COMPUTED]) for each in steps} == {1}


@pytest.mark.parametrize(
    "times, pattern",
    [
        ((0.9, 0.9), "cc"),
        ((0.9, 0.9, 0.8), "ccs"),
        ((0.9, 0.8, 0.8, 0.7), "cscs"),
        ((0.9, 0.8, 0.7, 0.9, 0.8), "csscs"),  # a new generation
        ((0.9, 0.8, 0.85, 0.8), "cscs"),  # whoever goes back has begun anew, and may go on either way
        ((0.1, 0.2, 0.3, 0.4), "csss"),
        ((0.1, 0.2, 0.15), "csc"),
        ((0.5, 0.4, 0.3, 0.9, 0.5), "csscs"),
        ((0.0, -0.1, -0.2), "css"),
    ],
)
def test_times_tell_where_a_generation_begins(times: Sequence[float], pattern: str) -> None:
    steps = graphs_of().run([noisy(number, time=time) for number, time in enumerate(times)], ALWAYS)
    assert hits(steps) == pattern


def test_a_step_after_a_new_beginning_knows_nothing_of_what_was_before() -> None:
    """Bit for bit: an old image never shows in a new one."""
    before = [noisy(number, 2.0) for number in range(4)]
    after = [noisy(number, 0.3) for number in range(5)]
    for rules in ({}, {"taylor_order": 2}):
        graphs = graphs_of(**rules)
        generation, fresh = graphs.begin(), graphs.begin()
        for each in before:
            generation.step(each, NEVER)
        for each, rdt in zip(after, (ALWAYS, NEVER, ALWAYS, NEVER, ALWAYS), strict=True):
            found, expected = generation.step(each, rdt), fresh.step(each, rdt)
            assert found.hit == expected.hit
            assert torch.equal(found.output, expected.output)
            assert torch.equal(found.records[0].nan_to_num(-1), expected.records[0].nan_to_num(-1))


@pytest.mark.parametrize(
    "rows, pattern",
    [
        ([(0.9, 0.5), (0.9, 0.4), (0.9, 0.3)], "css"),  # one of the rows stands still
        ([(0.9, 0.4), (0.9, 0.5), (0.9, 0.6)], "css"),
        ([(0.9, 0.1), (0.8, 0.2), (0.7, 0.3)], "css"),  # each goes its own way
        ([(0.9, 0.1), (0.8, 0.2), (0.7, 0.1)], "csc"),
        ([(0.9, 0.1), (0.9, 0.2), (0.8, 0.2), (0.9, 0.2)], "cssc"),
    ],
)
def test_each_row_has_a_time_of_its_own(rows: Sequence[tuple[float, float]], pattern: str) -> None:
    inputs = [{**noisy(number), "timestep": torch.tensor(row)} for number, row in enumerate(rows)]
    assert hits(graphs_of().run(inputs, ALWAYS)) == pattern


class Timeless(Denoiser):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return super().forward(hidden_states, torch.zeros(1))


def test_without_times_all_calls_are_one_generation() -> None:
    inputs = [{"hidden_states": noisy(number)["hidden_states"]} for number in range(4)]
    graphs = cached(of_model(Timeless(), inputs[0]))
    assert graphs.layouts[0].record.shape == (Record.length(times=0, inputs=1),)
    assert hits(graphs.run([*inputs, inputs[3]], ALWAYS)) == "cssss"


# Slots that nobody named


@pytest.mark.parametrize(
    "times, pattern",
    [
        ((0.9, 0.8, 0.7, 0.6), "ccss"),
        ((0.9, 0.9, 0.8, 0.7), "cccs"),  # two images, of which one goes on: it is not known which
        ((0.9, 0.8, 0.7, 0.9, 0.8, 0.7), "ccsccs"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_in_a_slot_that_nobody_named_two_steps_begin_a_generation(
    times: Sequence[float], pattern: str, ranks: int
) -> None:
    """The first may have been of another image: what is reused is of the second at the earliest."""
    inputs = [noisy(number, time=time) for number, time in enumerate(times)]
    generation = graphs_of(ranks=ranks).begin()
    for each in inputs:
        generation.step(each, ALWAYS, unnamed=True)
    assert hits(generation.steps) == pattern
    model = ByHand(denoiser())
    last = max(number for number, letter in enumerate(pattern) if letter == "c")
    by_formula(generation.steps[-1].output, model.skipped(inputs[-1], model.computed(inputs[last]).added))


def test_extrapolation_in_a_slot_that_nobody_named_begins_with_the_second_step() -> None:
    """Bit for bit as if the first step had not been."""
    graphs = graphs_of(taylor_order=2)
    generation, later = graphs.begin(), graphs.begin()
    generation.step(noisy(0), ALWAYS, unnamed=True)
    for number, rdt in ((1, ALWAYS), (2, ALWAYS), (3, NEVER), (4, ALWAYS), (5, NEVER), (6, ALWAYS)):
        found = generation.step(noisy(number), rdt, unnamed=True)
        expected = later.step(noisy(number), rdt)
        assert torch.equal(found.output, expected.output)
    assert hits(later.steps) == "cscscs"


# What is no number


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order, ranks", [(0, 1), (2, 1), (2, 2)])
def test_what_is_no_number_is_computed_and_not_reused(bad: float, ranks: int, order: int) -> None:
    """The step after it is computed, and from there on all is as if the generation had begun there."""
    graphs = graphs_of(ranks=ranks, taylor_order=order)
    poisoned = noisy(2)
    poisoned["hidden_states"][0, 5] = bad  # a token of the first rank
    rest = [noisy(number, 0.2) for number in range(3, 8)]
    thresholds = (ALWAYS, ALWAYS, NEVER, ALWAYS, ALWAYS)
    generation, fresh = graphs.begin(), graphs.begin()
    for each in (noisy(0), noisy(1), poisoned):
        generation.step(each, ALWAYS)
    assert hits(generation.steps) == "csc"
    assert not generation.steps[-1].output.isfinite().all()
    for each, rdt in zip(rest, thresholds, strict=True):
        found, expected = generation.step(each, rdt), fresh.step(each, rdt)
        assert found.hit == expected.hit
        for one, other in zip(found.outputs, expected.outputs, strict=True):
            assert one.isfinite().all()
            assert torch.equal(one, other)
    assert hits(fresh.steps) == "cscss"


class Gated(Block):
    """What it adds is divided by a gate."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if gate is None else x + (y - x) / gate


class GatedTail(Denoiser):
    """All blocks but the first have the gate."""

    def __init__(self) -> None:
        super().__init__(3, block=Gated)

    def forward(self, hidden_states: Tensor, timestep: Tensor, gate: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x = self.blocks[0](self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1)))
        for block in self.blocks[1:]:
            x = block(x, gate)
        return (self.proj_out(x),)


@cache
def gated(order: int, ranks: int) -> CachedGraphs:
    of = of_model(GatedTail(), {**noisy(0), "gate": torch.ones(BATCH, IMAGE, 1)})
    return cached(of, {"ulysses": ranks} if ranks > 1 else None, taylor_order=order)


@pytest.mark.parametrize("bad", [0.0, math.nan])
@pytest.mark.parametrize("order, ranks", [(0, 1), (2, 2)])
def test_what_is_no_number_in_the_middle_alone_is_not_reused(bad: float, order: int, ranks: int) -> None:
    """The residual that decides is fine, and of two ranks only the first is hit at first."""
    gate = torch.ones(BATCH, IMAGE, 1)
    graphs = gated(order, ranks)
    broken = gate.clone()
    broken[0, 3] = bad
    generation, fresh = graphs.begin(), graphs.begin()
    generation.step({**noisy(0), "gate": gate}, ALWAYS)
    generation.step({**noisy(1), "gate": broken}, NEVER)
    assert not generation.steps[-1].output.isfinite().all()
    assert generation.steps[-1].state[0][0].isfinite().all()
    for number, rdt in ((2, ALWAYS), (3, ALWAYS), (4, NEVER), (5, ALWAYS)):
        found, expected = (each.step({**noisy(number), "gate": gate}, rdt) for each in (generation, fresh))
        assert found.hit == expected.hit
        for output in found.outputs:
            assert torch.equal(output, expected.output)
    assert hits(fresh.steps) == "cscs"


# Options


def test_the_first_steps_are_computed() -> None:
    inputs = [noisy(number) for number in range(5)]
    assert hits(graphs_of(warmup_steps=3).run(inputs, ALWAYS)) == "cccss"
    assert hits(graphs_of(warmup_steps=1).run(inputs, ALWAYS)) == "cssss"


def test_the_first_steps_of_each_generation_are_computed() -> None:
    inputs = [noisy(number) for number in (0, 1, 2, 0, 1, 2, 3)]
    assert hits(graphs_of(warmup_steps=2).run(inputs, ALWAYS)) == "ccsccss"


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "plan, pattern",
    [("1", "cssss"), ("11?1?", "ccscs"), ("?1", "ccsss"), ("1?1?1?1", "cscsc"), ("000", "cssss")],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_are_computed_by_plan(plan: str, pattern: str, ranks: int) -> None:
    inputs = [noisy(number) for number in range(5)]
    assert hits(graphs_of(ranks=ranks, steps=plan).run(inputs, ALWAYS)) == pattern


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_are_skipped_by_plan(ranks: int) -> None:
    """Whatever changed, as long as something is stored and a threshold is set; but not what is no number."""
    inputs = [noisy(number, 100.0) for number in range(6)]
    graphs = graphs_of(ranks=ranks, steps="0010?")
    assert hits(graphs.run(inputs, 1e-9)) == "csc" + "scc"
    assert hits(graphs.run(inputs, NEVER)) == "cccccc"
    assert hits(graphs_of(ranks=ranks, steps="0000", warmup_steps=2).run(inputs[:4], 1e-9)) == "ccss"
    assert hits(graphs_of(ranks=ranks, steps="0000", max_consecutive_hits=1).run(inputs[:4], 1e-9)) == "cscs"
    again = [noisy(number) for number in (0, 1, 2, 0, 1, 2)]
    assert hits(graphs.run(again, 1e-9)) == "csccsc"  # each generation has its plan


# Watching what the first block makes of its input


def modulated(model: nn.Module, inputs: Inputs) -> Tensor:
    """What goes into the first block's first product."""
    found: list[Tensor] = []
    linear = next(module for module in model.blocks[0].modules() if isinstance(module, nn.Linear))  # type: ignore[index,union-attr]
    handle = linear.register_forward_pre_hook(lambda module, given: found.append(given[0].double()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[0]


def changes(watched: Sequence[Tensor]) -> list[float]:
    return [float((new - old).abs().sum() / old.abs().sum()) for old, new in itertools.pairwise(watched)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_modulation_is_what_goes_into_the_first_product(ranks: int) -> None:
    inputs = [noisy(number) for number in range(4)]
    watched = [modulated(denoiser().model, each) for each in inputs]
    steps = graphs_of(ranks=ranks, watch="modulation").run(inputs, NEVER)
    assert [each.ratio for each in steps[1:]] == pytest.approx(changes(watched), rel=1e-4)
    skipping = graphs_of(ranks=ranks, watch="modulation").run(inputs, ALWAYS)
    assert hits(skipping) == "csss"
    model = ByHand(denoiser())
    by_formula(skipping[-1].output, model.skipped(inputs[-1], model.computed(inputs[0]).added))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_block_may_be_skipped_where_the_modulation_decides(ranks: int) -> None:
    """As in TeaCache: what all blocks added stands for all."""
    inputs = [noisy(number) for number in range(3)]
    graphs = graphs_of(ranks=ranks, watch="modulation", first_blocks=0)
    assert graphs.layouts[0].skipped.middle == ("blocks.0", "blocks.1", "blocks.2")
    steps = graphs.run(inputs, ALWAYS)
    assert hits(steps) == "css"
    watched = [modulated(denoiser().model, each) for each in inputs]
    assert [each.ratio for each in steps[1:]] == pytest.approx(
        [ratio_of(later, watched[0]) for later in watched[1:]], rel=1e-4
    )
    model = copy.deepcopy(denoiser().model).double()
    with torch.no_grad():
        entered = [
            model.proj_in(each["hidden_states"].double()) * (1 + each["timestep"].double()[:, None, None])
            for each in inputs
        ]
        left = entered[0]
        for block in model.blocks:
            left = block(left)
        for step, value in zip(steps, entered, strict=True):
            by_formula(step.output, model.proj_out(value + left - entered[0]))


@pytest.mark.parametrize("watch", ["residual", "modulation"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_changes_from_step_to_step_add_up_through_a_polynomial(watch: str, ranks: int) -> None:
    """TeaCache's rule: skipped as long as their sum is below the threshold; a computed step begins anew."""
    inputs = [noisy(number, 0.02) for number in range(8)]
    polynomial = (3.0, -0.5, 0.25)
    graphs = graphs_of(ranks=ranks, watch=watch, coefficients=polynomial)
    computed = graphs.run(inputs, NEVER)
    ratios = [each.ratio for each in computed[1:]]  # of each step to the one before
    distances = [3.0 * ratio**2 - 0.5 * ratio + 0.25 for ratio in ratios]
    limit = 2.5 * sum(distances) / len(distances)
    expected, drift = "c", 0.0
    for distance in distances:
        drift += distance
        expected += "s" if drift < limit else "c"
        drift = drift if drift < limit else 0.0
    assert "ss" in expected
    assert "c" in expected[1:]
    found = graphs.run(inputs, limit)
    assert hits(found) == expected
    assert [each.ratio for each in found[1:]] == pytest.approx(ratios, rel=1e-4)  # skipped steps are compared with, too


@pytest.mark.parametrize("most, pattern", [(1, "cscscscs"), (3, "cssscsss")])
def test_so_many_hits_in_a_row_at_most(most: int, pattern: str) -> None:
    inputs = [noisy(number) for number in range(8)]
    for ranks in (1, 2):
        assert hits(graphs_of(ranks=ranks, max_consecutive_hits=most).run(inputs, ALWAYS)) == pattern


def test_hits_in_a_row_are_counted_anew_after_a_computed_step() -> None:
    generation = graphs_of(max_consecutive_hits=2).begin()
    for number, rdt in enumerate((ALWAYS, ALWAYS, NEVER, ALWAYS, ALWAYS, ALWAYS, ALWAYS)):
        generation.step(noisy(number), rdt)
    assert hits(generation.steps) == "cscsscs"


@pytest.mark.parametrize("factor, ranks", [(2, 1), (7, 1), (5, 2), (1000, 1)])
def test_every_so_manieth_channel_is_compared(factor: int, ranks: int) -> None:
    """None of them but 2 divides the width of 72."""
    graphs = graphs_of(ranks=ranks, downsample_factor=factor)
    channels = -(-WIDTH // factor)
    assert [tuple(layout.state[0].shape) for layout in graphs.layouts] == [(BATCH, IMAGE // ranks, channels)] * ranks
    inputs = [noisy(0), noisy(1)]
    computed, skipped = graphs.run(inputs, ALWAYS)
    assert skipped.ratio == pytest.approx(ratio_by_hand(inputs, factor), rel=1e-4)
    assert skipped.ratio != pytest.approx(ratio_by_hand(inputs), rel=3e-4)
    model = ByHand(denoiser())
    seen = model.computed(inputs[0])
    by_formula(torch.cat([state[0] for state in computed.state], dim=1), seen.residual[..., ::factor])
    by_formula(skipped.output, model.skipped(inputs[1], seen.added))


@dataclass
class Series:
    """TaylorSeer's extrapolation of what the middle adds, by hand: differences over the steps that were computed."""

    order: int
    terms: list[Tensor] = field(default_factory=list)
    at: int = 0

    def computed(self, number: int, added: Tensor) -> None:
        terms = [added]
        for old in self.terms[: self.order]:
            terms.append((terms[-1] - old) / (number - self.at))
        self.terms, self.at = terms, number

    def at_step(self, number: int) -> Tensor:
        distance = number - self.at
        return sum(
            (term * distance**order / math.factorial(order) for order, term in enumerate(self.terms)), torch.zeros(1)
        )


def follow_series(graphs: CachedGraphs, model: ByHand, order: int, pattern: str, inputs: Sequence[Inputs]) -> None:
    """Every step of a generation against the model and the formula."""
    series: dict[int, Series] = {}
    for number, (found, each) in enumerate(zip(follow(graphs, pattern, inputs), inputs, strict=True)):
        seen = model.computed(each)
        expected = seen.output
        if pattern[number] == "s":
            added = tuple(
                series[place].at_step(number) if place in series else None for place in range(len(seen.added))
            )
            expected = model.skipped(each, added)
        else:
            for place, added in enumerate(seen.added):
                if added is not None:
                    series.setdefault(place, Series(order)).computed(number, added)
        for output in found.outputs:
            by_formula(output, expected)


IRREGULAR = "cscsscsssc"  # steps of 2, 3 and 4 from one computed step to the next


@pytest.mark.parametrize("order, ranks", [(0, 1), (1, 1), (2, 1), (2, 2)])
def test_extrapolation(order: int, ranks: int) -> None:
    inputs = [noisy(number % len(TIMES), 0.2, time=1 - number / 20) for number in range(len(IRREGULAR) + 2)]
    graphs = cached(denoiser(3), {"ulysses": ranks} if ranks > 1 else None, taylor_order=order)
    follow_series(graphs, ByHand(denoiser()), order, IRREGULAR + "ss", inputs)
    for gm in graphs.graphs:
        reuse, compute = branches(gm)
        assert writes(compute)
        assert not writes(reuse)
        assert not writes(gm)


def test_an_extrapolation_needs_as_many_computed_steps_as_its_order() -> None:
    """With one computed step there is nothing to extrapolate from; with two a line."""
    inputs = [noisy(number) for number in range(6)]
    orders = {order: follow(graphs_of(taylor_order=order), "csscss", inputs) for order in (0, 1, 2)}
    for number in (1, 2):
        assert torch.equal(orders[0][number].output, orders[2][number].output)
    for number in (4, 5):
        assert torch.equal(orders[1][number].output, orders[2][number].output)
        assert not torch.equal(orders[0][number].output, orders[1][number].output)


def test_a_line_is_extrapolated_exactly() -> None:
    """Where what is added grows evenly with the steps, the first order knows it before it is computed."""
    graphs = cached(
        of_model(Even(), {"hidden_states": image_tokens(WIDTH), "drift": torch.ones(BATCH, 1, 1)}), taylor_order=1
    )
    inputs = [{"hidden_states": image_tokens(WIDTH), "drift": torch.full((BATCH, 1, 1), 1.0 + n)} for n in range(7)]
    for found, each in zip(follow(graphs, "cscssss", inputs), inputs, strict=True):
        with torch.no_grad():
            (exact,) = graphs.of.model(**each)
        if each is not inputs[1]:  # one computed step makes no line
            by_formula(found.output, exact.double())


class Push(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, drift: Tensor | None = None) -> Tensor:
        return x + self.linear(self.norm(x)) * (1 if drift is None else drift)


class Even(nn.Module):
    """Of two blocks the second adds so many times the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Push(), Push()])

    def forward(self, hidden_states: Tensor, drift: Tensor) -> tuple[Tensor]:
        return (self.blocks[1](self.blocks[0](hidden_states), drift),)


def test_several_first_blocks_decide() -> None:
    inputs = [noisy(0), noisy(1)]
    for first in (1, 2):
        graphs = graphs_of(first_blocks=first)
        assert graphs.layouts[0].skipped.middle == tuple(f"blocks.{index}" for index in range(first, 3))
        skipped = graphs.run(inputs, ALWAYS)[1]
        model = ByHand(denoiser(), first=first)
        assert skipped.ratio == pytest.approx(ratio_by_hand(inputs, first=first), rel=1e-4)
        by_formula(skipped.output, model.skipped(inputs[1], model.computed(inputs[0]).added))


KEPT: list[tuple[str, dict[str, int], int, int, int]] = [
    ("flux", {}, 1, 1, 2),
    ("flux", {"ulysses": 2}, 2, 1, 2),
    ("hunyuan_video", {}, 2, 1, 2),
    ("stable_diffusion_3", {}, 1, 1, 2),
    ("cogvideox", {}, 1, 1, 2),
    ("wan", {}, 1, 1, 1),
    ("flux", {}, 2, 0, 1),
]


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("family, mesh, first, last, streams", KEPT)
def test_blocks_that_are_kept_at_both_ends(
    family: str, mesh: dict[str, int], first: int, last: int, streams: int
) -> None:
    """A last block that is computed reads both streams, so that both are stored."""
    graphs = cached_family(family, mesh, first_blocks=first, last_blocks=last, taylor_order=1)
    assert [len(layout.state) for layout in graphs.layouts] == [1 + 2 * streams] * len(graphs.graphs)
    inputs = [step(graphs.of, number) for number in range(6)]
    model = ByHand.of_family(family, graphs.of, first=first, last=last)
    follow_series(graphs, model, 1, "cscsss", inputs)
    residuals = [model.computed(each).residual for each in inputs[:2]]
    ratio = graphs.run(inputs[:2], NEVER)[1].ratio
    assert ratio == pytest.approx(ratio_of(*residuals[::-1]), rel=1e-4)


# Streams that the ranks hold in several forms


def summed(x: Tensor) -> Tensor:
    """Each token sees all before it, which no rank has alone."""
    return x.cumsum(dim=1) / x.shape[1]


class Summing(Block):
    """Ends with what must be computed whole (`mixes`), or with what is each token's own."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.mixes, self.scale = mixes, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + (summed(x) * self.scale if self.mixes else self.scale)


class SomeSumming(Denoiser):
    def __init__(self, which: str, *, before: bool = False) -> None:
        super().__init__(len(which))
        self.blocks = nn.ModuleList(Summing(letter == "s") for letter in which)
        self.first = summed if before else lambda x: x

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x = self.first(self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1)))
        for block in self.blocks:
            x = block(x)
        return (self.proj_out(x),)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", quick([{"ulysses": 2}, {"batch": 2, "ulysses": 2}], {"ulysses": 2}), ids=mesh_name)
@pytest.mark.parametrize(
    "which, before", [("sss", True), ("ttt", True), ("tts", False), ("tss", False), ("stt", False), ("sts", True)]
)
def test_a_stream_that_some_blocks_leave_whole(which: str, before: bool, mesh: dict[str, int]) -> None:
    """Whole behind s, a part on each rank behind t: the residual is taken in a form that both its ends have."""
    of = of_model(SomeSumming(which, before=before))
    inputs = [noisy(number) for number in range(3)]
    computed, skipped, again = follow(cached(of, mesh), "csc", inputs)
    model = ByHand(of)
    expected = [model.computed(each) for each in inputs]
    for found, output in (
        (computed, expected[0].output),
        (skipped, model.skipped(inputs[1], expected[0].added)),
        (again, expected[2].output),
    ):
        for each in found.outputs:
            by_formula(each, output)
    assert skipped.ratio == pytest.approx(ratio_of(expected[1].residual, expected[0].residual), rel=1e-4)


# What is stored, and where it is written

FLOAT = 4
IMAGE_STREAM = {  # batch, tokens, width
    "flux": (3, 48, 64),
    "stable_diffusion_3": (3, 48, 64),
    "wan": (2, 72, 72),
    "cogvideox": (2, 72, 64),
    "hunyuan_video": (2, 72, 64),
    "ltx_video": (2, 72, 72),
    "qwen_image": (2, 48, 64),
    "mochi": (2, 72, 64),
}


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_two_values_as_large_as_the_image_are_stored(family: str) -> None:
    """The first block's residual, and what the middle added to the image: of the text nothing is read any more."""
    (layout,) = cached_family(family).layouts
    batch, tokens, width = IMAGE_STREAM[family]
    assert [tuple(value.shape) for value in layout.state] == [(batch, tokens, width)] * 2
    assert {value.dtype for value in layout.state} == {torch.float32}
    assert layout.state_bytes == 2 * FLOAT * batch * tokens * width


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_rank_stores_its_own_tokens_only(family: str) -> None:
    batch, tokens, width = IMAGE_STREAM[family]
    for layout in cached_family(family, {"ulysses": 2}).layouts:
        assert [tuple(value.shape) for value in layout.state] == [(batch, tokens // 2, width)] * 2
        assert layout.state_bytes == FLOAT * batch * tokens * width


@pytest.mark.slow
def test_bytes_of_uneven_shares() -> None:
    """35 image tokens after 13 of text; two tokens for three ranks."""
    uneven = cached_family("flux", {"ulysses": 2}, UNEVEN["flux"]).layouts
    assert [layout.state_bytes for layout in uneven] == [2 * FLOAT * 2 * tokens * 48 for tokens in (18, 17)]
    empty = cached_family("flux", {"ulysses": 3}, NO_TOKEN).layouts
    assert [layout.state_bytes for layout in empty] == [2 * FLOAT * 3 * tokens * 64 for tokens in (1, 1, 0)]


@pytest.mark.slow
def test_bytes_of_a_batch_axis() -> None:
    batch, tokens, width = IMAGE_STREAM["ltx_video"]
    layouts = cached_family("ltx_video", {"batch": 2, "ulysses": 2}).layouts
    assert [layout.state_bytes for layout in layouts] == [2 * FLOAT * (batch // 2) * (tokens // 2) * width] * 4


def test_options_cost_what_they_store() -> None:
    token = FLOAT * BATCH * IMAGE
    for order in (0, 1, 2):
        (layout,) = graphs_of(taylor_order=order).layouts
        assert layout.state_bytes == token * WIDTH * (2 + order)
    (layout,) = graphs_of(downsample_factor=5).layouts
    assert layout.state_bytes == token * (15 + WIDTH)
    image, text = (3 * length * 64 for length in (48, 12))
    (layout,) = cached_family("flux", last_blocks=1, first_blocks=1, taylor_order=1).layouts
    assert layout.state_bytes == FLOAT * (image + 2 * (image + text))


def branches(gm: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    (conditional,) = gm.graph.find_nodes(op="call_function", target=COND)
    reuse, compute = (gm.get_submodule(branch.target) for branch in conditional.args[1:3])
    return reuse, compute


def writes(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def collectives(gm: fx.GraphModule) -> int:
    return sum(
        number for name, number in count(gm).items() if name.startswith("_c10d_functional.") and "wait" not in name
    )


ON_TWO_RANKS = list(itertools.product(TWO_FAMILIES, (2,)))
ON_ONE_OR_TWO = list(itertools.product(ALL_FAMILIES, (1, 2)))


@pytest.mark.whole
@pytest.mark.parametrize("family, ranks", quick(ON_ONE_OR_TWO, *ON_TWO_RANKS, slow=ON_ONE_OR_TWO))
def test_a_skipped_step_copies_nothing(family: str, ranks: int) -> None:
    """It adds what is stored and does nothing else; only the computing branch writes, once to each stored value."""
    graphs = cached_family(family, {"ulysses": 2} if ranks > 1 else {})
    for gm, layout in zip(graphs.graphs, graphs.layouts, strict=True):
        reuse, compute = branches(gm)
        assert dict(count(reuse)) == {"add.Tensor": 1, "ones.default": 1}
        inputs = compute.graph.find_nodes(op="placeholder")
        written = writes(compute)
        assert [str(node.target) for node in written] == ["aten.copy_.default"] * len(layout.state)
        state = [node for node in inputs if node.name.startswith("cache_")]
        assert [node.args[0] for node in written] == state[: len(layout.state)]
        assert not writes(gm)
        assert not writes(reuse)


@pytest.mark.parametrize("family", TWO_FAMILIES)
def test_the_exchanges_of_skipped_blocks_are_skipped(family: str) -> None:
    """Of the graph's own exchanges those of the middle are in the computing branch; the decision is one more."""
    graphs = cached_family(family, {"ulysses": 2})
    for gm, plain in zip(graphs.graphs, sharded(family, 2).graphs, strict=True):
        reuse, compute = branches(gm)
        assert count(gm)["_c10d_functional.all_reduce.default"] == 1
        assert collectives(reuse) == 0
        assert collectives(compute) >= 4
        assert collectives(gm) + collectives(compute) == collectives(plain) + 1


def test_one_rank_asks_nobody() -> None:
    gm = graphs_of().graphs[0]
    assert collectives(gm) == collectives(branches(gm)[1]) == 0


def test_what_the_graph_takes_and_gives_besides() -> None:
    graphs = cached_family("flux", {"ulysses": 2})
    for gm, layout in zip(graphs.graphs, graphs.layouts, strict=True):
        inputs = gm.graph.find_nodes(op="placeholder")
        own = len(graphs.of.arguments)
        assert [node.name for node in inputs[own:]] == [
            "cache_control",
            "cache_record",
            "cache_previous",
            "cache_state_0",
        ]
        given = [tuple(node.meta["val"].shape) for node in inputs[own:]]
        assert given == [tuple(value.shape) for value in (layout.control, layout.record, *layout.state)]
        assert layout.control.shape == (4,)  # threshold, two facts, and what to do in any step
        # timestep and guidance of three rows; they, the sample, two texts and two tables of positions
        assert layout.record.shape == (Record.length(times=2 * 3, inputs=7),)
        assert not any(value.is_inference() for value in layout.state)


# No trace


def traces(gm: fx.GraphModule) -> list[str]:
    """Whatever of the cache is in a graph."""
    return [
        node.name
        for node in gm.graph.nodes
        if node.target is COND or node.name.startswith("cache_") or any("cache" in key for key in node.meta)
    ] + [name for name, _ in gm.named_children() if name in (REUSE, COMPUTE)]


def test_without_the_option_there_is_no_trace_of_the_cache() -> None:
    of = captured("flux")
    for mesh in ({}, {"ulysses": 2}):
        assert len(traces(cached_family("flux", mesh).graphs[0])) > 10
    for gm in (*not_cached(of).graphs, *sharded("flux", 2).graphs):
        assert traces(gm) == []
        assert len(gm.graph.find_nodes(op="placeholder")) == len(of.arguments)


class Blockless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(hidden_states)),)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_graph_without_blocks_is_as_if_no_cache_was_asked_for(ranks: int) -> None:
    of = of_model(Blockless(), {"hidden_states": image_tokens(WIDTH)})
    mesh = {"ulysses": ranks} if ranks > 1 else None
    graphs = cached(of, mesh)
    assert graphs.layouts == []
    for gm, plain in zip(graphs.graphs, not_cached(of, mesh).graphs, strict=True):
        assert traces(gm) == []
        assert gm.print_readable(print_output=False) == plain.print_readable(print_output=False)
