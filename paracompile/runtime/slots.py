"""Which trajectory a call belongs to: the conditional pass and the unconditional one never share state.

A name says it outright: `cache_context` of paracompile, or of diffusers' models (many of its pipelines use it). In the
loop of a pipeline the call's place in its step tells: the second call since the scheduler's last step is the second
pass of this step. The host can be wrong there, where guidance begins in the middle; so the graph itself compares the
conditioning with that of the last call (`passes.fingerprints`), and a wrong guess costs a computed step.

In other loops, and in the first step, the calls themselves tell: the very same tensors of conditioning (text, ids,
masks) come at each step of one trajectory, and others with another. What is not surely the same is another trajectory,
and starts by computing: two steps, because two images of one prompt in turn are only seen to be two at the second.

All this is within one generation, the making of one image or video. Generations that run at the same time never share
anything: each thread has its own, and so has each loop of a diffusers pipeline, also one within another.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from paracompile.torch_private import version_of

__all__ = [
    "UNKNOWN",
    "Call",
    "CallSigns",
    "Generation",
    "begin_generation",
    "current_generation",
    "current_name",
    "end_step",
    "named",
]

UNKNOWN = "not told apart"
"""The name of the slot of calls without any sign; nothing is ever reused in it."""

_name: ContextVar[str | None] = ContextVar("paracompile_cache_context", default=None)


def current_name() -> str | None:
    """The name that the innermost `named` gave."""
    return _name.get()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Calls inside belong to the slot of this name."""
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


@dataclass(eq=False)
class Generation:
    """One generation: calls in different ones never share state.

    attributes:
        outer: the generation that goes on after this one; None for what is outside of all loops that are known.
        thread: the thread that it began in.
        over: whether it has ended.
        steps: how many signs there were that a step of it has ended; a step may give several.
    """

    outer: Generation | None
    thread: int = field(default_factory=threading.get_ident)
    over: bool = False
    steps: int = 0

    @property
    def is_loop(self) -> bool:
        """Whether it is the loop of a pipeline, whose beginning and end are known."""
        return self.outer is not None


_generation: ContextVar[Generation | None] = ContextVar("paracompile_generation", default=None)


def current_generation() -> Generation:
    """The generation that calls belong to now."""
    generation = _generation.get()
    while generation is not None and generation.over:
        generation = generation.outer
    # Threads that were given a copy of one context would share what is outside of all loops.
    if generation is None or (generation.outer is None and generation.thread != threading.get_ident()):
        generation = Generation(outer=None)
    _generation.set(generation)
    return generation


def begin_generation() -> Generation:
    """Begins a generation within the current one; it lasts until it is said to be `over`."""
    inner = Generation(outer=current_generation())
    _generation.set(inner)
    return inner


def end_step() -> None:
    """Notes that a step of the current generation has ended."""
    current_generation().steps += 1


@dataclass(frozen=True)
class _Seen:
    """A tensor that was passed: the same object, not written to since, is the same value."""

    reference: weakref.ref[Tensor]
    address: int
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(weakref.ref(tensor), tensor.data_ptr(), version_of(tensor))

    def is_same(self, other: _Seen) -> bool:
        tensor = self.reference()
        return (
            tensor is not None
            and tensor is other.reference()
            and (self.address, self.version) == (other.address, other.version)
        )

    def is_current(self) -> bool:
        """Whether the tensor still exists, and was not written to."""
        tensor = self.reference()
        return tensor is not None and self.is_same(_Seen.of(tensor))


@dataclass(frozen=True)
class Call:
    """The signs of one call: its conditioning."""

    conditioning: tuple[_Seen, ...]

    def continues(self, last: Call) -> bool:
        """Whether both calls have the same conditioning."""
        return all(mine.is_same(theirs) for mine, theirs in zip(self.conditioning, last.conditioning, strict=True))

    def alive(self) -> bool:
        """Whether the conditioning can still come again."""
        return all(seen.is_current() for seen in self.conditioning)


@dataclass(frozen=True)
class CallSigns:
    """Where among a graph's arguments the signs are.

    attributes:
        conditioning: places of tensors that stay the same through a trajectory.
    """

    conditioning: tuple[int, ...]

    def of(self, args: Sequence[Any]) -> Call | None:
        """The signs of a call; None where it has none."""
        if not self.conditioning:
            return None
        return Call(tuple(_Seen.of(args[place]) for place in self.conditioning))
