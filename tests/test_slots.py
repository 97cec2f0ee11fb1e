"""Which calls share state: those of one name, or of the very same conditioning; in doubt none, and nothing is kept."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from denoising import (
    NAMINGS,
    PASSES,
    STEPS,
    Cut,
    Prompts,
    build,
    compiled,
    generate,
    prompts,
    slots_of,
    steps_of,
)
from quick import quick
from random_tensors import draw, randomise
from small_models import Transformer, image_tokens
from torch import Tensor, nn

from paracompile import OptionError, cache_context, cache_stats, reset_cache, set_rdt
from paracompile.runtime.slots import UNKNOWN, CallSigns, begin_generation, current_name, end_step

pytestmark = pytest.mark.shares_graphs

UNNAMED_HITS = [False, False, True, True, True]


def fresh() -> nn.Module:
    return compiled(build("wan"))


@cache
def noises() -> list[Tensor]:
    """Samples of a trajectory, of one shape."""
    return [draw(*prompts("wan").noise.shape, seed=seed) for seed in range(STEPS)]


def call(model: nn.Module, step: int, text: Tensor, sample: Tensor | None = None) -> Tensor:
    """One call at the time of this step."""
    sample = noises()[step] if sample is None else sample
    times = torch.full((len(sample),), 900.0 - 100.0 * step)
    result: Tensor
    (result,) = model(hidden_states=sample, timestep=times, encoder_hidden_states=text, return_dict=False)
    return result


def text(seed: int = 1) -> Tensor:
    return draw(*prompts("wan").conditioning["cond"]["encoder_hidden_states"].shape, seed=seed)


def hits(model: nn.Module) -> dict[str, list[bool]]:
    return {name: [step.hit for step in steps] for name, steps in cache_stats(model).slots.items()}


def computed(step: int, conditioning: Tensor, sample: Tensor | None = None) -> Tensor:
    model = fresh()
    set_rdt(model, 0)
    return call(model, step, conditioning, sample)


# Names


def test_the_innermost_name_counts_and_ends_with_its_block() -> None:
    assert current_name() is None
    with cache_context("outer"):
        with contextlib.suppress(Cut), cache_context("inner"):
            assert current_name() == "inner"
            raise Cut
        assert current_name() == "outer"
    assert current_name() is None


def test_diffusers_names_are_heard_by_the_model_and_by_what_is_compiled() -> None:
    model = fresh()
    for owner in (model, model._orig_mod):
        with cache_context("ours"), owner.cache_context("theirs"):
            assert current_name() == "theirs"
        assert current_name() is None


@pytest.mark.parametrize("name", [None, "", 1, b"cond", True])
def test_no_name(name: Any) -> None:
    with pytest.raises(OptionError, match='give a name, such as "cond"'):
        cache_context(name)


@torch.no_grad()
def test_a_name_is_a_slot_whatever_the_conditioning_is() -> None:
    """New tensors at each call, as a loop of one's own may make them."""
    model = fresh()
    for step in range(STEPS):
        for seed, name in enumerate(PASSES):
            with cache_context(name):
                call(model, step, text(seed))
    assert hits(model) == {name: [False, True, True, True, True] for name in PASSES}


@pytest.mark.parametrize("naming", NAMINGS)
def test_passes_in_turn_equal_each_alone(naming: str) -> None:
    """The loop combines the passes, so each step of either must be right for the result to be."""
    of, both = prompts("wan"), fresh()
    loop = steps_of(both, of, naming=naming)
    alone = {name: fresh() for name in PASSES}
    sample = of.noise
    for step, after in enumerate(loop):
        found = {}
        for name in PASSES:
            times = torch.tensor(_times()[step]).expand(len(sample)).clone()
            context = contextlib.nullcontext() if naming == "unnamed" else cache_context(name)
            with context, torch.no_grad():
                (found[name],) = alone[name](hidden_states=sample, timestep=times, **of.conditioning[name])
        guided = found["uncond"] + 2.0 * (found["cond"] - found["uncond"])
        sigmas = [time / 1000 for time in [*_times(), 0.0]]
        sample = sample + (sigmas[step + 1] - sigmas[step]) * guided
        assert torch.allclose(sample, after, rtol=1e-4, atol=1e-4)
        sample = after
    assert cache_stats(both).hits == sum(cache_stats(model).hits for model in alone.values()) > 0


def _times() -> list[float]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return [float(time) for time in scheduler.timesteps]


# Without a name


@torch.no_grad()
def test_two_conditionings_in_turn_never_share() -> None:
    model, first, second = fresh(), text(1), text(2)
    apart = {1: fresh(), 2: fresh()}
    for step in range(STEPS):
        for seed, given in ((1, first), (2, second)):
            assert torch.equal(call(model, step, given), call(apart[seed], step, given))
    assert hits(model) == {"call 1": UNNAMED_HITS, "call 2": UNNAMED_HITS}


