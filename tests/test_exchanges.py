"""Queries, keys and values in one exchange, where it is mostly its start; and how what is sent lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from all_ranks import of_all_ranks
from capture import assert_equal, captured
from families import ALL_FAMILIES
from lockstep import run_lockstep
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, HEADS, IMAGE, SIZE, WIDTH, Mesh, Transformer, assert_sharded, heads, image_tokens, merge
from torch import Tensor, nn

from paracompile.patterns import exchanges
from paracompile.patterns.exchanges import Link
from paracompile.runtime import ulysses
from paracompile.runtime.ulysses import Exchange, heads_to_tokens

SENT = BATCH * HEADS * IMAGE * SIZE * 4
"""Bytes of the queries of all ranks."""


class Attention(nn.Module):
    """Attention with so many heads of queries and of keys, of such a size of values."""

    def __init__(self, queries: int = HEADS, keys: int = HEADS, values: int = SIZE) -> None:
        super().__init__()
        self.counts = queries, keys
        self.to_q, self.to_k = nn.Linear(WIDTH, queries * SIZE), nn.Linear(WIDTH, keys * SIZE)
        self.to_v = nn.Linear(WIDTH, keys * values)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        queries, keys = self.counts
        q, k, v = heads(self.to_q(x), queries), heads(self.to_k(x), keys), heads(self.to_v(x), keys)
        return merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=queries != keys))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "heads that divide": Attention,
    "heads that do not": lambda: Attention(10, 10),
    "fewer heads than ranks": lambda: Attention(2, 2),
    "grouped": lambda: Attention(HEADS, 4),
    "grouped, and none divides": lambda: Attention(9, 3),
    "one head of keys": lambda: Attention(HEADS, 1),
}
MESHES: dict[str, Mesh] = {
    "2": 2,
    "3": 3,
    "4": 4,
    "ring": {"ring": 2, "ulysses": 2},
    "batch": {"batch": 2, "ulysses": 2},
}


@pytest.mark.whole
@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", quick(MESHES, "3"))
@pytest.mark.parametrize("name", MODELS)
def test_as_one_and_apart(name: str, mesh: str) -> None:
    model, inputs = randomise(MODELS[name]()), [draw(BATCH, IMAGE + 2, WIDTH)]
    apart = assert_sharded(model, inputs, MESHES[mesh])
    as_one = assert_sharded(model, inputs, MESHES[mesh], together=True)
    assert as_one.collectives["all_to_all_single"] == apart.collectives["all_to_all_single"] - 2
    if name != "one head of keys":  # repeated for each rank: sent as often, whichever way
        assert as_one.report.bytes_sent == apart.report.bytes_sent
    (note,) = as_one.report.notes
    assert note.startswith("queries, keys and values in one exchange: 1 attentions, each part below 200,000 bytes")


@pytest.mark.parametrize("start, count", [(SENT / 2, 4), (SENT / 2 + 1, 2)])
def test_only_where_an_exchange_is_mostly_its_start(start: float, count: int) -> None:
    with mock.patch.object(exchanges, "_OTHERWISE", Link(start=start, rate=1.0)):
        sharded = assert_sharded(randomise(Transformer()), [image_tokens()], 2, together=True)
    assert sharded.collectives["all_to_all_single"] == count


def test_a_rank_without_tokens_decides_as_the_others_do() -> None:
    """Many rows of few tokens, which are worth an exchange each."""
    sharded = assert_sharded(randomise(Attention()), [draw(1000, 3, WIDTH)], 4, together=True)
    counts = [sum("all_to_all" in str(node.target) for node in graph.graph.nodes) for graph in sharded.graphs]
    assert counts == [4] * 4


def test_values_of_another_size_go_apart() -> None:
    model = randomise(Attention(values=2 * SIZE))
    assert assert_sharded(model, [image_tokens(WIDTH)], 2, together=True).collectives["all_to_all_single"] == 4


class ToMoreKeys(nn.Module):
    """Queries of the image, keys of the image and of registers that every rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.registers = nn.Parameter(draw(BATCH, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        k = heads(self.to_k(torch.cat([self.registers, x], 1)))
        return merge(F.scaled_dot_product_attention(heads(self.to_q(x)), k, k))


def test_keys_of_other_tokens_go_apart() -> None:
    sharded = assert_sharded(randomise(ToMoreKeys()), [image_tokens(WIDTH)], 2, together=True)
    assert sharded.report.notes == ()


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "family, mesh",
    quick(
        product(("flux", "wan", "hunyuan_video", "qwen_image"), MESHES),
        ("flux", "3"),
        ("wan", "ring"),
        ("qwen_image", "batch"),
    ),
)
def test_families(family: str, mesh: str) -> None:
    of = captured(family, batch=2)
    sizes = MESHES[mesh] if isinstance(MESHES[mesh], dict) else {"ulysses": MESHES[mesh]}
    made = of_all_ranks(of.gm, of.example_inputs, sizes, together=True)
    assert made.found[0].together == ALL_FAMILIES[family].self_attentions
    for outputs in run_lockstep(made.graphs, [of.arguments] * len(made.graphs), sizes):
        assert_equal(outputs[0], of.expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_what_arrives_is_taken_as_it_lies(rows: int, together: bool) -> None:
    sharded = assert_sharded(randomise(Attention()), [draw(rows, IMAGE, WIDTH)], 2, together=together)
    graph = sharded.graphs[0].graph
    (attention,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    for operand in attention.args[:3]:
        value = operand.meta["val"]
        assert value.stride(-1) == 1
        assert value.permute(2, 0, 1, 3).stride(0) == rows * (3 if together else 1) * HEADS // 2 * SIZE
        while operand.target is not torch.ops._c10d_functional.wait_tensor.default:
            assert operand.meta["val"].untyped_storage()._cdata == value.untyped_storage()._cdata  # a view
            operand = operand.args[0]


def test_what_a_kernel_made_in_the_layout_of_its_queries_is_sent_as_it_lies() -> None:
    copied = []

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        made = target(*args, **kwargs)
        if target is torch.ops.aten.contiguous.default:
            copied.append(made is not args[0])
        return args[0] if target is torch.ops._c10d_functional.wait_tensor.default else made

    exchange = Exchange(group="none", rank=0, heads=(3, 3), tokens=(5, 4))
    with mock.patch.object(
        ulysses, "all_to_all", lambda call, x, arriving, sent, group: x[:1].new_empty(10, *x.shape[1:])
    ):
        for layout in ((2, 0, 1, 3), (0, 1, 2, 3)):
            shape = [(1, 3, 9, 8)[dim] for dim in layout]
            result = draw(*shape).permute([layout.index(dim) for dim in range(4)])
            assert heads_to_tokens(call, result, result.shape, exchange).shape == (1, 6, 5, 8)
    assert copied == [False, True]
