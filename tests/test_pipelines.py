"""diffusers' own pipelines, small: each skips in every pass, and none ever gives another picture than it should.

The long list is in `pipelines`; one compile serves all that is asserted of an entry.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from denoising import ALWAYS
from pipelines import MOST_HITS, PIPELINES, SKIPS, STEPS, Entry, build
from quick import quick
from torch import Tensor

from paracompile import cache_stats, set_rdt

pytestmark = [pytest.mark.shares_graphs, pytest.mark.whole]

QUICK = ("FluxControlNetPipeline", "WanPipeline with two transformers")
SLOW = (
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "WanVideoToVideoPipeline",
    "LTXPipeline",
    "CosmosTextToWorldPipeline",
    "Kandinsky5T2IPipeline",
    "LattePipeline",
    "SanaPipeline",
    "DiTPipeline",
    "PixArtSigmaPipeline",
    "ZImagePipeline",
)
IN_A_FRESH_PROCESS = ("FluxControlNetPipeline",)
ROUNDING = 1e-5  # of the largest value


def generate(entry: Entry, pipeline: Any, seed: int) -> Tensor:
    """The latents, or the picture, of this seed's prompt and noise."""
    torch.manual_seed(seed)  # some encode a picture without the generator
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **entry.call, **entry.prompt(seed)}
    result = pipeline(**arguments, generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(result[0])


def compiled(entry: Entry, pipeline: Any) -> Any:
    """The pipeline, with the entry's components compiled in place and a cache that skips whenever it may."""
    options = {"compiler": "eager", "rdt": ALWAYS, "max_consecutive_hits": MOST_HITS}
    for name in entry.slots:
        getattr(pipeline, name).compile(backend="paracompile", fullgraph=entry.fullgraph, options=options)
    return pipeline


@dataclass(frozen=True)
class Ran:
    """What a pipeline gave.

    attributes:
        name: of its entry.
        plain: the picture of prompt 1 by a pipeline of which nothing was compiled.
        first, other, again: those of prompts 1, 2 and 1 with the cache.
        computed: that of prompt 1 with the threshold set to 0.
        hits: of each component, the hits of each slot in each of the three generations with the cache.
        computed_hits: in the generation without.
        said: the warnings of the first generation.
    """

    name: str
    plain: Tensor
    first: Tensor
    other: Tensor
    again: Tensor
    computed: Tensor
    hits: tuple[dict[str, dict[str, tuple[bool, ...]]], ...]
    computed_hits: int
    said: list[str]

    @property
    def entry(self) -> Entry:
        return PIPELINES[self.name]


def hits_of(entry: Entry, pipeline: Any) -> dict[str, dict[str, tuple[bool, ...]]]:
    stats = {name: cache_stats(getattr(pipeline, name)) for name in entry.slots}
    return {
        name: {slot: tuple(step.hit for step in steps) for slot, steps in each.slots.items()}
        for name, each in stats.items()
    }


@pytest.fixture(scope="module", params=quick(PIPELINES, *QUICK, slow=SLOW))
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    torch._dynamo.reset()
    diffusers.utils.logging.set_verbosity_error()
    entry = PIPELINES[request.param]
    if entry.needs is not None:
        pytest.importorskip(entry.needs)
    plain = generate(entry, build(request.param), 1)
    pipeline = compiled(entry, build(request.param))  # one that was never called, as its user has it
    hits, pictures = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2, 1):
            pictures.append(generate(entry, pipeline, seed))
            hits.append(hits_of(entry, pipeline))
    for name in entry.slots:
        set_rdt(getattr(pipeline, name), 0)
    computed = generate(entry, pipeline, 1)
    computed_hits = sum(cache_stats(getattr(pipeline, name)).hits for name in entry.slots)
    said = [str(warning.message) for warning in caught]
    yield Ran(request.param, plain, *pictures, computed, tuple(hits), computed_hits, said)
    torch._dynamo.reset()


def test_every_pass_has_a_slot_and_skips_in_every_generation(ran: Ran) -> None:
    assert ran.hits == (dict(ran.entry.slots),) * 3


def test_the_picture_at_threshold_0_is_the_plain_one(ran: Ran) -> None:
    assert ran.plain.isfinite().all()
    assert ran.computed_hits == 0
    assert (ran.computed - ran.plain).abs().max() <= ROUNDING * ran.plain.abs().max()


def test_skipping_moves_the_picture(ran: Ran) -> None:
    """Unless nothing is skipped, which a warning tells."""
    moved = (ran.first - ran.computed).abs().max() / ran.computed.abs().max()
    told = [message for message in ran.said if "paracompile" in message]
    if ran.entry.never is None:
        assert moved > 100 * ROUNDING
    else:
        assert moved == 0
        assert any("no step of this generation" in message and ran.entry.never in message for message in told)


def test_a_generation_is_the_same_after_another_prompt_s(ran: Ran) -> None:
    assert torch.equal(ran.again, ran.first)
    assert (ran.other - ran.first).abs().max() > 100 * ROUNDING * ran.first.abs().max()


# The slots of a generation whose prompt is another one from the third step on.
CHANGED_ON_THE_WAY = {
    "FluxImg2ImgPipeline": {"call 1": (False, True, False, True, True, False), "call 2": SKIPS},  # only the first pass
    "ZImagePipeline": {"call 1": (False, False, False, False, True, True)},
}


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CHANGED_ON_THE_WAY)
def test_a_prompt_that_a_callback_changes_is_seen(name: str) -> None:
    def change(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": PIPELINES[name].prompt(2)["prompt_embeds"]} if step == 1 else {}

    torch._dynamo.reset()
    entry = replace(PIPELINES[name], call={**PIPELINES[name].call, "callback_on_step_end": change})
    pipeline = compiled(entry, build(name))
    generate(entry, pipeline, 1)
    assert hits_of(entry, pipeline) == {"transformer": CHANGED_ON_THE_WAY[name]}


PROCESS = """
import sys, torch
torch.set_num_threads(1)
from pipelines import PIPELINES, build
from test_pipelines import compiled, generate
name, file = sys.argv[1:]
entry = PIPELINES[name]
torch.save(generate(entry, compiled(entry, build(name)), 1), file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ran", quick(PIPELINES, *IN_A_FRESH_PROCESS), indirect=True)
def test_a_generation_is_the_same_in_a_fresh_process(ran: Ran, tmp_path: Path) -> None:
    """As after two others in this one."""
    file = tmp_path / "alone.pt"
    command = [sys.executable, "-c", PROCESS, ran.name, file]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True)
    assert torch.equal(ran.again, torch.load(file))
