"""Masks that only hide keys: what they hide is dropped, once for all attentions, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    HEADS,
    IMAGE,
    SIZE,
    TEXT,
    WIDTH,
    Joint,
    Mesh,
    assert_sharded,
    close,
    count,
    heads,
    image_tokens,
    merge,
    mesh_name,
    text_tokens,
)
from torch import Tensor, fx, nn

from paracompile import backend
from paracompile import compiler as compiler_module
from paracompile.mesh import Ranks
from paracompile.passes import pipeline, run_passes
from paracompile.runtime import visible

ALL = IMAGE + TEXT
MESHES: list[Mesh] = [{"ulysses": 2}, {"ring": 2}, {"batch": 2}]
VISIBLE, ATTENTION = "paracompile.visible_keys.default", "paracompile.attention_to_visible.default"
STEP = "paracompile.attention_with_lse_to_visible.default"
SDPA = "scaled_dot_product_attention.default"

on_meshes = pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)


def hidden(*windows: tuple[int, int]) -> list[bool]:
    """One row of a mask that hides the keys of each window."""
    row = [True] * ALL
    for start, end in windows:
        row[start:end] = [False] * (end - start)
    return row


SCATTERED = [position % 3 != 1 for position in range(ALL)]

# Where the visible keys of each of the two rows lie.
ROWS: dict[str, list[list[bool]]] = {
    "first ones": [hidden((50, ALL)), hidden((50, ALL))],
    "last ones": [hidden((0, 7)), hidden((0, 7))],
    "a window": [hidden((0, 7), (50, ALL)), hidden((0, 7), (50, ALL))],
    "around a hole": [hidden((20, 33)), hidden((20, 33))],
    "scattered": [SCATTERED, SCATTERED],
    "rows of different lengths": [hidden((50, ALL)), hidden((61, ALL))],
    "rows of different kinds": [SCATTERED, hidden((0, 7))],
    "as many, elsewhere": [hidden((0, 7)), hidden((ALL - 7, ALL))],
    "one row sees nothing": [hidden((0, ALL)), hidden((61, ALL))],
    "no row sees anything": [hidden((0, ALL)), hidden((0, ALL))],
    "one key": [hidden((0, 30), (31, ALL)), hidden((0, 30), (31, ALL))],
    "all": [hidden(), hidden()],
}

all_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


class Attend(nn.Module):
    """Attention of projected heads with a mask, and whatever else attention takes; `depth` of them in a row."""

    def __init__(self, depth: int = 1, queries: int = HEADS, keys: int = HEADS, values: int = SIZE, **how: Any) -> None:
        super().__init__()
        self.counts, self.how, self.depth = (queries, keys), how, depth
        self.to_q, self.to_k = nn.Linear(WIDTH, queries * SIZE), nn.Linear(WIDTH, keys * SIZE)
        self.to_v, self.to_out = nn.Linear(WIDTH, keys * values), nn.Linear(queries * values, WIDTH)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys = self.counts
        q, k, v = heads(self.to_q(x), queries), heads(self.to_k(x), keys), heads(self.to_v(x), keys)
        return self.to_out(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.how)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = x + self.attend(x, mask[:, None, None])
        return x


def tokens() -> Tensor:
    return draw(BATCH, ALL, WIDTH)


@contextmanager
def watched_attention() -> Iterator[list[tuple[int, bool]]]:
    """Gives the number of keys of each call of attention by the operator, and whether it has a mask."""
    calls: list[tuple[int, bool]] = []

    def watch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        calls.append((key.shape[-2], attn_mask is not None))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **how)

    with mock.patch.object(visible, "F", SimpleNamespace(scaled_dot_product_attention=watch)):
        yield calls


def compiled_on_one_rank(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="paracompile", fullgraph=True, options={"compiler": "eager", **options})


def graph_on_one_rank(model: Callable[..., Any], inputs: Sequence[Any], *, grad: bool = False, **options: Any) -> Any:
    """The graph that the compiler gets on one rank, and the result; both through the real backend."""
    graphs: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    whole = [mock.patch.object(module, "compile_whole", compiler) for module in (backend, compiler_module)]
    with whole[0], whole[1], torch.set_grad_enabled(grad):
        result = compiled_on_one_rank(model, regions=False, **options)(*inputs)
    (graph,) = graphs
    return graph, result


def assert_dropped(model: Callable[..., Any], inputs: Sequence[Any], *, attentions: int = 1, masks: int = 1) -> None:
    """On one rank: so many attentions drop the hidden keys of so many masks, and the result is eager's."""
    graph, result = graph_on_one_rank(model, inputs)
    with torch.no_grad():
        close(result, model(*inputs))
    operators = count(graph)
    assert (operators[ATTENTION], operators[VISIBLE], operators[SDPA]) == (attentions, masks, 0)


