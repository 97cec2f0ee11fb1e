"""The pass `fuse_attention`: attention that a model writes out is made one operator, and shared as any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from denoising import ALWAYS
from diffusers.models.attention_processor import AttnProcessor
from other_families import OTHER_FAMILIES
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    WIDTH,
    Denoiser,
    Mesh,
    assert_sharded,
    capture,
    close,
    heads,
    image_tokens,
    merge,
    mesh_name,
    normalised,
)
from test_all_transformers import on_ranks
from torch import Tensor, fx, nn

from paracompile import cache_context, cache_stats
from paracompile.passes.drop_masked_keys import hides_keys_only
from paracompile.passes.found import Found
from paracompile.passes.fuse_attention import fuse_attention
from paracompile.passes.normalise import normalise
from paracompile.report.report import Report
from paracompile.runtime.slots import begin_generation, end_step

pytestmark = pytest.mark.whole

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values of shape (batch, heads, tokens, size)."""

ATTENTION = "scaled_dot_product_attention.default"
SCALE = SIZE**-0.5
OPERANDS = [draw(BATCH, HEADS, IMAGE, SIZE, seed=seed) for seed in range(3)]
HIDDEN = torch.arange(IMAGE) % 5 == 3
FLOAT = torch.zeros(IMAGE).masked_fill(HIDDEN, -math.inf)
BIAS = draw(HEADS, IMAGE, IMAGE, seed=8)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SCALE


def by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With rows and heads in one dimension, as before PyTorch had attention."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    made = torch.baddbmm(q.new_empty(q.shape[0], q.shape[1], k.shape[1]), q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(made.softmax(-1), v).unflatten(0, (-1, HEADS))


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads behind tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhnm, bmhe -> bnhe", weights, v).transpose(1, 2)


