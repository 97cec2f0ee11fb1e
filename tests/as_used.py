"""A model as its user first runs it: batch 1, the default compiler, `rdt` on, step after step.

    found, expected = steps(build("wan"), {})          # of the compiled model, and of the same options interpreted

What the interpreted graph gives is tested against the model and the cache's formula elsewhere.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import ALL_FAMILIES, Inputs
from torch import Tensor, nn

import paracompile

ALWAYS = 1e9
EVERYTHING: dict[str, Any] = {
    "warmup_steps": 1,
    "taylor_order": 1,
    "last_blocks": 1,
    "watch": "modulation",
    "coefficients": (1.0, 0.0),
}
"""Options beside quantised weights."""

Built = tuple[nn.Module, Inputs]


def build(family: str, *, quantised: bool = False) -> Built:
    """A family's small model at batch 1; of three blocks at least where weights are quantised."""
    model, inputs = ALL_FAMILIES[family].build(batch=1)
    model.requires_grad_(False)
    if quantised:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        lists = [child for child in model.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
        if sum(map(len, lists)) < 3:
            lists[0].insert(0, copy.deepcopy(lists[0][0]))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model, inputs


def steps(of: Built, options: dict[str, Any], *others: Inputs, **compiling: Any) -> tuple[list[Tensor], list[bool]]:
    """The outputs of four steps of a generation, and which of them were skipped; then of `others`, compiled once."""
    model, inputs = of
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="paracompile", fullgraph=True, options={"rdt": ALWAYS, **options, **compiling}
    )
    outputs, hits = [], []
    for generation in (inputs, *others):
        paracompile.reset_cache(model)
        with torch.no_grad(), paracompile.cache_context("only"):
            for number in range(4):
                given = dict(generation)
                given["timestep"] = generation["timestep"] * (0.01 - 0.001 * number)
                given["hidden_states"] = generation["hidden_states"] * (1 + 0.01 * number)
                outputs.append(compiled(**given)[0].clone())
        hits += [step.hit for step in paracompile.cache_stats(model).slots["only"]]
    return outputs, hits


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of all steps, in units of the largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
