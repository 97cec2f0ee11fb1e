"""Every family as its user first runs it, on one rank: batch 1, Inductor, rdt on."""

from __future__ import annotations

import pytest
import torch
from as_used import EVERYTHING, build, largest_difference, steps
from families import ALL_FAMILIES
from quick import quick


@pytest.mark.parametrize("family", quick(ALL_FAMILIES, "wan", slow=ALL_FAMILIES))
def test_computed_and_skipped_steps(family: str) -> None:
    of = build(family)
    found, hits = steps(of, {})
    expected, _ = steps(of, {}, compiler="eager")
    assert hits == [False, True, True, True]
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_with_everything_on(family: str) -> None:
    """Quantised weights, warm-up, an extrapolation, a last block that is always computed."""
    pytest.importorskip("torchao.quantization")
    of = build(family, quantised=True)
    found, hits = steps(of, EVERYTHING)
    expected, _ = steps(of, EVERYTHING, compiler="eager")
    assert hits == [False, True, True, True]
    assert largest_difference(found, expected) < 0.05  # where Inductor's rounding moves an activation's 8 bits
    plain, inputs = build(family, quantised=True)
    call = torch.compile(plain, fullgraph=True)
    given = {**inputs, "timestep": inputs["timestep"] * 0.01}
    with torch.no_grad():
        assert largest_difference(found[:1], [call(**given)[0]]) < 0.02