def assert_left_alone(model: Callable[..., Any], inputs: Sequence[Any], **how: Any) -> None:
    graph, result = graph_on_one_rank(model, inputs, **how)
    with torch.set_grad_enabled(how.get("grad", False)):
        expected = model(*inputs)
    close(result.detach(), expected.detach(), 0.0)
    assert not {VISIBLE, ATTENTION} & {str(node.target) for node in graph.graph.nodes}


# Equal to the mask


@all_rows
@pytest.mark.parametrize("batch", [1, BATCH], ids=["one mask for all rows", "a mask for each row"])
def test_one_rank_equals_eager(rows: list[list[bool]], batch: int) -> None:
    assert_dropped(randomise(Attend()), [tokens(), torch.tensor(rows)[:batch]])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", ["rows of different kinds", "one row sees nothing", "all"])
@pytest.mark.parametrize("batch", [1, BATCH], ids=["one mask for all rows", "a mask for each row"])
@on_meshes
def test_several_ranks_equal_eager(mesh: Mesh, batch: int, kind: str) -> None:
    sharded = assert_sharded(randomise(Attend()), [tokens(), torch.tensor(ROWS[kind])[:batch]], mesh)
    steps = mesh.get("ring", 1) if isinstance(mesh, dict) else 1
    for graph in sharded.graphs:
        operators = count(graph)
        assert operators[VISIBLE] == 1
        assert operators[STEP if steps > 1 else ATTENTION] == steps
        assert not any(operators[name] for name in (SDPA, "paracompile.attention_with_lse.default"))


@pytest.mark.parametrize("mesh", [{"ring": 4}, {"ring": 2, "ulysses": 2}], ids=mesh_name)
def test_members_of_a_ring_without_keys(mesh: Mesh) -> None:
    x, mask = draw(BATCH, 3, WIDTH), torch.tensor([[True, False, True], [False, False, True]])
    sharded = assert_sharded(randomise(Attend()), [x, mask], mesh)
    assert all(count(graph)[VISIBLE] == 1 for graph in sharded.graphs)


def test_parts_of_a_mask_that_the_model_takes_itself() -> None:
    """Slices that overlap, or leave a part out, are masks of their own."""

    def run(x: Tensor, mask: Tensor) -> Tensor:
        first = model.attend(x[:, :40], mask[:, None, None, :40])
        return torch.cat([first, model.attend(x[:, 20:], mask[:, None, None, 20:])], dim=1)

    model = randomise(Attend())
    inputs = [tokens(), torch.tensor(ROWS["rows of different kinds"])]
    assert_dropped(run, inputs, attentions=2, masks=2)
    assert_sharded(run, inputs, {"ring": 2})


HOW: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.3},
    "grouped queries": {"keys": 4, "enable_gqa": True},
    "values of another size": {"values": 10},
    "all at once": {"keys": 4, "enable_gqa": True, "values": 10, "scale": 0.3},
}


