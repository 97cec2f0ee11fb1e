"""The report: its numbers are those counted by hand, its notes say what was gathered on the way, where and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    TEXT,
    WIDTH,
    CrossAttention,
    Mesh,
    SelfAttention,
    Transformer,
    capture,
    image_tokens,
    mesh_name,
    shard,
    text_tokens,
)
from torch import Tensor, fx, nn

from paracompile.cache_options import CacheOptions
from paracompile.mesh import Ranks
from paracompile.passes import Found, pipeline, run_passes
from paracompile.report.report import Report, report_of

CHANNELS = 10
FLOAT = 4
LAYER = FLOAT * BATCH * IMAGE * WIDTH
"""Bytes of the whole sequence at the width of the blocks."""
OUTPUT = FLOAT * BATCH * IMAGE * CHANNELS


def whole_flops(depth: int) -> int:
    """Two for each multiply-add of `Transformer`."""
    linears = CHANNELS * WIDTH + depth * (4 * WIDTH * WIDTH + 2 * 2 * WIDTH * WIDTH) + WIDTH * CHANNELS
    attentions = depth * 2 * HEADS * IMAGE * SIZE
    return 2 * BATCH * IMAGE * (linears + attentions)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("depth", [1, 2])
def test_ulysses(depth: int, ranks: int) -> None:
    """v, k, q and the result of each attention: a rank holds 1/ranks of each, and keeps 1/ranks of that."""
    report = shard(randomise(Transformer(depth)), [image_tokens()], ranks).report
    assert report == Report(
        ranks=ranks,
        attentions=depth,
        collectives={"all_to_all_single": 4 * depth, "all_gather_into_tensor": 1},
        bytes_sent=(ranks - 1) * (4 * depth * LAYER // ranks**2 + OUTPUT // ranks),
        flops_whole=whole_flops(depth),
        flops_rank=whole_flops(depth) // ranks,
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_ring(ranks: int) -> None:
    """Keys and values, a rank's part of each, once to every other rank's step."""
    report = shard(randomise(Transformer()), [image_tokens()], {"ring": ranks}).report
    assert report == Report(
        ranks=ranks,
        attentions=1,
        collectives={"all_to_all_single": ranks - 1, "all_gather_into_tensor": 1},
        bytes_sent=(ranks - 1) * (2 * LAYER // ranks + OUTPUT // ranks),
        flops_whole=whole_flops(1),
        flops_rank=whole_flops(1) // ranks,
    )


def test_ring_and_ulysses() -> None:
    """Over four ranks: the exchange is within pairs, and half the heads of half the tokens go around the ring."""
    report = shard(randomise(Transformer()), [image_tokens()], {"ring": 2, "ulysses": 2}).report
    assert report == Report(
        ranks=4,
        attentions=1,
        collectives={"all_to_all_single": 5, "all_gather_into_tensor": 1},
        bytes_sent=4 * LAYER // 4 // 2 + 2 * LAYER // 4 + 3 * OUTPUT // 4,
        flops_whole=whole_flops(1),
        flops_rank=whole_flops(1) // 4,
    )


def test_batch() -> None:
    report = shard(randomise(Transformer()), [image_tokens()], {"batch": 2}).report
    assert report == Report(
        ranks=2,
        attentions=0,
        cross_attentions=1,
        collectives={"all_gather_into_tensor": 1},
        bytes_sent=OUTPUT // 2,
        flops_whole=whole_flops(1),
        flops_rank=whole_flops(1) // 2,
    )


def test_batch_and_ulysses_count_the_work_of_the_model_as_a_whole() -> None:
    report = shard(randomise(Transformer()), [image_tokens()], {"batch": 2, "ulysses": 2}).report
    assert (report.ranks, report.attentions, report.notes) == (4, 1, ())
    assert (report.flops_whole, report.flops_rank) == (whole_flops(1), whole_flops(1) // 4)
    assert report.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 2}


class WithText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross = SelfAttention(), CrossAttention(20)
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.out(self.cross(self.attention(x), text))


def test_keys_of_the_text_are_every_rank_s_own_work() -> None:
    report = shard(randomise(WithText()), [image_tokens(WIDTH), text_tokens(20)], 2).report
    shared = 2 * BATCH * IMAGE * (6 * WIDTH * WIDTH + WIDTH * CHANNELS + 2 * WIDTH * (IMAGE + TEXT))
    own = 2 * BATCH * TEXT * 2 * 20 * WIDTH
    assert (report.flops_whole, report.flops_rank) == (shared + own, shared // 2 + own)
    assert (report.attentions, report.cross_attentions, report.whole_attentions) == (1, 1, 0)
    assert report.bytes_sent == LAYER + OUTPUT // 2


@pytest.mark.parametrize("number", [HEADS, 2], ids=["3, 3, 2, 2, 2 heads", "1, 1, 0, 0, 0 heads"])
def test_bytes_of_uneven_shares(number: int) -> None:
    """Rank 0 has 10 of 48 tokens, and keeps its own share of the heads, and of the result its own tokens."""
    report = shard(randomise(SelfAttention(number=number)), [image_tokens(WIDTH)], 5).report
    mine, of_heads = 10, -(-number // 5)
    size = WIDTH // number
    operands = 3 * (number - of_heads) * mine
    result = of_heads * (IMAGE - mine)
    gathered = WIDTH * mine * 4
    assert report.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert report.bytes_sent == FLOAT * BATCH * ((operands + result) * size + gathered)


# Attentions that are left whole


class Refined(nn.Module):
    """The text is refined by an attention of its own, and added up to one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner, self.attention = SelfAttention(), SelfAttention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attention(x + self.refiner(text).mean(dim=1, keepdim=True))