@torch.no_grad()
def test_a_conditioning_that_was_written_to_is_another() -> None:
    model, given = fresh(), text(1)
    for step in range(3):
        call(model, step, given)
    assert hits(model) == {"call 1": [False, False, True]}
    given.copy_(text(2))
    assert torch.equal(call(model, 3, given), computed(3, given))
    assert len(slots_of(model)) == 1  # the former text cannot come again


@pytest.mark.slow
def test_one_buffer_for_two_conditionings_never_shares_in_inference_mode() -> None:
    """Tensors made there do not tell that they were written to: only the times that come twice do."""
    model, exact = fresh(), fresh()
    set_rdt(exact, 0)
    with torch.inference_mode():
        buffer = text(1) + 0
        assert buffer.is_inference()
        for step in range(STEPS):
            for seed in (1, 2):
                buffer.copy_(text(seed))
                assert torch.equal(call(model, step, buffer), call(exact, step, buffer))
    assert cache_stats(model).hits == 0


def test_one_conditioning_is_reused_in_inference_mode() -> None:
    model = fresh()
    with torch.inference_mode():
        given = text(1) + 0
        for step in range(STEPS):
            call(model, step, given)
    assert hits(model) == {"call 1": UNNAMED_HITS}


@torch.no_grad()
def test_new_tensors_at_each_call_are_never_reused_nor_kept() -> None:
    model = fresh()
    for step in range(STEPS):
        given = text(1)
        assert torch.equal(call(model, step, given), computed(step, given))
        del given
        assert len(slots_of(model)) == 1
    assert cache_stats(model).hits == 0


@torch.no_grad()
def test_of_many_conditionings_the_latest_are_kept() -> None:
    model, given = fresh(), [text(seed) for seed in range(10)]
    for step in range(3):
        for each in given:
            assert torch.equal(call(model, step, each), computed(step, each))
            assert len(slots_of(model)) <= 8
    assert cache_stats(model).hits == 0  # each was dropped before it came again
    reset_cache(model)
    for step in range(STEPS):
        for each in given[:8]:
            call(model, step, each)
    assert hits(model) == {f"call {number}": UNNAMED_HITS for number in range(1, 9)}


@torch.no_grad()
def test_a_name_takes_no_state_of_a_call_without_one() -> None:
    model, given = fresh(), text(1)
    for step in range(3):
        call(model, step, given)
    with cache_context("call 1"):
        assert torch.equal(call(model, 3, given), computed(3, given))


@pytest.mark.parametrize("named", [True, False])
def test_what_several_calls_of_the_first_step_wrote_to_is_nobody_s(named: bool) -> None:
    """Two calls a step of one name, or without one and of one conditioning, which only the second step tells apart."""
    model = fresh()
    one = text()
    conditioning = (one, text(2)) if named else (one, one)
    generation = begin_generation()
    for step in range(4):
        for place in range(2):
            with cache_context("cond") if named else contextlib.nullcontext():
                found = call(model, step, conditioning[place], noises()[step] * (1 - 2 * place))
            if step == 1:
                assert torch.equal(found, computed(step, conditioning[place], noises()[step] * (1 - 2 * place)))
        end_step()
    generation.over = True
    assert list(hits(model).values()) == [[False, False, False, True, True], [False, True, True]]


class Timed(Transformer):
    """Knows a time, and no conditioning."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * timestep.reshape(-1, 1, 1))


@torch.no_grad()
def test_calls_without_conditioning_are_not_told_apart_unless_they_are_named() -> None:
    torch._dynamo.reset()
    module = randomise(Timed(3))
    model = compiled(module)
    steps = [(image_tokens(seed=step), torch.full((2,), 0.9 - 0.1 * step)) for step in range(4)]
    expected = [module(*step) for step in steps]
    for step, right in zip(steps, expected, strict=True):
        assert torch.allclose(model(*step), right, rtol=1e-4, atol=1e-5)
    assert cache_stats(model).hits == 0
    assert set(cache_stats(model).slots) == {UNKNOWN}
    assert len(slots_of(model)) == 1
    with cache_context("all"):
        for step in steps:
            model(*step)
    assert hits(model)["all"] == [False, True, True, True]
    torch._dynamo.reset()


@torch.no_grad()
def test_without_a_time_nothing_is_told_apart() -> None:
    """A generation that follows another could not be seen."""

    class Conditioned(Transformer):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + text.mean()

    torch._dynamo.reset()
    model, given = compiled(randomise(Conditioned(3))), draw(2, 5, 3)
    for step in range(4):
        model(image_tokens(seed=step), given)
    assert cache_stats(model).hits == 0
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_time_for_each_token_is_a_time() -> None:
    """Wan 2.2 takes one; the first frame's, which is given, stays 0."""
    torch._dynamo.reset()
    of = prompts("wan")
    tokens = of.noise[0, 0].numel() // 4

    def times(step: int) -> Tensor:
        return torch.cat(
            [torch.zeros(len(of.noise), 24), torch.full((len(of.noise), tokens - 24), 900 - 100.0 * step)], 1
        )

    def run(model: nn.Module, naming: str, noise: list[Tensor], steps: int = STEPS) -> list[Tensor]:
        context = cache_context("cond") if naming == "named" else contextlib.nullcontext()
        with context:
            return [model(noise[n], timestep=times(n), **of.conditioning["cond"])[0] for n in range(steps)]

    for naming in ("named", "unnamed"):
        model, alone = fresh(), fresh()
        run(model, naming, noises()[::-1])
        run(model, naming, noises()[::-1], steps=1)
        for found, right in zip(run(model, naming, noises()), run(alone, naming, noises()), strict=True):
            assert torch.equal(found, right)
        assert cache_stats(alone).hits > 0
    torch._dynamo.reset()