def with_rows_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key's side of the first product comes first, and the value's of the second one."""
    weights = torch.einsum("bhmd,bhnd->bhnm", k, q).mul(SCALE).softmax(3)
    return torch.einsum("bhmd,bhnm->bhnd", v, weights)


FORMS: dict[str, Attend] = {
    "matmul": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "scaled before": lambda q, k, v: ((q * SCALE) @ k.transpose(-1, -2)).softmax(dim=3) @ v,
    "divided": lambda q, k, v: F.softmax(q @ k.mT / math.sqrt(SIZE), dim=-1) @ v,
    "scaled twice": lambda q, k, v: (2 * scores(q, k) / 3).softmax(-1) @ v,
    "not scaled": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "in double": lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float64).to(q.dtype) @ v,
    "in float, and back": lambda q, k, v: scores(q, k).double().softmax(-1).to(q.dtype).contiguous() @ v,
    "dropout that drops nothing": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1, training=False) @ v,
    "rows and heads in one": by_rows,
    "einsum": by_einsum,
    "einsum, the other way": with_rows_first,
    "float mask": lambda q, k, v: (scores(q, k) + FLOAT).softmax(-1) @ v,
    "bias in front": lambda q, k, v: (BIAS + scores(q, k)).softmax(-1) @ v,
    "bias and mask": lambda q, k, v: (scores(q, k) + BIAS + FLOAT).softmax(-1) @ v,
    "bias by baddbmm": lambda q, k, v: (
        torch.baddbmm(BIAS.repeat(BATCH, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT)
        .softmax(-1)
        .bmm(v.flatten(0, 1))
        .unflatten(0, (-1, HEADS))
    ),
    "masked_fill": lambda q, k, v: scores(q, k).masked_fill(HIDDEN, -math.inf).softmax(-1) @ v,
    "masked_fill by rows": lambda q, k, v: (
        scores(q, k).masked_fill(HIDDEN[None, None, None], -math.inf).softmax(-1) @ v
    ),
    "masked_fill by much": lambda q, k, v: scores(q, k).masked_fill(HIDDEN, torch.finfo(q.dtype).min).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(~HIDDEN, scores(q, k), -math.inf).softmax(-1) @ v,
    "where and masked_fill": lambda q, k, v: (
        torch.where(~HIDDEN, scores(q, k), -math.inf).masked_fill(torch.arange(IMAGE) < 3, -math.inf).softmax(-1) @ v
    ),
    "bias, then masked_fill": lambda q, k, v: (scores(q, k) + BIAS).masked_fill(HIDDEN, -math.inf).softmax(-1) @ v,
    "as T5": lambda q, k, v: (scores(q, k) + BIAS[None].clone().add_(FLOAT)).float().softmax(-1).type_as(q) @ v,
}

OTHERS: dict[str, Attend] = {
    # what is no attention, or more than one
    "softmax over queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "weights added to": lambda q, k, v: (scores(q, k).softmax(-1) + 0.1) @ v,
    "scores squared": lambda q, k, v: scores(q, k).square().softmax(-1) @ v,
    "scores read twice": lambda q, k, v: (s := scores(q, k)).softmax(-1) @ v + s.mean(),
    "weights read twice": lambda q, k, v: (w := scores(q, k).softmax(-1)) @ v + w.mean(),
    "weights transposed": lambda q, k, v: scores(q, k).softmax(-1).mT @ v,
    "mask scaled": lambda q, k, v: ((scores(q, k) + BIAS) * 0.5).softmax(-1) @ v,
    "scaled by a tensor": lambda q, k, v: (scores(q, k) * BIAS).softmax(-1) @ v,
    "mask of another type": lambda q, k, v: (scores(q, k) + BIAS.double()).softmax(-1).to(q.dtype) @ v,
    "scores hidden a little": lambda q, k, v: scores(q, k).masked_fill(HIDDEN, -1e4).softmax(-1) @ v,
    "masked, then a bias": lambda q, k, v: (scores(q, k).masked_fill(HIDDEN, -1e31) + BIAS).softmax(-1) @ v,
    "mask with a batch": lambda q, k, v: (scores(q[:1], k[:1]) + BIAS.repeat(BATCH, 1, 1, 1)).softmax(-1) @ v,
    "one query, a bias for many": lambda q, k, v: (scores(q[:, :, :1], k) + BIAS).softmax(-1) @ v,
    "one head, a bias for many": lambda q, k, v: ((scores(q[0, 0], k[0, 0]) + BIAS).softmax(-1) @ v[0])[None],
    "one key for all heads": lambda q, k, v: scores(q, k[:, :1]).softmax(-1) @ v,
    "channels attend": lambda q, k, v: ((q.mT @ k).softmax(-1) @ v.mT).mT,
    "no product before": lambda q, k, v: BIAS.softmax(-1) @ v,
}


class Attention(nn.Module):
    """Attention of a sequence to itself, in several forms."""

    def __init__(self, *forms: Attend) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.forms = forms

    def forward(self, x: Tensor) -> list[Tensor]:
        q, k, v = (heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        return [merge(form(q, k, v)) for form in self.forms]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.to_out = Attention(FORMS["rows and heads in one"]), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.to_out(self.attention(x)[0])
        return x + self.mlp(x)


def fused(model: Callable[..., Any], *inputs: Tensor, tolerance: float = 2e-6) -> tuple[fx.GraphModule, int]:
    """The graph after the pass, and how many were fused; it gives what the model gives."""
    kept: list[fx.GraphModule] = []
    found = Found()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(fuse_attention(normalise(gm, example_inputs), example_inputs, found=found))
        return kept[0].forward

    with torch.no_grad():
        close(capture(model, inputs, backend), model(*inputs), tolerance)
    return kept[0], found.fused


@cache
def all_of(which: str) -> fx.GraphModule:
    """All forms in one graph, which is compiled once."""
    forms = FORMS if which == "forms" else OTHERS
    graph, count = fused(randomise(Attention(*forms.values())), image_tokens(WIDTH))
    assert count == (len(FORMS) if which == "forms" else 0)
    return graph


def operators_of(which: str, place: int) -> set[str]:
    """What the form at this place is made of."""
    (output,) = all_of(which).graph.find_nodes(op="output")
    seen, waiting = set(), [output.args[0][place]]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return {str(node.target).removeprefix("aten.") for node in seen}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_out_is_one_operator(name: str) -> None:
    made = operators_of("forms", [*FORMS].index(name))
    assert ATTENTION in made
    assert not made & {"softmax.int", "matmul.default", "bmm.default", "baddbmm.default", "einsum.default"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_stays_as_it_is(name: str) -> None:
    made = operators_of("others", [*OTHERS].index(name))
    assert ATTENTION not in made
    assert "softmax.int" in made


def test_what_is_dropped_at_random_stays_as_it_is() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(scores(q, k).softmax(-1), 0.1, training=True) @ v

    found = Found()
    fuse_attention(normalised(attend, *OPERANDS), (), found=found)
    assert found.fused == 0


def test_a_mask_that_only_hides_keys_is_boolean() -> None:
    """So that hidden keys can be dropped."""

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scores(q, k).masked_fill(mask[:, None, None], -math.inf).softmax(-1) @ v

    graph, _ = fused(model, *OPERANDS, HIDDEN.repeat(BATCH, 1))
    (attention,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert hides_keys_only(attention)


def test_one_may_read_what_another_made() -> None:
    """Nothing of the first one's scores is left."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(scores(q, k).softmax(-1) @ v, k).softmax(-1) @ v

    graph, count = fused(twice, *OPERANDS)
    assert count == 2
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)


