"""Quantised linear layers by short names, through torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from paracompile.errors import OptionError

__all__ = ["Quantization", "quantise"]

Name = Literal["int8", "int8-weight", "fp8", "fp8-row", "fp8-weight"]
Quantization = Name | Any
"""A name, or a configuration of torchao (`torchao.core.config.AOBaseConfig`)."""

_FP8_PRODUCTS = (8, 9)
"""The compute capability from which on GPUs multiply in float8."""


def quantise(module: nn.Module, how: Quantization) -> None:
    """Quantises a module's linear layers in place.

    Args:
        how: "int8" and "fp8-row" quantise weights and, with a scale for each row, what they are multiplied by; "fp8"
            has one scale for each tensor; "int8-weight" and "fp8-weight" quantise weights alone, which saves memory.
            Or a configuration of torchao.

    Raises:
        OptionError: no such name, no torchao, or hardware that cannot do it.
    """
    try:
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import quantize_
    except ImportError as missing:
        raise OptionError(
            "quantize", how, f"it needs torchao: pip install 'paracompile[quantization]' ({missing})"
        ) from missing
    if isinstance(how, AOBaseConfig):
        quantize_(module, how)
        return
    if how not in get_args(Name):
        raise OptionError("quantize", how, f"give one of {', '.join(get_args(Name))}, or a configuration of torchao")
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if how in ("fp8", "fp8-row"):
        _check_float8(how, device)
    quantize_(module, _configurations()[how]())


def _check_float8(how: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_PRODUCTS:
        return
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device}"
    raise OptionError(
        "quantize", how, f'{here} does not multiply in float8 (from compute capability 8.9 on): "int8" works here'
    )


def _configurations() -> dict[str, Callable[[], Any]]:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        PerTensor,
    )

    # torchao's own changes to Inductor's configuration make compiling take many times as long.
    return {
        "int8": lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "int8-weight": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), set_inductor_config=False),
        "fp8-row": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        "fp8-weight": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
    }
