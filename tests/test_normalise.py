"""One spelling per operator: the graph after `normalise` is functional, static, and computes what the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from open_sizes import runnable
from random_tensors import draw, randomise
from small_models import (
    BATCH,
    IMAGE,
    WIDTH,
    Block,
    SelfAttention,
    Transformer,
    assert_sharded,
    capture,
    close,
    count,
    image_tokens,
    normalised,
    shard,
    targets,
)
from torch import Tensor, fx, nn
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch._functorch._aot_autograd.frontend_utils import _try_get_metadata_from_dynamo
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint

from paracompile.errors import GraphError
from paracompile.layout.sizes import Size
from paracompile.mesh import Ranks
from paracompile.passes import pipeline, run_passes
from paracompile.passes.normalise import normalise
from paracompile.patterns.rules import rule_for

Model = Callable[..., Any]


@dataclass
class Seen:
    """What a backend that runs the normalised graph was given and made, compile by compile."""

    captured: list[fx.GraphModule] = field(default_factory=list)
    example_inputs: list[Sequence[Any]] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.captured.append(gm)
        self.example_inputs.append(example_inputs)
        graph = normalise(gm, example_inputs)
        self.graphs.append(graph)
        return runnable(graph, example_inputs) if any(isinstance(size, Size) for size in sizes_of(graph)) else graph

    @property
    def graph(self) -> fx.GraphModule:
        (graph,) = self.graphs
        return graph


def copied(inputs: Sequence[Any]) -> list[Any]:
    return pytree.tree_map_only(Tensor, Tensor.clone, list(inputs))


def assert_same(model: Model, *inputs: Any) -> Seen:
    """The normalised graph gives the eager model's result, and leaves its inputs as the eager model does."""
    seen, others = Seen(), copied(inputs)
    with torch.no_grad():
        expected = model(*others)
    close(capture(model, inputs, seen), expected, 0.0)
    close(list(inputs), others, 0.0)
    return seen


def spelled(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """The graph without the names of its nodes."""
    numbers = {node: f"%{number}" for number, node in enumerate(gm.graph.nodes)}
    return [
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            fx.map_arg((node.args, node.kwargs), numbers.__getitem__),
        )
        for node in gm.graph.nodes
    ]


def writes(gm: fx.GraphModule) -> list[str]:
    """The operators that write to an operand."""
    return [
        str(node.target)
        for node in gm.graph.nodes
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    ]


# One spelling