# What is freed


def references(model: nn.Module) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(value) for slot in slots_of(model) for value in slot.state]


def freed(kept: list[weakref.ref[Tensor]]) -> bool:
    gc.collect()
    assert kept
    return all(reference() is None for reference in kept)


ENDINGS = ("reset_cache", "diffusers", "set_rdt", "the model is gone", "Dynamo is reset")


@pytest.mark.slow
@torch.no_grad()
def test_state_of_a_conditioning_that_is_gone_goes_with_the_next() -> None:
    model, first, second = fresh(), text(1), text(2)
    call(model, 0, first)
    kept = references(model)
    call(model, 0, second)
    assert not freed(kept)
    del first
    call(model, 0, text(3))
    assert freed(kept)


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "ending, naming",
    quick(
        product(ENDINGS, NAMINGS),
        *((ending, "unnamed") for ending in ENDINGS),
        *(("reset_cache", naming) for naming in NAMINGS),
    ),
)
def test_state_is_freed_when_a_generation_ends(naming: str, ending: str) -> None:
    model = fresh()
    generate(model, prompts("wan"), naming=naming, steps=2)
    kept = references(model)
    assert len(kept) == 2 * 2  # the residual of the first block, and of the others, of each pass
    if ending == "reset_cache":
        reset_cache(model)
    elif ending == "diffusers":
        model._reset_stateful_cache()
    elif ending == "set_rdt":
        set_rdt(model, 1.0)
    elif ending == "the model is gone":
        del model
    else:
        torch._dynamo.reset()
    assert freed(kept)


@pytest.mark.slow
def test_state_belongs_to_the_model_and_not_to_what_is_compiled() -> None:
    first, second = fresh(), fresh()
    generate(first, prompts("wan"), steps=2)
    generate(second, prompts("wan"), steps=2)
    kept, others = references(first), references(second)
    del first
    assert freed(kept)
    assert not freed(others)


# The signs themselves


def test_signs_hold_no_tensor_alive() -> None:
    signs = CallSigns((0, 2))
    arguments = [torch.ones(2), torch.ones(3), torch.ones(4)]
    last = signs.of(arguments)
    assert last is not None
    for same in (arguments, [arguments[0], torch.zeros(3), arguments[2]]):
        following = signs.of(same)
        assert following is not None
        assert following.continues(last)
    other = signs.of([arguments[0], arguments[1], arguments[2].clone()])
    assert other is not None
    assert not other.continues(last)
    assert last.alive()
    arguments[2].add_(1)
    assert not last.alive()
    reference = weakref.ref(arguments[0])
    del same
    arguments.clear()
    assert reference() is None
    assert CallSigns(()).of([torch.ones(2)]) is None


def test_a_generation_of_equal_prompts_is_no_continuation() -> None:
    """Equal values in new tensors: another generation, for all that is known."""
    model = fresh()
    first = prompts("wan", seed=1)
    generate(model, first, steps=3)
    equal = Prompts(first.noise, first.scale, prompts("wan", seed=1).conditioning)
    before = cache_stats(model).steps
    next(steps_of(model, equal))
    assert cache_stats(model).steps == before + 2
    assert cache_stats(model).hits == 2


# At the same time


@pytest.mark.parametrize("naming", quick(NAMINGS, "unnamed"))
def test_loops_in_two_threads_share_nothing(naming: str) -> None:
    """Step by step in turn, in copies of one context, under the same names and with the very same conditioning."""
    model = fresh()
    of = [Prompts(noise, prompts("wan").scale, prompts("wan", seed=1).conditioning) for noise in noises()[:2]]
    alone = [generate(fresh(), each, naming=naming) for each in of]
    generate(model, of[0], naming=naming)  # this thread has state, too
    turns = threading.Barrier(2, timeout=60)

    def loop(number: int) -> Tensor:
        for sample in steps_of(model, of[number], naming=naming):
            last = sample
            turns.wait()
        return last

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(contextvars.copy_context().run, loop, number) for number in range(2)]
        found = [each.result() for each in runs]
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
    gc.collect()
    assert len(slots_of(model)) == 2  # of this thread: those of the others are gone with them
