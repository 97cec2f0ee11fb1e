"""Hand-written models of a few lines, and `shard`, which runs all ranks of one in lockstep.

Sizes are pairwise different, and lengths and heads divide by 2, 3 and 4: batch 2, 12 heads of 6, 48 image and 24 text
tokens.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from all_ranks import of_all_ranks
from lockstep import run_lockstep
from random_tensors import draw
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from paracompile.layout.plan import Plan
from paracompile.mesh import Ranks
from paracompile.passes.normalise import normalise
from paracompile.patterns.flops import flops_of
from paracompile.report.report import Report, report_of

BATCH, HEADS, SIZE, IMAGE, TEXT = 2, 12, 6, 48, 24
WIDTH = HEADS * SIZE


@dataclass
class Sharded:
    """What became of a model on all ranks.

    attributes:
        captured: Dynamo's graph.
        normalised: the graph after the pass `normalise`.
        plan: rank 0's plan; of the tokens, where a batch axis has one of its own.
        graphs: the last graph, by rank.
        result: what the model returns on rank 0, put together by Dynamo.
        outputs: the graph's outputs, by rank.
        report: rank 0's report.
    """

    captured: fx.GraphModule
    normalised: fx.GraphModule
    plan: Plan
    graphs: list[fx.GraphModule]
    report: Report
    result: Any = None
    outputs: list[Any] = field(default_factory=list)

    @property
    def collectives(self) -> dict[str, int]:
        return self.report.collectives

    @property
    def share(self) -> float:
        """Which part of the whole's products rank 0 computes."""
        return self.report.flops_rank / self.report.flops_whole

    def whole_operations(self) -> list[str]:
        """The names of operators with products that every rank computes whole."""
        return [
            str(operation.node.target)
            for operation in self.plan.operations
            if flops_of(operation) and operation not in self.plan.cuts
        ]


def capture(
    model: Callable[..., Any], inputs: Sequence[Any], backend: Callable[..., Any], *, grad: bool = False
) -> Any:
    """Calls the model, compiled by `backend`, in one graph and without gradients; raises what the backend raises."""
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        try:
            return torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None


def normalised(model: Callable[..., Any], *inputs: Any, grad: bool = False) -> fx.GraphModule:
    """The graph of a model after `normalise`."""
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(normalise(gm, example_inputs))
        return gm.forward

    capture(model, inputs, backend, grad=grad)
    (graph,) = kept
    return graph


Mesh = int | Mapping[str, int]
"""Sizes by axis, as {"ring": 2, "ulysses": 2}; a number stands for so many ranks on the ulysses axis."""


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    return {"ulysses": mesh} if isinstance(mesh, int) else dict(mesh)


def mesh_name(mesh: Mesh) -> str:
    """The mesh as a test's id: "ring2-ulysses2"."""
    return "-".join(f"{axis}{size}" for axis, size in mesh_sizes(mesh).items())


def shard(model: Callable[..., Any], inputs: Sequence[Any], mesh: Mesh = 2, **how: Any) -> Sharded:
    """Shards a model over simulated ranks and runs them all; `how` goes to `pipeline`."""
    kept: list[Sharded] = []
    sizes = mesh_sizes(mesh)
    ranks = prod(sizes.values())

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        after_normalise: list[fx.GraphModule] = []

        def after(name: str, graph: fx.GraphModule) -> None:
            if name == "normalise":
                after_normalise.append(graph)

        made = of_all_ranks(gm, example_inputs, sizes, after=after, **how)
        graphs, found = made.graphs, made.found
        first, plans = Ranks.simulated(**sizes), list(found[0].plans.values())
        report = report_of(found[0], first, graphs[0])
        sharded = Sharded(gm, after_normalise[0], plans[-1], graphs, report)
        kept.append(sharded)

        def run(*args: Any) -> Any:
            others = [pytree.tree_map_only(Tensor, Tensor.clone, args) for _ in range(1, ranks)]
            sharded.outputs = run_lockstep(graphs, [args, *others], sizes)
            return sharded.outputs[0]

        return run

    result = capture(model, inputs, backend)
    (sharded,) = kept
    sharded.result = result
    return sharded