SPELLINGS: dict[str, list[Model]] = {
    "add": [
        lambda x: x + x.sin(),
        lambda x: torch.add(x, torch.sin(x)),
        lambda x: x.add(x.sin()),
        lambda x: torch.add(input=x, other=x.sin()),
    ],
    "power": [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, 2), lambda x: torch.pow(x, exponent=2)],
    "transpose": [
        lambda x: x.transpose(1, 2),
        lambda x: torch.transpose(x, 1, 2),
        lambda x: x.transpose(dim0=1, dim1=2),
        lambda x: torch.transpose(x, dim0=1, dim1=2),
        lambda x: torch.swapaxes(x, 1, 2),
    ],
    "reshape": [
        lambda x: x.reshape(2, 12, 2),
        lambda x: x.view(2, 12, 2),
        lambda x: torch.reshape(x, (2, 12, 2)),
        lambda x: x.view((2, 12, 2)),
        lambda x: x.reshape(shape=(2, 12, 2)),
        lambda x: x.reshape([2, 12, 2]),
    ],
    "linear": [
        lambda x: F.linear(x, x[0]),
        lambda x: F.linear(input=x, weight=x[0]),
        lambda x: torch._C._nn.linear(x, x[0], None),
        lambda x: F.linear(x, bias=None, weight=x[0]),
    ],
    "softmax": [
        lambda x: x.softmax(1),
        lambda x: torch.softmax(x, 1),
        lambda x: F.softmax(x, dim=1),
        lambda x: F.softmax(input=x, dim=1),
    ],
    "attention": [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x),
        lambda x: F.scaled_dot_product_attention(x, value=x, key=x),
    ],
    "in place or not": [lambda x: x.sin() * 2, lambda x: x.sin().mul_(2), lambda x: torch.sin(x).mul(2)],
    "concatenation": [
        lambda x: torch.cat([x, x], dim=1),
        lambda x: torch.cat((x, x), 1),
        lambda x: torch.cat(tensors=[x, x], dim=1),
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_function_method_operator_and_keyword_give_the_same_graph(name: str) -> None:
    first, *others = [assert_same(model, draw(2, 6, 4)).graph for model in SPELLINGS[name]]
    for other in others:
        assert spelled(other) == spelled(first)


@pytest.mark.parametrize("alias", ["concat", "concatenate"])
def test_a_second_name_of_an_operator_has_the_rule_of_the_first(alias: str) -> None:
    assert rule_for(getattr(torch.ops.aten, alias).default) == rule_for(torch.ops.aten.cat.default)


NEGATIVE: dict[str, tuple[Model, Model]] = {
    "transpose": (lambda x: x.transpose(1, 2), lambda x: x.transpose(-2, -1)),
    "unsqueeze": (lambda x: x.unsqueeze(3), lambda x: torch.unsqueeze(x, -1)),
    "softmax": (lambda x: x.softmax(2), lambda x: F.softmax(x, dim=-1)),
    "mean": (lambda x: x.mean(1), lambda x: torch.mean(x, dim=-2)),
    "cat": (lambda x: torch.cat([x, x], 2), lambda x: torch.cat([x, x], dim=-1)),
    "select": (lambda x: x[:, 5], lambda x: x[:, -1]),
    "slice": (lambda x: x[:, 2:6], lambda x: x[..., -4:, :]),
    "chunk": (lambda x: x.chunk(2, 2), lambda x: x.chunk(2, dim=-1)),
    "flatten": (lambda x: x.flatten(1, 2), lambda x: x.flatten(-2)),
    "permute": (lambda x: x.permute(0, 2, 1), lambda x: x.permute(0, -1, -2)),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_negative_dimensions_call_the_same_operators(name: str) -> None:
    """The rules of the operators read negative numbers; there is no second operator for them."""
    positive, negative = (assert_same(model, draw(2, 6, 4)).graph for model in NEGATIVE[name])
    assert targets(negative) == targets(positive)


def test_operators_with_products_stay_single_nodes() -> None:
    seen = assert_same(randomise(Block()), image_tokens(WIDTH))
    counted = count(seen.graph)
    assert counted["linear.default"] == 6
    assert counted["scaled_dot_product_attention.default"] == 1
    assert counted["layer_norm.default"] == 2
    assert counted["rms_norm.default"] == 2
    assert all(isinstance(node.target, OpOverload) for node in seen.graph.graph.nodes if node.op == "call_function")


# In-place forms


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding as CogView and Sana write it."""
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a.cos() - b.sin()
    out[..., 1::2] = a.sin() + b.cos()
    return out


def fill_where_negative(x: Tensor) -> Tensor:
    y = x.clone()
    y.masked_fill_(x < 0, 3.0)
    return y


def chain(x: Tensor) -> Tensor:
    y = x * 2
    y.mul_(3).add_(x).clamp_(min=0.1)
    y *= x
    y -= 1
    return y


def through_views(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    first, second = y.chunk(2, dim=1)
    first.add_(1)
    y.transpose(1, 2)[:, 0].zero_()
    return y, second * first


def copy_into_part(x: Tensor) -> Tensor:
    y = torch.zeros(2, 6, 8)
    y[:, :, :4].copy_(x)
    y[:, 1:3, 4:].copy_(x[:, :1])
    return y


def index_put(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, [0, 3]] = 7.0
    y[x > 1] = 0.0
    return y


def fill_diagonal_of_a_part(x: Tensor) -> Tensor:
    """The mask of perturbed attention guidance: some tokens see themselves only."""
    mask = torch.zeros(6, 6)
    mask[:4, :4] = float("-inf")
    mask[:4, :4].fill_diagonal_(0)
    return x + mask.softmax(-1) @ x


IN_PLACE: dict[str, Model] = {
    "fill_diagonal_ of a part": fill_diagonal_of_a_part,
    "fill_diagonal_ of a wide matrix": lambda x: (x[:, 0] * 2).fill_diagonal_(3.0),
    "fill_diagonal_ of three dimensions": lambda x: (x[:, :2, :2] * 2).fill_diagonal_(fill_value=3.0),
    "fill_diagonal_ of a tall matrix": lambda x: (x[0] * 2).fill_diagonal_(3.0),
    "setitem of every second": rotate,
    "masked_fill_": fill_where_negative,
    "chain": chain,
    "through views": through_views,
    "copy_ into a part": copy_into_part,
    "index_put_": index_put,
    "out=": lambda x: torch.add(x, 1, out=torch.empty_like(x)) * 2,
    "fill_ and uniform value": lambda x: torch.empty_like(x).fill_(2.5) + x,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_forms_become_functional(name: str) -> None:
    graph = assert_same(IN_PLACE[name], draw(2, 6, 4)).graph
    assert writes(graph) == []


NUMBERS: dict[str, Model] = {
    "written into a part": lambda x: _write_true(x > 0),
    "written where a mask says": lambda x: _write_where(x.clone()),
    "a tensor of no dimension": lambda x: x * torch.tensor(0.5) + torch.where(x > 0, torch.tensor(2.0), x),
}


def _write_where(x: Tensor) -> Tensor:
    x[x > 1] = 0.0
    return x


def _write_true(mask: Tensor) -> Tensor:
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_made_where_they_are_used(name: str) -> None:
    """Constants of the host would be copied to a GPU at each call, and the host would wait for it."""
    graph = assert_same(NUMBERS[name], draw(2, 6, 4)).graph
    assert not [
        node for node in graph.graph.nodes if node.op == "get_attr" and graph.get_buffer(node.target).dim() == 0
    ]
    assert "lift_fresh_copy.default" not in targets(graph)


def halve_in_place(x: Tensor) -> Tensor:
    y = x + 1
    x.mul_(0.5)
    return y + x


def write_through_a_view(x: Tensor) -> Tensor:
    x[:, 1:3].fill_(9.0)
    return x.sum(1)


def write_and_return(x: Tensor) -> Tensor:
    return x.add_(1)


def copy_then_write(x: Tensor) -> Tensor:
    """What was copied must not change with what it was copied from."""
    before = torch.empty_like(x)
    before.copy_(x)
    x.mul_(2)
    return before


def read_as_type_then_write(x: Tensor) -> Tensor:
    """`type_as` of the same type is the tensor itself."""
    y = x.type_as(x)
    x.add_(1)
    return y * 2


MUTATIONS: dict[str, Model] = {
    "mul_": halve_in_place,
    "a view": write_through_a_view,
    "returned": write_and_return,
    "after a copy": copy_then_write,
    "through type_as": read_as_type_then_write,
    "through to": lambda x: (y := x.to(torch.float32), x.add_(1), y * 2)[2],
    "through reshape": lambda x: (y := x.reshape(-1), x.add_(1), y * 2)[2],
    "twice": lambda x: (x.mul_(2), x.add_(1), x.sum())[2],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_input_is_written_back_at_the_end(name: str) -> None:
    graph = assert_same(MUTATIONS[name], draw(2, 6, 4)).graph
    assert writes(graph) == ["aten.copy_.default"]
    *_, last, output = graph.graph.nodes
    assert (last.target, output.op) == (torch.ops.aten.copy_.default, "output")
    assert last.args[0].op == "placeholder"


def test_a_mutated_input_that_shares_its_memory_with_another_is_refused() -> None:
    def call(x: Tensor, row: Tensor) -> Tensor:
        x.mul_(2)
        return row + 1

    x = draw(2, 6)
    with pytest.raises(GraphError, match="shares its memory"):
        capture(call, [x, x[0]], Seen())


def test_a_copy_is_not_its_source() -> None:
    x = draw(2, 6)
    found = capture(lambda x: torch.empty_like(x).copy_(x), [x], Seen())
    found.zero_()
    close(x, draw(2, 6), 0.0)


def test_a_mutated_buffer_is_written_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls[0]

    model, eager = Counting(), Counting()
    close(capture(model, [draw(3, 4)], Seen()), eager(draw(3, 4)), 0.0)
    close(model.calls, eager.calls, 0.0)


# Functions around functions


class Checkpointed(nn.Module):
    """Blocks of which nothing is kept for a backward pass, one of them under autocast."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(self.blocks[0].mlp, x, use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_is_part_of_the_graph(use_reentrant: bool) -> None:
    model = randomise(Checkpointed(use_reentrant))
    graph = assert_same(model, image_tokens(WIDTH)).graph
    assert count(graph)["scaled_dot_product_attention.default"] == 3
    assert shard(model, [image_tokens(WIDTH)]).whole_operations() == []


def scaled_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 1:] += x.sum()
    return y


MAPPED: dict[str, Model] = {
    "rows": lambda x: torch.vmap(lambda row: row * row.sum())(x),
    "rows of rows": lambda x: torch.vmap(torch.vmap(lambda row: row / (1 + row.square().sum())))(x),
    "another dimension": lambda x: torch.vmap(lambda part: part.softmax(0), in_dims=2, out_dims=1)(x),
    "with one for all": lambda x: torch.vmap(lambda a, b: a @ b.T, in_dims=(0, None))(x, x[0]),
    "with a constant": lambda x: torch.vmap(lambda part: part + torch.tensor([1.0, 2.0, 3.0, 4.0]))(x),
    "several results": lambda x: torch.vmap(lambda part: (part.amax(0), part.mean()))(x),
    "written in place": lambda x: torch.vmap(scaled_in_place)(x),
    "twice": lambda x: torch.vmap(torch.sin)(torch.vmap(torch.cos)(x) + x) + x,
}


@pytest.mark.parametrize("name", MAPPED)
def test_what_vmap_maps_becomes_operators_on_whole_batches(name: str) -> None:
    seen, x = Seen(), draw(2, 6, 4)
    close(capture(MAPPED[name], [x], seen), MAPPED[name](x))
    assert all(isinstance(node.target, OpOverload) for node in seen.graph.graph.nodes if node.op == "call_function")


def test_equal_blocks_that_map_are_sharded() -> None:
    model = Transformer(3, middle=lambda x: torch.vmap(lambda row: row * row.square().mean())(x))
    assert_sharded(randomise(model), [image_tokens()])


def test_a_region_that_cannot_be_traced_leaves_no_level_behind() -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Model:
        (sine,) = gm.graph.find_nodes(op="call_function", target=torch.sin)
        sine.target = torch.linalg.cholesky  # of what is no matrix
        return normalise(gm, example_inputs).forward

    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        capture(lambda x: torch.vmap(torch.sin)(x), [draw(2, 6)], backend)
    assert get_dynamic_layer_stack_depth() == 0


# What does nothing is dropped

DROPPED: dict[str, tuple[Model, list[str]]] = {
    "type_as of the same type": (lambda x, y: x.type_as(y) + 1, ["add.Tensor"]),
    "type_as of another type": (lambda x, y: x.type_as(y.half()) + 1, ["_to_copy.default", "add.Tensor"]),
    "dropout in evaluation": (lambda x, y: F.dropout(x, 0.3, training=False) + 1, ["add.Tensor"]),
    "dropout of nothing": (lambda x, y: F.dropout(x, 0.0, training=True) + 1, ["add.Tensor"]),
}


def unused(gm: fx.GraphModule, shape: tuple[int, ...]) -> bool:
    """Whether nothing reads an input of this shape (Dynamo may have left it out)."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return not any(node.users for node in placeholders if tuple(node.meta["val"].shape) == shape)


@pytest.mark.parametrize("name", DROPPED)
def test_what_does_nothing_is_dropped(name: str) -> None:
    """Above all the operand that is only asked for its type."""
    model, expected = DROPPED[name]
    graph = assert_same(model, draw(2, 6), draw(5, 7, seed=2)).graph
    assert targets(graph) == expected
    assert unused(graph, (5, 7))


def test_dropout_in_training_is_kept() -> None:
    graph = normalised(lambda x: F.dropout(x, 0.3, training=True), draw(2, 6))
    assert "dropout.default" in targets(graph)


def test_the_overwritten_operand_of_a_copy_is_dropped() -> None:
    graph = assert_same(lambda x, y: (y * 2).copy_(x[0]) + 1, draw(3, 2, 6), draw(2, 6, seed=2)).graph
    assert not any("copy" in target for target in targets(graph))
    assert unused(graph, (2, 6))


def test_a_copy_that_broadcasts_stays() -> None:
    graph = assert_same(lambda x: torch.zeros(3, 6).copy_(x) + 1, draw(6)).graph
    assert "copy.default" in targets(graph)


# Autocast, grad mode, inference mode


class Cast(nn.Module):
    """Regions of autocast, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention = SelfAttention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            low = self.first(x)
            with torch.autocast("cpu", enabled=False):
                high = self.second(x + low.float())
            attended = self.attention(x)
        return low, high, self.third(attended.float() + high)


def marks(gm: fx.GraphModule) -> list[str]:
    """The edges of autocast regions and the linears, in order."""
    kinds = {"_enter_autocast": "enter", "_exit_autocast": "exit"}
    named = [(getattr(node.target, "__name__", ""), str(node.target)) for node in gm.graph.nodes]
    return [kinds.get(name, "linear") for name, target in named if name in kinds or target == "aten.linear.default"]


def test_autocast_regions_keep_order_and_values() -> None:
    model = randomise(Cast())
    seen = assert_same(model, image_tokens(WIDTH))
    first, *_ = capture(model, [image_tokens(WIDTH)], Seen())
    assert first.dtype is torch.bfloat16
    assert marks(seen.graph) == [
        *("enter", "linear", "enter", "linear", "exit"),
        *["linear"] * 4,
        *("exit", "linear"),
    ]


def test_what_is_computed_under_autocast_is_known_to_have_its_type() -> None:
    """A conversion that would do nothing without autocast does something under it."""
    inner = randomise(nn.Linear(WIDTH, WIDTH))

    def call(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            y = inner(x)
            return y, y.float(), y.to(torch.float32) + 1, x.type_as(y), torch.zeros_like(y), y.softmax(-1)

    seen, x = assert_same(call, image_tokens(WIDTH)), image_tokens(WIDTH)
    expected = [output.dtype for output in call(x)]
    assert [output.dtype for output in seen.graph(*[*inner.parameters(), x])] == expected
    (outputs,) = seen.graph.graph.find_nodes(op="output")[0].args
    assert [output.meta["val"].dtype for output in outputs] == expected


def test_autocast_regions_survive_the_sharding() -> None:
    sharded = assert_sharded(randomise(Cast()), [image_tokens(WIDTH)], 2, tolerance=0.02)
    assert [output.dtype for output in sharded.result] == [torch.bfloat16, torch.float32, torch.float32]
    for gm in sharded.graphs:
        assert [mark for mark in marks(gm) if mark != "linear"] == ["enter", "enter", "exit", "exit"]


def test_autocast_around_the_call() -> None:
    model = randomise(Transformer())
    with torch.autocast("cpu", torch.bfloat16):
        seen = assert_same(model, image_tokens())
        assert seen.graph.graph.find_nodes(op="output")[0].args[0][0].meta["val"].dtype is torch.bfloat16


def test_inner_no_grad_leaves_nothing_behind() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        with torch.enable_grad():
            return y + x

    graph = assert_same(call, draw(2, 6)).graph
    assert targets(graph) == ["sin.default", "add.Tensor"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_the_call_changes_nothing(mode: Callable[[], Any]) -> None:
    model, seen = randomise(Transformer()), Seen()
    torch._dynamo.reset()
    with mode():
        found = torch.compile(model, backend=seen, fullgraph=True)(image_tokens())
        close(found.clone(), model(image_tokens()), 0.0)
        assert found.is_inference() == (mode is torch.inference_mode)
    assert spelled(seen.graph) == spelled(normalised(model, image_tokens()))


def test_a_trace_leaves_the_grad_mode_as_it_was() -> None:
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin(), backend=Seen())(draw(2, 6))
    assert torch.is_grad_enabled()


# What Dynamo attached


def test_dynamo_s_own_graph_is_not_touched() -> None:
    before: list[Any] = []

    def facts(gm: fx.GraphModule) -> list[Any]:
        return [
            (node.name, node.op, node.target, str(node.args), str(node.kwargs), dict(node.meta))
            for node in gm.graph.nodes
        ]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before.extend(facts(gm))
        graph = normalise(gm, example_inputs)
        assert graph is not gm
        after = facts(gm)
        assert [each[:-1] for each in after] == [each[:-1] for each in before]
        assert [each[-1].keys() for each in after] == [each[-1].keys() for each in before]
        return graph.forward

    x = image_tokens()
    capture(randomise(Transformer(before=lambda x: x.mul_(2))), [x], backend)
    assert any("grapharg" in each[-1] for each in before)


def static_inputs(gm: fx.GraphModule) -> tuple[list[Any], list[int]]:
    """What AOTAutograd reads from the graph: the source of each input, and which inputs are weights."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources, static = _try_get_metadata_from_dynamo(gm, {}.keys(), len(placeholders), [])
    assert sources is not None
    return sources, static


@pytest.mark.parametrize(
    "mesh",
    [{}, {"ulysses": 2}, {"ring": 2}, {"batch": 2}, {"batch": 2, "ring": 2, "ulysses": 2}],
    ids=["one rank", "ulysses", "ring", "batch", "all"],
)
def test_aot_autograd_sees_the_same_weights_after_every_pass(mesh: dict[str, int]) -> None:
    steps: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        expected, meta = static_inputs(gm), dict(gm.meta)
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        dicts = [node.meta.get("tensor_dict") for node in gm.graph.find_nodes(op="placeholder")]
        assert len(expected[1]) == len(list(model.parameters()))

        def after(name: str, graph: fx.GraphModule) -> None:
            steps.append(name)
            placeholders = graph.graph.find_nodes(op="placeholder")
            assert static_inputs(graph) == expected
            assert [node.name for node in placeholders] == names
            assert [node.meta.get("tensor_dict") for node in placeholders] == dicts
            assert graph._param_name_to_source == gm._param_name_to_source
            assert meta.items() <= graph.meta.items()

        run_passes(gm, example_inputs, pipeline(Ranks.simulated(**mesh)), after=after)
        return gm.forward

    model = randomise(Transformer())
    capture(model, [image_tokens()], backend)
    assert steps[0] == "normalise"
    assert "schedule" in steps


def test_nodes_keep_the_line_and_the_module_that_they_came_from() -> None:
    graph = normalised(randomise(Transformer()), image_tokens())
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        assert "F.scaled_dot_product_attention" in node.meta["stack_trace"]
        assert any("attention" in str(module) for module in node.meta["nn_module_stack"].values())


# Symbolic sizes


def run_sizes(model: Model, sizes: Sequence[int], **how: Any) -> Seen:
    torch._dynamo.reset()
    seen = Seen()
    compiled = torch.compile(model, backend=seen, fullgraph=True, **how)
    with torch.no_grad():
        for size in sizes:
            x = draw(BATCH, size, 10)
            close(compiled(x), model(x), 0.0)
    return seen


def sizes_of(gm: fx.GraphModule) -> list[Any]:
    """All numbers among the arguments of a graph's nodes."""
    return [leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs))]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic=True", "automatic"])
