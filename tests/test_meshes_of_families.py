"""All eight families on every kind of mesh, in lockstep: lengths and heads that divide, and that do not."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from capture import assert_equal, captured, inside, sharded_on
from families import ALL_FAMILIES
from quick import quick

from paracompile.layout.graph import operations
from paracompile.patterns.flops import flops_of
from paracompile.patterns.rules import rule_for

MESHES: dict[str, dict[str, int]] = {
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "unified": {"ring": 2, "ulysses": 2},
    "batch": {"batch": 2},
}

UNEVEN: dict[str, dict[str, Any]] = {
    "flux": {"heads": 3, "image": (5, 7), "text": 13, "batch": 2},
    "stable_diffusion_3": {"heads": 3, "size": (10, 14), "text": 7, "batch": 2},
    "wan": {"heads": 3, "size": (3, 6, 10), "text": 7, "image": 9},
    "cogvideox": {"heads": 3, "size": (3, 6, 10), "text": 7},
    "hunyuan_video": {"heads": 3, "size": (3, 6, 10), "text": 11},
    "ltx_video": {"heads": 3, "size": (3, 3, 5), "text": 11},
    "qwen_image": {"heads": 3, "image": (5, 7), "text": 11},
    "mochi": {"heads": 3, "size": (3, 6, 10), "text": 11},
}

all_families = pytest.mark.parametrize("family", ALL_FAMILIES)


def check(family: str, mesh: dict[str, int], **sizes: Any) -> None:
    whole = captured(family, **sizes)
    assert whole.graphs == 1
    for output in sharded_on(mesh, family, **sizes).run(whole.arguments):
        assert_equal(output, whole.expected)


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "family, mesh",
    quick(
        product(ALL_FAMILIES, ("unified", "batch")),
        ("flux", "unified"),
        ("qwen_image", "unified"),
        ("mochi", "unified"),
        ("wan", "batch"),
    ),
)
def test_lengths_and_heads_that_do_not_divide(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], **UNEVEN[family])


@pytest.mark.full
@all_families
@pytest.mark.parametrize("mesh", ["ulysses", "ring"])
def test_lengths_and_heads_that_do_not_divide_on_two_ranks(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], **UNEVEN[family])


@pytest.mark.full
@all_families
@pytest.mark.parametrize("mesh", MESHES)
def test_lengths_that_divide(family: str, mesh: str) -> None:
    check(family, MESHES[mesh], batch=2)


@pytest.mark.full
@pytest.mark.parametrize("condition", ["latent_concat", "token_replace"])
def test_the_image_conditions_of_hunyuan_video(condition: str) -> None:
    check("hunyuan_video", MESHES["unified"], condition=condition)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "family, mesh",
    quick(
        product(ALL_FAMILIES, ("ulysses", "ring")),
        *((family, "ulysses") for family in ("flux", "wan", "hunyuan_video")),
        ("ltx_video", "ring"),
    ),
)
def test_inside_the_blocks_a_rank_does_its_part_of_the_work(family: str, mesh: str) -> None:
    """Text that every rank keeps whole (keys of cross attention) weighs little beside enough image tokens."""
    longer: dict[str, Any] = {"wan": {"size": (3, 12, 16)}, "ltx_video": {"size": (3, 8, 10)}}.get(family, {})
    whole = captured(family, **longer)
    lists = whole.block_lists()
    sharded = sharded_on(MESHES[mesh], family, **longer)
    before = sum(flops_of(operation) for operation in sharded.plans[0].operations if inside(operation, lists))
    for gm in sharded.graphs:
        local = sum(flops_of(operation) for operation in operations(gm.graph, rule_for) if inside(operation, lists))
        assert 0 < local <= 1.1 * before / 2


def test_padding_reaches_every_attention_of_a_masked_family() -> None:
    """The masks matter: without padding the outputs differ."""
    for family in ("hunyuan_video", "qwen_image", "mochi"):
        build = ALL_FAMILIES[family].build
        model, inputs = build()
        name = next(key for key in inputs if key.endswith("mask"))
        with torch.no_grad():
            padded = model(**inputs)[0]
            seen = model(**{**inputs, name: torch.ones_like(inputs[name])})[0]
        assert (padded - seen).abs().max() > 1e-2 * padded.abs().max()
