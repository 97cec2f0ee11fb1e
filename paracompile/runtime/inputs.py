"""At the entry of a compiled graph, ranks agree on its inputs.

Ranks that draw their own noise (a pipeline called without a generator) hold different latents. Sharded over ranks these
would make one picture out of parts of several. So the first rank's inputs are sent to all, or the ranks compare what
they hold, or the user vouches for them. Where a model runs in pieces, what one hands to the next needs no agreement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from paracompile.errors import OptionError, ParacompileError, RankError
from paracompile.options import InputMode
from paracompile.runtime.pieces import is_handed_on
from paracompile.torch_private import device_types_of, group_named, is_traceable_wrapper_subclass

__all__ = ["InputAgreement", "digest"]

# Where a tensor starts in the packed buffer: Inductor copies inputs that are not 16-byte aligned, and 64 suits every
# vector unit.
_ALIGNMENT = 64
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class InputAgreement:
    """A function on the positional arguments of a compiled graph; a collective of `group` unless the mode is "trust".

    Works with any backend that can broadcast and all-gather (gloo, nccl), inside `torch.no_grad` and
    `torch.inference_mode`. All ranks must call it with the same shapes and dtypes, as ranks that run the same compiled
    graph do; "check" reports a difference there too, "broadcast" relies on it.
    """

    mode: InputMode
    """"broadcast", "check" or "trust"; see `Options.inputs`."""
    indices: tuple[int, ...]
    """Which positions are run-time inputs; the others (weights, buffers) are never touched."""
    group: ProcessGroup | str
    """All ranks that must agree, or the c10d name of their group."""
    source: int
    """The global rank whose inputs count in mode "broadcast"."""
    names: tuple[str, ...] = ()
    """The inputs' names in the order of `indices`, for messages; by default their positions."""
    of_piece: bool = False
    """Whether the graph is a piece of a model: what other pieces handed on is left alone then. All ranks run the same
    pieces, so they leave alone the same."""
    in_place: frozenset[int] = frozenset()
    """Positions of inputs that the caller sees again, because the model writes to them or hands them back: in mode
    "broadcast" their own memory receives the source's values."""

    def __post_init__(self) -> None:
        if self.mode not in ("broadcast", "check", "trust"):
            raise OptionError("inputs", self.mode, "give one of 'broadcast', 'check', 'trust'")
        if self.names and len(self.names) != len(self.indices):
            raise ValueError(f"{len(self.names)} names for {len(self.indices)} inputs")

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """Agree on the inputs among `args`.

        Returns:
            a new list. "broadcast" puts copies of the source's tensors, with the strides of this rank's own, in the
            place of this rank's. Of the tensors passed in only those of `in_place` are written to; arguments that are
            not tensors stay.

        Raises:
            RankError: "check" found differences; raised on every rank, with the same text.
            ParacompileError: an input that is sparse, quantised or a tensor subclass, in mode "broadcast" or "check".
        """
        args = list(args)
        if self.mode == "trust":
            return args
        own = [index for index in self.indices if not (self.of_piece and is_handed_on(args[index]))]
        if not own:
            return args
        group = group_named(cast(Any, self.group)) if isinstance(self.group, str) else self.group
        if dist.get_world_size(group) == 1:
            return args
        with torch.no_grad():
            return self._broadcast(args, own, group) if self.mode == "broadcast" else self._check(args, own, group)

    def _broadcast(self, args: list[Any], own: Sequence[int], group: ProcessGroup) -> list[Any]:
        """One buffer of bytes, and one broadcast, for each device that inputs are on.

        Bytes, not one buffer a dtype: pipelines pass latents, ids, timesteps and masks in three or four dtypes, and the
        time of such small messages is the starts of the collectives. What is sent from another device (numbers, over
        nccl) is copied there and back as one buffer, too.
        """
        places: dict[torch.device, list[int]] = {}
        for index in own:
            if isinstance(args[index], Tensor):
                self._plain(index, args[index])
                if args[index].numel():
                    places.setdefault(args[index].device, []).append(index)
        # Every rank must send in one order; the order of first appearance follows from the arguments' places.
        for device, indices in places.items():
            starts, length = [], 0
            for index in indices:
                starts.append(length)
                length += -(-_bytes(args[index]) // _ALIGNMENT) * _ALIGNMENT
            buffer = torch.empty(length, dtype=torch.uint8, device=device)
            slots = [_slot(buffer, start, args[index]) for start, index in zip(starts, indices, strict=True)]
            am_source = dist.get_rank() == self.source
            if am_source:
                for slot, index in zip(slots, indices, strict=True):
                    slot.copy_(args[index])
            sent = buffer.to(_transport(device, group))
            dist.broadcast(sent, src=self.source, group=group)
            if not am_source:
                if sent is not buffer:
                    buffer.copy_(sent)
                for slot, index in zip(slots, indices, strict=True):
                    if index in self.in_place:
                        _overwrite(args[index], slot)
                    else:
                        args[index] = _in_form_of(args[index], slot)
        return args

    def _check(self, args: list[Any], indices: Sequence[int], group: ProcessGroup) -> list[Any]:
        """Two numbers for each input, gathered in one collective: what kind of thing it is, a digest of its bytes."""
        tensors = [args[index] for index in indices if isinstance(args[index], Tensor)]
        device = _transport(tensors[0].device if tensors else torch.device("cpu"), group)
        kinds, contents = [], []
        for index in indices:
            value = args[index]
            if isinstance(value, Tensor):
                self._plain(index, value)
                kinds.append(_hash(f"{value.dtype} {tuple(value.shape)}"))
                contents.append(digest(value).to(device))
            else:
                kinds.append(_hash(f"{type(value).__name__} {value!r}"))
                contents.append(torch.zeros((), dtype=torch.int64, device=device))
        own = torch.cat([torch.tensor(kinds, dtype=torch.int64, device=device), torch.stack(contents)])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        table = torch.stack(every).tolist()
        ranks = dist.get_process_group_ranks(group)
        findings = []
        for column, name in enumerate(map(self._name, indices)):
            for what, at in (("shape, dtype or number", column), ("values", column + len(indices))):
                others = [rank for rank, row in zip(ranks, table, strict=True) if row[at] != table[0][at]]
                if others:
                    findings.append(f"{name!r} ({what}): {_ranks(others)} and rank {ranks[0]} differ")
                    break
        if findings:
            raise RankError(
                "the ranks were called with different inputs: "
                + "; ".join(findings)
                + ". Give every rank the same inputs (a generator with the same seed), or leave out "
                '"inputs": "check": by default the first rank\'s inputs are sent to all'
            )
        return args

    def _plain(self, index: int, value: Tensor) -> None:
        wrapped: bool = is_traceable_wrapper_subclass(value)
        if value.layout == torch.strided and not value.is_quantized and not wrapped:
            return
        raise ParacompileError(
            f"input {self._name(index)!r} is a {type(value).__name__} of layout {value.layout}: only plain dense "
            "tensors can be sent to other ranks or compared. Pass a plain tensor, or see to equal inputs and use "
            '"inputs": "trust"'
        )

    def _name(self, index: int) -> str:
        return self.names[self.indices.index(index)] if self.names else f"argument {index}"


def digest(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's exact bytes in row-major order, whatever its strides; NaNs and -0.0 count by their bits.

    Computed on the tensor's device in integers that wrap around, hence the same on every device and in any order of
    summation. Every 8-byte word is mixed with its position by a multiply-xorshift finaliser (that of splitmix64) before
    the sum: a plain weighted sum would miss, for instance, a tensor and its negative, whose sign bits cancel in pairs.

    Returns:
        a tensor () of int64. A check against accidents, not against forgery.
    """
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    words = -(-data.numel() // _DIGEST_BYTES)
    if data.numel() % _DIGEST_BYTES or data.storage_offset() % _DIGEST_BYTES:
        padded = torch.zeros(words * _DIGEST_BYTES, dtype=torch.uint8, device=data.device)
        padded[: data.numel()].copy_(data)
        data = padded
    position = torch.arange(1, words + 1, dtype=torch.int64, device=data.device)
    mixed = data.view(torch.int64) ^ (position * _signed(0x9E3779B97F4A7C15))
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shifted(mixed, 31)).sum()


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(value: Tensor, bits: int) -> Tensor:
    # int64's >> copies the sign; the mask makes it the logical shift that the mixing needs to lose nothing.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _transport(device: torch.device, group: ProcessGroup) -> torch.device:
    """The device to send a tensor from: its own, or one that the group can use (nccl takes no CPU tensors)."""
    usable = device_types_of(group)
    if not usable or any(each.type == device.type for each in usable):
        return device
    kind = usable[0].type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _slot(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a byte buffer that holds a tensor like this one, contiguous, as a view of its dtype and shape."""
    return buffer[start : start + _bytes(like)].view(like.dtype).view(like.shape)


def _in_form_of(own: Tensor, received: Tensor) -> Tensor:
    """`received`, a contiguous tensor of the same shape, on `own`'s device and with its strides.

    A compiled graph relies on the strides it was traced with. Expanded dimensions (stride 0) stay expanded.
    """
    if own.is_contiguous():
        return received
    base = _unexpanded(own, own)
    copy = torch.empty_strided(base.size(), base.stride(), dtype=own.dtype, device=own.device)
    return copy.copy_(_unexpanded(received, own)).expand(own.size())


def _overwrite(own: Tensor, received: Tensor) -> None:
    """Writes `received` over `own`, in any mode that it was made in.

    `data` leaves its version alone: the version tells the cache's calls apart, and must do so on all ranks alike.
    """
    _unexpanded(own.data, own).copy_(_unexpanded(received, own))


def _unexpanded(tensor: Tensor, like: Tensor) -> Tensor:
    """One of each position along the dimensions in which `like` is expanded (stride 0)."""
    for dim, stride in enumerate(like.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
