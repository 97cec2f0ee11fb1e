"""Models whose graph breaks run all the same: each piece is sharded by itself, or whole on every rank."""

from __future__ import annotations

import contextlib
import functools
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from families import FAMILIES, Inputs
from pieces import PIECES, latents_of
from pool import Pool
from random_tensors import draw
from torch import Tensor, nn

from paracompile import cache_context, cache_stats, init_mesh
from paracompile.report.report import Report


@dataclass
class Result:
    """What one rank saw: the plain model's outputs, those of two compiled calls, the reports and the warnings."""

    expected: list[Tensor]
    found: list[list[Tensor]]
    reports: list[Report]
    told: list[str]


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        output, *_ = model(**inputs)
    return [output] if isinstance(output, Tensor) else list(output)


def in_pieces(rank: int, family: str, batch: int, options: dict[str, Any]) -> Result:
    """Two calls; the second rank brings other noise, and what the first one holds counts."""
    model, inputs = PIECES[family](batch)
    expected = call(model, inputs)
    for number, latents in enumerate(latents_of(inputs)):
        latents.copy_(latents + rank * draw(*latents.shape, seed=50 + number))
    reports: list[Report] = []
    given = {"compiler": "eager", "timeout": 60, "report": reports.append, **options}
    compiled = torch.compile(model, backend="paracompile", options=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [call(compiled, inputs) for _ in range(2)]
    told = [str(each.message) for each in caught if str(each.message).startswith("paracompile")]
    return Result(expected, found, reports, told)


def assert_as_one(result: Result, family: str) -> None:
    for found in result.found:
        for one, other in zip(found, result.expected, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()
    shared = [report for report in result.reports if report.ranks > 1]
    assert shared
    assert max(report.flops_rank / report.flops_whole for report in shared if report.attentions) < 1
    if family == "z_image":
        assert not result.told
        return
    assert any(report.ranks == 1 for report in result.reports)  # a piece without attention
    assert all(report.why_a_piece is not None for report in result.reports)
    assert any("broken at" in text and family.split("_")[0] in text for text in result.told)


FEW = ("z_image",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.full] * (family not in FEW)) for family in PIECES]
)
def test_two_ranks_as_one(family: str, two_ranks: Pool) -> None:
    for result in two_ranks.run(in_pieces, family, 2, {}):
        assert_as_one(result, family)


@pytest.mark.parametrize("family", PIECES)
@pytest.mark.full
def test_four_ranks_as_one(family: str, four_ranks: Pool) -> None:
    for result in four_ranks.run(in_pieces, family, 1, {}):
        assert_as_one(result, family)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("family", PIECES)
def test_under_inductor(family: str, two_ranks: Pool) -> None:
    for result in two_ranks.run(in_pieces, family, 1, {"compiler": "inductor"}):
        assert_as_one(result, family)


@pytest.mark.slow
def test_what_a_piece_hands_on_is_not_sent_again(two_ranks: Pool) -> None:
    """Of one call of the small model 404,736 bytes would be sent, most of them streams between two blocks."""
    assert two_ranks.run(bytes_broadcast, "hunyuan_video_15")[0] < 40_000


def bytes_broadcast(rank: int, family: str) -> int:
    model, inputs = PIECES[family](2)
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", "timeout": 60})
    call(compiled, inputs)
    sent = []
    broadcast = dist.broadcast

    def counting(tensor: Tensor, **how: Any) -> Any:
        sent.append(tensor.numel())
        return broadcast(tensor, **how)

    with mock.patch.object(dist, "broadcast", counting):
        call(compiled, inputs)
    return sum(sent)


# What breaks any model's graph


def hooked(rank: int, hook: str) -> tuple[list[list[Tensor]], list[Tensor], set[int]]:
    model, inputs = FAMILIES["flux"].build()
    context: Any = contextlib.nullcontext
    if hook == "layerwise casting":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif hook == "group offload":
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        context = functools.partial(model.cache_context, "cond")
    reports: list[Report] = []
    given = {"compiler": "eager", "timeout": 60, "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=given)
    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")
        expected = call(model, inputs)
        return [call(compiled, inputs) for _ in range(2)], expected, {report.ranks for report in reports}


@pytest.mark.full
@pytest.mark.parametrize("hook", ["layerwise casting", "group offload", "cache"])
def test_hooks_of_diffusers(hook: str, two_ranks: Pool) -> None:
    for calls, expected, ranks in two_ranks.run(hooked, hook):
        assert ranks == {1, 2}
        for found in calls:
            for one, other in zip(found, expected, strict=True):
                assert (one - other).abs().max() < 1e-5 * other.abs().max()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plainly(x: Tensor) -> Tensor:
    return x.sin()


class Between(nn.Module):
    """A piece without attention that may write to its input, code that is not compiled, and a piece with attention."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.writes:
            x[:, 1:].mul_(2)
        y = x + 1
        plain = _plainly(x)
        heads = y.unflatten(-1, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads), plain


def with_code_between(rank: int, writes: bool, inference: bool, compiler: str) -> list[tuple[Tensor, Tensor]]:
    """What ranks that bring other inputs find, and what they expect; the last pair is the input afterwards."""
    x, other = draw(1, 12, 8, seed=1), draw(1, 12, 8, seed=1 + rank)
    model = Between(writes)
    compiled = torch.compile(model, backend="paracompile", options={"compiler": compiler, "timeout": 60})
    with warnings.catch_warnings(), torch.inference_mode(inference), torch.no_grad():
        warnings.simplefilter("ignore")
        found = compiled(other)
        expected = model(x)
    return [*zip(found, expected, strict=True), (other, x)]


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_a_piece_and_the_code_behind_it_see_what_the_first_rank_brought(
    writes: bool, inference: bool, two_ranks: Pool
) -> None:
    for pairs in two_ranks.run(with_code_between, writes, inference, "eager"):
        for one, other in pairs:
            assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_a_piece_that_writes_under_inductor(two_ranks: Pool) -> None:
    for pairs in two_ranks.run(with_code_between, True, True, "inductor"):
        for one, other in pairs:
            assert torch.allclose(one, other, atol=1e-6)


# The cache, in the piece that holds the blocks


def cached(rank: int, options: dict[str, Any]) -> tuple[list[Tensor], list[list[bool]]]:
    model, inputs = PIECES["lumina2"](2)
    given = {"compiler": "eager", "timeout": 60, "rdt": 10.0, **options}
    compiled = torch.compile(model, backend="paracompile", options=given)
    outputs = []
    for step in range(3):
        with cache_context("cond"):
            outputs += call(compiled, inputs | {"timestep": inputs["timestep"] + 0.1 * step})
    slots = cache_stats(compiled).slots.values()
    return outputs, [[step.hit for step in steps] for steps in slots if steps]


@pytest.mark.full
def test_blocks_are_skipped_in_the_piece_that_holds_them(two_ranks: Pool) -> None:
    expected, hits = cached(0, {"mesh": None})
    assert hits == [[False, True, True]]
    for found, same in two_ranks.run(cached, {}):
        assert same == hits
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()


# Pieces on other meshes


def on_a_mesh(rank: int, family: str) -> Result:
    return in_pieces(rank, family, 2, {"mesh": init_mesh("cpu", max_batch_dim_size=2)})


@pytest.mark.full
def test_rows_and_tokens(four_ranks: Pool) -> None:
    for result in four_ranks.run(on_a_mesh, "glm_image"):
        assert_as_one(result, "glm_image")
