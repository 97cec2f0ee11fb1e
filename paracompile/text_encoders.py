"""Text encoders on different ranks: one rank holds and runs each, and all get what it gives.

    rank 0   text_encoder(ids) ──┬──► embeddings          text_encoder_2(ids) ◄──┬── embeddings
    rank 1   text_encoder(ids) ◄─┘    (no weights)        text_encoder_2(ids) ───┴──► embeddings

A pipeline calls its encoders one after the other, and each rank needs every result before it goes on, so this saves
memory and no time. What an encoder returns is known to its rank alone: the structure, with shapes and types, travels
through the store in which the ranks agree; the tensors in one broadcast.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from paracompile.errors import OptionError, ParacompileError
from paracompile.mesh import Ranks
from paracompile.runtime.agreement import Agreement
from paracompile.runtime.inputs import InputAgreement, digest
from paracompile.torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["encoders_of", "place"]

_ENCODER = "text_encoder"
"""What pipelines call them: "text_encoder", "text_encoder_2"."""


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by name.

    Raises:
        OptionError: it has none.
    """
    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in parts.items() if name.startswith(_ENCODER)}
    if not found:
        raise OptionError("text_encoders", True, f"{type(pipe).__name__} has no text encoder: leave it out")
    return found


def place(encoders: Mapping[str, nn.Module], ranks: Ranks, timeout: float) -> dict[str, int]:
    """Has one rank hold and run each encoder, the largest first, where there is least so far.

    On the other ranks its weights are let go of, and a call of it gives what the first one's call gave. Encoders that
    were placed before stay where they are.

    Args:
        timeout: seconds that ranks wait for the one that runs an encoder.

    Returns:
        by name, which of the ranks runs it.
    """
    held = [0] * ranks.size
    placed = {}
    for name, module in sorted(encoders.items(), key=lambda each: -_bytes(each[1])):
        known = vars(module).get("forward")
        owner = known.owner if isinstance(known, _Placed) else held.index(min(held))
        held[owner] += _bytes(module)
        placed[name] = owner
    for name in encoders:
        module, owner = encoders[name], placed[name]
        if not isinstance(vars(module).get("forward"), _Placed):
            agreement = Agreement(ranks.members, timeout)
            call = _Placed(name, owner, ranks, agreement, module.forward, next(module.parameters()).device)
            module.forward = call
            if not call.is_mine:
                _let_go(module, call)
    return {name: placed[name] for name in encoders}


@dataclass(frozen=True)
class _Sent:
    """What stands for a tensor until it arrives."""

    shape: torch.Size
    dtype: torch.dtype
    on_host: bool


class _Unsent:
    """What stands for something that is no tensor and was not sent, as keys and values for a next token."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ParacompileError(
            f"{name!r} of what a text encoder on another rank returned was not sent: leave out text_encoders"
        )


@dataclass(frozen=True)
class _Placed:
    """Stands for the `forward` of an encoder.

    attributes:
        name: of the encoder.
        owner: which of the ranks runs it.
        ranks: all of them, seen from this one.
        agreement: theirs.
        original: the `forward` itself.
        device: where results are wanted.
    """

    name: str
    owner: int
    ranks: Ranks
    agreement: Agreement
    original: Callable[..., Any]
    device: torch.device

    @property
    def is_mine(self) -> bool:
        return self.ranks.flat_rank == self.owner

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner's call gives, on all ranks.

        Raises:
            RankError: the encoder failed on its rank; ranks were called with other inputs, or not all of them.
        """
        stage, facts = f"a call of {self.name}", {"inputs": _described((args, kwargs))}
        if not self.is_mine:
            said = self.agreement.exchange(stage, facts=facts)[self.owner]
            leaves, structure = tree_flatten(pickle.loads(base64.b64decode(said)))
            return tree_unflatten(self._broadcast([self._room_for(leaf) for leaf in leaves]), structure)
        try:
            result = self.original(*args, **kwargs)
            said = base64.b64encode(pickle.dumps(tree_map(_standing_for, result))).decode()
        except BaseException as failure:
            self.agreement.exchange(stage, facts={}, error=f"{type(failure).__name__}: {failure}")
            raise
        self.agreement.exchange(stage, facts=facts, own=said)
        self._broadcast(tree_leaves(result))
        return result

    def _room_for(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Sent):
            return leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu" if leaf.on_host else self.device)

    def _broadcast(self, leaves: list[Any]) -> list[Any]:
        tensors = tuple(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        source = self.ranks.members[self.owner]
        return InputAgreement("broadcast", tensors, self.ranks.group, source)(leaves)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raises for what needs the weights here, and tells the other ranks."""
        message = (
            f"{self.name} is on rank {self.ranks.members[self.owner]}, and its weights, or a part of it, are wanted "
            f"on rank {self.ranks.members[self.ranks.flat_rank]}: leave out text_encoders=True"
        )
        self.agreement.exchange(f"a call of {self.name}", facts={}, error=message)
        raise ParacompileError(message)


def _let_go(module: nn.Module, call: _Placed) -> None:
    """Frees the weights; the type and the device of what is left are what pipelines ask an encoder for."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        if part is not module:
            part.register_forward_pre_hook(call.refuse)
    module.register_state_dict_pre_hook(call.refuse)  # type: ignore[no-untyped-call]


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _standing_for(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _Sent(leaf.shape, leaf.dtype, leaf.device.type == "cpu")
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else _Unsent()


def _described(arguments: Any) -> str:
    """Inputs as text: equal on ranks that were called with the same."""
    leaves, structure = tree_flatten(arguments)
    values = [
        f"{leaf.dtype} {list(leaf.shape)} {int(digest(leaf))}" if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return "\n".join([str(structure), *values])
