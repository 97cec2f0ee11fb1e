"""The first block cache on real ranks: they decide together, and what comes out is what one rank makes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from denoising import STEPS, Cut, Prompts, build, compiled, generate, prompts
from pool import Pool
from quick import quick
from random_tensors import draw, randomise
from small_models import Denoiser, image_tokens
from torch import Tensor, nn

from paracompile import cache_context, cache_stats, init_mesh, set_rdt
from paracompile.report.report import Report

Hits = dict[str, list[bool]]

OPTIONS: dict[str, Any] = {"timeout": 60}
SKIPPING = {"max_consecutive_hits": 2}


def hits(model: nn.Module) -> Hits:
    return {name: [step.hit for step in steps] for name, steps in cache_stats(model).slots.items()}


def differences(model: nn.Module) -> list[float | None]:
    return [step.difference for steps in cache_stats(model).slots.values() for step in steps]


def assert_like(found: Tensor, expected: Tensor, rtol: float = 1e-3) -> None:
    """Equal up to the rounding of several steps."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < rtol * expected.abs().max()


# As one rank


def whole(rank: int, family: str, naming: str, options: dict[str, Any]) -> tuple[Tensor, Hits, list[float | None], int]:
    """The image of one generation, what was skipped, what was compared, and the ranks of the report."""
    reports: list[Report] = []
    model = compiled(build(family), **OPTIONS, **options, report=reports.append)
    image = generate(model, prompts(family, seed=1), naming=naming)
    (report,) = reports
    return image, hits(model), differences(model), report.ranks


