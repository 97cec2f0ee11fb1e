"""Tokens with convolutions between the attentions: cut in whole rows, columns or frames where that is cheaper.

Small models are too narrow for that, as more is carried than computed; so ranks are linked as fast as need be.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from all_ranks import of_all_ranks
from by_hand import ByHand, check_generation
from cached import cached
from capture import capture
from fast_links import fast_links
from more_families import MORE_FAMILIES
from quick import quick
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    IMAGE,
    WIDTH,
    Mesh,
    SelfAttention,
    Transformer,
    assert_sharded,
    heads,
    merge,
    mesh_name,
    shard,
)
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paracompile.layout.boundaries import Machine
from paracompile.layout.costs import cost_of
from paracompile.mesh import Ranks
from paracompile.patterns.flops import flops_of
from paracompile.report.report import report_of

ROWS, COLUMNS = 6, 8
MESHES: list[Mesh] = [2, 3, {"ring": 2, "ulysses": 2}, {"batch": 2, "ulysses": 2}]
TOKENS = {"sana": (48, 48), "sana_video": (72, 72)}


@pytest.fixture(name="fast_links")
def _fast_links() -> Iterator[None]:
    with fast_links():
        yield


class Block(nn.Module):
    """As Sana has it: linear attention over all tokens, attention to the text, and an MLP with a convolution in it."""

    def __init__(self, width: int, dims: tuple[int, ...], kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.wide = nn.Linear(width, 3 * width)
        self.depth = convolution(3 * width, 3 * width, kernel, padding=[k // 2 for k in kernel], groups=3 * width)
        self.narrow = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (heads(F.relu(self.norms[0](x) + shift)).mT for shift in (0.0, 0.5, 1.0))
        x = x + merge(((v @ k.mT) @ q).mT) / x.shape[1]
        attended = F.scaled_dot_product_attention(heads(self.to_q(self.norms[1](x))), heads(text), heads(text))
        x = x + self.to_out(merge(attended))
        image = self.wide(self.norms[2](x)).mT.unflatten(2, self.dims)
        return x + self.narrow(F.silu(self.depth(image)).flatten(2).mT)


class Model(nn.Module):
    def __init__(self, *dims: int, kernel: tuple[int, ...] | None = None, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        kernel = kernel or (3,) * len(dims)
        self.blocks = nn.ModuleList(Block(width, dims, kernel) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


def inputs(*dims: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return draw(BATCH, torch.Size(dims).numel(), width), draw(BATCH, 10, width, seed=2)


@pytest.mark.usefixtures("fast_links")
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_every_block_sends_its_edges_and_its_sum(mesh: Mesh) -> None:
    model = randomise(Model(ROWS, COLUMNS))
    sharded = assert_sharded(model, inputs(ROWS, COLUMNS), mesh, tolerance=5e-6)
    rows_of_a_batch = isinstance(mesh, dict) and "batch" in mesh
    assert sharded.collectives == {
        "all_reduce": 2,
        "all_to_all_single": 2,
        "all_gather_into_tensor": 1 + rows_of_a_batch,
    }
    assert not sharded.whole_operations()[1:]  # the first one is
    assert sharded.report.dimension in ("height", "width")
    (note,) = (note for note in sharded.report.notes if note.startswith("tokens are cut along their"))
    assert "; dearer: tokens one by one (" in note


@pytest.mark.usefixtures("fast_links")
@pytest.mark.parametrize(
    "dims, kernel, cut",
    [
        ((48,), (5,), "width"),
        ((9, 5), (3, 1), "height"),
        ((8, 3, 3), (3, 1, 1), "frames"),
    ],
)
def test_what_is_cut(dims: tuple[int, ...], kernel: tuple[int, ...], cut: str) -> None:
    """The dimension whose cut leaves the fullest rank the least to do; parts may be uneven."""
    sharded = assert_sharded(randomise(Model(*dims, kernel=kernel)), inputs(*dims), 2, tolerance=5e-6)
    assert sharded.report.dimension == cut


@pytest.mark.usefixtures("fast_links")
@pytest.mark.parametrize("mesh", [2, {"batch": 2, "ulysses": 2}], ids=mesh_name)
def test_what_is_padded_beside_a_convolution_is_padded_in_its_window(mesh: Mesh) -> None:
    model = Model(ROWS, COLUMNS)
    for block in model.blocks:
        block.depth = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(3 * WIDTH, 3 * WIDTH, 3, groups=3 * WIDTH))
    sharded = assert_sharded(randomise(model), inputs(ROWS, COLUMNS), mesh, tolerance=5e-6)
    assert sharded.report.dimension is not None
    assert sharded.collectives["all_to_all_single"] == 2


def test_a_small_model_s_tokens_are_cut_one_by_one() -> None:
    sharded = assert_sharded(randomise(Model(ROWS, COLUMNS)), inputs(ROWS, COLUMNS), 2, tolerance=5e-6)
    assert sharded.report.dimension is None
    assert "all_to_all_single" not in sharded.collectives


@pytest.mark.parametrize("ranks, share", [(2, 0.51), (4, 0.26)])
def test_a_wide_model_s_rows_are_cut(ranks: int, share: float) -> None:
    """On links as they are: 32 x 32 tokens of 1440 channels. Nothing is computed."""
    with FakeTensorMode():
        model, given = Model(32, 32, width=1440), inputs(32, 32, width=1440)
        graph = torch.export.export(model, given).module()
    assert isinstance(graph, fx.GraphModule)
    made = of_all_ranks(graph, given, {"ulysses": ranks})
    report = report_of(made.found[0], Ranks.simulated(ulysses=ranks), made.graphs[0])
    assert report.dimension is not None
    assert report.flops_rank / report.flops_whole < share


@pytest.mark.usefixtures("fast_links")
def test_open_sizes_are_fixed() -> None:
    given = inputs(ROWS, COLUMNS)
    for value in given:
        torch._dynamo.maybe_mark_dynamic(value, 0)
    sharded = assert_sharded(randomise(Model(ROWS, COLUMNS)), given, 2, tolerance=5e-6)
    assert sharded.report.dimension is not None


@pytest.mark.slow
@pytest.mark.usefixtures("fast_links")
@pytest.mark.parametrize(
    "name, ranks", quick([(name, ranks) for name in ("sana", "sana_video") for ranks in (2, 4)], ("sana", 2))
)
def test_a_family_with_blocks_skipped(name: str, ranks: int) -> None:
    """Computed, skipped, computed; of each value a rank stores its part."""
    family = MORE_FAMILIES[name]
    of = capture(*family.build())
    graphs = cached(of, {"ulysses": ranks})
    check_generation(graphs, ByHand(of, family.lists, family.image), change=family.change)
    stored = [[value.shape[:-1].numel() for value in layout.state] for layout in graphs.layouts]
    assert [BATCH * of_all for of_all in TOKENS[name]] == [sum(parts) for parts in zip(*stored, strict=True)]


def test_a_plan_s_cost_counts_what_attention_exchanges() -> None:
    """Queries, keys, values and results: the ranks' parts of each. The output's gather stands in the graph by now."""
    plan = shard(Transformer(), [draw(BATCH, IMAGE, 10)], 2).plan
    assert cost_of(plan, flops_of, 2, Machine()).bytes == 4 * BATCH * IMAGE * WIDTH * 4 // 2


@pytest.mark.usefixtures("fast_links")
def test_what_is_whole_beside_the_tokens_is_no_reason() -> None:
    """A convolution on their way that little depends on, however much a text has to itself."""
    block, text = randomise(SelfAttention()), randomise(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(9))))

    def model(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = block(x)
        return x + F.conv1d(x.mT, torch.ones(WIDTH, 1, 3), padding=1, groups=WIDTH).mT, text(y)

    sharded = assert_sharded(model, [draw(BATCH, IMAGE, WIDTH), draw(BATCH, IMAGE, WIDTH, seed=2)], 2)
    assert sharded.report.dimension is None
