"""Denoising loops over the families' small models, as pipelines run them, through `torch.compile`.

    model = compiled(build("flux"), max_consecutive_hits=2)
    image = generate(model, prompts("flux", seed=1), naming="diffusers")

A generation makes two calls a step, of a prompt and of its negation, and takes real times and steps of diffusers'
scheduler of flow matching. Everything is drawn from seeds: the same generation is the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import ALL_FAMILIES, Inputs
from random_tensors import draw
from torch import Tensor, nn

from paracompile import cache_context
from paracompile.runtime.cached_call import Slot, caches_of

STEPS = 5
ALWAYS = 1e9
"""A threshold under which every step is skipped that may be."""

NAMINGS = ("unnamed", "paracompile", "diffusers")
"""Who says which pass a call is of."""

PASSES = ("cond", "uncond")
_OWN = ("hidden_states", "timestep")


class Cut(Exception):
    """What ends a generation early in these tests."""


@dataclass(frozen=True)
class Prompts:
    """What a generation starts from.

    attributes:
        noise: the first sample.
        scale: the time of pure noise.
        conditioning: by pass, all keyword inputs but the sample and the time: the same objects at each step.
    """

    noise: Tensor
    scale: float
    conditioning: Mapping[str, Inputs]


def build(family: str, **sizes: Any) -> nn.Module:
    """A new instance of a family's small model; all have the same weights."""
    model, _ = ALL_FAMILIES[family].build(**sizes)
    return model


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """The model with a cache that skips whenever it may."""
    options = {"compiler": "eager", "rdt": ALWAYS, **options}
    result = torch.compile(model, backend="paracompile", fullgraph=True, options=options)
    assert isinstance(result, nn.Module)
    return result


def prompts(family: str, seed: int = 0, **sizes: Any) -> Prompts:
    """The noise and the two prompts of this seed, new tensors each time."""
    _, inputs = ALL_FAMILIES[family].build(**sizes)
    fixed = {name: value for name, value in inputs.items() if name not in _OWN}
    by_pass = {
        name: {
            key: _drawn_anew(value, 1000 * seed + number) if key == "encoder_hidden_states" else _copied(value)
            for key, value in fixed.items()
        }
        for number, name in enumerate(PASSES)
    }
    noise = draw(*inputs["hidden_states"].shape, seed=1000 * seed + 7)
    return Prompts(noise, 1.0 if float(inputs["timestep"].max()) <= 1 else 1000.0, by_pass)


def steps_of(
    model: Callable[..., Any],
    of: Prompts,
    *,
    naming: str = "unnamed",
    steps: int = STEPS,
    cut: tuple[int, str] | None = None,
    every_pass: tuple[str, ...] = PASSES,
) -> Iterator[Tensor]:
    """The sample after each step of a generation.

    args:
        naming: one of `NAMINGS`.
        cut: raises `Cut` in this step, before this pass.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sample = of.noise.clone()
    for number, time in enumerate(scheduler.timesteps):
        times = (time / 1000 * of.scale).expand(len(sample)).clone()
        found = {}
        for name in every_pass:
            if cut == (number, name):
                raise Cut
            with _named(model, name, naming), torch.no_grad():
                (found[name],) = model(hidden_states=sample, timestep=times, **of.conditioning[name])
        guided = found[every_pass[-1]] + 2.0 * (found[every_pass[0]] - found[every_pass[-1]])
        sample = scheduler.step(guided, time, sample, return_dict=False)[0]
        yield sample


def generate(model: Callable[..., Any], of: Prompts, **how: Any) -> Tensor:
    """The last sample of a generation."""
    *_, last = steps_of(model, of, **how)
    return last


def slots_of(model: nn.Module) -> list[Slot]:
    """All state that is stored for a model now."""
    return [slot for cache in caches_of(model.parameters()) for slot in cache.slots()]


def _named(model: Any, name: str, naming: str) -> AbstractContextManager[Any]:
    if naming == "diffusers":
        context: AbstractContextManager[Any] = model.cache_context(name)
        return context
    return cache_context(name) if naming == "paracompile" else nullcontext()


def _drawn_anew(value: Tensor, seed: int) -> Tensor:
    return draw(*value.shape, seed=seed)


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value
