"""Quantised models: torchao's configurations, and small models in which each layer can be quantised.

float8 products run on this CPU, too; torchao only refuses to write them for one, which is looked away from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torchao.quantization as torchao
from random_tensors import randomise
from small_models import SelfAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import PerRow, PerTensor, quant_api

WIDTH = 64  # float8 products take multiples of 16


def _int8(**how: Any) -> Any:
    return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, **how)


def _float8(granularity: Any) -> Any:
    return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)


KINDS: dict[str, Callable[[], Any]] = {
    "int8": _int8,
    "int8 weights": lambda: torchao.Int8WeightOnlyConfig(set_inductor_config=False),
    "float8 weights": lambda: torchao.Float8WeightOnlyConfig(set_inductor_config=False),
}
"""Those that run on a CPU, and ask nothing of other tokens."""

BY_ROW: dict[str, Callable[[], Any]] = {"float8, by row": lambda: _float8(PerRow())}
BY_TENSOR: dict[str, Callable[[], Any]] = {
    "int8, by tensor": lambda: _int8(granularity=[PerTensor(), PerRow()]),
    "int8, all by tensor": lambda: _int8(granularity=PerTensor()),
    "int8, asymmetric": lambda: _int8(granularity=PerTensor(), act_mapping_type=torchao.MappingType.ASYMMETRIC),
    "float8, by tensor": lambda: _float8(PerTensor()),
}
"""Those that take one scale from all tokens."""

ALL = KINDS | BY_ROW | BY_TENSOR


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Quantises its linear layers in place; each of them becomes a subclass's."""
    with mock.patch.object(quant_api, "_check_hardware_support"):
        torchao.quantize_(model, ALL[kind]())
    layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert layers
    assert all(map(is_traceable_wrapper_subclass, layers))
    return model


class Block(nn.Module):
    """Attention and an MLP, without norms: what is given to a layer grows with the token's place."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(WIDTH, 4)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def block(kind: str) -> nn.Module:
    made = randomise(Block())
    if kind in BY_ROW:  # which torchao gives bfloat16 only
        made = made.to(torch.bfloat16)
    return quantise(made, kind)


def tokens(kind: str, length: int = 48) -> Tensor:
    """(2, length, WIDTH), each token larger than the one before it."""
    values = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))
    values = values * torch.linspace(0.1, 3.0, length)[:, None]
    return values.to(torch.bfloat16) if kind in BY_ROW else values