@pytest.mark.slow
@pytest.mark.parametrize("family, naming", quick([("flux", "diffusers"), ("wan", "unnamed")], ("wan", "unnamed")))
def test_two_ranks_skip_what_one_skips(family: str, naming: str, two_ranks: Pool) -> None:
    expected, skipped, compared, ranks = whole(0, family, naming, SKIPPING)
    assert ranks == 1
    assert sum(map(sum, skipped.values())) > 0
    for image, of_rank, compared_of_rank, ranks in two_ranks.run(whole, family, naming, SKIPPING):
        assert ranks == 2
        assert of_rank == skipped
        assert_like(image, expected)
        for one, other in zip(compared_of_rank, compared, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or abs(one - other) < 1e-3 * other


def on_a_mesh(rank: int) -> tuple[Tensor, Hits, list[float | None]]:
    model = compiled(build("wan"), **OPTIONS, **SKIPPING, mesh=init_mesh("cpu", max_ring_dim_size=2))
    return generate(model, prompts("wan", seed=1), naming="diffusers"), hits(model), differences(model)


@pytest.mark.full
def test_four_ranks_on_two_axes(four_ranks: Pool) -> None:
    expected, skipped, _, _ = whole(0, "wan", "diffusers", SKIPPING)
    results = four_ranks.run(on_a_mesh)
    for image, of_rank, compared in results:
        assert of_rank == skipped
        assert compared == results[0][2]
        assert_like(image, expected)


def quantised(rank: int) -> tuple[Tensor, Hits]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = build("wan")
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    model = compiled(module, **OPTIONS, **SKIPPING)
    return generate(model, prompts("wan", seed=1), naming="diffusers"), hits(model)


@pytest.mark.full
def test_quantised_weights(two_ranks: Pool) -> None:
    expected, skipped = quantised(0)
    assert sum(map(sum, skipped.values())) > 0
    for image, of_rank in two_ranks.run(quantised):
        assert of_rank == skipped
        assert_like(image, expected, rtol=0.1)  # rounding decides between two neighbouring whole numbers


# What ranks do not have in common


def with_own_noise(rank: int) -> tuple[Tensor, Tensor, Hits]:
    """The image from this rank's noise, and the last output, which is broadcast."""
    of = prompts("wan", seed=1)
    own = Prompts(of.noise if rank == 0 else draw(*of.noise.shape, seed=99), of.scale, of.conditioning)
    model = compiled(build("wan"), **OPTIONS, **SKIPPING)
    image = generate(model, own, naming="diffusers")
    with torch.no_grad():
        times = torch.full((len(own.noise),), 500.0)
        (output,) = model(hidden_states=own.noise, timestep=times, **own.conditioning["cond"])
    return image, output, hits(model)


@pytest.mark.slow
def test_ranks_that_are_given_other_noise_go_with_the_first(two_ranks: Pool) -> None:
    expected, _, _ = with_own_noise(0)
    (image, output, skipped), (_, other_output, other_skipped) = two_ranks.run(with_own_noise)
    assert_like(image, expected)
    assert torch.equal(output, other_output)
    assert skipped == other_skipped
    assert sum(map(sum, skipped.values())) > 0


# By rank, with what follows; None: the threshold of the options, which all but forbids to skip
THRESHOLDS: list[tuple[tuple[float | None, float | None], bool]] = [
    ((None, 0), False),
    ((None, 1e9), True),
    ((0, 1e9), False),
    ((1e9, 1e-9), True),
    ((1e-9, None), False),
]


def with_own_thresholds(rank: int) -> list[tuple[Tensor, Hits, list[float | None]]]:
    found = []
    for thresholds, _ in THRESHOLDS:
        model, rdt = compiled(build("wan"), **OPTIONS, rdt=1e-9), thresholds[rank]
        if rdt is not None:
            set_rdt(model, rdt)
        found.append((generate(model, prompts("wan", seed=1), naming="diffusers"), hits(model), differences(model)))
    return found


@pytest.mark.slow
def test_set_rdt_on_one_rank_only_is_still_one_decision(two_ranks: Pool) -> None:
    """The mean threshold counts; 0 on any rank means that all compute."""
    for first, second, (_, skips) in zip(*two_ranks.run(with_own_thresholds), THRESHOLDS, strict=True):
        assert first[1] == second[1]
        assert first[2] == second[2]
        assert torch.equal(first[0], second[0])
        assert any(map(any, first[1].values())) == skips


def with_own_names(rank: int) -> Hits:
    """One rank names its calls, and the other does not: it computes a second step, and so do both."""
    model = compiled(build("wan"), **OPTIONS)
    generate(model, prompts("wan", seed=1), naming="paracompile" if rank else "unnamed")
    return hits(model)


@pytest.mark.slow
def test_names_on_one_rank_only_are_still_one_decision(two_ranks: Pool) -> None:
    for of_rank in two_ranks.run(with_own_names):
        assert list(of_rank.values()) == [[False, False, True, True, True]] * 2


# A generation after another


def after_others(rank: int) -> list[tuple[Tensor, Tensor, Hits]]:
    """An image after generations that were cut off in the first and the third step; the same image alone."""
    of, other = prompts("wan", seed=1), prompts("wan", seed=2)
    results = []
    for naming in ("unnamed", "diffusers"):
        model, alone = (compiled(build("wan"), **OPTIONS, **SKIPPING) for _ in range(2))
        for cut in ((0, "uncond"), (2, "cond")):
            with contextlib.suppress(Cut):
                generate(model, Prompts(other.noise, of.scale, of.conditioning), naming=naming, cut=cut)
        found = generate(model, of, naming=naming)
        results.append((found, generate(alone, of, naming=naming), hits(model)))
    return results


@pytest.mark.slow
def test_a_generation_after_an_exception_on_every_rank_equals_it_alone(two_ranks: Pool) -> None:
    for results in two_ranks.run(after_others):
        for found, alone, of_rank in results:
            assert torch.equal(found, alone)
            assert any(map(any, of_rank.values()))


# Inductor


def small_generation(rank: int, compiler: str) -> list[tuple[Tensor, Hits]]:
    """The outputs of a few steps and what was skipped: skipping, and computing all."""
    model = compiled(randomise(Denoiser(2)), **OPTIONS, **SKIPPING, compiler=compiler)
    found = []
    for rdt in (1e9, 0):
        set_rdt(model, rdt)
        with torch.no_grad(), cache_context("cond"):
            outputs = [model(image_tokens(seed=step), torch.full((2,), 0.9 - 0.1 * step))[0] for step in range(STEPS)]
        found.append((torch.stack(outputs), hits(model)))
    return found


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_inductor(ranks: int, two_ranks: Pool) -> None:
    expected = small_generation(0, "eager")
    torch._dynamo.reset()
    assert [sum(skipped["cond"]) for _, skipped in expected] == [3, 0]
    for found in [small_generation(0, "inductor")] if ranks == 1 else two_ranks.run(small_generation, "inductor"):
        for (outputs, skipped), (right, as_eagerly) in zip(found, expected, strict=True):
            assert skipped == as_eagerly
            assert_like(outputs, right, rtol=1e-4)
