"""Random weights and inputs: equal seeds give equal numbers, on every rank alike."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomise(model: Module, seed: int = 0) -> Module:
    """Redraws every floating point parameter: std 1/sqrt(fan in), biases and scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            if parameter.dim() == 1:
                values = 0.5 + values  # scales of norms near zero would mute what they scale
            parameter.copy_(values.to(parameter.dtype))
    return model.eval().requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
