"""What the first block cache must do, worked out by hand: a family's own model in float64, whose blocks are watched.

Nothing here looks at a graph. Which lists of blocks a model has, and which of a block's results is the image's stream,
is written down for each family.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from cached import ALWAYS, NEVER, CachedGraphs, step
from capture import Captured, assert_equal
from families import Inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LISTS = {
    "flux": ("transformer_blocks", "single_transformer_blocks"),
    "stable_diffusion_3": ("transformer_blocks",),
    "wan": ("blocks",),
    "cogvideox": ("transformer_blocks",),
    "hunyuan_video": ("transformer_blocks", "single_transformer_blocks"),
    "ltx_video": ("transformer_blocks",),
    "qwen_image": ("transformer_blocks",),
    "mochi": ("transformer_blocks",),
}
"""The lists of a family's blocks, in the order in which they are run."""

IMAGE_SECOND = ("flux", "stable_diffusion_3", "qwen_image")
"""Families whose blocks return (text, image); the others return (image, text), or the image alone."""


ROUNDING = 1e-5
"""Of the largest value: what float32 may be off, after a few blocks."""


class InDouble(TorchDispatchMode):
    """What a model does in float32 by its own word, it does in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


Streams = tuple[Any, ...]
"""A value for each stream that a block returns: the image's and the text's; None where the last block drops one."""


@dataclass(frozen=True)
class Seen:
    """What was seen in one call.

    attributes:
        output: the model's.
        residual: what the blocks at the front add to the image, which decides; where the last of them see image and
            text joined, what those add to both.
        added: what the blocks in the middle add to each stream.
        added_by: the same up to each block in the middle; some models read what leaves one once more at the end.
    """

    output: Tensor
    residual: Tensor
    added_by: tuple[Streams, ...]

    @property
    def added(self) -> Streams:
        return self.added_by[-1]


class ByHand:
    """A captured model in float64; `first` blocks at the front and `last` at the end are always computed.

    args:
        lists: the model's lists of blocks, in the order in which they are run.
        image: the place of the image's stream among what a block returns.
        in_turn: a block of each list is run, then the next of each.
    """

    def __init__(
        self,
        of: Captured,
        lists: Sequence[str] = ("blocks",),
        image: int = 0,
        *,
        in_turn: bool = False,
        first: int = 1,
        last: int = 0,
    ) -> None:
        self.model = copy.deepcopy(of.model).double()
        parts = [list(self.model.get_submodule(name).children()) for name in lists]
        self.blocks = [block for part in (zip(*parts, strict=True) if in_turn else parts) for block in part]
        self.image, self.first, self.end = image, first, len(self.blocks) - last

    @classmethod
    def of_family(cls, family: str, of: Captured, *, first: int = 1, last: int = 0) -> ByHand:
        return cls(of, LISTS[family], int(family in IMAGE_SECOND), first=first, last=last)

    def computed(self, inputs: Inputs) -> Seen:
        return self._call(inputs, ())

    def skipped(self, inputs: Inputs, added: Streams) -> Tensor:
        """The output where `added` stands for what the blocks in the middle add."""
        return self.skipped_by(inputs, (added,))

    def skipped_by(self, inputs: Inputs, added_by: Sequence[Streams]) -> Tensor:
        """The same, with what stands for what is added up to each of the last blocks in the middle."""
        return self._call(inputs, added_by).output

    def _call(self, inputs: Inputs, instead: Sequence[Streams]) -> Seen:
        start: list[Tensor] = []
        front: list[Streams] = []
        added: list[Streams] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = kwargs["hidden_states"] if "hidden_states" in kwargs else args[min(self.image, len(args) - 1)]
            if start and start[0].shape != value.shape:  # joined
                start.clear()
            start.append(value)

        def leave_front(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            front.append(_streams(result))

        def leave_middle(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            begun = front[0] if len(front[0]) == len(_streams(result)) else (torch.cat(front[0], dim=1),)
            pairs = [(end, _as_in(end, begin)) for end, begin in zip(_streams(result), begun, strict=True)]
            added.append(tuple(None if end is None else end - begin for end, begin in pairs))
            place = len(added) - (self.end - self.first) + len(instead) - 1
            if place < 0:
                return None
            new = tuple(
                None if end is None else begin + more for (end, begin), more in zip(pairs, instead[place], strict=True)
            )
            return new if isinstance(result, tuple) else new[0]

        hooks = [
            *(block.register_forward_pre_hook(enter, with_kwargs=True) for block in self.blocks[: self.first]),
            self.blocks[self.first - 1].register_forward_hook(leave_front),
            *(block.register_forward_hook(leave_middle) for block in self.blocks[self.first : self.end]),
        ]
        try:
            with torch.no_grad(), InDouble():
                (output,) = self.model(**pytree.tree_map_only(Tensor, _double, inputs))
        finally:
            for hook in hooks:
                hook.remove()
        image = front[0][self.image if len(front[0]) > 1 else 0]
        return Seen(output, image - start[0], tuple(added))


def _streams(result: Any) -> Streams:
    return tuple(result) if isinstance(result, tuple) else (result,)


def _as_in(end: Tensor | None, begin: Tensor) -> Tensor:
    """The stream as it lies where blocks that take turns leave it: tokens of each frame, or frames of each token."""
    if end is None or end.shape == begin.shape:
        return begin
    return begin.unflatten(0, (-1, end.shape[1])).transpose(1, 2).flatten(0, 1)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def by_formula(found: Tensor, expected: Tensor) -> None:
    """Equal to what was worked out in float64, up to rounding."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def ratio_of(residual: Tensor, previous: Tensor) -> float:
    return float((residual - previous).abs().sum() / previous.abs().sum())


def check_generation(graphs: CachedGraphs, model: ByHand, *, change: float = 0.01) -> None:
    """Asserts of three steps, computed, skipped and computed, what each rank gives: the model's and the formula's.

    args:
        change: of the sample from step to step.
    """
    inputs = [step(graphs.of, number, change=change) for number in range(3)]
    generation = graphs.begin()
    steps = [generation.step(each, rdt) for each, rdt in zip(inputs, (ALWAYS, ALWAYS, NEVER), strict=True)]
    assert [each.hit for each in steps] == [False, True, False]

    seen = [model.computed(each) for each in inputs]
    skipped = model.skipped_by(inputs[1], seen[0].added_by)
    for output in steps[1].outputs:
        by_formula(output, skipped)
    assert float((skipped - seen[1].output).abs().max()) > 100 * ROUNDING * float(skipped.abs().max())

    for number in (0, 2):
        with torch.no_grad():
            (expected,) = graphs.of.model(**inputs[number])
        for output in steps[number].outputs:
            assert_equal(output, expected)

    assert math.isnan(steps[0].ratio)
    assert steps[1].ratio == pytest.approx(ratio_of(seen[1].residual, seen[0].residual), rel=1e-4)
    assert steps[2].ratio == pytest.approx(ratio_of(seen[2].residual, seen[0].residual), rel=1e-4)
    for each in steps:
        assert len({tuple(record.nan_to_num(-1).tolist()) for record in each.records}) == 1
