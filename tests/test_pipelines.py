"""Real pipelines of diffusers, small: each skips in every pass, and never gives another picture than it should."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ALWAYS
from pipelines import MOST_HITS, PIPELINES, STEPS, Entry
from torch import Tensor

from paracompile import cache_stats, set_rdt

QUICK: set[str] = set()


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    """Instead of the one for all tests: the tests of a pipeline share its graphs."""


@pytest.fixture(scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in PIPELINES])
def ran(request: pytest.FixtureRequest) -> Iterator["Ran"]:
    yield Ran.of(request.param)
    torch._dynamo.reset()


def generate(entry: Entry, pipeline: Any, seed: int) -> Tensor:
    """The latents, or the picture, of this seed's prompt and noise."""
    torch.manual_seed(seed)  # some draw without the generator
    result = pipeline(
        **{"num_inference_steps": STEPS, "output_type": "latent", **entry.call, **entry.prompt(seed)},
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.as_tensor(result[0])


def compiled(entry: Entry, pipeline: Any) -> Any:
    """The pipeline, each of the entry's components compiled in place, with a cache that skips whenever it may."""
    for name in entry.slots:
        options = {"compiler": "eager", "rdt": ALWAYS, "max_consecutive_hits": MOST_HITS}
        getattr(pipeline, name).compile(backend="paracompile", fullgraph=entry.fullgraph, options=options)
    return pipeline
