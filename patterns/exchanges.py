"""Collectives in a graph: where one is started, where its result is waited for, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx


def is_collective(node: fx.Node) -> bool:
    """Whether the node starts a collective."""
    name = str(node.target)
    return name.startswith("_c10d_functional.") and not is_wait(node)


def is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True)
class Link:
    """What an exchange between ranks costs, as far as that decides how a graph is written.

    attributes:
        start: seconds that one more exchange costs, whatever it carries, on the host or on the way.
        rate: bytes a second that a rank sends.
    """

    start: float
    rate: float

    @property
    def balance(self) -> int:
        """The bytes that take as long to carry as an exchange to start."""
        return round(self.start * self.rate)

    def is_mostly_start(self, size: int) -> bool:
        """Whether an exchange of so many bytes takes less time to carry than to start."""
        return size < self.balance


_LINKS = {"cuda": Link(start=30e-6, rate=200e9)}  # NCCL over NVLink
_OTHERWISE = Link(start=200e-6, rate=1e9)  # gloo over the memory or the network of a host


def link_of(device: torch.device) -> Link:
    """The link between ranks that hold their tensors on devices of this kind."""
    return _LINKS.get(device.type, _OTHERWISE)
