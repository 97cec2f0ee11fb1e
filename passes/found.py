"""What the passes of one compile find: the one door through which a pass tells those behind it, and the backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from paracompile.layout.costs import Cost
from paracompile.layout.plan import Plan
from paracompile.layout.sizes import bytes_in

__all__ = ["TOKENS", "CacheLayout", "Found", "Skipped"]

TOKENS = "tokens one by one"
"""What is cut where it is no spatial dimension, in a report."""


@dataclass(frozen=True)
class Skipped:
    """What may be skipped in one graph.

    attributes:
        blocks: the modules of all blocks on the stream, in order.
        middle: those that may be skipped.
        sample: the place of the graph input that is denoised, among all inputs; None where it is not clear.
        times: the places of timesteps, and of inputs like them that hold one number a row or one at all: guidance.
        inputs: the places of all tensors that a call brings; what changes in the course of a generation comes last.
        numbers: the places of those that are Python's numbers, and new tensors at each call.
    """

    blocks: tuple[str, ...]
    middle: tuple[str, ...]
    sample: int | None
    times: tuple[int, ...]
    inputs: tuple[int, ...]
    numbers: frozenset[int] = frozenset()

    @property
    def free(self) -> int:
        """How many inputs change in the course of a generation, or may: the times and the sample."""
        return len(self.times) + (self.sample is not None)

    @property
    def conditioning(self) -> tuple[int, ...]:
        """The places of the others."""
        return self.inputs[: len(self.inputs) - self.free]


@dataclass(frozen=True)
class CacheLayout:
    """What a graph with a cache takes beside its own inputs, in this order, and gives beside its own outputs.

    attributes:
        control, record: fake tensors like those two inputs; the record is also the last output.
        state: fake tensors like the stored values, the previous residual first.
        added: the places in `state` of what the skipped blocks added to each stream.
        skipped: what may be skipped.
    """

    control: torch.Tensor
    record: torch.Tensor
    state: tuple[torch.Tensor, ...]
    added: tuple[int, ...]
    skipped: Skipped

    @property
    def state_bytes(self) -> int:
        """At the sizes of the first call."""
        return sum(map(bytes_in, self.state))


@dataclass
class Found:
    """What was found in one graph.

    attributes:
        why_a_piece: why the graph is only a piece of its model (`Captured`); None where it is all of it.
        fused: how many attentions the model writes out (`fuse_attention`).
        plans: by mesh axis, what its ranks cut and how (`plan_layouts`).
        dimensions: where a spatial dimension is cut, its name and what that costs, then those of the others and of
            `TOKENS` one by one (`plan_layouts`); none where it is not.
        together: how many attentions have their queries, keys and values in one exchange (`lower`).
        ranges: how many ranges of values ranks exchange to quantise by one scale (`lower`).
        skipped: what may be skipped (`mark_blocks`); None without a cache, or where no blocks are.
        masks_dropped: how many attentions got along without their mask (`drop_masked_keys`).
        kernel: what attention is computed by where it was not left to PyTorch (`choose_kernels`).
        kernel_serves: how many attentions it computes.
        kernel_declined: how many it does not, by the reason.
        seen_again: the places of inputs that whoever passes them sees again: written to, or handed back.
        ints: the places of Python's ints that the graph takes as tensors (`normalise`).
        cache: what the graph takes and gives for it (`first_block_cache`).
    """

    why_a_piece: str | None = None
    fused: int = 0
    plans: dict[str, Plan] = field(default_factory=dict)
    dimensions: tuple[tuple[str, Cost], ...] = ()
    skipped: Skipped | None = None
    together: int = 0
    ranges: int = 0
    masks_dropped: int = 0
    kernel: str | None = None
    kernel_serves: int = 0
    kernel_declined: dict[str, int] = field(default_factory=dict)
    seen_again: frozenset[int] = frozenset()
    ints: frozenset[int] = frozenset()
    cache: CacheLayout | None = None

    def clear(self) -> None:
        """Forgets what passes found, so that they may run again."""
        vars(self).update(vars(Found(self.why_a_piece)))
