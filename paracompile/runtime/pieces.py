"""What pieces of a model hand to each other: the same on all ranks, so that nobody has to send it again."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from paracompile.torch_private import version_of

__all__ = ["handing_on", "is_handed_on"]

_handed_on = cast(MutableMapping[Tensor, int | None], WeakIdKeyDictionary())
"""What a piece returned; by each, its version then."""


def handing_on(
    piece: Callable[..., Sequence[Any]], agree: Callable[[Sequence[Any]], list[Any]], inputs: Sequence[int]
) -> Callable[..., Sequence[Any]]:
    """Calls a piece with what the ranks agree on.

    What it returns is known from then on to be the same on all ranks, as long as nobody writes to it; but not what it
    returns of an input, which is a copy on some ranks.

    args:
        inputs: the places of what the ranks agree on, among the arguments.
    """

    def call(*args: Any) -> Sequence[Any]:
        agreed = agree(args)
        outputs = piece(*agreed)
        held = {_memory(agreed[place]) for place in inputs if isinstance(agreed[place], Tensor)}
        for value in outputs:
            if isinstance(value, Tensor) and _memory(value) not in held:
                _handed_on[value] = version_of(value)
        return outputs

    return call


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def is_handed_on(value: Any) -> bool:
    """Whether a piece returned this, and nobody wrote to it since."""
    return isinstance(value, Tensor) and value in _handed_on and _handed_on[value] == version_of(value)
