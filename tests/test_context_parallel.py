"""Context parallelism: every rank's result is the whole model's, with just so many collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quick import quick
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    TEXT,
    WIDTH,
    CrossAttention,
    Joint,
    Mesh,
    SelfAttention,
    Transformer,
    assert_sharded,
    close,
    count,
    heads,
    image_tokens,
    merge,
    mesh_name,
    mesh_sizes,
    shard,
    text_tokens,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from paracompile.errors import GraphError

SDPA = torch.ops.aten.scaled_dot_product_attention.default
ALL = IMAGE + TEXT

ONE_AXIS: list[Mesh] = [{"ulysses": 2}, {"ring": 2}, {"ring": 3}, {"batch": 2}]
TWO_AXES: list[Mesh] = [{"ring": 2, "ulysses": 2}, {"batch": 2, "ulysses": 2}, {"batch": 2, "ring": 2}]


class Attend(nn.Module):
    """Attention of projected heads, with whatever else attention takes."""

    def __init__(self, queries: int = HEADS, keys: int = HEADS, values: int = SIZE, **how: Any) -> None:
        super().__init__()
        self.counts = queries, keys
        self.to_q, self.to_k = nn.Linear(WIDTH, queries * SIZE), nn.Linear(WIDTH, keys * SIZE)
        self.to_v = nn.Linear(WIDTH, keys * values)
        self.how = how

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        queries, keys = self.counts
        q, k, v = heads(self.to_q(x), queries), heads(self.to_k(x), keys), heads(self.to_v(x), keys)
        return merge(F.scaled_dot_product_attention(q, k, v, **self.how, **how))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2])
def test_self_attention_takes_four_exchanges_and_the_output_one_gather(depth: int, ranks: int) -> None:
    sharded = assert_sharded(randomise(Transformer(depth)), [image_tokens()], ranks)
    assert sharded.collectives == {"all_to_all_single": 4 * depth, "all_gather_into_tensor": 1}
    assert sharded.report.attentions == depth
    assert sharded.share == 1 / ranks
    assert sharded.report.notes == ()


class WithText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross, self.out = SelfAttention(), CrossAttention(20), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(x)
        return self.out(x + self.cross(x, text))


@pytest.mark.parametrize("ranks", [2, 3])
def test_cross_attention_sends_nothing(ranks: int) -> None:
    sharded = assert_sharded(randomise(WithText()), [image_tokens(WIDTH), text_tokens(20)], ranks)
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert (sharded.report.attentions, sharded.report.cross_attentions) == (1, 1)


def test_cross_attention_alone_needs_the_last_gather_only() -> None:
    sharded = assert_sharded(randomise(CrossAttention(20)), [image_tokens(WIDTH), text_tokens(20)])
    assert sharded.collectives == {"all_gather_into_tensor": 1}
    assert (sharded.report.attentions, sharded.report.cross_attentions) == (0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_of_text_and_image(text_first: bool, ranks: int) -> None:
    model = randomise(Joint(text_first=text_first))
    sharded = assert_sharded(model, [image_tokens(WIDTH), text_tokens()], ranks)
    assert sharded.collectives["all_to_all_single"] == 4


# Masks

MASKS = {
    "queries x keys": (lambda s: (s, s)),
    "batch": (lambda s: (BATCH, 1, s, s)),
    "batch and heads": (lambda s: (BATCH, HEADS, s, s)),
    "heads": (lambda s: (HEADS, s, s)),
    "key padding": (lambda s: (BATCH, 1, 1, s)),
    "key padding, no batch": (lambda s: (1, s)),
    "per query": (lambda s: (BATCH, HEADS, s, 1)),
}


def mask_of(shape: tuple[int, ...], boolean: bool) -> Tensor:
    """Hides about a third, but never the first of several keys."""
    mask = draw(*shape, seed=5)
    if not boolean:
        return mask * 3
    mask = mask < 0.5
    if shape[-1] > 1:
        mask[..., 0] = True
    return mask


class JoinedFirst(nn.Module):
    """Text and image, joined before attention: two segments in one sequence."""

    def __init__(self, number: int = HEADS) -> None:
        super().__init__()
        self.image, self.text, self.out = nn.Linear(10, WIDTH), nn.Linear(14, WIDTH), nn.Linear(WIDTH, 10)
        self.attention = SelfAttention(number=number)

    def forward(self, image: Tensor, text: Tensor, **how: Any) -> Tensor:
        x = torch.cat([self.text(text), self.image(image)], dim=1)
        x = x + self.attention(x, **how)
        return self.out(x[:, text.shape[1] :])


def masked(model: nn.Module) -> Callable[..., Tensor]:
    return lambda *inputs: model(*inputs[:-1], attn_mask=inputs[-1])


@pytest.mark.parametrize(
    "shape, boolean", [(shape, index % 2 == 0) for index, shape in enumerate(MASKS.values())], ids=MASKS.keys()
)
def test_masks_over_two_segments(shape: Callable[[int], tuple[int, ...]], boolean: bool) -> None:
    inputs = [image_tokens(), text_tokens(14), mask_of(shape(ALL), boolean)]
    sharded = assert_sharded(masked(randomise(JoinedFirst())), inputs, 3)
    assert sharded.collectives["all_to_all_single"] == 4


@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "additive"])
@pytest.mark.parametrize(
    "shape", [(IMAGE, TEXT), (BATCH, 1, 1, TEXT), (BATCH, HEADS, IMAGE, TEXT), (BATCH, 1, IMAGE, 1)], ids=str
)
def test_masks_of_cross_attention(shape: tuple[int, ...], boolean: bool) -> None:
    inputs = [image_tokens(WIDTH), text_tokens(20), mask_of(shape, boolean)]
    sharded = assert_sharded(masked(randomise(CrossAttention(20))), inputs, 2)
    assert "all_to_all_single" not in sharded.collectives


def test_a_mask_that_is_made_inside_from_token_values() -> None:
    model = randomise(JoinedFirst())

    def from_padding(image: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        keys = torch.cat([seen, seen.new_ones(BATCH, IMAGE)], dim=1)
        return model(image, text, attn_mask=(keys[:, None] & keys[:, :, None])[:, None])

    seen = torch.arange(TEXT) < torch.tensor([7, 19])[:, None]
    assert_sharded(from_padding, [image_tokens(), text_tokens(14), seen], 2, tolerance=1e-5)


def test_one_mask_shared_by_attentions_is_put_in_order_once() -> None:
    one, two = randomise(SelfAttention()), randomise(SelfAttention(), seed=1)

    def model(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([text, image], dim=1)
        return two(one(x, attn_mask=mask), attn_mask=mask)[:, TEXT:]

    inputs = [image_tokens(WIDTH), text_tokens(), mask_of((BATCH, HEADS, ALL, ALL), True)]
    sharded = assert_sharded(model, inputs, 2)
    used = [node.args[3] for node in sharded.graphs[0].graph.nodes if "scaled_dot" in str(node.target)]
    assert len(used) == 2
    assert used[0] is used[1]


# Other forms of attention


@pytest.mark.parametrize("residual", [False, True])
def test_causal_over_one_segment(residual: bool) -> None:
    model = randomise(Attend(is_causal=True))
    sharded = assert_sharded(lambda x: model(x) + x * residual, [image_tokens(WIDTH)], 3)
    assert sharded.report.attentions == 1
    assert sharded.share < 0.34


def test_causal_over_two_segments() -> None:
    """The tokens arrive out of order, and the causal mask follows them."""
    model = randomise(JoinedFirst())
    inputs = [image_tokens(), text_tokens(14)]
    assert_sharded(lambda image, text: model(image, text, is_causal=True), inputs, 2)


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_causal_with_one_side_joined_of_two_segments(side: str) -> None:
    model = randomise(Attend())

    def call(image: Tensor, text: Tensor) -> Tensor:
        joined = torch.cat([text, image], dim=1)
        x, y = (joined, image) if side == "queries" else (image, joined)
        q, k, v = heads(model.to_q(x)), heads(model.to_k(y)), heads(model.to_v(y))
        return merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)) + x

    assert_sharded(call, [image_tokens(WIDTH), text_tokens()], 2)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("how", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_grouped_queries(how: dict[str, Any], ranks: int) -> None:
    model = randomise(Attend(queries=24, keys=12 if ranks == 2 else 8, enable_gqa=True, **how))
    assert assert_sharded(model, [image_tokens(WIDTH)], ranks).collectives["all_to_all_single"] == 4


def test_grouped_queries_with_a_mask_for_each_head() -> None:
    model = randomise(Attend(queries=24, keys=12, enable_gqa=True))
    mask = mask_of((BATCH, 24, IMAGE, IMAGE), False)
    assert_sharded(masked(model), [image_tokens(WIDTH), mask], 3)


def test_values_of_another_size() -> None:
    assert_sharded(randomise(Attend(values=5)), [image_tokens(WIDTH)], 3)


def test_a_scale_is_kept() -> None:
    assert_sharded(randomise(Attend(scale=0.9)), [image_tokens(WIDTH)], 2)


def test_queries_of_three_dimensions() -> None:
    model = randomise(Attend())

    def merged(x: Tensor) -> Tensor:
        q, k, v = (heads(to(x)).flatten(0, 1) for to in (model.to_q, model.to_k, model.to_v))
        return merge(F.scaled_dot_product_attention(q, k, v).unflatten(0, (BATCH, HEADS)))

    assert assert_sharded(merged, [image_tokens(WIDTH)], 3).collectives["all_to_all_single"] == 4


def test_one_head_left_for_each_rank() -> None:
    assert_sharded(randomise(Attend(queries=4, keys=4)), [image_tokens(WIDTH)], 4)


def test_two_batch_dimensions_before_the_heads() -> None:
    model = randomise(Attend())

    def doubled(x: Tensor) -> Tensor:
        q, k, v = (heads(to(x)).unflatten(0, (BATCH, 1)) for to in (model.to_q, model.to_k, model.to_v))
        return merge(F.scaled_dot_product_attention(q, k, v).flatten(0, 1))

    assert_sharded(doubled, [image_tokens(WIDTH)], 2)


# All forms of attention, on all meshes, with whatever does not divide


class Forms(nn.Module):
    """Every form of attention over one joined sequence, each an output of its own: one compile for all of them."""

    WIDTH = 16

    def __init__(self, number: int, groups: int, segments: int) -> None:
        super().__init__()
        self.number, self.groups = number, groups
        self.streams = nn.ModuleList(nn.Linear(4 + index, self.WIDTH) for index in range(segments))
        wanted = {"q": SIZE, "k": SIZE, "v": SIZE, "small": SIZE - 1}
        self.parts = nn.ModuleDict({name: nn.Linear(self.WIDTH, number * size) for name, size in wanted.items()})
        self.to_queries = nn.Linear(self.WIDTH, number * groups * SIZE)
        self.to_group = nn.ModuleList(nn.Linear(self.WIDTH, groups * SIZE) for _ in "kv")

    def forward(self, masks: dict[str, Tensor], of_groups: Tensor, other: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        x = torch.cat([to(stream) for to, stream in zip(self.streams, inputs, strict=True)], dim=1)
        q, k, v, small = (heads(to(x), self.number) for to in self.parts.values())
        grouped = (
            heads(self.to_queries(x), self.number * self.groups),
            *(heads(to(x), self.groups) for to in self.to_group),
        )
        merged = (part.flatten(0, 1) for part in (q, k, v))
        others = (heads(self.parts[name](other), self.number) for name in "kv")
        attend = F.scaled_dot_product_attention
        results = {
            "plain": attend(q, k, v),
            "causal": attend(q, k, v, is_causal=True),
            "scale": attend(q, k, v, scale=0.7),
            "value size": attend(q, k, small),
            "three dimensions": attend(*merged).unflatten(0, q.shape[:2]),
            "cross": attend(q, *others),
            "queries of the last segment": attend(q[:, :, -inputs[-1].shape[1] :], k, v),
            "grouped": attend(*grouped, enable_gqa=True),
            "grouped, causal": attend(*grouped, is_causal=True, enable_gqa=True),
            "grouped, mask": attend(*grouped, attn_mask=of_groups, enable_gqa=True),
            **{name: attend(q, k, v, attn_mask=mask) for name, mask in masks.items()},
        }
        return {name: merge(result) for name, result in results.items()}


def padding(batch: int, length: int) -> Tensor:
    """Which tokens of each row are real: another number in each."""
    return torch.arange(length) < torch.tensor([1 + (5 + 3 * row) % length for row in range(batch)])[:, None]


def masks_of(batch: int, number: int, length: int, boolean: bool) -> dict[str, Tensor]:
    shapes = {
        "queries x keys": (length, length),
        "key padding": (batch, 1, 1, length),
        "batch": (batch, 1, length, length),
        "batch and heads": (batch, number, length, length),
        "heads": (number, length, length),
        "keys": (1, length),
        "one column": (batch, 1, length, 1),
    }
    seen = padding(batch, length)
    masks = {name: mask_of(shape, boolean) for name, shape in shapes.items()}
    masks["rows of different lengths"] = seen[:, None, None]
    masks["rows that see no key"] = (seen[:, None] & seen[:, :, None])[:, None]
    if not boolean:
        masks |= {
            name: torch.zeros(masks[name].shape).masked_fill(~masks[name], -torch.inf)
            for name in ("rows of different lengths", "rows that see no key")
        }
    return masks


def check_forms(mesh: Mesh, lengths: Sequence[int], number: int, batch: int, boolean: bool) -> None:
    """Holds every form against the eager model, on every rank."""
    groups, length = mesh_sizes(mesh).get("ulysses", 1), sum(lengths)
    model = randomise(Forms(number, groups, len(lengths)))
    of_groups = mask_of((batch, number * groups, length, length), boolean)
    streams = [draw(batch, tokens, 4 + index, seed=index) for index, tokens in enumerate(lengths)]
    inputs = [masks_of(batch, number, length, boolean), of_groups, draw(batch, 7, Forms.WIDTH), *streams]
    with torch.no_grad():
        expected = model(*inputs)
    sharded = shard(model, inputs, mesh)
    wrong = {
        name: float((sharded.result[name] - expected[name]).abs().max())
        for name in expected
        if not torch.allclose(
            sharded.result[name], expected[name], rtol=0, atol=3e-6 * float(expected[name].abs().max())
        )
    }
    assert not wrong
    for output in sharded.outputs[1:]:
        close(output, sharded.outputs[0], 0.0)
    for gm in sharded.graphs:  # PyTorch 2.11's kernel for the CPU dies without heads
        attentions = gm.graph.find_nodes(op="call_function", target=SDPA)
        assert not [node for node in attentions if node.args[0].meta["val"].shape[-3] == 0]
    heaviest = max(attention.flops for attention in sharded.plan.attentions.values())
    assert not [
        attention.name
        for operation, attention in sharded.plan.attentions.items()
        if operation not in sharded.plan.cuts and attention.flops > 0.1 * heaviest
    ]


SITUATIONS: list[tuple[Mesh, tuple[int, ...], int, int]] = [
    # mesh, tokens of each segment, heads, batch
    ({"ulysses": 2}, (13, 6), 3, 2),
    ({"ulysses": 2}, (12,), 4, 1),
    ({"ulysses": 4}, (14, 3), 3, 2),  # a rank with no head, and one with no token of the second segment
    ({"ulysses": 4}, (3,), 5, 2),  # a rank with no token at all
    ({"ring": 2}, (13,), 3, 2),
    ({"ring": 2}, (1, 6), 5, 1),
    ({"ring": 3}, (12, 9), 4, 2),
    ({"ring": 3}, (2, 11), 3, 2),
    ({"ring": 2, "ulysses": 2}, (13, 6), 5, 2),
    ({"ring": 2, "ulysses": 2}, (2, 1), 3, 2),
    ({"batch": 2}, (13, 6), 3, 3),
    ({"batch": 2, "ulysses": 2}, (5, 1, 8), 3, 2),
    ({"batch": 2, "ring": 2}, (7,), 4, 3),
]
ALL_SITUATIONS = [(*situation, index % 2 == 0) for index, situation in enumerate(SITUATIONS)]


@pytest.mark.whole
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "mesh, lengths, number, batch, boolean",
    quick(ALL_SITUATIONS, *ALL_SITUATIONS[::3]),
    ids=lambda value: mesh_name(value) if isinstance(value, dict) else None,
)
def test_every_form_of_attention(mesh: Mesh, lengths: tuple[int, ...], number: int, batch: int, boolean: bool) -> None:
    """Meshes, lengths and heads in pairs that matter; the test below takes every combination."""
    check_forms(mesh, lengths, number, batch, boolean)


@pytest.mark.full
@pytest.mark.parametrize("number, boolean", [(3, True), (4, True), (5, False)])
@pytest.mark.parametrize("lengths", [(12,), (13,), (3,), (12, 8), (13, 6), (14, 3), (5, 1, 8)], ids=str)
@pytest.mark.parametrize("mesh", [*ONE_AXIS, {"ulysses": 4}, *TWO_AXES], ids=mesh_name)
def test_every_form_of_attention_in_every_combination(
    mesh: Mesh, lengths: tuple[int, ...], number: int, boolean: bool
) -> None:
    check_forms(mesh, lengths, number, 3 if "batch" in mesh_sizes(mesh) else 2, boolean)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("mesh", [{"ring": 2}, {"ulysses": 2}, {"ring": 3}], ids=mesh_name)
def test_rows_from_which_an_additive_mask_hides_every_key(mesh: Mesh, hidden: float) -> None:
    """PyTorch gives the plain mean of all values where a finite number hides all keys, and 0 where -inf does."""
    seen = padding(BATCH, 13)
    mask = torch.zeros(BATCH, 1, 13, 13).masked_fill(~(seen[:, None] & seen[:, :, None])[:, None], hidden)
    assert_sharded(masked(randomise(SelfAttention())), [draw(BATCH, 13, WIDTH), mask], mesh)


# The other axes: whole models


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "mesh, collectives, share",
    [
        ({"ring": 2}, {"all_to_all_single": 2, "all_gather_into_tensor": 1}, 1 / 2),
        ({"ring": 3}, {"all_to_all_single": 4, "all_gather_into_tensor": 1}, 1 / 3),
        ({"ring": 2, "ulysses": 2}, {"all_to_all_single": 10, "all_gather_into_tensor": 1}, 1 / 4),
        ({"batch": 2}, {"all_gather_into_tensor": 1}, 1 / 2),
        ({"batch": 2, "ulysses": 2}, {"all_to_all_single": 8, "all_gather_into_tensor": 2}, 1 / 4),
        ({"batch": 2, "ring": 2}, {"all_to_all_single": 2, "all_gather_into_tensor": 2}, 1 / 4),
    ],
    ids=lambda value: mesh_name(value) if isinstance(value, dict) and "all_gather_into_tensor" not in value else None,
)
def test_what_two_blocks_cost_on_a_mesh(mesh: Mesh, collectives: dict[str, int], share: float) -> None:
    """A ring of P takes P - 1 exchanges for an attention, each of keys and values together."""
    sharded = assert_sharded(randomise(Transformer(2)), [image_tokens()], mesh)
    assert sharded.collectives == collectives
    assert sharded.share == pytest.approx(share)
    assert sharded.report.notes == ()  # the last gathers are no news


@pytest.mark.sampled(4)
@pytest.mark.parametrize("tokens", [49, 3, 2])
@pytest.mark.parametrize("mesh", [{"ulysses": 4}, {"ring": 2, "ulysses": 2}, {"batch": 2, "ring": 2}], ids=mesh_name)
def test_two_blocks_whose_tokens_do_not_divide(mesh: Mesh, tokens: int) -> None:
    assert_sharded(randomise(Transformer(2)), [draw(BATCH, tokens, 10)], mesh)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "text_first, tokens", [(True, (13, 5)), (False, (13, 5)), (True, (2, 6)), (False, (7, 7))], ids=str
)
@pytest.mark.parametrize("mesh", [{"ulysses": 3}, {"ring": 3}], ids=mesh_name)
def test_uneven_text_and_image_joined_and_split_again(mesh: Mesh, text_first: bool, tokens: tuple[int, int]) -> None:
    image, text = (draw(BATCH, length, WIDTH, seed=length + slot) for slot, length in enumerate(tokens))
    assert_sharded(randomise(Joint(text_first=text_first)), [image, text], mesh)


@pytest.mark.parametrize("mesh", [{"ring": 3}, *TWO_AXES], ids=mesh_name)
def test_self_and_cross_attention_on_a_mesh(mesh: Mesh) -> None:
    inputs = [draw(BATCH, 13, WIDTH), draw(BATCH, 5, 20, seed=2)]
    sharded = assert_sharded(randomise(WithText()), inputs, mesh)
    assert (sharded.report.attentions, sharded.report.cross_attentions) == (1, 1)


@pytest.mark.parametrize("mesh", [{"ring": 2}, {"ulysses": 2}], ids=mesh_name)
def test_several_causal_attentions_are_all_cut(mesh: Mesh) -> None:
    """A causal attention has no rule for its queries: its result must be known to hold tokens all the same."""
    model = nn.Sequential(randomise(Attend(is_causal=True)), randomise(Attend(is_causal=True), seed=1))
    sharded = assert_sharded(model, [draw(BATCH, 13, WIDTH)], mesh)
    assert (sharded.report.attentions, sharded.report.whole_attentions) == (2, 0)


@pytest.mark.parametrize("mesh", [{"ring": 2}, {"batch": 2}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
def test_queries_of_three_dimensions_alone_on_a_mesh(mesh: Mesh) -> None:
    model = randomise(Attend())

    def merged(x: Tensor) -> Tensor:
        q, k, v = (heads(to(x)).flatten(0, 1) for to in (model.to_q, model.to_k, model.to_v))
        return merge(F.scaled_dot_product_attention(q, k, v).unflatten(0, (BATCH, HEADS))) + x

    assert_sharded(merged, [draw(BATCH, 13, WIDTH)], mesh)


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_the_batch_axis_cuts_what_carries_a_batch(batch: int) -> None:
    """Tables, masks and modulation with a row for each element, and with one row for all."""
    attention, modulation = randomise(SelfAttention()), randomise(nn.Linear(8, 2 * WIDTH))

    def model(x: Tensor, time: Tensor, table: Tensor, shared: Tensor, mask: Tensor) -> Tensor:
        scale, shift = modulation(F.silu(time))[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
        x = x * table.cos() + shared.sin()
        return x + attention(x, attn_mask=mask)

    tables = draw(batch, 13, WIDTH, seed=3), draw(1, 13, WIDTH, seed=4)
    inputs = [draw(batch, 13, WIDTH), draw(batch, 8, seed=2), *tables, padding(batch, 13)[:, None, None]]
    sharded = assert_sharded(model, inputs, {"batch": 2})
    assert sharded.collectives == {"all_gather_into_tensor": 1}
    assert sharded.share == pytest.approx((batch + 1) // 2 / batch)


@pytest.mark.parametrize("batch, ranks", [(2, 3), (1, 2)])
def test_a_batch_smaller_than_its_axis_is_refused(batch: int, ranks: int) -> None:
    with pytest.raises(GraphError, match=f"batch of {batch} cannot be shared by the {ranks} ranks") as caught:
        shard(randomise(Transformer()), [draw(batch, IMAGE, 10)], {"batch": ranks})
    assert "without max_batch_dim_size" in str(caught.value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "mesh", quick([2, 4, {"ring": 2}, {"ring": 2, "ulysses": 2}], 4, {"ring": 2, "ulysses": 2}), ids=mesh_name
)
@pytest.mark.parametrize("queries, keys", [(6, 3), (6, 1), (9, 3), (2, 1)])
def test_key_heads_that_do_not_divide(queries: int, keys: int, mesh: Mesh) -> None:
    model = randomise(Attend(queries=queries, keys=keys, enable_gqa=True))
    mask = mask_of((BATCH, queries, IMAGE, IMAGE), False)
    assert_sharded(model, [image_tokens(WIDTH)], mesh)
    assert_sharded(masked(model), [image_tokens(WIDTH), mask], mesh)


# What cannot be cut beside what can


class Frames(nn.Module):
    """Attention among the tokens of each frame, and then among the frames of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal, self.forward_net = SelfAttention(), SelfAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, tokens, _ = x.shape
        x = x.flatten(0, 1)
        x = x + self.spatial(x)
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        x = x + self.temporal(x)
        x = x + self.forward_net(x)
        return x.unflatten(0, (batch, tokens)).transpose(1, 2)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", [2, {"ring": 3}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