@pytest.mark.parametrize("kind", ["first ones", "rows of different kinds", "one row sees nothing"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_other_arguments_of_attention_on_one_rank(how: dict[str, Any], kind: str) -> None:
    assert_dropped(randomise(Attend(**how)), [tokens(), torch.tensor(ROWS[kind])])


@pytest.mark.parametrize("mesh", [{"ulysses": 2}, {"ring": 2}], ids=mesh_name)
def test_other_arguments_of_attention_on_two_ranks(mesh: Mesh) -> None:
    model = randomise(Attend(**HOW["all at once"]))
    assert_sharded(model, [tokens(), torch.tensor(ROWS["rows of different kinds"])], mesh)


class AsHunyuanVideo(Joint):
    """Image, then text, and a mask of the real length of each row, as diffusers' HunyuanVideoTransformer3DModel."""

    def __init__(self) -> None:
        super().__init__(text_first=False)

    def forward(self, image: Tensor, text: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        length = image.shape[1] + text.shape[1]
        mask = torch.ones(image.shape[0], length, device=image.device, dtype=torch.bool)
        lengths = image.shape[1] + real.sum(dim=1, dtype=torch.int)
        beyond = torch.arange(length, device=image.device).unsqueeze(0) >= lengths.unsqueeze(1)
        mask = mask.masked_fill(beyond, False).unsqueeze(1).unsqueeze(1)
        for _ in range(2):
            image, text = super().forward(image, text, attn_mask=mask)
        return image, text


class AsQwenImage(Joint):
    """Text, then image, and a mask that each attention makes anew, as diffusers' QwenImageTransformer2DModel."""

    def forward(self, image: Tensor, text: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        for _ in range(2):
            images = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
            mask = torch.cat([real.to(torch.bool), images], dim=1)
            image, text = super().forward(image, text, attn_mask=mask[:, None, None, :])
        return image, text


def prompts(*lengths: int) -> Tensor:
    return (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("kind", [AsHunyuanVideo, AsQwenImage])
def test_masks_as_models_make_them_are_found_once_for_all_attentions(kind: type[Joint]) -> None:
    model, inputs = randomise(kind()), [image_tokens(WIDTH), text_tokens(), prompts(5, 17)]
    assert_dropped(model, inputs, attentions=2, masks=1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [AsHunyuanVideo, AsQwenImage])
@on_meshes
def test_masks_as_models_make_them_on_several_ranks(kind: type[Joint], mesh: Mesh) -> None:
    inputs = [image_tokens(WIDTH), text_tokens(), prompts(5, 17)]
    sharded = assert_sharded(randomise(kind()), inputs, mesh)
    assert count(sharded.graphs[0])[VISIBLE] == 1


def test_attentions_with_different_masks_each_drop_their_own_keys() -> None:
    model = randomise(Attend())

    def two(x: Tensor, mask: Tensor) -> Tensor:
        return model(model(x, mask), mask.flip(1))

    assert_dropped(two, [tokens(), torch.tensor(ROWS["rows of different lengths"])], attentions=2, masks=2)


def test_a_mask_that_is_an_input_before_others() -> None:
    model = randomise(Attend())
    inputs = [torch.tensor(ROWS["first ones"])[:, None, None], tokens()]

    def run(mask: Tensor, x: Tensor) -> Tensor:
        return model.attend(x, mask) * x

    assert_dropped(run, inputs)
    graph, _ = graph_on_one_rank(run, inputs)
    kinds = [node.op for node in graph.graph.nodes]
    assert "placeholder" not in kinds[kinds.index("call_function") :]


@pytest.mark.parametrize("kind", ["first ones", "rows of different lengths", "no row sees anything"])
def test_under_autocast(kind: str) -> None:
    """The result has the type that attention has in autocast, for rows alike and for rows that differ."""
    model, inputs = randomise(Attend()), [tokens(), torch.tensor(ROWS[kind])]

    def run(x: Tensor, mask: Tensor) -> Tensor:
        q = heads(x)
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, q, mask[:, None, None])

    graph, result = graph_on_one_rank(run, inputs)
    close(result, run(*inputs), 0.01)
    assert result.dtype is torch.bfloat16
    (attention,) = (node for node in graph.graph.nodes if str(node.target) == ATTENTION)
    assert attention.meta["val"].dtype is torch.bfloat16
    assert_sharded(model, inputs, 2)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compilers_keep_both_operators(compiler: str) -> None:
    model, inputs = randomise(AsHunyuanVideo()), [image_tokens(WIDTH), text_tokens(), prompts(5, 17)]
    with torch.no_grad(), watched_attention() as calls:
        close(compiled_on_one_rank(model, compiler=compiler)(*inputs), model(*inputs))
    assert calls[:4] == [(IMAGE + 5, False), (IMAGE + 17, False)] * 2


# What runs


@pytest.mark.parametrize(
    "kind, keys",
    [
        ("first ones", [50]),
        ("last ones", [ALL - 7]),
        ("a window", [43]),
        ("rows of different lengths", [50, 61]),
        ("as many, elsewhere", [ALL - 7, ALL - 7]),
        ("around a hole", [ALL - 13, ALL - 13]),
        ("scattered", [sum(SCATTERED)] * 2),
        ("one row sees nothing", [61]),
        ("no row sees anything", []),
        ("all", [ALL]),
    ],
)
def test_attention_gets_the_visible_keys_and_no_mask(kind: str, keys: list[int]) -> None:
    """Rows that see the same window of keys share one call."""
    model = randomise(Attend())
    run = compiled_on_one_rank(model)
    with torch.no_grad(), watched_attention() as calls:
        run(tokens(), torch.tensor(ROWS[kind]))
    assert calls == [(number, False) for number in keys]


def test_one_mask_for_all_rows_is_one_call_wherever_its_keys_lie() -> None:
    run = compiled_on_one_rank(randomise(Attend()))
    with torch.no_grad(), watched_attention() as calls:
        run(tokens(), torch.tensor([SCATTERED]))
    assert calls == [(sum(SCATTERED), False)]


def test_one_compile_serves_all_masks_of_a_size() -> None:
    model = randomise(Attend())
    compiles: list[Any] = []
    run = compiled_on_one_rank(model, report=compiles.append)
    with torch.no_grad():
        for rows in ROWS.values():
            close(run(tokens(), torch.tensor(rows)), model(tokens(), torch.tensor(rows)))
    assert len(compiles) == 1


def test_one_compile_serves_all_prompts_of_a_padded_size() -> None:
    model, (image, text) = randomise(AsHunyuanVideo()), (image_tokens(WIDTH), text_tokens())
    compiles: list[Any] = []
    run = compiled_on_one_rank(model, report=compiles.append)
    with torch.no_grad():
        for lengths in ((5, 17), (17, 5), (TEXT, 1), (0, TEXT), (TEXT, TEXT), (9, 9)):
            close(run(image, text, prompts(*lengths)), model(image, text, prompts(*lengths)))
    assert len(compiles) == 1


class Apart(Attend):
    """Two streams that attend apart, each with a mask of the same lengths for its own number of tokens."""

    def forward(self, x: Tensor, y: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        def masked(stream: Tensor) -> Tensor:
            return self.attend(stream, (torch.arange(stream.shape[1]) < lengths[:, None])[:, None, None])

        return masked(x), masked(y)


def test_masks_that_only_happened_to_be_of_one_length_are_two() -> None:
    """At the second call, which is the one that is compiled with open sizes."""
    model = randomise(Apart())
    compiles: list[Any] = []
    run = compiled_on_one_rank(model, report=compiles.append)
    for number, other in ((10, 6), (16, 16), (12, 16), (10, 18), (20, 16)):
        given = draw(BATCH, number, WIDTH), draw(BATCH, other, WIDTH), torch.tensor([max(number, other) - 2, 5])
        with torch.no_grad():
            close(run(*given), model(*given))
    assert len(compiles) == 2


# What is left alone


class Cut(Attend):
    """Of as many tokens as a number in a tensor says."""

    def forward(self, x: Tensor, mask: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        length = count.item()
        torch._check(length > 1)
        torch._check(length <= x.shape[1])
        return self.attend(x[:, :length], mask[:, None, None, :length])


def test_a_mask_whose_length_only_the_data_tells_is_left_alone() -> None:
    model = randomise(Cut())
    given = tokens(), torch.rand(BATCH, ALL) < 0.9, torch.tensor(20)
    run = compiled_on_one_rank(model, rdt=0.1)  # so that what a pass cannot do is an error
    with torch.no_grad(), pytest.warns(UserWarning, match="rdt was given"):
        close(run(*given), model(*given))


def attended(change: Callable[[Tensor], Tensor], **how: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A model whose mask `change` makes of the mask of each row's keys, (batch, 1, 1, keys)."""
    model = randomise(Attend(**how))
    return lambda x, mask: model.attend(x, change(mask[:, None, None]))


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "per head": attended(lambda m: m | (torch.arange(HEADS) == 3)[:, None, None]),
    "per query": attended(lambda m: m | torch.eye(ALL, dtype=torch.bool)),
    "additive": attended(lambda m: torch.zeros(m.shape).masked_fill(~m, -torch.inf)),
    "additive, not infinite": attended(lambda m: torch.zeros(m.shape).masked_fill(~m, -2.0)),
    "one column for all keys": attended(lambda m: m[..., :1]),
    "two dimensions": attended(lambda m: m[0, 0].expand(ALL, ALL)),
    "no mask": attended(lambda m: None),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS.keys())
def test_other_masks_are_left_alone(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_left_alone(model, [tokens(), torch.tensor(ROWS["rows of different kinds"])])


def test_is_causal_is_left_alone() -> None:
    def model(x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True) * mask.sum()

    assert_left_alone(model, [tokens(), torch.tensor(ROWS["first ones"])])


BROADCAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "heads of queries": lambda x, m: F.scaled_dot_product_attention(x[:, :1], x, x, m),
    "rows of values": lambda x, m: F.scaled_dot_product_attention(x, x, x[:1], m),
    "rows of keys and values": lambda x, m: F.scaled_dot_product_attention(x, x[:1], x[:1], m),
}


@pytest.mark.parametrize("attention", BROADCAST.values(), ids=BROADCAST.keys())
def test_operands_that_are_broadcast_are_left_alone(attention: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = [tokens(), torch.tensor(ROWS["rows of different kinds"])]
    assert_left_alone(lambda x, mask: attention(heads(x), mask[:, None, None]), inputs)


def test_the_option_leaves_every_mask_alone() -> None:
    inputs = [tokens(), torch.tensor(ROWS["first ones"])]
    assert_left_alone(randomise(Attend()), inputs, drop_masked_keys=False)
    names = [step.name for step in pipeline(Ranks.simulated(ulysses=2), drop_keys=False)]
    assert "drop_masked_keys" not in names


def test_with_gradients_wanted_one_rank_leaves_every_mask_alone() -> None:
    model, mask = randomise(Attend()), torch.tensor(ROWS["first ones"])
    found, wanted = tokens().requires_grad_(), tokens().requires_grad_()
    assert_left_alone(model, [found, mask], grad=True)
    compiled_on_one_rank(model)(found, mask).square().sum().backward()
    model(wanted, mask).square().sum().backward()
    close(found.grad, wanted.grad)


# The pass


def test_a_second_run_changes_nothing() -> None:
    kept: list[str] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        passes = pipeline(Ranks.simulated(ulysses=1))
        once = run_passes(gm, example_inputs, passes)
        kept.append(once.print_readable(print_output=False))
        (again,) = (step for step in passes if step.name == "drop_masked_keys")
        kept.append(again.run(once, example_inputs).print_readable(print_output=False))
        return once.forward

    torch._dynamo.reset()
    with torch.no_grad():
        inputs = [tokens(), torch.tensor(ROWS["first ones"])]
        torch.compile(randomise(Attend(depth=2)), backend=keep, fullgraph=True)(*inputs)
    assert kept[0] == kept[1]
    assert ATTENTION in kept[0]


# The operators


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("lengths", [[ALL], [30, 0, ALL - 30]], ids=["whole", "in parts"])
def test_visible_keys_is_a_sound_operator(lengths: list[int], kind: str) -> None:
    mask = torch.tensor(ROWS[kind])
    torch.library.opcheck(torch.ops.paracompile.visible_keys.default, (mask, lengths))
    order, windows = torch.ops.paracompile.visible_keys(mask, lengths)
    for part, of_part, of_rows in zip(mask.split(lengths, 1), order.split(lengths, 1), windows.tolist(), strict=True):
        for row, found, (start, number) in zip(part, of_part, of_rows, strict=True):
            positions = row.nonzero().flatten()
            assert number == len(positions)
            assert found[:number].tolist() == positions.tolist()
            assert sorted(found.tolist()) == list(range(part.shape[1]))
            if start >= 0:
                assert positions.tolist() == list(range(start, start + number))


def test_attention_of_no_rows() -> None:
    q, k, v = (torch.empty(0, 4, number, 6) for number in (9, ALL, ALL))
    order, windows = torch.ops.paracompile.visible_keys(torch.empty(0, ALL, dtype=torch.bool), [ALL])
    assert torch.ops.paracompile.attention_to_visible(q, k, v, order, windows[0], None, False).shape == q.shape
    result, lse = torch.ops.paracompile.attention_with_lse_to_visible(q, k, v, order, windows[0], None)
    assert (result.shape, lse.shape) == (q.shape, q.shape[:-1])


@pytest.mark.parametrize("kind", ["first ones", "rows of different kinds", "one row sees nothing"])
@pytest.mark.parametrize("strides", ["heads first", "tokens first"])
def test_attention_to_visible_is_a_sound_operator(kind: str, strides: str) -> None:
    q, k, v = (draw(2, 4, number, size, seed=number) for number, size in ((9, 6), (ALL, 6), (ALL, 10)))
    if strides == "tokens first":
        q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (q, k, v))
    order, windows = torch.ops.paracompile.visible_keys(torch.tensor(ROWS[kind]), [ALL])
    torch.library.opcheck(torch.ops.paracompile.attention_to_visible.default, (q, k, v, order, windows[0], 0.3, False))
    torch.library.opcheck(
        torch.ops.paracompile.attention_with_lse_to_visible.default, (q, k, v, order, windows[0], 0.3)
    )
