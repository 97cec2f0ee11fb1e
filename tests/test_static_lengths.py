"""Attention on the tokens that a mask selects, as Mochi does it, becomes masked attention of a static length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import assert_equal, captured, sharded_on
from quick import quick
from random_tensors import randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    TEXT,
    WIDTH,
    Mesh,
    assert_sharded,
    capture,
    close,
    count,
    heads,
    image_tokens,
    mesh_name,
    mesh_sizes,
    text_tokens,
)
from torch import Tensor, fx, nn

from paracompile.mesh import Ranks
from paracompile.passes import pipeline, run_passes
from paracompile.passes.normalise import normalise
from paracompile.passes.static_lengths import static_lengths

ALL = IMAGE + TEXT
SDPA = "scaled_dot_product_attention.default"
TWO_RANKS: list[Mesh] = [{"ulysses": 2}, {"ring": 2}, {"batch": 2}]

on_two_ranks = pytest.mark.parametrize("mesh", TWO_RANKS, ids=mesh_name)

FIRST, LATER = [True] * 5 + [False] * (TEXT - 5), [True] * 17 + [False] * (TEXT - 17)
LAST = [False] * 9 + [True] * (TEXT - 9)
SCATTERED = [position % 3 != 1 for position in range(TEXT)]
EVERY, NONE = [True] * TEXT, [False] * TEXT

# The text tokens that each row selects.
ROWS: dict[str, list[list[bool]]] = {
    "first ones, another number in each row": [FIRST, LATER],
    "scattered": [SCATTERED, SCATTERED],
    "last ones, and scattered": [LAST, SCATTERED],
    "all, and first ones": [EVERY, FIRST],
    "none, and scattered": [NONE, SCATTERED],
    "all": [EVERY, EVERY],
    "none": [NONE, NONE],
}

Heads = Sequence[Tensor]
"""Query, key and value, each (batch, heads, tokens, size)."""


def selection(mask: Tensor) -> Tensor:
    return torch.nonzero(mask.flatten(), as_tuple=False).flatten()


def row_as_mochi(
    image: Heads,
    text: Heads,
    mask: Tensor,
    row: int,
    *,
    joined: Callable[[Tensor, Tensor], Tensor] = lambda image, text: torch.cat([image, text], dim=2),
    key_mask: Callable[[Tensor], Tensor] | None = None,
    pad: Callable[[Tensor, int], Tensor] = lambda x, missing: F.pad(x, (0, 0, 0, missing)),
    after: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> Tensor:
    """One row of diffusers' MochiAttnProcessor2_0; the arguments change it."""
    valid = selection(mask[row][None, :])
    valid_key = valid if key_mask is None else selection(key_mask(mask[row])[None, :])
    query, key, value = (
        joined(whole[row : row + 1], part[row : row + 1, :, positions, :])
        for whole, part, positions in zip(image, text, (valid, valid_key, valid_key), strict=True)
    )
    attended = F.scaled_dot_product_attention(query, key, value, **{"dropout_p": 0.0, "is_causal": False, **how})
    total = image[0].size(2) + text[0].size(2)
    return after(pad(attended, total - attended.size(2)))


class AsMochi(nn.Module):
    """Joint attention of image and text tokens that are selected by row; `row` does it for one row."""

    def __init__(self, row: Callable[..., Tensor] = row_as_mochi, keys: int = HEADS) -> None:
        super().__init__()
        self.row, self.keys = row, keys
        self.image, self.text = (nn.Linear(WIDTH, (HEADS + 2 * keys) * SIZE) for _ in range(2))
        self.image_out, self.text_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, to: nn.Module, x: Tensor) -> list[Tensor]:
        parts = to(x).split([HEADS * SIZE, self.keys * SIZE, self.keys * SIZE], dim=-1)
        return [heads(part, number) for part, number in zip(parts, (HEADS, self.keys, self.keys), strict=True)]

    def rows(self, image: Heads, text: Heads, mask: Tensor) -> list[Tensor]:
        return [self.row(image, text, mask, row) for row in range(mask.shape[0])]

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(self.project(self.image, image), self.project(self.text, text), mask)
        attended = torch.cat(rows, dim=0).transpose(1, 2).flatten(2, 3)
        new_image, new_text = attended.split_with_sizes((image.shape[1], text.shape[1]), dim=1)
        return image + self.image_out(new_image), text + self.text_out(new_text)