def test_open_sizes_are_stated_where_they_are_used(dynamic: bool | None) -> None:
    seen = run_sizes(randomise(Transformer()), [IMAGE, 20, 36, 20, IMAGE], dynamic=dynamic)
    assert len(seen.graphs) == (1 if dynamic else 2)
    graph = seen.graphs[-1]
    assert any(isinstance(size, Size) for size in sizes_of(graph))
    assert not any(isinstance(size, (torch.SymInt, torch.SymFloat)) for size in sizes_of(graph))
    numbers = [node for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    assert numbers
    assert all(node.op == "placeholder" and not node.users for node in numbers)


def test_a_dimension_marked_dynamic_by_a_library_stays_open() -> None:
    torch._dynamo.reset()
    model, seen = randomise(Transformer()), Seen()
    compiled = torch.compile(model, backend=seen, fullgraph=True)
    with torch.no_grad():
        for size in (IMAGE, 20):
            x = draw(BATCH, size, 10)
            torch._dynamo.maybe_mark_dynamic(x, 1)
            close(compiled(x), model(x), 0.0)
    assert len(seen.graphs) == 1


def test_a_number_that_makes_a_shape_stays_open_where_it_is_calculated_with() -> None:
    torch._dynamo.reset()
    seen = Seen()

    def call(x: Tensor, count: int) -> Tensor:
        return x.repeat(1, count) + count

    compiled = torch.compile(call, backend=seen, fullgraph=True, dynamic=True)
    for number in (3, 5, 3, 7):
        close(compiled(draw(2, 6), number), call(draw(2, 6), number), 0.0)
    assert len(seen.graphs) == 1


# Quantised weights

KINDS = ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"]


@pytest.fixture(scope="module", params=KINDS)
def quantised(request: pytest.FixtureRequest) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = randomise(Transformer())
    torchao.quantize_(model, getattr(torchao, request.param)())
    return model


def test_a_quantised_linear_stays_one_node(quantised: nn.Module) -> None:
    graph = normalised(quantised, image_tokens())
    assert count(graph)["linear.default"] == 8
    assert not any("mm" in target or "quant" in target for target in targets(graph))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_quantised_model_keeps_its_result(quantised: nn.Module, compiler: str, mode: Callable[[], Any]) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        passes = pipeline(Ranks.simulated())
        graph = run_passes(gm, example_inputs, passes)
        return graph.forward if compiler == "eager" else aot_eager(graph, list(example_inputs))

    torch._dynamo.reset()
    with mode():
        found = torch.compile(quantised, backend=backend, fullgraph=True)(image_tokens())
        close(found.clone(), quantised(image_tokens()))


def test_a_quantised_model_is_sharded(quantised: nn.Module) -> None:
    with torch.no_grad():
        expected = quantised(image_tokens())
    sharded = shard(quantised, [image_tokens()], 2)
    close(sharded.result, expected)
    assert sharded.collectives == {"all_to_all_single": 4, "all_gather_into_tensor": 1}


# Constants and outputs


def test_constants_of_the_graph_survive() -> None:
    def call(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(4.0)

    seen = assert_same(call, draw(2, 3))
    assert seen.graph.graph.find_nodes(op="get_attr")
    model = randomise(Transformer(before=lambda x: x * torch.linspace(0, 1, WIDTH) * torch.tensor([2.0])))
    assert_sharded(model, [image_tokens()], 2)


OUTPUTS: dict[str, Model] = {
    "tuple": lambda x, n: (x + 1, x * 2),
    "None and numbers": lambda x, n: (x + 1, None, 3, "text", n),
    "nested": lambda x, n: {"a": [x + 1, (x * 2, None)], "b": n},
    "the same twice": lambda x, n: (y := x + 1, y),
    "an input": lambda x, n: (x, x + 1),
    "a view": lambda x, n: (y := x + 1, y[0], y.view(-1)),
    "a size": lambda x, n: (x + x.shape[0], x.shape[1]),
    "none at all": lambda x, n: None,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_survive(name: str) -> None:
    seen, x = Seen(), draw(2, 6)
    close(capture(OUTPUTS[name], [x, 5], seen), OUTPUTS[name](x, 5), 0.0)
    assert len(seen.graphs) == (name != "none at all")


def test_none_among_the_outputs_of_the_graph_itself() -> None:
    """Dynamo itself leaves these out; a graph of another origin may hold them."""

    class Several(nn.Module):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x + 1, None, 3, (x, [x * 2])

    gm, x = fx.symbolic_trace(Several()), draw(2, 6)
    close(normalise(gm, [x])(x), Several()(x), 0.0)


def test_a_check_of_a_length_stays() -> None:
    """As torch 2.11 captures it: without it, what is asked of the length later has no answer."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten._assert_scalar.default:
                node.target, node.args = torch._check, node.args[:1]
        graphs.append(normalise(gm, example_inputs))
        return gm.forward

    def model(x: Tensor, length: Tensor) -> Tensor:
        kept = int(length.item())
        torch._check(kept > 1)
        torch._check(kept <= x.shape[1])
        return x[:, :kept]

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(model, backend=backend, fullgraph=True)(draw(2, 9), torch.tensor(5))
    (graph,) = graphs
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)) == 2
