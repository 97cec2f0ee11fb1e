"""No image depends on the one before: every generation equals, bit for bit, the same one alone in a fresh state.

"Alone" is the first generation of a model object that was never called. Every loop skips some steps, and a test holds
that skipping is seen in the result, so a leak would be.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ALWAYS, NAMINGS, PASSES, STEPS, Cut, Prompts, build, compiled, generate, prompts, steps_of
from diffusers import CacheMixin
from families import ALL_FAMILIES
from torch import Tensor, nn

from paracompile import cache_stats, set_rdt

pytestmark = pytest.mark.shares_graphs

OPTIONS: dict[str, Any] = {"max_consecutive_hits": 2, "taylor_order": 1}
WITHOUT_CONTEXT = ("stable_diffusion_3",)
HITS = [False, True, True, False, True]  # of one pass
UNNAMED_HITS = [False, False, True, True, False]  # its first two steps are always computed


def hits_of(naming: str) -> list[bool]:
    return UNNAMED_HITS if naming == "unnamed" else HITS


all_namings = pytest.mark.parametrize("naming", NAMINGS)


THOROUGH = ("flux", "stable_diffusion_3")  # with diffusers' cache_context and without; what is tested knows no family
OTHERS = [name for name in ALL_FAMILIES if name not in THOROUGH]


@pytest.fixture(scope="module", params=[*THOROUGH, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def fresh(family: str, **options: Any) -> nn.Module:
    """A model that was never called; what is compiled for one is used by all."""
    return compiled(build(family), **{**OPTIONS, **options})


@cache
def alone(family: str, seed: int, naming: str = "unnamed") -> Tensor:
    return generate(fresh(family), prompts(family, seed), naming=naming)


def skip_without_context(family: str, naming: str) -> None:
    if naming == "diffusers" and family in WITHOUT_CONTEXT:
        pytest.skip("diffusers gives this model no cache_context")


def test_which_models_have_a_cache_context(family: str) -> None:
    assert isinstance(build(family), CacheMixin) == (family not in WITHOUT_CONTEXT)


@pytest.mark.sampled(1)
@all_namings
def test_steps_are_skipped_and_it_shows(family: str, naming: str) -> None:
    skip_without_context(family, naming)
    model, of = fresh(family), prompts(family)
    result = generate(model, of, naming=naming)
    stats = cache_stats(model)
    names = PASSES if naming != "unnamed" else ("call 1", "call 2")
    found = {name: [step.hit for step in steps] for name, steps in stats.slots.items()}
    assert found == dict.fromkeys(names, hits_of(naming))
    set_rdt(model, 0)
    computed = generate(model, of, naming=naming)
    assert cache_stats(model).hits == 0
    assert (result - computed).abs().max() > 1e-3 * computed.abs().max()


@pytest.mark.sampled(4)
@all_namings
@pytest.mark.parametrize("same", [True, False], ids=["same prompts", "other prompts"])
def test_after_a_whole_generation(family: str, naming: str, same: bool) -> None:
    skip_without_context(family, naming)
    model, of = fresh(family), prompts(family, seed=1)
    generate(model, of if same else prompts(family, seed=2), naming=naming)
    assert torch.equal(generate(model, of, naming=naming), alone(family, 1, naming))
    assert cache_stats(model).hits >= 2 * sum(hits_of(naming))


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_after_a_whole_generation(name: str) -> None:
    torch._dynamo.reset()
    model, of = fresh(name), prompts(name, seed=1)
    generate(model, prompts(name, seed=2), naming="diffusers")
    assert torch.equal(generate(model, of, naming="diffusers"), alone(name, 1, "diffusers"))
    assert cache_stats(model).hits >= 2 * sum(HITS)  # diffusers forgets at the beginning of a generation


@pytest.mark.sampled(8)
@all_namings
@pytest.mark.parametrize("cut", [(0, "uncond"), (1, "cond"), (2, "cond"), (2, "uncond")], ids=str)
def test_after_one_that_was_cut_off(family: str, naming: str, cut: tuple[int, str]) -> None:
    """Of other noise, with the very same tensors as prompts: nothing but the times tells the two apart."""
    skip_without_context(family, naming)
    model, of = fresh(family), prompts(family, seed=1)
    other = Prompts(prompts(family, seed=2).noise, of.scale, of.conditioning)
    with pytest.raises(Cut):
        generate(model, other, naming=naming, cut=cut)
    assert torch.equal(generate(model, of, naming=naming), alone(family, 1, naming))


@all_namings
def test_after_a_warm_up_of_one_step(family: str, naming: str) -> None:
    """Its only time is the first of the next generation as well."""
    skip_without_context(family, naming)
    model, of = fresh(family), prompts(family, seed=1)
    other = Prompts(prompts(family, seed=2).noise, of.scale, of.conditioning)
    for _ in range(2):
        generate(model, other, naming=naming, steps=1)
    assert torch.equal(generate(model, of, naming=naming), alone(family, 1, naming))


def test_set_rdt_between_steps_starts_afresh(family: str) -> None:
    model, of = fresh(family), prompts(family, seed=1)
    generate(model, of)
    set_rdt(model, 0.5 * ALWAYS)
    assert torch.equal(generate(model, of), alone(family, 1))
    loop = steps_of(model, of)
    for _ in range(2):
        next(loop)
    set_rdt(model, ALWAYS)
    *_, last = loop
    hits = [step.hit for step in cache_stats(model).slots["call 1"]]
    assert hits == [False, False, True]  # of the three steps since
    assert torch.isfinite(last).all()


@all_namings
def test_two_models_in_turn_step_by_step(family: str, naming: str) -> None:
    skip_without_context(family, naming)
    models = [fresh(family), fresh(family)]
    given = [prompts(family, seed=1), prompts(family, seed=2)]
    loops = [steps_of(model, of, naming=naming) for model, of in zip(models, given, strict=True)]
    for _ in range(STEPS):
        results = [next(loop) for loop in loops]
    for seed, result, model in zip((1, 2), results, models, strict=True):
        assert torch.equal(result, alone(family, seed, naming))
        assert cache_stats(model).hits == 2 * sum(hits_of(naming))


def test_two_images_of_one_prompt_in_turn_never_share(family: str) -> None:
    """Nothing but the sample tells the calls apart, so all of them compute."""
    model, of = fresh(family), prompts(family, seed=1)
    given = [of, Prompts(prompts(family, seed=2).noise, of.scale, of.conditioning)]
    loops = [steps_of(model, each, every_pass=("cond",)) for each in given]
    for _ in range(STEPS):
        results = [next(loop) for loop in loops]
    computing = fresh(family)
    set_rdt(computing, 0)
    for result, each in zip(results, given, strict=True):
        assert torch.equal(result, generate(computing, each, every_pass=("cond",)))


# Other shapes

SIZES: dict[str, list[dict[str, Any]]] = {  # batch, resolution, prompt length
    "flux": [{"batch": 2}, {"image": (4, 6)}, {"text": 16}],
    "stable_diffusion_3": [{"batch": 2}, {"size": (8, 12)}, {"text": 16}],
    "wan": [{"batch": 3}, {"size": (3, 4, 8)}, {"text": 16}],
    "cogvideox": [{"batch": 3}, {"size": (3, 4, 8)}],
    "hunyuan_video": [{"batch": 3}, {"size": (3, 4, 8)}, {"text": 16}],
    "ltx_video": [{"batch": 3}, {"size": (3, 2, 8)}, {"text": 16}],
    "qwen_image": [{"batch": 3}, {"image": (4, 6)}, {"text": 16}],
    "mochi": [{"batch": 3}, {"size": (3, 4, 8)}],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, sizes",
    [
        pytest.param(family, sizes, marks=[] if sizes is SIZES["wan"][1] else pytest.mark.full, id=f"{family}-{sizes}")
        for family, changes in SIZES.items()
        for sizes in changes
    ],
)
def test_after_a_change_of_shape_and_back(family: str, sizes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, of, small = fresh(family), prompts(family, seed=1), prompts(family, seed=2, **sizes)
    other = fresh(family)
    with pytest.raises(Cut):
        generate(model, of, cut=(2, "cond"))
    changed = generate(model, small)
    hits = cache_stats(model).hits
    again = generate(model, of)
    assert torch.equal(changed, generate(other, small))
    assert torch.equal(again, alone(family, 1))
    assert hits >= 2 * sum(UNNAMED_HITS)


# A fresh process

PROCESS = """
import sys, torch
torch.set_num_threads(1)
from test_generations import fresh, generate, prompts
family, file = sys.argv[1:]
torch.save(generate(fresh(family), prompts(family, seed=1)), file)
"""


@pytest.mark.full
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_b_after_a_equals_b_alone_in_a_fresh_process(tmp_path: Path, name: str) -> None:
    torch._dynamo.reset()
    model, of = fresh(name), prompts(name, seed=1)
    generate(model, prompts(name, seed=2))
    with pytest.raises(Cut):
        generate(model, prompts(name, seed=3), cut=(2, "cond"))
    found = generate(model, of)
    assert cache_stats(model).hits > 0
    file = tmp_path / "alone.pt"
    subprocess.run(
        [sys.executable, "-c", PROCESS, name, file], check=True, cwd=Path(__file__).parent, capture_output=True
    )
    assert torch.equal(found, torch.load(file))
