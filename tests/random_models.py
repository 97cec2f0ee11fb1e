"""Small diffusion transformers drawn at random: what they are made of is a `Recipe`, which prints as what it is.

Every part that real models have is one line here: streams that are joined or stay apart, refiners, cross attention,
masks, ropes, and what is done to tokens between attention and MLP and between blocks. Lengths are mostly odd, and often
equal to another size on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_tensors import draw, randomise
from small_models import mesh_sizes
from torch import Tensor, nn

MESHES: tuple[dict[str, int], ...] = (
    {"ulysses": 2},
    {"ulysses": 3},
    {"ulysses": 4},
    {"ring": 2},
    {"ring": 3},
    {"batch": 2},
    {"batch": 3},
    {"ring": 2, "ulysses": 2},
    {"batch": 2, "ulysses": 2},
    {"batch": 2, "ring": 2},
)

Grid = tuple[int, int]


def _whole(x: Tensor, grid: Grid) -> Tensor:
    return x.unflatten(1, grid)


def _windows(x: Tensor, grid: Grid) -> Tensor:
    """Each column of the grid is a window, within which its mean is subtracted."""
    columns = _whole(x, grid).permute(0, 2, 1, 3)
    return x + (columns - columns.mean(2, keepdim=True)).permute(0, 2, 1, 3).flatten(1, 2)


def _columns(x: Tensor, grid: Grid) -> Tensor:
    """Attention within each column of the grid, whose rows are what is cut there."""
    columns = _whole(x, grid).transpose(1, 2).flatten(0, 1).unflatten(-1, (2, -1)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(columns, columns, columns).transpose(1, 2).flatten(2)
    return x + attended.unflatten(0, (len(x), grid[1])).transpose(1, 2).flatten(1, 2)


MIDDLES: Mapping[str, Callable[[Tensor, Grid], Tensor]] = {
    "windows": _windows,
    "rows": lambda x, grid: x + _whole(x, grid).cumsum(2).flatten(1, 2) / grid[1],
    "pooled": lambda x, grid: x + torch.tanh(x.mean(1, keepdim=True)),
    "largest": lambda x, grid: x - x.amax(1, keepdim=True),
    "softmax over tokens": lambda x, grid: x * x.softmax(1),
    "first token": lambda x, grid: x * torch.sigmoid(x[:, :1]),
    "last token": lambda x, grid: x + x[:, -1:],
    "shift": lambda x, grid: x + F.pad(x, (0, 0, 1, -1)),
    "shift by cat": lambda x, grid: x + torch.cat([x[:, :1], x[:, :-1]], dim=1),
    "roll": lambda x, grid: x + x.roll(1, 1),
    "flip": lambda x, grid: x + x.flip(1),
    "every other": lambda x, grid: torch.stack([x[:, ::2], x[:, ::2]], 2).flatten(1, 2)[:, : x.shape[1]] + x,
    "length as a number": lambda x, grid: x * (x.shape[1] ** 0.5) / len(x),
    "new tensor": lambda x, grid: x + x.new_ones(x.shape[1], 1) + torch.arange(x.shape[1])[:, None] / x.shape[1],
    "chunks of tokens": lambda x, grid: torch.cat([part * 2 for part in x.chunk(2, dim=1)], dim=1),
    "head as tokens": lambda x, grid: x + x.transpose(1, 2).contiguous().transpose(1, 2),
    "by batch": lambda x, grid: x + torch.stack([row * 0.5 for row in x]),
    "written": lambda x, grid: _written(x),
    "written where": lambda x, grid: _written_where(x),
    "strides": lambda x, grid: x + _every_second_channel(x).repeat_interleave(2, -1),
    "masked": lambda x, grid: torch.where(torch.arange(x.shape[1])[:, None] < x.shape[1] // 2, x, -x),
    "where": lambda x, grid: x.masked_fill(x > 1, 1.0),
    "halves": lambda x, grid: x + x[:, : x.shape[1] // 2 * 2].unflatten(1, (2, -1)).mean((1, 2))[:, None],
    "gather": lambda x, grid: x + x.gather(1, x[..., :1].argsort(1).expand_as(x)),
    "index": lambda x, grid: x + x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "interpolated": lambda x, grid: x + F.interpolate(x.transpose(1, 2), scale_factor=2.0)[..., ::2].transpose(1, 2),
    "average": lambda x, grid: x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "normed over tokens": lambda x, grid: x + F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2),
    "group norm": lambda x, grid: F.group_norm(x.transpose(1, 2), 1).transpose(1, 2),
    "topk": lambda x, grid: x + x.topk(1, dim=1).values,
    "repeated": lambda x, grid: x.repeat_interleave(2, 1)[:, : x.shape[1]] + x,
    "transposed grid": lambda x, grid: x + _whole(x, grid).transpose(1, 2).flatten(1, 2),
    "attention over columns": _columns,
    "einsum": lambda x, grid: x + torch.einsum("bnc,bmc->bnm", x, x).softmax(-1) @ x / 4,
}
"""What is done to the image's tokens."""


