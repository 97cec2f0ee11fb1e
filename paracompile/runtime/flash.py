"""The newest flash attention that is installed beside PyTorch, put in the place of PyTorch's own.

PyTorch ships FlashAttention 2, and lets packages register newer ones for the same operator
(`torch.nn.attention.activate_flash_attention_impl`, since torch 2.11). Which one is active is a state of the process:
whoever activated one before keeps it.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)

__all__ = ["newest_flash"]


@dataclass(frozen=True)
class _Implementation:
    """One that PyTorch can be given.

    attributes:
        name: PyTorch's name for it.
        package: the module whose presence tells that it is installed.
        capabilities: the major compute capabilities that it has kernels for.
    """

    name: str
    package: str
    capabilities: tuple[int, ...]


_IMPLEMENTATIONS = (
    _Implementation("FA3", "flash_attn_interface", (9,)),  # before FA4 on Hopper, for which it was written
    _Implementation("FA4", "flash_attn.cute", (9, 10)),
)


def newest_flash(device: torch.device) -> str | None:
    """The implementation that is active for this device, activated if need be; None where PyTorch's own is."""
    if device.type != "cuda":
        return None
    if (active := current_flash_attention_impl()) is not None:
        return str(active)
    offered = list_flash_attention_impls()
    for each in _IMPLEMENTATIONS:
        if each.name not in offered or not _is_installed(each.package):
            continue
        if torch.cuda.get_device_capability(device)[0] not in each.capabilities:
            continue
        try:
            activate_flash_attention_impl(each.name)
        except Exception as error:  # noqa: BLE001 (whatever it raises: a package built for another torch, say)
            warnings.warn(f"paracompile: {each.package} is installed and does not start: {error}", stacklevel=2)
            continue
        return each.name
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False
