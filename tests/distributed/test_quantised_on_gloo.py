"""Quantised pipelines on two ranks: what one rank gives, with the cache, whichever kind of scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoising import ALWAYS
from pool import Pool
from quantised import quantise
from test_parallelize import latents, load
from test_quantization import ONE_OFF, difference
from torch import Tensor

import paracompile

KINDS = ("int8", "int8 weights", "float8 weights", "int8, by tensor", "float8, by tensor")
"""Those that take float32."""
QUICK = ("float8, by tensor",)


def quantised(kind: str) -> Any:
    pipe = load()
    quantise(pipe.transformer, kind)
    return pipe


def bound(kind: str) -> float:
    return 1e-5 if kind.endswith("weights") else ONE_OFF


def on_a_rank(rank: int, kind: str, options: dict[str, Any]) -> list[Any]:
    """Computed and skipped latents, and the hits."""
    torch._dynamo.reset()
    pipe = paracompile.parallelize(quantised(kind), rdt=ALWAYS, timeout=200, **options)
    skipped = latents(pipe, num_inference_steps=3)
    hits = paracompile.cache_stats(pipe.transformer).hits
    paracompile.set_rdt(pipe.transformer, 0)
    return [latents(pipe, num_inference_steps=3), skipped, hits]


def whole(kind: str) -> tuple[Tensor, Tensor]:
    """Computed and skipped, by one rank that interprets."""
    torch._dynamo.reset()
    pipe = quantised(kind)
    computed = latents(pipe, num_inference_steps=3)
    paracompile.parallelize(pipe, rdt=ALWAYS, compiler="eager")
    return computed, latents(pipe, num_inference_steps=3)


def check(found: list[list[Any]], kind: str, most: float) -> None:
    computed, skipped = whole(kind)
    for one, other, hits in found:
        assert hits == 2
        assert difference(one, computed) < most
        assert difference(other, skipped) < most


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.full) for kind in KINDS]
)
def test_two_ranks_give_what_one_gives(kind: str, two_ranks: Pool) -> None:
    check(two_ranks.run(on_a_rank, kind, {"compiler": "eager"}), kind, bound(kind))


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_so_they_do_under_inductor(kind: str, two_ranks: Pool) -> None:
    check(two_ranks.run(on_a_rank, kind, {}), kind, bound(kind))