def tokens(rows: list[list[bool]], batch: int = BATCH) -> list[Tensor]:
    return [image_tokens(WIDTH)[:batch], text_tokens()[:batch], torch.tensor(rows)[:batch]]


def rewritten(model: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph after the pass, whose result is that of the eager model."""
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(static_lengths(normalise(gm, example_inputs), example_inputs))
        return kept[0].forward

    with torch.no_grad():
        close(capture(model, inputs, backend), model(*inputs))
    (graph,) = kept
    return graph


def assert_static(graph: fx.GraphModule, attentions: int = 1) -> None:
    """So many attentions, each with a mask; and every length is a number."""
    operators = count(graph)
    assert operators[SDPA] == attentions
    assert not {"nonzero.default", "pad.default", "_assert_scalar.default", "sym_size.int"} & set(operators)
    for node in graph.graph.nodes:
        if str(node.target) == f"aten.{SDPA}":
            assert node.args[3].meta["val"].shape[1:3] == (1, 1)
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            assert all(type(size) is int for size in value.shape), node


@pytest.mark.parametrize("batch", [1, BATCH])
def test_it_becomes_one_masked_attention_for_all_selections(batch: int) -> None:
    model = randomise(AsMochi())
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(static_lengths(normalise(gm, example_inputs), example_inputs))
        return kept[-1].forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in ROWS.values():
            close(run(*tokens(rows, batch)), model(*tokens(rows, batch)))
    (graph,) = kept
    assert_static(graph)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [ROWS["last ones, and scattered"], ROWS["none, and scattered"]], ids=["some", "none"])
@on_two_ranks
def test_two_ranks_equal_eager(mesh: Mesh, rows: list[list[bool]]) -> None:
    assert_sharded(randomise(AsMochi()), tokens(rows), mesh)


def test_what_is_not_selected_is_dropped_in_the_end() -> None:
    model, inputs = randomise(AsMochi()), tokens(ROWS["last ones, and scattered"])
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(run_passes(gm, example_inputs, pipeline(Ranks.simulated(ulysses=1))))
        return kept[-1].forward

    with torch.no_grad():
        close(capture(model, inputs, backend), model(*inputs))
    assert count(kept[0])["paracompile.attention_to_visible.default"] == 1
    assert count(kept[0])[SDPA] == 0


def test_two_layers_are_two_masked_attentions() -> None:
    first, second = randomise(AsMochi(), 1), randomise(AsMochi(), 2)

    def model(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return second(*first(image, text, mask), mask)

    assert_static(rewritten(model, tokens(ROWS["last ones, and scattered"])), attentions=2)


def test_a_mask_of_numbers_selects_what_is_not_zero() -> None:
    image, text, mask = tokens(ROWS["last ones, and scattered"])
    for numbers in (mask.long() * 3, mask.float() * -0.5):
        assert_static(rewritten(randomise(AsMochi()), [image, text, numbers]))


def test_scale_and_grouped_queries_are_kept() -> None:
    model = randomise(AsMochi(partial(row_as_mochi, scale=0.3, enable_gqa=True), keys=4))
    graph = rewritten(model, tokens(ROWS["last ones, and scattered"]))
    assert_static(graph)
    (attention,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert (attention.kwargs["scale"], attention.kwargs["enable_gqa"]) == (0.3, True)


class FewerQueries(AsMochi):
    """The queries begin with the third token without a selection."""

    def rows(self, image: Heads, text: Heads, mask: Tensor) -> list[Tensor]:
        rows = super().rows([image[0][:, :, 2:], *image[1:]], text, mask)
        return [F.pad(torch.cat(rows, dim=0), (0, 0, 0, 2))]


@pytest.mark.parametrize("batch", [1, BATCH])
def test_fewer_queries_than_keys(batch: int) -> None:
    """Also: of a batch of one, a slice of the tokens is not taken for a row."""
    graph = rewritten(randomise(FewerQueries()), tokens(ROWS["last ones, and scattered"], batch))
    assert count(graph)["nonzero.default"] == 0
    assert count(graph)[SDPA] == 1


class RowsOfTwoBatches(AsMochi):
    def rows(self, image: Heads, text: Heads, mask: Tensor) -> list[Tensor]:
        others = [part * 0.5 for part in image]
        return [self.row(source, text, mask, row) for row, source in enumerate((image, others))]


class RowsExchanged(AsMochi):
    def rows(self, image: Heads, text: Heads, mask: Tensor) -> list[Tensor]:
        return super().rows(image, text, mask)[::-1]


class RowsOfTwoScales(AsMochi):
    def rows(self, image: Heads, text: Heads, mask: Tensor) -> list[Tensor]:
        return [self.row(image, text, mask, row, scale=scale) for row, scale in enumerate((0.3, 0.5))]


class OutputUsedTwice(AsMochi):
    """The sum of the selected tokens' results, which the masked attention does not tell from the others'."""

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Any:
        sums: list[Tensor] = []

        def pad(x: Tensor, missing: int) -> Tensor:
            sums.append(x.sum(2))
            return F.pad(x, (0, 0, 0, missing))

        self.row = partial(row_as_mochi, pad=pad)
        return super().forward(image, text, mask), sums


def changed(**how: Any) -> AsMochi:
    return AsMochi(partial(row_as_mochi, **how))


NEAR_MISSES: dict[str, AsMochi] = {
    "padded with ones": changed(pad=lambda x, missing: F.pad(x, (0, 0, 0, missing), value=1.0)),
    "keys of another mask": changed(key_mask=lambda mask: ~mask),
    "causal": changed(is_causal=True),
    "padded in front": changed(pad=lambda x, missing: F.pad(x, (0, 0, missing, 0))),
    "something after the padding": changed(after=lambda x: x * 2),
    "the output is also used elsewhere": OutputUsedTwice(),
    "rows of two batches": RowsOfTwoBatches(),
    "text first": changed(joined=lambda image, text: torch.cat([text, image], dim=2)),
    "rows exchanged": RowsExchanged(),
    "rows of two scales": RowsOfTwoScales(),
}


@pytest.mark.parametrize("model", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_what_only_looks_like_it_is_left_alone(model: AsMochi) -> None:
    operators = count(rewritten(randomise(model), tokens(ROWS["last ones, and scattered"])))
    assert operators[SDPA] == BATCH
    assert operators["nonzero.default"] > 0


def test_padding_to_a_length_that_is_not_known_is_left_alone() -> None:
    def model(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        part = text[:, :, selection(mask[0])]
        joined = torch.cat([image, part], dim=2)
        attended = F.scaled_dot_product_attention(joined, joined, joined)
        return torch.cat([F.pad(attended, (0, 0, 0, 3))], dim=0)

    image, text, mask = tokens(ROWS["scattered"], 1)
    assert count(rewritten(model, [heads(image), heads(text), mask]))["nonzero.default"] == 1


def test_a_selection_of_some_of_the_tokens_is_left_alone() -> None:
    """The mask is shorter than the text: what is behind it is never selected."""

    def model(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        joined = torch.cat([image, text[:, :, selection(mask[0])]], dim=2)
        attended = F.scaled_dot_product_attention(joined, joined, joined)
        return torch.cat([F.pad(attended, (0, 0, 0, ALL - attended.size(2)))], dim=0)

    image, text, mask = tokens(ROWS["scattered"], 1)
    assert count(rewritten(model, [heads(image), heads(text), mask[:, :-4]]))["nonzero.default"] == 1


def test_a_graph_without_it_is_untouched() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([F.scaled_dot_product_attention(x, x, x), x], dim=0)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = normalise(gm, example_inputs)
        before = list(graph.graph.nodes)
        assert static_lengths(graph, example_inputs) is graph
        assert list(graph.graph.nodes) == before
        return graph.forward

    capture(model, [heads(image_tokens(WIDTH))], backend)


def test_a_second_run_changes_nothing() -> None:
    graph = rewritten(randomise(AsMochi()), tokens(ROWS["scattered"]))
    before = list(graph.graph.nodes)
    static_lengths(graph, [])
    assert list(graph.graph.nodes) == before


# diffusers' MochiTransformer3DModel


@pytest.mark.slow
def test_mochi_on_one_rank() -> None:
    whole = captured("mochi")
    graph = run_passes(whole.gm, whole.example_inputs, pipeline(Ranks.simulated(ulysses=1)))
    operators = count(graph)
    assert operators["paracompile.attention_to_visible.default"] == 2 + 1  # one pools the prompt
    assert operators["nonzero.default"] == 0
    with torch.no_grad():
        assert_equal(graph(*whole.arguments)[0], whole.expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", quick(TWO_RANKS, {"ring": 2}), ids=mesh_name)
def test_mochi_on_two_ranks(mesh: Mesh) -> None:
    whole = captured("mochi", batch=2)
    for output in sharded_on(mesh_sizes(mesh), "mochi", batch=2).run(whole.arguments):
        assert_equal(output, whole.expected)
