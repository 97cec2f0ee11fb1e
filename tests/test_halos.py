"""Images cut along a spatial dimension: windows by brute force, then small convolutional models on all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from random_tensors import draw, randomise
from rule_check import check
from small_models import SelfAttention, assert_sharded, shard, targets
from torch import Tensor, nn

import paracompile.passes.lower_windows as lower_windows
from paracompile.errors import GraphError
from paracompile.layout.factors import Place
from paracompile.layout.halos import Halo
from paracompile.layout.places import backward, forward
from paracompile.layout.plan import Sharding
from paracompile.layout.shares import Shares
from paracompile.runtime.halos import Rows, window_of

aten = torch.ops.aten

# Windows


@pytest.mark.parametrize("kernel, stride, dilation", [*product((1, 2, 3, 4), (1, 2, 3), (1, 2))])
def test_windows_of_convolutions(kernel: int, stride: int, dilation: int) -> None:
    for padding, size in product((0, 1, 2, 5), (11, 14)):
        arguments = draw(1, 2, size), draw(3, 2, kernel), draw(3), [stride], [padding], [dilation]
        verdict = check(aten.conv1d.default, *arguments, search=False)
        assert verdict.wrong == []
        assert verdict.halos == ((kernel, stride, padding) != (1, 1, 0))


def test_windows_of_convolutions_whose_padding_has_a_name() -> None:
    x = draw(1, 2, 9, 8)
    for kernel, padding, halos in (((3, 5), "same", 2), ((3, 3), "valid", 2), ((3, 2), "same", 0)):
        verdict = check(aten.conv2d.padding, x, draw(3, 2, *kernel), padding=padding, search=False)
        assert (verdict.wrong, verdict.halos) == ([], halos)


@pytest.mark.parametrize("kernel, stride, padding", [*product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2))])
def test_windows_of_transposed_convolutions(kernel: int, stride: int, padding: int) -> None:
    for more, dilation in product(range(stride), (1, 2)):
        arguments = draw(1, 2, 7), draw(2, 3, kernel), draw(3), [stride], [padding], [more], 1, [dilation]
        verdict = check(aten.conv_transpose1d.default, *arguments, search=False)
        assert verdict.wrong == []
        assert verdict.halos == (dilation * (kernel - 1) >= padding + stride - 1)


@pytest.mark.parametrize("pool", [aten.avg_pool2d.default, aten.max_pool2d.default])
def test_windows_of_pools(pool: Any) -> None:
    x = draw(1, 2, 9, 8) - 3  # zeros outside would be the largest
    for kernel, stride, padding in (([3, 2], [1, 2], [1, 0]), ([2], [], [1]), ([3], [2], [1])):
        verdict = check(pool, x, kernel, stride, padding, search=False)
        assert (verdict.wrong, verdict.halos) == ([], 2)
    assert check(pool, x, [2], [], [0], ceil_mode=True, search=False).halos == 0
    if pool is aten.avg_pool2d.default:
        uncounted = check(pool, x, [3, 3], [1, 1], [1, 0], count_include_pad=False, search=False)
        assert (uncounted.wrong, uncounted.halos) == ([], 1)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_windows_of_padding(mode: str) -> None:
    for pad in ([0, 1, 4, 3], [5, 0, 0, 0], [1, 1, 2, 0]):
        verdict = check(aten.pad.default, draw(1, 2, 6, 7), pad, mode, search=False)
        assert (verdict.wrong, verdict.halos) == ([], 3 if mode == "constant" else 2)  # it may pad channels, too
    assert check(aten.pad.default, draw(1, 2, 6, 7), [1, 1, 1, 1], "circular", search=False).halos == 0
    cropped = check(aten.constant_pad_nd.default, draw(1, 6, 7), [-2, 3, 9, -1], 0.5, search=False)
    assert (cropped.wrong, cropped.halos) == ([], 2)


def test_windows_of_slices() -> None:
    for start, end, step in ((2, 9, 1), (0, 5, 1), (1, 12, 3), (-7, -1, 2)):
        verdict = check(aten.slice.Tensor, draw(2, 12), 1, start, end, step, search=False)
        assert (verdict.wrong, verdict.halos) == ([], 1)


def test_windows_of_resizing() -> None:
    x = draw(1, 2, 4, 5)
    for scales in ([2.0, 3.0], [1.0, 4.0]):
        nearest = check(aten.upsample_nearest2d.vec, x, None, scales, search=False)
        linear = check(aten.upsample_bilinear2d.vec, x, None, False, scales, search=False)
        assert (nearest.wrong, nearest.halos, linear.wrong, linear.halos) == ([], 2, [], 2)
    by_size = check(aten.upsample_bilinear2d.default, x, [8, 7], False, search=False)
    assert (by_size.wrong, by_size.halos) == ([], 1)
    assert check(aten.upsample_bilinear2d.default, x, [8, 10], True, search=False).halos == 0
    assert check(aten.upsample_nearest2d.vec, x, None, [1.5, 1.5], search=False).halos == 0


HALOS = [
    Halo(1, 10, 10, low=-1, high=1),
    Halo(1, 12, 10, low=0, high=2),
    Halo(1, 10, 13, low=-2, high=-2),
    Halo(1, 11, 5, step=2, low=0, high=2),
    Halo(1, 10, 5, step=2, low=-1, high=1),
    Halo(1, 10, 20, scale=2, edge="clipped"),
    Halo(1, 10, 20, step=2, scale=4, low=-1, high=3, edge="clipped"),
]


@pytest.mark.parametrize("halo", HALOS, ids=range(len(HALOS)))
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_what_ranks_hold_of_operand_and_result_is_all_of_it_once(halo: Halo, ranks: int) -> None:
    """And no rank reaches further than the halo does, where parts are not smaller than that."""
    place = Place(1, 5, 1, halo.size // 5, 0, halo.size % 5)
    result = forward(halo, place)
    assert result is not None
    back = backward(halo, result)
    assert back is not None
    for one, size in ((place, halo.size), (result, halo.size_out), (back, halo.size)):
        sharding = Sharding(one, (5,), Shares(ranks, 5))
        bounds = [sharding.bounds(rank) for rank in range(ranks)]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == size == one.size
    held, made = (Sharding(each, (5,), Shares(ranks, 5)) for each in (back, result))
    for rank in range(ranks):
        window, (start, stop) = halo.window(*made.bounds(rank)), held.bounds(rank)
        if window.count and start < stop:
            assert start - window.start <= halo.reach + halo.step
            assert window.stop - stop <= halo.reach + halo.step


def test_a_place_that_an_operator_does_not_keep_in_whole_steps_has_none() -> None:
    assert forward(Halo(1, 10, 5, step=2), Place(1, 10)) is None
    assert backward(Halo(1, 10, 20, scale=2), Place(1, 20)) is None
    assert forward(Halo(1, 10, 10), Place(2, 10)) is None


# Models

ROWS, COLUMNS, CHANNELS = 11, 6, 8


def image(rows: int = ROWS, columns: int = COLUMNS, channels: int = 3) -> Tensor:
    return draw(1, channels, rows, columns)


def stack(*layers: nn.Module) -> nn.Module:
    """A convolution in, one out, and layers between."""
    return randomise(nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), *layers, nn.Conv2d(CHANNELS, 3, 3, padding=1)))


def conv(kernel: int = 3, **how: Any) -> nn.Module:
    return nn.Conv2d(CHANNELS, how.pop("out", CHANNELS), kernel, **how)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "wide kernel": lambda: conv(7, padding=3),
    "even kernel": lambda: conv(4, padding=2),
    "without padding": lambda: conv(3),
    "as large as before": lambda: conv((3, 5), padding="same", dilation=2),
    "much padding": lambda: conv(3, padding=4),
    "dilated": lambda: conv(3, padding=4, dilation=4),
    "of each channel": lambda: conv(5, padding=2, groups=CHANNELS),
    "strided": lambda: nn.Sequential(conv(3, stride=2, padding=1), conv()),
    "strided after padding at one edge": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, stride=2)),
    "strided by three": lambda: conv(3, stride=3),
    "reflected": lambda: conv(5, padding=2, padding_mode="reflect"),
    "replicated": lambda: conv(5, padding=2, padding_mode="replicate"),
    "constant": lambda: nn.Sequential(nn.ConstantPad2d((1, 2, 3, 4), 0.7), conv()),
    "circular": lambda: conv(3, padding=1, padding_mode="circular"),
    "mean of neighbours": lambda: nn.AvgPool2d(3, 1, 1),
    "largest of neighbours": lambda: nn.MaxPool2d(3, 2, 1),
    "nearest": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(padding=1)),
    "linear": lambda: nn.Upsample(scale_factor=3, mode="bilinear"),
    "aligned corners": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "cubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1),
    "shuffled": lambda: nn.Sequential(conv(out=4 * CHANNELS, padding=1), nn.PixelShuffle(2)),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "group norm without weights": lambda: nn.GroupNorm(4, CHANNELS, affine=False),
    "norm of channels": lambda: nn.BatchNorm2d(CHANNELS),
}


@pytest.mark.sampled(26)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_on_rows(layer: str, ranks: int) -> None:
    sharded = assert_sharded(stack(LAYERS[layer]()), [image()], ranks, tolerance=5e-6)
    assert sharded.plan.cuts


@pytest.mark.whole
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.full if seed >= 8 else ()) for seed in range(60)]
)
def test_layers_in_any_order(seed: int) -> None:
    """Residuals where the size stays, odd sizes, as many as eight ranks, and parts of a row or none."""
    choose = random.Random(seed)
    image = x = draw(1, CHANNELS, choose.randint(15, 24), choose.randint(15, 18))
    layers: list[nn.Module] = []
    for _ in range(choose.randint(2, 5)):
        layer = LAYERS[choose.choice(sorted(LAYERS))]()
        made = layer(x)
        if min(made.shape[2:]) >= 5:  # the largest kernel
            layers.append(layer)
            x = made

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)
            self.first, self.last = conv(padding=1), conv(padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                y = layer(x)
                x = x + y if y.shape == x.shape else y
            return self.last(x)

    assert_sharded(randomise(Model()), [image], choose.randint(2, 8), tolerance=2e-5)


def test_rows_are_cut_where_there_are_more_and_columns_where_there_are_more() -> None:
    tall, wide = (shard(stack(), [image(*size)], 4).report.notes[0] for size in ((16, 4), (4, 16)))
    assert tall.startswith("images are cut along their height, 16 positions")
    assert wide.startswith("images are cut along their width, 16 positions")
    assert "; dearer: width" in tall


def test_each_convolution_has_one_exchange_with_its_neighbours_only() -> None:
    model = stack(conv(1), conv(padding=1), nn.SiLU(), conv(5, padding=2))
    graphs = shard(model, [image(16)], 4).graphs
    for rank, graph in enumerate(graphs):
        exchanges = [node for node in graph.graph.nodes if "all_to_all_single" in str(node.target)]
        assert len(exchanges) == 3  # the first convolution's image is every rank's own
        for node in exchanges:
            _, arriving, sent, _ = node.args
            for sizes in (arriving, sent):
                assert [other for other, size in enumerate(sizes) if size] == [
                    other for other in (rank - 1, rank + 1) if 0 <= other < 4
                ]


def test_a_halo_wider_than_a_rank_s_part_comes_from_ranks_further_away() -> None:
    model = stack(conv(9, padding=8, dilation=2), conv(3, padding=6, dilation=6))
    sharded = assert_sharded(model, [image(9, 5)], 4, tolerance=5e-6)
    (exchange, *_) = [node for node in sharded.graphs[0].graph.nodes if "all_to_all_single" in str(node.target)]
    assert all(size > 0 for size in exchange.args[1][1:])


def test_without_halos_the_result_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of models would show if edges were forgotten."""

    def own_rows_only(
        call: Any,
        x: Any,
        shape: Sequence[int],
        dim: int,
        held: Sequence[Rows],
        wanted: Sequence[Rows],
        rank: int,
        *more: Any,
    ) -> Any:
        window: Any = window_of(call, x, shape, dim, held, wanted, rank, *more)
        before = max(0, held[rank][0] - wanted[rank][0])
        length = window.meta["val"].shape[dim]
        blank = call(aten.mul.Scalar, call(aten.slice.Tensor, window, dim, 0, before), 0.0)
        return call(aten.cat.default, [blank, call(aten.slice.Tensor, window, dim, before, length)], dim)

    monkeypatch.setattr(lower_windows, "window_of", own_rows_only)
    model = stack()
    found = shard(model, [image()], 2).result
    with torch.no_grad():
        expected = model(image())
    assert float((found - expected).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("ranks", [2, 3])
def test_moments_of_a_norm_far_from_zero(ranks: int) -> None:
    """Sums of squares would have no digits left."""

    def model(x: Tensor) -> Tensor:
        ones = torch.ones(4, 4, 3, 3, dtype=x.dtype)
        return F.conv2d(F.group_norm(F.conv2d(x, ones, padding=1) * 1e-3 + 1e3, 2), ones, padding=1)

    x = draw(1, 4, 12, 5)
    with torch.no_grad():
        exact, plain = model(x.double()), model(x)
    sharded = shard(model, [x], ranks)
    assert sharded.collectives["all_gather_into_tensor"] == 2  # the moments and the result
    error, plain_error = (float((found.double() - exact).abs().max()) for found in (sharded.result, plain))
    assert error < 2 * plain_error


def test_half_precision() -> None:
    model = stack(nn.GroupNorm(2, CHANNELS), nn.SiLU(), conv(padding=1)).to(torch.bfloat16)
    assert_sharded(model, [image().to(torch.bfloat16)], 2, tolerance=3e-2)


class Pixels(nn.Module):
    """Attention among all pixels, with a residual, as in the middle of decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.attention = SelfAttention(CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("size", [(24, 6), (6, 25)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_among_pixels(size: tuple[int, int], ranks: int) -> None:
    model = stack(conv(padding=1, out=CHANNELS), Pixels(), *(conv(padding=1) for _ in range(4)))
    assert_sharded(model, [image(*size)], ranks, tolerance=5e-6)


@pytest.mark.parametrize("mesh", [{"ring": 2, "ulysses": 2}, {"batch": 2, "ulysses": 2}, {"batch": 2}])
def test_all_ranks_of_a_mesh_share_an_image(mesh: dict[str, int]) -> None:
    sharded = assert_sharded(stack(nn.GroupNorm(2, CHANNELS), conv(padding=1)), [image(16)], mesh, tolerance=5e-6)
    assert sharded.share < 1.1 / len(sharded.graphs)


def test_images_that_are_too_small_for_the_ranks_are_an_error() -> None:
    with pytest.raises(GraphError, match="none of its convolutions' results has 4 rows, columns or frames"):
        shard(stack(), [image(3, 3)], 4)


class Video(nn.Module):
    """Convolutions causal in time, which look at the first frame where there is none before."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv3d(3, CHANNELS, 3), nn.Conv3d(CHANNELS, 3, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))
        return self.outer(F.pad(F.silu(x), (0, 0, 0, 0, 2, 0), mode="replicate"))


@pytest.mark.parametrize("size, cut", [((9, 2, 3), "frames"), ((3, 8, 4), "height"), ((2, 3, 10), "width")])
def test_a_video_is_cut_along_what_it_has_most_of(size: tuple[int, int, int], cut: str) -> None:
    sharded = assert_sharded(randomise(Video()), [draw(1, 3, *size)], 2)
    assert sharded.report.notes[0].startswith(f"images are cut along their {cut}")


def test_a_transformer_with_a_convolution_is_cut_along_its_tokens() -> None:
    attention = randomise(SelfAttention())

    def model(x: Tensor) -> Tensor:
        return attention(x + F.conv1d(x.transpose(1, 2), torch.ones(x.shape[-1], 1, 3), padding=1, groups=72).mT)

    sharded = assert_sharded(model, [draw(2, 48, 72)], 2)
    assert sharded.report.attentions == 1
    assert "conv1d.default" in targets(sharded.graphs[0])


@pytest.mark.slow
def test_a_denoiser_that_convolves_is_cut_along_its_images() -> None:
    """Resolutions fall and rise again, and are joined across: each is cut where the coarsest is."""
    model = randomise(
        UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 12),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )

    def denoise(x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        result: Tensor = model(x, time, text, return_dict=False)[0]
        return result

    inputs = [draw(1, 4, 14, 6), torch.tensor(5.0), draw(1, 7, 12)]
    sharded = assert_sharded(denoise, inputs, 2, tolerance=1e-5)
    assert sharded.report.notes[0].startswith("images are cut along their height, 7 positions")
    assert sharded.share < 0.75