def _written(x: Tensor) -> Tensor:
    result = x.clone()
    result[:, 0] = 0
    result[:, -1:] *= 2
    return result


def _written_where(x: Tensor) -> Tensor:
    """A boolean mask of two dimensions counts as one index."""
    result = x.clone()
    result[x[..., 0] > 0] = 0.5
    return result


def _every_second_channel(x: Tensor) -> Tensor:
    rows, tokens, width = x.shape
    return x.contiguous().as_strided((rows, tokens, width // 2), (tokens * width, width, 2))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model is made of.

    attributes:
        streams: "image": one stream; "joint": text and image in one; "separate": with weights of their own, and joined
            in attention only; "cross": the text is attended to.
        convolution: over the tokens of the image, before the blocks.
        shared_batch: which inputs have one row for all of the batch.
        together: queries, keys and values in one exchange.
        skips: run with a first block cache, too.
    """

    mesh: Mapping[str, int]
    batch: int
    grid: Grid
    text: int
    heads: int
    head_size: int
    key_heads: int
    depth: int
    streams: str
    text_first: bool
    refiner: bool
    mask: str
    rope: str
    middles: tuple[str, ...]
    between: tuple[str, ...]
    convolution: str
    registers: int
    shared_batch: tuple[str, ...]
    output: str
    together: bool = False
    skips: bool = False

    @property
    def image(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def joins(self) -> bool:
        return self.streams in ("joint", "separate")

    @property
    def keys(self) -> int:
        """How long the sequence is that attends to itself."""
        return self.image + self.registers + (self.text if self.joins else 0)


@st.composite
def recipes(choose: st.DrawFn) -> Recipe:
    heads = choose(st.sampled_from([1, 2, 3, 4, 6]))
    size = choose(st.sampled_from([4, 6, 8]))
    usual = st.sampled_from([5, 3, 7, 2, 4, 6, 1])
    streams = choose(st.sampled_from(["image", "joint", "separate", "cross"]))
    depth = choose(st.integers(1, 2))
    return Recipe(
        mesh=choose(st.sampled_from(MESHES)),
        batch=choose(st.sampled_from([2, 3, 4, 2, 3, 4, 1])),
        grid=choose(st.one_of(st.tuples(usual, usual), st.sampled_from([(1, heads), (1, size), (size, heads)]))),
        text=choose(st.one_of(st.integers(1, 9), st.sampled_from([heads, size]))),
        heads=heads,
        head_size=size,
        key_heads=choose(st.sampled_from([number for number in range(1, heads + 1) if heads % number == 0])),
        depth=depth,
        streams=streams,
        text_first=choose(st.booleans()),
        refiner=choose(st.booleans()),
        mask=choose(st.sampled_from(["none", "none", "keys", "added", "heads", "square", "causal"])),
        rope=choose(st.sampled_from(["none", "halves", "pairs", "complex", "given"])),
        middles=tuple(choose(st.lists(st.sampled_from(sorted(MIDDLES)), max_size=2, unique=True))),
        between=tuple(choose(st.lists(st.sampled_from(sorted(MIDDLES)), max_size=1))),
        convolution=choose(st.sampled_from(["none", "none", "none", "tokens", "grid"])),
        registers=choose(st.sampled_from([0, 0, 0, 1, 3])),
        shared_batch=tuple(choose(st.lists(st.sampled_from(["text", "time", "mask"]), max_size=2, unique=True))),
        output=choose(st.sampled_from(["tokens", "picture", "both", "pooled", "named", "slice"])),
        together=choose(st.booleans()),
        skips=depth > 1 and choose(st.booleans()),
    )


class Attention(nn.Module):
    """Attention with grouped keys and a rope, of sequences that come with weights of their own."""

    def __init__(self, recipe: Recipe, streams: int) -> None:
        super().__init__()
        width, keys = recipe.width, recipe.key_heads * recipe.head_size
        self.recipe = recipe
        self.to_q = nn.ModuleList(nn.Linear(width, width) for _ in range(streams))
        self.to_kv = nn.ModuleList(nn.Linear(width, 2 * keys) for _ in range(streams))
        self.to_out = nn.ModuleList(nn.Linear(width, width) for _ in range(streams))
        self.norm = nn.RMSNorm(recipe.head_size)

    def forward(self, sequences: list[Tensor], others: list[Tensor] | None = None, **how: Any) -> list[Tensor]:
        rope = how.pop("rope", None)
        size = self.recipe.head_size
        q = torch.cat([to(x) for to, x in zip(self.to_q, sequences, strict=True)], dim=1)
        kv = torch.cat([to(x) for to, x in zip(self.to_kv, others or sequences, strict=True)], dim=1)
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
        q, k = self.norm(q), self.norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        grouped = k.shape[1] != q.shape[1]
        joined = F.scaled_dot_product_attention(q, k, v, **how, enable_gqa=grouped).transpose(1, 2).flatten(2)
        parts = joined.split([x.shape[1] for x in sequences], dim=1)
        return [to(x) for to, x in zip(self.to_out, parts, strict=True)]


class Block(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        streams = 2 if recipe.streams == "separate" else 1
        self.attention = Attention(recipe, streams)
        self.cross = Attention(recipe, 1) if recipe.streams == "cross" else None
        self.norm = nn.LayerNorm(recipe.width)
        self.mlp = nn.Sequential(
            nn.Linear(recipe.width, 2 * recipe.width), nn.GELU(), nn.Linear(2 * recipe.width, recipe.width)
        )

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, mask: Tensor | None, rope: Any
    ) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        how = {"attn_mask": mask, "is_causal": recipe.mask == "causal", "rope": rope}
        given = self.norm(image) * (1 + time)
        if recipe.joins:
            order = -1 if recipe.text_first else 1
            pair = [given, text][::order]
            lengths = [x.shape[1] for x in pair]
            if recipe.streams == "separate":
                added = self.attention(pair, **how)
            else:
                (both,) = self.attention([torch.cat(pair, dim=1)], **how)
                added = list(both.split(lengths, dim=1))
            to_image, to_text = added[::order]
            text = text + to_text
        else:
            (to_image,) = self.attention([given], **how)
        image = image + to_image
        if self.cross is not None:
            (crossed,) = self.cross([self.norm(image)], [text])
            image = image + crossed
        for name in recipe.middles:
            image = _on_image(MIDDLES[name], image, recipe)
        return image + self.mlp(self.norm(image)), text


def _on_image(middle: Callable[[Tensor, Grid], Tensor], x: Tensor, recipe: Recipe) -> Tensor:
    """Registers, which come first, stay as they are."""
    if not recipe.registers:
        return middle(x, recipe.grid)
    registers, image = x.split([recipe.registers, recipe.image], dim=1)
    return torch.cat([registers, middle(image, recipe.grid)], dim=1)


class RandomModel(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.proj_in, self.proj_out = nn.Linear(10, recipe.width), nn.Linear(recipe.width, 12)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.refiner = Attention(recipe, 1) if recipe.refiner else None
        self.registers = nn.Parameter(torch.zeros(1, recipe.registers, recipe.width))
        if recipe.convolution == "tokens":
            self.convolution: nn.Module = nn.Conv1d(recipe.width, recipe.width, 3, padding=1)
        elif recipe.convolution == "grid":
            self.convolution = nn.Conv2d(recipe.width, recipe.width, 3, padding=1, groups=recipe.width)

    def forward(
        self, hidden_states: Tensor, text: Tensor, time: Tensor, mask: Tensor | None, angles: Tensor | None
    ) -> Any:
        recipe = self.recipe
        image = self._convolved(self.proj_in(hidden_states))
        time = time.reshape(-1, 1, 1)
        if recipe.joins:  # elsewhere attention does it
            text = text.expand(len(image), -1, -1)
        if self.refiner is not None:
            text = text + self.refiner([text])[0]
        if recipe.registers:
            image = torch.cat([self.registers.expand(len(image), -1, -1), image], dim=1)
        rope = self._rope(angles)
        for number, block in enumerate(self.blocks):
            if number:
                for name in recipe.between:
                    image = _on_image(MIDDLES[name], image, recipe)
            image, text = block(image, text, time, mask, rope)
        return self._outputs(image[:, recipe.registers :], text)

    def _convolved(self, image: Tensor) -> Tensor:
        if self.recipe.convolution == "tokens":
            return image + self.convolution(image.transpose(1, 2)).transpose(1, 2)
        if self.recipe.convolution == "grid":
            over = self.convolution(image.transpose(1, 2).unflatten(2, self.recipe.grid))
            return image + over.flatten(2).transpose(1, 2)
        return image

    def _rope(self, angles: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        recipe = self.recipe
        if recipe.rope == "none":
            return None
        if angles is None:
            steps = torch.arange(recipe.head_size // 2) / recipe.head_size
            angles = torch.outer(torch.arange(recipe.keys), 10.0**-steps)
        if recipe.rope == "complex":
            turn = torch.polar(torch.ones_like(angles), angles)
            return lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)
        cos, sin = angles.cos(), angles.sin()

        def by_halves(x: Tensor) -> Tensor:
            one, other = x.chunk(2, dim=-1)
            return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)

        def by_pairs(x: Tensor) -> Tensor:
            one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1).flatten(3)

        return by_pairs if recipe.rope == "pairs" else by_halves

    def _outputs(self, image: Tensor, text: Tensor) -> Any:
        tokens = self.proj_out(image)
        match self.recipe.output:
            case "picture":
                height, width = self.recipe.grid
                parts = tokens.reshape(len(tokens), height, width, 2, 2, 3)
                return torch.einsum("bhwpqc->bchpwq", parts).reshape(len(tokens), 3, 2 * height, 2 * width)
            case "both":
                return tokens, text
            case "pooled":
                return tokens, tokens.mean(1), tokens.shape[1]
            case "named":
                return {"sample": tokens, "norm": tokens.norm(dim=-1)}
            case "slice":
                return tokens[:, : max(1, tokens.shape[1] // 2)]
        return tokens


def build(recipe: Recipe) -> tuple[nn.Module, tuple[Tensor | None, ...]]:
    """A model and its inputs."""
    rows = {name: 1 if name in recipe.shared_batch else recipe.batch for name in ("text", "time", "mask")}
    inputs = (
        draw(recipe.batch, recipe.image, 10, seed=1),
        draw(rows["text"], recipe.text, recipe.width, seed=2),
        draw(rows["time"], seed=3),
        _mask(recipe, rows["mask"]),
        draw(recipe.keys, recipe.head_size // 2, seed=5) if recipe.rope == "given" else None,
    )
    return randomise(RandomModel(recipe)), inputs


def _mask(recipe: Recipe, rows: int) -> Tensor | None:
    keys = recipe.keys
    match recipe.mask:
        case "keys":  # no row may see nothing
            return (draw(rows, 1, 1, keys, seed=4) > 0) | (torch.arange(keys) == 0)
        case "added":
            return draw(rows, 1, 1, keys, seed=4)
        case "heads":
            return draw(1, recipe.heads, keys, keys, seed=4)
        case "square":
            return (draw(keys, keys, seed=4) > 0) | torch.eye(keys, dtype=torch.bool)
    return None


def ranks_of(recipe: Recipe) -> int:
    product = 1
    for size in mesh_sizes(recipe.mesh).values():
        product *= size
    return product