def assert_sharded(
    model: Callable[..., Any], inputs: Sequence[Any], mesh: Mesh = 2, *, tolerance: float = 2e-6, **how: Any
) -> Sharded:
    """Shards a model, and asserts that every rank's result is that of the eager model, and its inputs as before.

    args:
        how: goes to `pipeline`.
    """
    before = pytree.tree_map_only(Tensor, Tensor.clone, list(inputs))
    with torch.no_grad():
        expected = model(*before)
    sharded = shard(model, inputs, mesh, **how)
    close(sharded.result, expected, tolerance)
    for output in sharded.outputs[1:]:
        close(output, sharded.outputs[0], 0.0)
    close(list(inputs), before, 0.0)
    return sharded


def close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Equal in structure; tensors to a tolerance relative to the largest value."""
    found_leaves, found_tree = pytree.tree_flatten(found)
    leaves, tree = pytree.tree_flatten(expected)
    assert found_tree == tree
    for one, other in zip(found_leaves, leaves, strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        finite = other[other.isfinite()] if other.dtype != torch.bool else other.flatten()[:0]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance * max(largest, 1.0), equal_nan=True)


def targets(gm: fx.GraphModule) -> list[str]:
    """The operators called, in order, without `aten.` and getitem."""
    return [
        str(node.target).removeprefix("aten.")
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]


def count(gm: fx.GraphModule) -> Counter[str]:
    return Counter(targets(gm))


def heads(x: Tensor, number: int = HEADS) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2, 3)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with norms on queries and keys."""

    def __init__(self, width: int = WIDTH, number: int = HEADS) -> None:
        super().__init__()
        self.number = number
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width // number), nn.RMSNorm(width // number)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        q, k, v = (heads(to(x), self.number) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(merge(F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, **how)))


class CrossAttention(nn.Module):
    """Attention of a sequence to another one, which has a width of its own."""

    def __init__(self, other: int, width: int = WIDTH) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(other, width), nn.Linear(other, width)

    def forward(self, x: Tensor, other: Tensor, **how: Any) -> Tensor:
        q, k, v = heads(self.to_q(x)), heads(self.to_k(other)), heads(self.to_v(other))
        return self.to_out(merge(F.scaled_dot_product_attention(q, k, v, **how)))


class Block(nn.Module):
    """A transformer block; `middle` is done to the sequence between attention and MLP."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.middle = middle or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = self.middle(x)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks between a linear in and a linear out; `before`, `after` are done to the tokens around the blocks."""

    def __init__(
        self,
        depth: int = 1,
        *,
        channels: int = 10,
        out: int = 10,
        before: Callable[[Tensor], Tensor] | None = None,
        middle: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, out)
        self.blocks = nn.ModuleList(Block(middle) for _ in range(depth))
        self.before, self.after = before or (lambda x: x), after or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.proj_in(x))
        for block in self.blocks:
            x = block(x)
        return self.after(self.proj_out(x))


class Denoiser(nn.Module):
    """Blocks between a linear in and a linear out, told the time, as a diffusion transformer is called."""

    def __init__(self, depth: int = 3, *, block: Callable[[], nn.Module] = Block, channels: int = 10) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, channels)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden_states: Tensor, timestep: Tensor, **more: Any) -> tuple[Tensor]:
        x = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1))
        for block in self.blocks:
            x = block(x, **more)
        return (self.proj_out(x),)


class Joint(nn.Module):
    """Text and image in one attention, joined before and split after it, as in the double blocks of MM-DiT."""

    def __init__(self, *, text_first: bool = True) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.image_out, self.text_out = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.text_first = text_first

    def forward(self, image: Tensor, text: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        streams = zip(
            *([heads(x) for x in to(s).chunk(3, dim=-1)] for to, s in ((self.text, text), (self.image, image))),
            strict=True,
        )
        order = 1 if self.text_first else -1
        q, k, v = (torch.cat(pair[::order], dim=2) for pair in streams)
        joined = merge(F.scaled_dot_product_attention(q, k, v, **how))
        lengths = [text.shape[1], image.shape[1]][::order]
        new_text, new_image = joined.split(lengths, dim=1)[::order]
        return image + self.image_out(new_image), text + self.text_out(new_text)


def image_tokens(channels: int = 10, seed: int = 1) -> Tensor:
    return draw(BATCH, IMAGE, channels, seed=seed)


def text_tokens(channels: int = WIDTH, seed: int = 2) -> Tensor:
    return draw(BATCH, TEXT, channels, seed=seed)