@pytest.mark.parametrize("frames", [1, 5])
def test_attention_over_frames_of_which_there_may_be_one(frames: int, mesh: Mesh) -> None:
    assert_sharded(randomise(Frames()), [draw(BATCH, frames, 15, WIDTH)], mesh)


class Outweighed(nn.Module):
    """An attention over tokens that is small beside one over a dimension that is no token's."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.attention, self.inner = SelfAttention(), nn.Linear(WIDTH, inner * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        inner = self.inner(x[0, 0]).unflatten(-1, (-1, SIZE))
        return x + F.scaled_dot_product_attention(inner, inner, inner).mean()


def test_the_largest_attention_stays_whole_as_long_as_others_carry_the_work() -> None:
    sharded = assert_sharded(randomise(Outweighed(4 * IMAGE)), [image_tokens(WIDTH)])
    assert sharded.report.whole_attentions == 1
    (note,) = [note for note in sharded.report.notes if note.startswith("left whole")]
    assert "test_context_parallel.py" in note


def test_where_too_little_can_be_cut_the_model_is_refused() -> None:
    with pytest.raises(GraphError, match="of the model's products can be shared") as caught:
        shard(randomise(Outweighed(16 * IMAGE)), [image_tokens(WIDTH)])
    assert "largest attention cannot be cut" in str(caught.value)


# What is refused


def test_dropout_in_attention_is_refused() -> None:
    with pytest.raises(GraphError, match="random numbers") as caught:
        shard(randomise(Attend(dropout_p=0.1)), [image_tokens(WIDTH)])
    assert "test_context_parallel.py" in str(caught.value)
    assert "scaled_dot_product_attention" in str(caught.value)


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: x + torch.rand_like(x),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x + torch.randn(IMAGE, 1),
        lambda x: F.dropout(x, 0.1, training=True),
        lambda x: x[:, torch.randperm(IMAGE)],
        lambda x: x + torch.empty_like(x).normal_(),
    ],
    ids=["rand_like", "bernoulli", "randn", "dropout", "randperm", "normal_"],
)
def test_random_numbers_inside_the_model_are_refused(noise: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(GraphError, match="random numbers") as caught:
        shard(randomise(Transformer(middle=noise)), [image_tokens()])
    assert "test_context_parallel.py" in str(caught.value)
    assert "lambda x" in str(caught.value)


def test_dropout_of_a_model_that_evaluates_is_nothing() -> None:
    model = randomise(Transformer(middle=nn.Dropout(0.5)))
    assert "dropout" not in " ".join(count(assert_sharded(model, [image_tokens()]).graphs[0]))


def test_a_graph_without_attention_is_refused() -> None:
    with pytest.raises(GraphError, match="no scaled_dot_product_attention") as caught:
        shard(nn.Linear(10, 10), [image_tokens()])
    assert "set_attention_backend" in str(caught.value)


class FlexAttention(SelfAttention):
    """Each token attends to those before it."""

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        q, k, v = (heads(to(x), 4) for to in (self.to_q, self.to_k, self.to_v))
        attended = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -torch.inf))
        assert isinstance(attended, Tensor)
        return self.to_out(merge(attended))


@pytest.mark.parametrize("mesh", [2, {"batch": 2}], ids=mesh_name)
def test_flex_attention_is_refused(mesh: Mesh) -> None:
    model = Transformer()
    model.blocks[0].attention = FlexAttention()
    with pytest.raises(GraphError) as caught:
        shard(randomise(model), [image_tokens()], mesh)
    said = str(caught.value)
    assert "it has queries (2, 4, 48, 18) and keys (2, 4, 48, 18), and cannot be cut" in said
    assert "in module blocks.0.attention" in said
    assert "model.set_attention_backend('native')" in said


def test_flex_attention_that_is_small_beside_the_model_s_is_computed_whole() -> None:
    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refiner, self.joint = FlexAttention(), Joint()

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            image, text = self.joint(image, text + self.refiner(text))
            return image

    sharded = assert_sharded(randomise(Refined()), [image_tokens(WIDTH), text_tokens()])
    assert sharded.report.attentions == 1
    assert count(sharded.graphs[0])["flex_attention"] == 1


def test_a_sequence_of_a_single_token_is_refused() -> None:
    with pytest.raises(GraphError, match="1 query tokens for the 2 ranks") as caught:
        shard(randomise(Transformer()), [draw(BATCH, 1, 10)], {"ring": 2})
    assert "use fewer ranks" in str(caught.value)


def test_attention_over_a_dimension_that_is_no_token_dimension_is_refused() -> None:
    with pytest.raises(GraphError, match="cannot be cut"):
        shard(lambda q: F.scaled_dot_product_attention(q, q, q), [draw(IMAGE, SIZE)])


# Inputs and outputs


def outputs_of(kind: str, x: Tensor, y: Tensor) -> Any:
    return {
        "tuple": (x, y),
        "dict": {"sample": x, "other": (y, None, 3)},
        "list with a repeated value": [x, x, y],
        "a value that is also used": (x, x * 2 + y),
        "a view of another": (x, x[:, :12], x.transpose(1, 2)),
        "an input": (x, y, x + y),
    }[kind]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "kind",
    ["tuple", "dict", "list with a repeated value", "a value that is also used", "a view of another", "an input"],
)
def test_outputs(kind: str) -> None:
    model = randomise(Transformer(out=WIDTH))
    inner = randomise(SelfAttention())

    def call(x: Tensor) -> Any:
        x = model(x)
        return outputs_of(kind, x, inner(x))

    assert_sharded(call, [image_tokens()], 2)


def test_an_input_that_is_returned_unchanged() -> None:
    model = randomise(Transformer())

    def call(x: Tensor, y: Tensor) -> Any:
        return model(x), y, x

    assert_sharded(call, [image_tokens(), text_tokens()], 2)


def test_numbers_and_flags_among_the_inputs() -> None:
    model = randomise(Transformer())

    def call(x: Tensor, factor: float, count: int, flag: bool, nothing: None) -> Any:
        return model(x) * factor + count if flag and nothing is None else x

    assert_sharded(call, [image_tokens(), 0.5, 3, True, None], 2)


def test_inputs_with_odd_strides() -> None:
    x = draw(IMAGE, BATCH, 20).transpose(0, 1)[..., ::2]
    assert_sharded(randomise(Transformer()), [x], 3)


def mutating(read: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    model = randomise(SelfAttention())

    def call(x: Tensor) -> Tensor:
        result = read(model(x), x)
        x.mul_(3)
        return result

    return call


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", [{"ulysses": 2}, {"ring": 3}], ids=mesh_name)
@pytest.mark.parametrize(
    "read",
    [
        lambda attended, x: attended + x,
        lambda attended, x: attended.flip(1) + x,
        lambda attended, x: attended.flip(1) + x[:, :5].sum(1, keepdim=True),
        lambda attended, x: torch.cat([attended, x[:, :12]], dim=1),
    ],
    ids=["cut", "whole", "view", "joined"],
)
def test_a_mutated_input_is_overwritten_after_its_last_use(
    read: Callable[[Tensor, Tensor], Tensor], mesh: Mesh
) -> None:
    """The old value is still wanted behind the exchanges: it may not be overwritten while they run."""
    call = mutating(read)
    x, other = image_tokens(WIDTH), image_tokens(WIDTH)
    with torch.no_grad():
        expected = call(other)
    sharded = shard(call, [x], mesh)
    torch.testing.assert_close(sharded.result, expected)
    torch.testing.assert_close(x, other)


@pytest.mark.parametrize("mesh", [2, 3, {"ring": 2}, {"batch": 2}], ids=mesh_name)
def test_a_buffer_that_is_updated_from_tokens(mesh: Mesh) -> None:
    """Every rank writes the whole new value."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()
            self.register_buffer("seen", torch.zeros(IMAGE, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x)
            self.seen += x.mean(0)
            return x

    model, eager = randomise(Counting()), randomise(Counting())
    x = image_tokens(WIDTH)
    torch.testing.assert_close(shard(model, [x], mesh).result, eager(x))
    torch.testing.assert_close(model.seen, eager.seen)


# Precision


@pytest.mark.parametrize("mesh", [{"ulysses": 2}, {"ring": 2}], ids=mesh_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, mesh: Mesh) -> None:
    sharded = assert_sharded(randomise(Transformer()).to(dtype), [image_tokens().to(dtype)], mesh, tolerance=0.03)
    assert sharded.result.dtype is dtype


@pytest.mark.parametrize("mesh", [{"ulysses": 4}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
@pytest.mark.parametrize("tokens", [(48, 24), (3, 1)], ids=str)
def test_every_rank_runs_the_same_collectives_in_the_same_order(tokens: tuple[int, int], mesh: Mesh) -> None:
    """Also ranks that hold no token, and no head."""
    image, text = tokens
    inputs = [draw(BATCH, image, 10), draw(BATCH, text, 14)]
    model = randomise(JoinedFirst(number=3))
    sharded = assert_sharded(model, inputs, mesh)
    orders = [[str(node.target) for node in gm.graph.nodes if "c10d" in str(node.target)] for gm in sharded.graphs]
    assert orders.count(orders[0]) == 4


def written_where(x: Tensor, of: str, value: float | None) -> Tensor:
    """A mask of several dimensions is one index of as many."""
    y = x.clone()
    seen = x > 0 if of == "values" else x[..., 0] > 0
    y[seen] = y[seen] * 2 if value is None else value
    return y


@pytest.mark.sampled(3)
@pytest.mark.parametrize("value", [0.5, None])
@pytest.mark.parametrize("of", ["tokens", "values"])
@pytest.mark.parametrize("mesh", [2, {"batch": 2, "ring": 2}], ids=mesh_name)
def test_a_mask_of_several_dimensions_as_an_index(mesh: Mesh, of: str, value: float | None) -> None:
    model = randomise(Transformer(middle=partial(written_where, of=of, value=value)))
    sharded = assert_sharded(model, [image_tokens()], mesh)
    if value is not None:  # what is written does not depend on other positions, so that nothing is gathered for it
        assert sharded.collectives["all_gather_into_tensor"] == len(mesh_sizes(mesh))


@pytest.mark.parametrize(
    "born",
    [
        lambda x: x.new_zeros(x.shape),
        lambda x: x.new_ones(x.shape),
        lambda x: x.new_full(x.shape, 0.5),
        lambda x: x.new_empty(x.shape).copy_(x),
        lambda x: torch.cat([x, x.new_zeros(x.shape[0], 3, x.shape[2])], 1)[:, : x.shape[1]],
    ],
    ids=["zeros", "ones", "full", "empty", "behind"],
)
def test_what_is_born_in_the_shape_of_another_gathers_nothing(born: Callable[[Tensor], Tensor]) -> None:
    sharded = assert_sharded(randomise(Transformer(middle=lambda x: x * 2 + born(x))), [image_tokens()])
    assert sharded.collectives["all_gather_into_tensor"] == 1
    assert sharded.share == 0.5


NEEDS_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv1d(x.transpose(1, 2), torch.eye(WIDTH)[:, :, None] * 2).transpose(1, 2),
    "FFT": lambda x: torch.fft.ifft(torch.fft.fft(x) * 2).real,
    "several results": lambda x: torch.cat(torch.fft.fft(x).real.sin().chunk(2, -1)[::-1], -1),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mesh", [4, {"ring": 4}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
@pytest.mark.parametrize("name", NEEDS_POSITIONS)
def test_a_rank_without_positions_runs_nothing_on_them(name: str, mesh: Mesh) -> None:
    model = Transformer(middle=NEEDS_POSITIONS[name])
    assert_sharded(randomise(model), [draw(BATCH, 3, 10)], mesh)


class Flattened(SelfAttention):
    """Rows and tokens in one dimension, of which one axis cuts the outer and the other the inner part."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        x = super().forward(x, **how)
        flat = self.middle(self.to_q(x.reshape(-1, x.shape[2])))
        return super().forward(flat.reshape(x.shape), **how)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "middle, gathers", [(torch.sin, 2), (lambda flat: flat.roll(1, 0).sin(), 4)], ids=["sin", "roll"]
)
@pytest.mark.parametrize("batch, tokens", [(2, 48), (3, 13)])
@pytest.mark.parametrize("mesh", TWO_AXES[1:], ids=mesh_name)
def test_rows_and_tokens_in_one_dimension(
    mesh: Mesh, batch: int, tokens: int, middle: Callable[[Tensor], Tensor], gathers: int
) -> None:
    """What mixes them is given both whole, gathered along one axis and then along the other."""
    sharded = assert_sharded(randomise(Flattened(middle)), [draw(batch, tokens, WIDTH)], mesh)
    assert sharded.collectives["all_gather_into_tensor"] == gathers
