"""The layout analysis: where tokens are found, how they are cut, into which segments, and where they are gathered."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    WIDTH,
    Block,
    CrossAttention,
    Joint,
    SelfAttention,
    Sharded,
    Transformer,
    assert_sharded,
    heads,
    image_tokens,
    merge,
    normalised,
)
from torch import Tensor, fx, nn

import paracompile.layout
from paracompile.layout.boundaries import Machine
from paracompile.layout.factors import Place, Span, project, within
from paracompile.layout.graph import Operation, Value, value_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Plan, Sharding, apart, make_plan
from paracompile.layout.segments import find_segments, too_fine
from paracompile.layout.shares import Shares
from paracompile.patterns.attention import find_attentions
from paracompile.patterns.flops import flops_of
from paracompile.patterns.rules import rule_for

TEXT = 20  # unlike in small_models, text and image together are not as many as there are channels
ALL = TEXT + IMAGE

aten = torch.ops.aten


def analyse(gm: fx.GraphModule, ranks: int = 2, **how: Any) -> Plan:
    return make_plan(gm.graph, rule_for=rule_for, find_attentions=find_attentions, flops=flops_of, ranks=ranks, **how)


def plan_of(model: Callable[..., Any], *inputs: Tensor, **how: Any) -> Plan:
    return analyse(normalised(model, *inputs), **how)


def calls(plan: Plan, target: Any) -> list[Operation]:
    return [operation for operation in plan.operations if operation.node.target is target]


def one_attention(plan: Plan) -> Attention:
    (attention,) = plan.attentions.values()
    return attention


def query_of(plan: Plan) -> Value:
    attention = one_attention(plan)
    return attention.operation.operands[attention.query]


def gathered(sharded: Sharded) -> list[int]:
    """Elements of all ranks together, for each gather in the graph."""
    return [
        node.args[0].meta["val"].numel() * node.args[1]
        for node in sharded.graphs[0].graph.nodes
        if node.target is torch.ops._c10d_functional.all_gather_into_tensor.default
    ]


def text_of(length: int = TEXT, channels: int = WIDTH) -> Tensor:
    return draw(BATCH, length, channels, seed=2)


# Places

AT = Place(1, IMAGE)
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Place | None]] = {
    # what is done to tokens of shape (batch, tokens, channels), and where the tokens are then
    "nothing": (lambda x: x * 1, AT),
    "linear": (lambda x: F.linear(x, torch.ones(7, WIDTH)), AT),
    "matmul": (lambda x: x @ torch.ones(WIDTH, 5), AT),
    "layer norm": (lambda x: F.layer_norm(x, (WIDTH,)), AT),
    "rms norm": (lambda x: F.rms_norm(x, (WIDTH,)), AT),
    "softmax over channels": (lambda x: x.softmax(-1), AT),
    "mean over channels": (lambda x: x.mean(-1), AT),
    "transposed": (lambda x: x.transpose(0, 1), Place(0, IMAGE)),
    "channels first": (lambda x: x.permute(0, 2, 1), Place(2, IMAGE)),
    "heads": (heads, Place(2, IMAGE)),
    "heads and back": (lambda x: merge(heads(x)), AT),
    "heads, then tokens": (lambda x: x.reshape(BATCH, IMAGE, HEADS, SIZE), AT),
    "merged with the batch": (lambda x: x.flatten(0, 1), Place(0, IMAGE, outer=BATCH)),
    "merged with the batch and back": (lambda x: x.flatten(0, 1).unflatten(0, (BATCH, IMAGE)), AT),
    "merged with channels": (lambda x: x.flatten(1, 2), Place(1, IMAGE, inner=WIDTH)),
    "merged with both": (lambda x: x.flatten(), Place(0, IMAGE, outer=BATCH, inner=WIDTH)),
    "merged with both and back": (lambda x: x.flatten().reshape(x.shape), AT),
    "merged heads and batch": (lambda x: heads(x).flatten(0, 1), Place(1, IMAGE)),
    "a new dimension": (lambda x: x[:, None], Place(2, IMAGE)),
    "expanded": (lambda x: x[:, None].expand(-1, 4, -1, -1), Place(2, IMAGE)),
    "stacked": (lambda x: torch.stack([x, x], dim=2), AT),
    "joined with others": (lambda x: torch.cat([torch.ones(BATCH, 5, WIDTH), x], dim=1), Place(1, 5 + IMAGE)),
    "joined along channels": (lambda x: torch.cat([x, x], dim=2), AT),
    "first token": (lambda x: x[:, :1], Place(1, 1)),
    "slice": (lambda x: x[:, 5:17], Place(1, 12)),
    "slice from the end": (lambda x: x[:, -5:], Place(1, 5)),
    "chunk": (lambda x: x.chunk(3, dim=1)[1], Place(1, 16)),
    "uneven chunk": (lambda x: x.chunk(5, dim=1)[4], Place(1, 8)),
    "split": (lambda x: x.split([13, 35], dim=1)[1], Place(1, 35)),
    "slice of channels": (lambda x: x[..., 3:9], AT),
    "chunk of channels": (lambda x: x.chunk(3, dim=-1)[2], AT),
    "repeated rows": (lambda x: x.repeat(2, 1, 1), AT),
    "complex": (lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))), AT),
    "complex and back": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(2), AT),
    "in place": (lambda x: x.clone().mul_(2).add_(x), AT),
    "set channels": (lambda x: _set(x.clone()), AT),
    "where": (lambda x: torch.where(x > 0, x, 0.0), AT),
    # what holds no tokens that could be cut
    "mean over tokens": (lambda x: x.mean(1), None),
    "mean over tokens, kept": (lambda x: x.mean(1, keepdim=True), None),
    "softmax over tokens": (lambda x: x.softmax(1), None),
    "cumsum over tokens": (lambda x: x.cumsum(1), None),
    "flip": (lambda x: x.flip(1), None),
    "roll": (lambda x: x.roll(1, 1), None),
    "one token": (lambda x: x[:, 3], None),
    "every second token": (lambda x: x[:, ::2], None),
    "shuffled": (lambda x: x[:, torch.arange(IMAGE - 1, -1, -1)], None),
    "grid": (lambda x: x.unflatten(1, (6, 8)), None),
    "merged with what it does not touch": (lambda x: x.transpose(1, 2).reshape(BATCH, 8, -1).sum(2), None),
    "convolution over tokens": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(WIDTH, 1, 3), groups=WIDTH), None),
    "norm over tokens": (lambda x: F.layer_norm(x, (IMAGE, WIDTH)), None),
    "tokens by tokens": (lambda x: (x @ x.transpose(1, 2)).sum(1), None),
}


def _set(x: Tensor) -> Tensor:
    x[..., :3] = 1.0
    return x


@cache
def plan_of_forms() -> tuple[Plan, dict[str, Value]]:
    """All forms in one graph, which is compiled once."""
    attention = randomise(SelfAttention())

    def model(x: Tensor) -> list[Tensor]:
        x = x + attention(x)
        return [form(x) for form, _ in FORMS.values()]

    gm = normalised(model, image_tokens(WIDTH))
    (output,) = gm.graph.find_nodes(op="output")
    return analyse(gm), dict(zip(FORMS, map(value_of, output.args[0]), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_the_place_of_the_tokens(name: str) -> None:
    plan, values = plan_of_forms()
    assert plan.places.get(values[name]) == FORMS[name][1]


def test_operations_are_cut_where_their_results_hold_tokens_and_nowhere_else() -> None:
    plan, _ = plan_of_forms()
    assert all(value in plan.places for operation in plan.cuts for value in operation.results)
    assert one_attention(plan).operation in plan.cuts
    assert not plan.cuts.keys() & {*calls(plan, aten.flip.default), *calls(plan, aten.cumsum.default)}


def test_places_run_backwards_to_the_inputs_and_beside_them() -> None:
    """The seed is the attention's query; what feeds it is found, and what is added to what feeds it."""
    attention = randomise(SelfAttention())
    other, table, scale = draw(BATCH, IMAGE, WIDTH, seed=3), draw(IMAGE, WIDTH, seed=4), draw(BATCH, 1, WIDTH, seed=5)

    def model(x: Tensor, other: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        return attention(x * scale + other.sin() + table.cos())

    plan = plan_of(model, image_tokens(WIDTH), other, table, scale)
    places = {
        str(value.node.meta["val"].shape[:-1]): place
        for value, place in plan.places.items()
        if value.node.op == "placeholder"
    }
    assert places == {str(torch.Size([BATCH, IMAGE])): AT, str(torch.Size([IMAGE])): Place(0, IMAGE)}


def test_equal_numbers_are_no_tokens() -> None:
    """As many channels as tokens, and as many rows: nothing is found by its size."""
    attention = randomise(SelfAttention())

    def model(x: Tensor, square: Tensor) -> Tensor:
        return attention(x).transpose(1, 2).flip(2).transpose(1, 2) @ square

    square = draw(WIDTH, WIDTH, seed=3)
    sharded = assert_sharded(model, [draw(WIDTH, WIDTH, WIDTH), square])
    plan = sharded.plan
    assert plan.places[query_of(plan)] == Place(2, WIDTH)
    (placeholder,) = [
        node for node in sharded.normalised.graph.nodes if node.op == "placeholder" and "square" in node.name
    ]
    assert Value(placeholder) not in plan.places


def test_the_seed_of_the_batch_axis() -> None:
    attention = randomise(SelfAttention())

    def model(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = attention(x + table)
        return x, x.flatten(0, 1)

    gm = normalised(model, image_tokens(WIDTH), draw(1, IMAGE, WIDTH, seed=3))
    plan = analyse(gm, seed="batch")
    assert plan.places[query_of(plan)] == Place(0, BATCH)
    assert plan.shares.longest == BATCH
    (output,) = gm.graph.find_nodes(op="output")
    assert [plan.places[value_of(node)] for node in output.args[0]] == [Place(0, BATCH), Place(0, BATCH, inner=IMAGE)]
    tables = [node for node in gm.graph.nodes if node.op == "placeholder" and node.meta["val"].shape[0] == 1]
    assert not [node for node in tables if Value(node) in plan.places]


@pytest.mark.parametrize("seed", ["tokens", "batch"])
def test_the_same_graph_gives_the_same_plan(seed: str) -> None:
    gm = normalised(randomise(Joint()), image_tokens(WIDTH), text_of())
    first, second = analyse(gm, seed=seed), analyse(gm, seed=seed)
    assert first.places == second.places
    assert [operation.node for operation in first.cuts] == [operation.node for operation in second.cuts]
    assert first.segments.values == second.segments.values


SPANS = [
    # a place in a value, the span of a factor in it, the factor's size, the place in the factor
    (Place(1, 48), Span(1, 0, 48), 48, Place(0, 48)),
    (Place(0, 48, outer=2), Span(0, 0, 48, outer=2), 48, Place(0, 48)),
    (Place(0, 48, outer=2), Span(0, 0, 96), 96, Place(0, 48, outer=2)),
    (Place(1, 48, inner=5), Span(1, 0, 240), 240, Place(0, 48, inner=5)),
    (Place(0, 48, outer=6, inner=5), Span(0, 0, 240, outer=6), 240, Place(0, 48, inner=5)),
    (Place(1, 48), Span(1, 24, 48), 72, Place(0, 72)),
    (Place(1, 48, inner=5), Span(1, 120, 240), 360, Place(0, 72, inner=5)),
    (Place(1, 48), Span(0, 0, 48), 48, None),
    (Place(1, 48), Span(1, 0, 8, inner=6), 8, None),
    (Place(1, 48, outer=3), Span(1, 0, 48, outer=2), 48, None),
    (Place(1, 24, outer=2), Span(1, 24, 48), 72, None),
    (Place(1, 48, inner=5), Span(1, 7, 240), 367, None),
]


@pytest.mark.whole
@pytest.mark.parametrize("place, span, size, expected", SPANS)
def test_a_place_in_a_value_is_one_in_the_factor_and_back(
    place: Place, span: Span, size: int, expected: Place | None
) -> None:
    assert within(place, span, size) == expected
    if expected is not None:
        assert project(expected, span, size) == place


# Segments


class Joined(nn.Module):
    """Streams joined in an order, a block, and taken apart again at the lengths given."""

    def __init__(self, order: tuple[int, ...] = (0, 1), apart: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.block, self.out = Block(), nn.Linear(WIDTH, 5)
        self.order, self.apart = order, apart

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        x = self.block(torch.cat([streams[index] for index in self.order], dim=1))
        lengths = self.apart or [streams[index].shape[1] for index in self.order]
        return tuple(self.out(part) for part in x.split(lengths, dim=1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "lengths, order, apart, expected",
    [
        ((TEXT, IMAGE), (0, 1), None, (TEXT, IMAGE)),
        ((TEXT, IMAGE), (1, 0), None, (IMAGE, TEXT)),
        ((4, 30, 18), (0, 1, 2), None, (4, 30, 18)),
        ((4, 30, 18), (2, 0, 1), None, (18, 4, 30)),
        ((52,), (0,), (4, 30, 18), (4, 30, 18)),  # known from the end only
        ((4, 48), (0, 1), (34, 18), (4, 30, 18)),  # some edges from the start, others from the end
        ((4, 48), (0, 1), (52,), (4, 48)),
    ],
)
def test_segments_of_joined_sequences(
    lengths: tuple[int, ...], order: tuple[int, ...], apart: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    streams = [draw(BATCH, length, WIDTH, seed=length) for length in lengths]
    sharded = assert_sharded(randomise(Joined(order, apart)), streams, 2)
    plan = sharded.plan
    assert plan.segments.values[query_of(plan)] == expected
    assert plan.segments.values[one_attention(plan).operation.results[0]] == expected
    assert plan.shares.longest == max(expected)
    assert sharded.share <= (sum(-(-length // 2) for length in expected) + 0.1) / sum(expected)
    assert sharded.report.notes == ()


@pytest.mark.parametrize("text_first", [True, False])
def test_segments_of_a_joint_attention_between_two_streams(text_first: bool) -> None:
    model = randomise(Joint(text_first=text_first))
    plan = plan_of(lambda image, text: model(*model(image, text)), image_tokens(WIDTH), text_of())
    assert len(plan.attentions) == 2
    for operation in plan.attentions:
        lengths = (TEXT, IMAGE) if text_first else (IMAGE, TEXT)
        assert plan.segments.values[operation.results[0]] == lengths
    linears = [plan.segments.values[operation.results[0]] for operation in calls(plan, aten.linear.default)]
    assert sorted(linears) == [(TEXT,)] * 4 + [(IMAGE,)] * 4


def reorderings(operations: Iterable[Operation]) -> list[list[Operation]]:
    forwards = list(operations)
    return [forwards, forwards[::-1], forwards[1::2] + forwards[::2]]


@pytest.mark.parametrize("apart", [None, (3, ALL - 3), (TEXT, 7, IMAGE - 7)])
def test_segments_are_the_same_found_from_either_end(apart: tuple[int, ...] | None) -> None:
    plan = plan_of(randomise(Joined(apart=apart)), text_of(), image_tokens(WIDTH))
    for operations in reorderings(plan.cuts):
        assert find_segments(operations, plan.cuts, plan.places, 2) == plan.segments


def test_a_slice_in_the_middle_cuts_the_whole_sequence_at_its_edges() -> None:
    """Before the slice as well as after: the parts of a rank must be its part of every window."""

    def middle(x: Tensor) -> Tensor:
        return torch.cat([x[:, :5], x[:, 5:17] * 2, x[:, 17:]], dim=1)

    sharded = assert_sharded(randomise(Transformer(middle=middle)), [image_tokens()], 2)
    plan = sharded.plan
    linears = [plan.segments.values[operation.results[0]] for operation in calls(plan, aten.linear.default)]
    assert set(linears) == {(5, 12, 31)}
    assert sharded.report.notes == ()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "middle",
    [
        lambda x: torch.cat([part + index for index, part in enumerate(x.chunk(3, dim=1))], dim=1),
        lambda x: torch.cat([x[:, 10:], x[:, :10]], dim=1),
        lambda x: torch.cat([x[:, 7:], x[:, :7] * 2], dim=1)[:, :41],
        lambda x: torch.cat(x.split(11, dim=1)[::-1], dim=1),
        lambda x: x.flatten(0, 1).relu().unflatten(0, (BATCH, IMAGE)),
        lambda x: x.flatten(1, 2).relu().unflatten(1, (IMAGE, WIDTH)),
        lambda x: x.transpose(0, 1).flatten(1, 2).relu().unflatten(1, (BATCH, WIDTH)).transpose(0, 1),
        lambda x: torch.cat([x.flatten(1, 2), x[:, :6].flatten(1, 2)], dim=1).unflatten(1, (IMAGE + 6, WIDTH)),
        lambda x: torch.cat([x, x[:, :12] * 2], dim=1)[:, 12:],
    ],
    ids=[
        "chunks",
        "swapped",
        "swapped and shortened",
        "reversed parts",
        "merged with the batch",
        "merged with channels",
        "merged with channels, tokens first",
        "merged with channels and joined",
        "lengthened and shortened",
    ],
)
def test_what_only_moves_tokens_in_pieces_is_cut(middle: Callable[[Tensor], Tensor]) -> None:
    sharded = assert_sharded(randomise(Transformer(middle=middle)), [image_tokens()], 3)
    assert sharded.report.notes == ()
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert sharded.whole_operations() == []


# Windows that do not align


class Moving(nn.Module):
    """Two blocks, and before each something that moves tokens against each other."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for block in self.blocks:
            x = block(self.move(x))
        return self.proj_out(x)


MISALIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "the token before": lambda x: x + torch.cat([x[:, -1:], x[:, :-1]], dim=1),
    "differences": lambda x: torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], dim=1),
    "token by token": lambda x: torch.cat([part * number for number, part in enumerate(x.split(1, dim=1))], dim=1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MISALIGNED)
def test_windows_that_do_not_align_are_gathered(name: str, ranks: int) -> None:
    """Otherwise a token would have to be where the one before it is: all on one rank."""
    sharded = assert_sharded(randomise(Moving(MISALIGNED[name])), [image_tokens()], ranks, tolerance=1e-5)
    lengths = [*sharded.plan.segments.values.values(), *sharded.plan.segments.operands.values()]
    assert not any(too_fine(each, ranks) for each in lengths)
    assert sharded.share < 1.35 / ranks
    assert sharded.report.attentions == 2
    if name != "guidance":  # whose parts are few enough
        assert any(
            "pieces too small to share, at" in note and "test_layout.py" in note for note in sharded.report.notes
        )


@pytest.mark.parametrize("name", ["the token before", "differences"])
def test_a_long_sequence_has_few_segments(name: str) -> None:
    plan = plan_of(randomise(Moving(MISALIGNED[name])), draw(1, 2048, 10))
    assert max(map(len, plan.segments.values.values())) <= 3
    assert len(plan.misaligned) == 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_guidance_between_two_halves_of_the_tokens_is_cut(ranks: int) -> None:
    """Two segments are few enough, also where they do not divide."""

    def after(x: Tensor) -> Tensor:
        conditional, other = x.chunk(2, dim=1)
        return other + 3 * (conditional - other)

    sharded = assert_sharded(randomise(Transformer(after=after)), [draw(BATCH, 50, 10)], ranks)
    assert sharded.report.notes == ()
    assert sharded.share < 1.15 / ranks


@pytest.mark.parametrize(
    "lengths, ranks, expected",
    [
        ((48,), 4, False),
        ((1,), 2, False),
        ((5, 13), 2, False),
        ((6, 13, 1), 4, False),
        ((1, 4, 1), 4, False),  # a token more than an even share
        ((1, 1), 2, True),
        ((1,) * 3, 2, True),
        ((1,) * 48, 4, True),
        ((16,) * 64, 4, False),
        ((16,) * 65, 4, True),
    ],
)
def test_what_is_too_fine(lengths: tuple[int, ...], ranks: int, expected: bool) -> None:
    assert too_fine(lengths, ranks) == expected


# Shares

LENGTHS, RANKS = range(14), range(1, 6)


@pytest.mark.parametrize("ranks", RANKS)
def test_shares_sum_to_the_length_and_differ_by_one_at_most(ranks: int) -> None:
    for longest, length in product(LENGTHS, repeat=2):
        sizes = Shares(ranks, longest).of(length)
        assert len(sizes) == ranks
        assert sum(sizes) == length
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", RANKS)
def test_remainders_of_the_longest_go_to_the_first_ranks_and_others_to_the_last(ranks: int) -> None:
    for length in LENGTHS:
        assert list(Shares(ranks, length).of(length)) == sorted(Shares(ranks, length).of(length), reverse=True)
        assert list(Shares(ranks, length + 1).of(length)) == sorted(Shares(ranks, length + 1).of(length))


@pytest.mark.parametrize("ranks", RANKS)
def test_windows_follow_each_other_through_the_segment(ranks: int) -> None:
    for longest, length in product(LENGTHS, repeat=2):
        shares, start = Shares(ranks, longest), 0
        for rank in range(ranks):
            assert shares.window(length, rank) == (start, shares.of(length)[rank])
            start += shares.of(length)[rank]
        assert start == length


@pytest.mark.parametrize(
    "segments, expected",
    [
        ((13,), [4, 3, 3, 3]),
        ((5, 13), [5, 4, 4, 5]),
        ((13, 5), [5, 4, 4, 5]),
        ((6, 13, 1), [5, 4, 5, 6]),
        ((3, 13), [4, 4, 4, 4]),
        ((), [0, 0, 0, 0]),
    ],
)
def test_tokens_of_all_segments_on_a_rank(segments: tuple[int, ...], expected: list[int]) -> None:
    shares = Shares(4, 13)
    assert [shares.local(segments, rank) for rank in range(4)] == expected
    sharding = Sharding(Place(1, sum(segments), outer=2, inner=3), segments, shares)
    assert [sharding.local_shape((7, 6 * sum(segments), 5), rank) for rank in range(4)] == [
        (7, 6 * tokens, 5) for tokens in expected
    ]


def test_a_value_that_two_axes_cut() -> None:
    """Rows outside of tokens in one merged dimension, and the other way round; never both in one place."""
    shape = (3 * 10, 7)
    rows = Sharding(Place(0, 3, inner=10), (3,), Shares(2, 3))
    tokens = Sharding(Place(0, 10, outer=3), (4, 6), Shares(2, 6))
    assert apart(rows.place, tokens.place)
    assert apart(tokens.place, rows.place)
    for rank, local in ((0, 2), (1, 1)):
        here = rows.local_shape(shape, rank)
        assert here == (local * 10, 7)
        assert tokens.beside(rows, rank).place == Place(0, 10, outer=local)
        assert tokens.beside(rows, rank).local_shape(here, 0) == (local * 5, 7)
        assert rows.beside(tokens, rank).place == Place(0, 3, inner=5)
    assert not apart(tokens.place, Place(0, 15, outer=2))
    other = Sharding(Place(1, 7), (7,), Shares(2, 7))
    assert apart(tokens.place, other.place)
    assert tokens.beside(other, 0) == tokens


def test_no_rank_gets_the_remainders_of_both_text_and_image() -> None:
    sharded = assert_sharded(randomise(Joint()), [draw(BATCH, 13, WIDTH), text_of(5)], 2)
    attention = one_attention(sharded.plan)
    assert sharded.plan.segments.values[attention.operation.results[0]] == (5, 13)
    assert [sharded.plan.shares.local((5, 13), rank) for rank in range(2)] == [9, 9]


# Tables and parameters that have no batch


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin


def angles(positions: Tensor) -> Tensor:
    return torch.outer(positions.float(), 100.0 ** -torch.linspace(0, 1, SIZE // 2))


class Rotary(nn.Module):
    """Self-attention with rope of a kind, over a sequence of one or two segments."""

    def __init__(self, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.to_qkv, self.out, self.rotate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 10), rotate

    def forward(self, *streams: Tensor) -> Tensor:
        q, k, v = (heads(x) for x in self.to_qkv(torch.cat(streams, dim=1)).chunk(3, dim=-1))
        return self.out(merge(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)))


def real(q: Tensor) -> Tensor:
    table = angles(torch.arange(q.shape[-2])).repeat_interleave(2, dim=-1)
    return turned(q, table.cos(), table.sin())


def complex_(q: Tensor) -> Tensor:
    table = angles(torch.arange(q.shape[-2]))
    turns = torch.polar(torch.ones_like(table), table)
    return torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def of_segments(q: Tensor) -> Tensor:
    """Positions that begin again with each segment."""
    table = torch.cat([angles(torch.arange(TEXT)), angles(torch.arange(q.shape[-2] - TEXT))])
    table = table.repeat_interleave(2, dim=-1)
    return turned(q, table.cos(), table.sin())


def of_a_grid(q: Tensor) -> Tensor:
    """Rows and columns, made of arange and meshgrid after the text's zeros."""
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    ids = torch.cat([torch.zeros(TEXT, 2), torch.stack([rows, columns], dim=-1).reshape(-1, 2).float()])
    table = torch.cat([angles(ids[:, 0])[:, :1], angles(ids[:, 1])[:, :2]], dim=-1).repeat_interleave(2, dim=-1)
    return turned(q, table.cos(), table.sin())


@pytest.mark.parametrize("rotate, ranks", [(real, 2), (complex_, 3), (of_segments, 3), (of_a_grid, 2)])
def test_rope_tables_that_are_born_inside_are_cut(rotate: Callable[[Tensor], Tensor], ranks: int) -> None:
    sharded = assert_sharded(randomise(Rotary(rotate)), [text_of(), image_tokens(WIDTH)], ranks)
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert sharded.report.notes == ()
    local = sharded.plan.shares.local((TEXT, IMAGE), 0)
    tokens = {
        node.meta["val"].shape[-2]
        for node in sharded.graphs[0].graph.nodes
        if node.target is aten.mul.Tensor and node.meta["val"].dim() == 4
    }
    assert tokens == {local}
    assert sharded.whole_operations() == []


def test_complex_tokens_that_must_be_gathered() -> None:
    """Complex values travel as real ones."""

    def middle(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))).flip(1) * 1j).flatten(2)

    sharded = assert_sharded(randomise(Mixed(middle)), [image_tokens()], 2, tolerance=1e-5)
    assert sharded.collectives["all_gather_into_tensor"] == 2
    assert sharded.share == 1 / 2


@pytest.mark.parametrize(
    "shape", [(1, ALL, WIDTH), (ALL, WIDTH), (1, ALL, 1), (BATCH, ALL, 1), (1, 1, WIDTH), (BATCH, 1, WIDTH)], ids=str
)
def test_parameters_with_a_row_for_each_token_and_others(shape: tuple[int, ...]) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.empty(shape))
            self.block, self.out = Block(), nn.Linear(WIDTH, 10)

        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            x = self.block(torch.cat([text, image], dim=1) + self.position) * self.position
            return self.out(x[:, text.shape[1] :])

    sharded = assert_sharded(randomise(Positions()), [text_of(), image_tokens(WIDTH)], 3)
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert sharded.report.notes == ()


def test_a_table_that_is_longer_than_the_sequence() -> None:
    table = draw(1, 60, WIDTH, seed=7)
    model = randomise(Transformer())

    def call(x: Tensor, table: Tensor) -> Tensor:
        return model(x) + (table[:, : x.shape[1]] * 2)[..., :10]

    assert assert_sharded(call, [image_tokens(), table], 2).report.notes == ()


# Class tokens


class WithClass(nn.Module):
    """A class token before the image, read again at the end, or by every token in the middle."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.first, self.read = nn.Parameter(torch.empty(1, 1, WIDTH)), read
        self.block, self.out, self.other = Block(), nn.Linear(WIDTH, 10), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = self.block(torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1))
        if self.read == "end":
            return self.other(x[:, :1]), self.out(x[:, 1:])
        if self.read == "one":
            return self.other(x[:, 0]), self.out(x[:, 1:])
        return self.out(self.block(x + self.other(x[:, :1])))


@pytest.mark.parametrize("read, ranks", [("end", 2), ("end", 3), ("one", 2), ("middle", 3)])
def test_a_class_token(read: str, ranks: int) -> None:
    sharded = assert_sharded(randomise(WithClass(read)), [image_tokens(WIDTH)], ranks)
    assert sharded.share < 1.1 / ranks


def test_of_a_class_token_read_by_all_only_that_token_is_gathered() -> None:
    sharded = assert_sharded(randomise(WithClass("middle")), [image_tokens(WIDTH)], 2)
    first, last = gathered(sharded)
    assert first <= 2 * BATCH * WIDTH
    assert last <= 2 * BATCH * (IMAGE // 2 + 1) * 10
    assert len(sharded.report.notes) == 1


# Two kinds of tokens


class SpaceAndTime(nn.Module):
    """Attention within each frame, then along each pixel's frames."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time, self.out = Block(), Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, pixels, _ = x.shape
        x = self.space(x.flatten(0, 1)).unflatten(0, (batch, frames))
        x = self.time(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, pixels))
        return self.out(x.transpose(1, 2))


@pytest.mark.parametrize("frames, pixels, ranks", [(4, 12, 3), (12, 4, 2), (5, 13, 2)])
def test_attention_in_space_and_in_time(frames: int, pixels: int, ranks: int) -> None:
    """The heavier one is cut along its tokens; for the other these are rows of the batch, which never meet."""
    sharded = assert_sharded(randomise(SpaceAndTime()), [draw(BATCH, frames, pixels, WIDTH)], ranks)
    report = sharded.report
    assert (report.attentions, report.cross_attentions, report.whole_attentions) == (1, 1, 0)
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    longer = max(frames, pixels)
    assert sharded.share == pytest.approx(-(-longer // ranks) / longer, rel=0.15)


@pytest.mark.parametrize("batch, mesh, share", [(1, {"batch": 2}, 3 / 4), (2, {"batch": 2, "ulysses": 2}, 3 / 8)])
def test_attention_in_space_and_in_time_on_a_batch_axis(batch: int, mesh: dict[str, int], share: float) -> None:
    """Frames are rows in space and tokens in time, where the batch axis exchanges nothing: there it leaves them whole.

    Pixels are rows in time, which the sequence's ranks cut already.
    """
    sharded = assert_sharded(randomise(SpaceAndTime()), [draw(batch, 4, 12, WIDTH)], mesh)
    assert sharded.share == pytest.approx(share, rel=0.01)


def test_two_sequences_that_meet_in_cross_attention_only() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.cross = Block(), Block(), CrossAttention(WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.cross(self.one(x), self.two(y))

    sharded = assert_sharded(randomise(Two()), [draw(BATCH, 31, WIDTH), image_tokens(WIDTH)], 2)
    assert sharded.report.attentions == 3  # the keys of the third are tokens of the second
    assert sharded.collectives == {"all_to_all_single": 12, "all_gather_into_tensor": 1}


# Boundaries


@pytest.mark.parametrize(
    "out, elements, whole",
    [(10, 10, []), (WIDTH // 2, WIDTH // 2, []), (3 * WIDTH, WIDTH, ["aten.linear.default"])],
    ids=["narrower", "half", "wider"],
)
def test_the_gather_is_where_the_tokens_are_narrowest(out: int, elements: int, whole: list[str]) -> None:
    sharded = assert_sharded(randomise(Transformer(out=out)), [image_tokens()], 2)
    assert gathered(sharded) == [BATCH * IMAGE * elements]
    assert sharded.whole_operations() == whole


def test_the_gather_comes_before_what_widens_and_after_what_narrows() -> None:
    def after(x: Tensor) -> Tensor:
        return x[..., :4].repeat(1, 1, 9).flip(1)

    sharded = assert_sharded(randomise(Transformer(after=after)), [image_tokens()], 2)
    assert gathered(sharded) == [BATCH * IMAGE * 4]


def test_one_gather_serves_all_who_want_the_whole() -> None:
    def after(x: Tensor) -> Tensor:
        return x.flip(1) + x.cumsum(1) + x.mean(1, keepdim=True) + x

    sharded = assert_sharded(randomise(Transformer(after=after)), [image_tokens()], 2)
    assert gathered(sharded) == [BATCH * IMAGE * 10]
    assert sharded.report.notes == ()


def test_a_time_embedding_is_whole_on_every_rank() -> None:
    model, embed = randomise(Transformer(channels=WIDTH)), randomise(nn.Linear(8, 2 * WIDTH))

    def call(x: Tensor, time: Tensor) -> Tensor:
        scale, shift = embed(F.silu(time))[:, None].chunk(2, dim=-1)
        return model(x * (1 + scale) + shift)

    sharded = assert_sharded(call, [image_tokens(WIDTH), draw(BATCH, 8, seed=3)], 2)
    assert sharded.whole_operations() == ["aten.linear.default"]
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}


class Refined(nn.Module):
    """Text through a block of its own, then joined with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner, self.joint, self.out = Block(), Block(), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.refiner(text), image], dim=1)
        return self.out(self.joint(x)[:, text.shape[1] :])


@cache
def refined(text: int) -> fx.GraphModule:
    return normalised(randomise(Refined()), image_tokens(WIDTH), text_of(text))


@pytest.mark.parametrize(
    "text, machine, whole",
    [
        (8, Machine(), 1),
        (8, Machine(link=1e30, start=0.0), 0),
        (8, Machine(flops=1e3, start=1e-4), 0),
        (8, Machine(link=1.0), 1),
        (8, Machine(link=1e30, start=0.5), 1),
        (40, Machine(), 0),  # too heavy to be anything but a main attention
        (40, Machine(link=1.0), 0),
    ],
)
def test_a_text_refiner_is_decided_by_cost(text: int, machine: Machine, whole: int) -> None:
    plan = analyse(refined(text), machine=machine)
    left = [attention for operation, attention in plan.attentions.items() if operation not in plan.cuts]
    assert len(left) == whole
    assert [attention.operation.op.operands[0][-2] for attention in left if attention.operation.op] == [text] * whole


@pytest.mark.parametrize("text, exchanges", [(8, 4), (40, 8)], ids=["whole", "cut"])
def test_a_text_refiner_left_whole_and_cut_give_the_same(text: int, exchanges: int) -> None:
    sharded = assert_sharded(randomise(Refined()), [image_tokens(WIDTH), text_of(text)], 3)
    assert sharded.collectives == {"all_to_all_single": exchanges, "all_gather_into_tensor": 1}
    assert sharded.report.whole_attentions == (exchanges == 4)
    assert sharded.report.notes == ()


# What cannot work on a part


class Mixed(nn.Module):
    """A block with something in its middle, and a plain one behind it, for which it pays to go on with parts."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, WIDTH), Block(middle), Block(), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.library.custom_op("paracompile_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """Every token takes from the one before it."""
    return x + x.roll(1, 1)


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("paracompile_tests::parted", mutates_args=())
def parted(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two results, of which one has lost its tokens."""
    return x.flip(1) + other, x.sum(1, keepdim=True)


@parted.register_fake
def _(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 1, *x.shape[2:])


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    # what is done in the middle of a block, and what of it is a product and must be computed whole
    "variance over tokens and channels": (lambda x: x * x.var((1, 2), keepdim=True), []),
    "flip": (lambda x: x.flip(1), []),
    "cumsum": (lambda x: x.cumsum(1), []),
    "softmax over tokens": (lambda x: x + x.softmax(1), []),
    "sorted": (lambda x: x.sort(dim=1).values, []),
    "shuffled": (lambda x: x[:, torch.arange(IMAGE - 1, -1, -1)], []),
    "every second": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], dim=1), []),
    "one token": (lambda x: x + x[:, 7].unsqueeze(1), []),
    "set a token": (lambda x: _set_token(x.clone()), []),
    "transposed grid": (lambda x: x.unflatten(1, (6, 8)).transpose(1, 2).flatten(1, 2), []),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1], []),
    "convolution": (
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(WIDTH, 1, 3), padding=1, groups=WIDTH).transpose(1, 2),
        ["aten.conv1d.default"],
    ),
    "convolution over the grid": (
        lambda x: (
            F.conv2d(x.transpose(1, 2).unflatten(2, (6, 8)), torch.ones(WIDTH, 1, 3, 3) / 9, padding=1, groups=WIDTH)
            .flatten(2)
            .transpose(1, 2)
        ),
        ["aten.conv2d.default"],
    ),
    "unknown": (lambda x: twist(x), []),
    "unknown with two operands and results": (lambda x: sum(parted(x, x * 2)), []),
}


def _set_token(x: Tensor) -> Tensor:
    x[:, 3] = 1.0
    return x


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MIXING)
def test_what_needs_all_tokens_in_the_middle_of_a_block(name: str) -> None:
    """It is gathered and right; everything around it is cut; the report has a note with the line."""
    middle, whole = MIXING[name]
    sharded = assert_sharded(randomise(Mixed(middle)), [image_tokens()], 2, tolerance=5e-6)
    assert sharded.whole_operations() == whole
    if not whole:
        assert sharded.share == 1 / 2
    assert sharded.report.attentions == 2
    assert sharded.collectives == {"all_to_all_single": 8, "all_gather_into_tensor": 2}
    (note,) = sharded.report.notes
    assert "test_layout.py" in note


def test_an_unknown_operator_is_named_in_the_notes_with_its_line() -> None:
    def middle(x: Tensor) -> Tensor:
        return twist(x)

    sharded = assert_sharded(randomise(Mixed(middle)), [image_tokens()], 3)
    (note,) = sharded.report.notes
    line = middle.__code__.co_firstlineno + 1
    assert "paracompile_tests.twist.default" in note
    assert "has no rule" in note
    assert f"test_layout.py:{line}" in note
    assert f"{BATCH * IMAGE * WIDTH * 4:,} bytes" in note
    (operation,) = calls(sharded.plan, torch.ops.paracompile_tests.twist.default)
    assert operation.rule is None
    assert operation not in sharded.plan.cuts
    assert sharded.share == 1 / 3


def test_an_operator_that_needs_all_tokens_is_said_to() -> None:
    sharded = assert_sharded(randomise(Mixed(lambda x: x.cumsum(1))), [image_tokens()], 3)
    (note,) = sharded.report.notes
    assert "aten.cumsum.default" in note
    assert "needs all tokens" in note


def test_unknown_operators_outside_the_blocks_are_no_news() -> None:
    model = randomise(Transformer(after=twist))
    sharded = assert_sharded(lambda x: model(twist(x)), [image_tokens()], 2)
    assert sharded.report.notes == ()
    assert gathered(sharded) == [BATCH * IMAGE * 10]


def test_an_unknown_operator_over_something_that_holds_no_tokens_costs_nothing() -> None:
    model, scale = randomise(Transformer(channels=WIDTH)), draw(BATCH, 1, WIDTH, seed=3)
    sharded = assert_sharded(lambda x, scale: model(x * twist(scale)), [image_tokens(WIDTH), scale], 2)
    assert sharded.report.notes == ()
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}


# The layers of the house

LAYOUT = sorted(Path(paracompile.layout.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", LAYOUT, ids=lambda path: path.stem)
def test_the_layout_imports_nothing_above_it(path: Path) -> None:
    names = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    house = [name for name in names if name and name.split(".")[0] in ("paracompile", "passes", "patterns")]
    assert [name for name in house if not name.startswith(("paracompile.layout", "paracompile.torch_private"))] == []


@pytest.mark.parametrize("path", LAYOUT, ids=lambda path: path.stem)
def test_the_layout_knows_no_operator(path: Path) -> None:
    """No `torch.ops`, no `aten`, no operator's name in a string, no function of torch's that computes."""
    tree = ast.parse(path.read_text())
    docstrings = {
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    }
    docstrings |= {node.value.value for node in ast.walk(tree) if _is_text(node)}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings
    }
    assert "aten" not in names
    assert {name for name in attributes if name.startswith("torch.")} <= {"torch.Tensor", "torch.dtype", "torch.SymInt"}
    operators = {str(name).removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names()}
    assert not strings & (operators - {"split", "cat"}), "operators named in strings"


def _is_text(node: ast.AST) -> bool:
    """A string that stands alone, as under an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