def test_an_attention_that_is_cheaper_whole() -> None:
    report = shard(randomise(Refined()), [image_tokens(WIDTH), draw(BATCH, 5, WIDTH)], 2).report
    assert (report.attentions, report.cross_attentions, report.whole_attentions) == (1, 0, 1)
    assert report.notes == ()


# Notes


@torch.library.custom_op("paracompile_tests::smooth", mutates_args=())
def smooth(x: Tensor) -> Tensor:
    return (x + x.roll(1, dims=1)) / 2


@smooth.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def by_an_unknown_operator(x: Tensor) -> Tensor:
    return smooth(x)


def by_a_known_operator(x: Tensor) -> Tensor:
    return x.cumsum(dim=1) / IMAGE


class Between(nn.Module):
    """Something done to all tokens between two attentions, between two linears of one width."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = SelfAttention(), SelfAttention()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


MIDDLES = [
    (by_an_unknown_operator, "smooth = paracompile_tests.smooth.default, which has no rule"),
    (by_a_known_operator, "cumsum = aten.cumsum.default, which needs all tokens"),
]


@pytest.mark.parametrize("middle, why", MIDDLES)
def test_a_gather_on_the_way_is_named_with_its_line(middle: Callable[[Tensor], Tensor], why: str) -> None:
    report = shard(randomise(Between(middle)), [image_tokens(WIDTH)]).report
    lines, start = inspect.getsourcelines(middle)
    where = f"{__file__}:{start + 1}, in {middle.__name__}: {lines[1].strip()}"
    (note,) = report.notes
    gathered, _, rest = note.partition(" for ")
    assert gathered.endswith(f"({LAYER:,} bytes)")
    assert rest == f"{why}, at {where}"
    assert report.collectives["all_gather_into_tensor"] == 2


def test_the_module_is_named_too() -> None:
    report = shard(randomise(Transformer(2, middle=by_an_unknown_operator)), [image_tokens()]).report
    (note,) = report.notes
    assert note.endswith("return smooth(x) in blocks.0")


def test_one_value_for_several_operators_is_one_note() -> None:
    report = shard(randomise(Between(lambda x: smooth(x) + x.cumsum(dim=1))), [image_tokens(WIDTH)]).report
    (note,) = report.notes
    assert note.endswith(" and 1 more")


@pytest.mark.parametrize("after", [by_an_unknown_operator, by_a_known_operator, lambda x: x])
def test_the_last_gather_is_no_news(after: Callable[[Tensor], Tensor]) -> None:
    report = shard(randomise(Transformer(after=after)), [image_tokens()]).report
    assert report.collectives["all_gather_into_tensor"] == 1
    assert report.notes == ()


# With a first block cache


def test_one_rank_with_a_cache() -> None:
    """What the middle of `Transformer` costs, counted by hand, and what is stored for it."""
    reports: list[Report] = []
    options = {"compiler": "eager", "rdt": 0.1, "last_blocks": 1, "report": reports.append}
    with torch.no_grad():
        torch.compile(randomise(Transformer(4)), backend="paracompile", options=options)(image_tokens())
    assert reports == [
        Report(
            ranks=1,
            flops_whole=whole_flops(4),
            flops_rank=whole_flops(4),
            blocks=4,
            blocks_skipped=2,
            flops_skipped=whole_flops(2) - whole_flops(0),
            state_bytes=2 * LAYER,
        )
    ]


def test_exchanges_of_a_step_in_which_all_blocks_are_computed() -> None:
    """Four numbers are added up over the ranks besides; exchanges in skipped blocks count."""
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found = Found()
        ranks = Ranks.simulated(ulysses=2)
        local = run_passes(gm, example_inputs, pipeline(ranks, found=found, cache=CacheOptions(rdt=1.0)))
        reports.append(report_of(found, ranks, local, caches=True))
        return gm.forward

    capture(randomise(Transformer(3)), [image_tokens()], backend)
    (report,) = reports
    assert report.collectives == {"all_to_all_single": 12, "all_reduce": 1, "all_gather_into_tensor": 1}
    assert report.bytes_sent == 3 * 4 * LAYER // 4 + 4 * FLOAT + OUTPUT // 2


# As text


def test_on_one_rank() -> None:
    assert str(Report(ranks=1)) == "ranks  1, nothing was sharded"


def test_as_a_table() -> None:
    report = Report(
        ranks=4,
        attentions=57,
        cross_attentions=3,
        whole_attentions=2,
        collectives={"all_to_all_single": 228, "all_gather_into_tensor": 1},
        bytes_sent=1234567,
        flops_whole=1000,
        flops_rank=255,
        notes=("gathered this", "gathered that"),
    )
    assert str(report).splitlines() == [
        "ranks                             4",
        "attentions sharded                57",
        "attentions without communication  3",
        "attentions left whole             2",
        "collectives in a call             228 all_to_all_single, 1 all_gather_into_tensor",
        "bytes sent by a rank              1,234,567",
        "work of a rank                    25.5% of the model's products",
        "- gathered this",
        "- gathered that",
    ]


CACHE = {"blocks": 57, "blocks_skipped": 56, "flops_skipped": 204, "state_bytes": 1234567}


def test_the_cache_as_a_table() -> None:
    names = "hidden_states.shape[1]", "encoder_hidden_states.shape[1]"
    report = Report(ranks=1, flops_whole=1000, flops_rank=255, open_sizes=names, notes=("gathered this",), **CACHE)
    assert str(report).splitlines() == [
        "ranks                       1, nothing was sharded",
        "blocks that may be skipped  56 of 57",
        "work of a skipped step      20.0% of a step",
        "bytes stored for each slot  1,234,567",
        "sizes that stay open        hidden_states.shape[1], encoder_hidden_states.shape[1]",
        "- gathered this",
    ]
    assert str(Report(ranks=2, flops_whole=1000, flops_rank=255, **CACHE)).splitlines()[6:] == [
        "work of a rank                    25.5% of the model's products",
        "blocks that may be skipped        56 of 57",
        "work of a skipped step            20.0% of a step",
        "bytes stored for each slot        1,234,567",
    ]


def test_a_model_without_products_is_no_division_by_zero() -> None:
    assert "work of a rank                    0.0%" in str(Report(ranks=2))


@pytest.mark.parametrize("mesh", [2, {"ring": 2}, {"batch": 2}], ids=mesh_name)
def test_a_real_one_as_a_table(mesh: Mesh) -> None:
    text = str(shard(randomise(Transformer()), [image_tokens()], mesh).report)
    assert "50.0% of the model's products" in text
    assert len(text.splitlines()) == 7