@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 1), (torch.float16, 0)], ids=str)
def test_scores_that_are_wider_and_hidden_by_the_lowest_number(dtype: torch.dtype, count: int) -> None:
    """A query that sees nothing sees all alike; float16 has no number that would still say so."""
    hidden = torch.zeros(IMAGE, IMAGE, dtype=torch.bool)
    hidden[3] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        return scores(q, k).float().masked_fill(hidden, lowest).softmax(-1).to(dtype) @ v

    operands = [operand.to(dtype) for operand in OPERANDS]
    assert fused(attend, *operands, tolerance=0.02)[1] == count
    close(attend(*operands)[..., 3, :], operands[2].mean(-2), 0.02)


def test_rows_and_heads_in_one_dimension_are_heads() -> None:
    """Kernels want four dimensions."""
    graph, _ = fused(by_rows, *OPERANDS)
    (attention,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert [operand.meta["val"].shape[:2] for operand in attention.args[:3]] == [(1, BATCH * HEADS)] * 3


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mesh", [2, {"ring": 2}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
def test_ranks_share_it(mesh: Mesh) -> None:
    sharded = assert_sharded(randomise(Attention(*FORMS.values())), [image_tokens(WIDTH)], mesh)
    assert sharded.report.fused == sharded.report.attentions == len(FORMS)


def test_open_sizes_stay_open() -> None:
    model, time = randomise(Denoiser(2, block=Block)), torch.tensor([0.5])
    reports: list[Report] = []
    options = {"compiler": "eager", "rdt": ALWAYS, "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=options)
    with torch.no_grad():
        for length in (IMAGE, 40, 77):
            x = draw(BATCH, length, 10, seed=length)
            torch._dynamo.mark_dynamic(x, 1)
            close(compiled(x, time), model(x, time))
    assert [(report.fused, bool(report.open_sizes)) for report in reports] == [(2, True)]


# Models of diffusers, as they were before PyTorch had attention


def pixart_by_hand() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = OTHER_FAMILIES["pixart"]()
    model.set_attn_processor(AttnProcessor())
    return model, inputs


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("mesh", [{"ulysses": 2}, {"ring": 2}], ids=mesh_name)
def test_a_model_of_diffusers(mesh: dict[str, int]) -> None:
    """PixArt with diffusers' first attention processor: baddbmm, a mask of the text, rows and heads in one."""
    model, inputs = pixart_by_hand()
    with torch.no_grad():
        expected = model(**inputs)
    found, run = on_ranks(model, inputs, mesh)
    (report,) = run.reports
    plain, plain_inputs = OTHER_FAMILIES["pixart"]()
    _, of_plain = on_ranks(plain, plain_inputs, mesh)
    close(found, expected, 2e-5)
    assert report.fused == 2 * len(model.transformer_blocks)
    assert replace(report, fused=0).collectives == of_plain.reports[0].collectives
    assert report.flops_rank == of_plain.reports[0].flops_rank


@pytest.mark.full
def test_under_inductor_with_the_cache() -> None:
    """As a user first runs it: batch 1, the default compiler, blocks skipped."""
    model = randomise(Denoiser(3, block=Block))
    compiled = torch.compile(model, backend="paracompile", options={"rdt": ALWAYS})
    x, time = draw(1, IMAGE, 10), torch.tensor([0.5])
    generation = begin_generation()
    with torch.no_grad():
        for _ in range(2):
            with cache_context("cond"):
                close(compiled(x, time), model(x, time), 1e-5)
            end_step()
    generation.over = True
    assert cache_stats(compiled).hits == 1
