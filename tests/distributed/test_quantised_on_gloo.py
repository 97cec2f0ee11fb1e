"""Quantised pipelines on two ranks: what one rank gives, with the cache, whichever kind of scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoising import ALWAYS
from pool import Pool
from quantised import ALL, quantise
from test_parallelize import latents, load
from test_quantization import ONE_OFF, difference
from torch import Tensor

import paracompile

KINDS = ("int8", "int8 weights", "float8 weights", "int8, by tensor", "float8, by tensor")
"""Those that take float32."""


def quantised(kind: str) -> Any:
    pipe = load()
    quantise(pipe.transformer, kind)
    return pipe


def on_a_rank(rank: int, kinds: tuple[str, ...], options: dict[str, Any]) -> dict[str, list[Any]]:
    """Of each kind: computed and skipped latents, and the hits."""
    found: dict[str, list[Any]] = {}
    for kind in kinds:
        torch._dynamo.reset()
        pipe = paracompile.parallelize(quantised(kind), rdt=ALWAYS, timeout=200, **options)
        skipped = latents(pipe, num_inference_steps=3)
        hits = paracompile.cache_stats(pipe.transformer).hits
        paracompile.set_rdt(pipe.transformer, 0)
        found[kind] = [latents(pipe, num_inference_steps=3), skipped, hits]
    return found


def whole(kind: str) -> tuple[Tensor, Tensor]:
    """Computed and skipped, by one rank that interprets."""
    torch._dynamo.reset()
    pipe = quantised(kind)
    computed = latents(pipe, num_inference_steps=3)
    paracompile.parallelize(pipe, rdt=ALWAYS, compiler="eager")
    return computed, latents(pipe, num_inference_steps=3)


def check(found: list[dict[str, list[Any]]], kind: str, bound: float) -> None:
    computed, skipped = whole(kind)
    for of_rank in found:
        one, other, hits = of_rank[kind]
        assert hits == 2
        assert difference(one, computed) < bound
        assert difference(other, skipped) < bound


def test_two_ranks_give_what_one_gives(two_ranks: Pool) -> None:
    assert set(KINDS) <= set(ALL)
    found = two_ranks.run(on_a_rank, KINDS, {"compiler": "eager"})
    for kind in KINDS:
        check(found, kind, 1e-5 if kind.endswith("weights") else ONE_OFF)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_so_they_do_under_inductor(kind: str, two_ranks: Pool) -> None:
    check(two_ranks.run(on_a_rank, (kind,), {}), kind, 1e-5 if kind.endswith("weights") else ONE_OFF)
