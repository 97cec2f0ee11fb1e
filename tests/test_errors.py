"""Errors name the node, its place in the model and the remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from paracompile.errors import GraphError, OptionError, ParacompileError, RankError, module_path, source_line

pytestmark = pytest.mark.whole


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x).mul_(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block["attn"](x)
        return x + 1


@pytest.fixture(scope="module")
def nodes() -> list[Node]:
    kept: list[Node] = []

    def keep(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept.extend(node for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Model(), backend=keep, fullgraph=True)(torch.ones(2, 4))
    return kept


def test_names_operator_module_line_and_remedy(nodes: list[Node]) -> None:
    linear, scale, *_, add = nodes
    text = str(GraphError(linear, "cannot be sharded", "do something else"))
    lines = text.splitlines()
    assert lines[0] == f"linear (node {linear.name!r}): cannot be sharded"
    assert lines[1] == "  in module transformer_blocks.0.attn.to_q"
    assert lines[2].startswith(f"  at {__file__}:")
    assert lines[2].endswith(", in forward: return self.to_q(x).mul_(2)")  # not torch.nn's own line
    assert lines[3] == "  remedy: do something else"
    assert str(GraphError(scale, "p", "r")).startswith("Tensor.mul_ (node ")
    assert module_path(scale) == "transformer_blocks.0.attn"
    assert module_path(add) is None
    assert "in module" not in str(GraphError(add, "p", "r"))


@pytest.mark.parametrize(
    "spelled, path",
    [
        ("L['self'].transformer_blocks.0.attn", "transformer_blocks.0.attn"),
        ("L['self']._modules['transformer_blocks']._modules['0'].attn", "transformer_blocks.0.attn"),
        ("L['fn'].blocks[3]", "blocks.3"),
        ("G['pipe'].transformer.blocks.3", "transformer.blocks.3"),
        ("L['self']", None),
        ("", None),
    ],
)
def test_module_path_drops_dynamo_s_spelling(spelled: str, path: str | None) -> None:
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": ("L['self']", Model), "2": (spelled, Attention)}
    assert module_path(node) == path


def test_a_node_without_metadata() -> None:
    graph = Graph()
    node = graph.call_function(torch.ops.aten.permute.default, (graph.placeholder("x"), [1, 0]))
    assert module_path(node) is None
    assert source_line(node) is None
    assert str(GraphError(node, "p", "r")) == "aten.permute.default (node 'permute_default'): p\n  remedy: r"
    assert str(GraphError(None, "no attention found", "r")) == "no attention found\n  remedy: r"


def test_only_torch_s_own_frames() -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = f'  File "{torch.__path__[0]}/nn/x.py", line 3, in forward\n    y = x\n        ^\n'
    assert source_line(node) == f"{torch.__path__[0]}/nn/x.py:3, in forward: y = x"


def test_all_are_one_family_and_pickle(nodes: list[Node]) -> None:
    for error in (OptionError("mode", "x" * 500, "remedy"), GraphError(nodes[0], "p", "r"), RankError("rank 1 failed")):
        assert isinstance(error, ParacompileError)
        assert isinstance(error, RuntimeError)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert len(str(OptionError("mode", "x" * 500, "remedy"))) < 300
