"""Inductor's code for real diffusers models on two real processes."""

from __future__ import annotations

import pytest
import torch
from capture import assert_equal
from families import FAMILIES
from pool import Pool
from torch import Tensor

from paracompile.report.report import Report

pytestmark = pytest.mark.slow


def inductor(rank: int, family: str) -> tuple[Tensor, Tensor, list[Report]]:
    """The eager output, the compiled model's in its second call, and the reports."""
    model, inputs = FAMILIES[family].build()
    reports: list[Report] = []
    options = {"report": reports.append, "timeout": 120}
    with torch.no_grad():
        (expected,) = model(**inputs)
        compiled = torch.compile(model, backend="paracompile", options=options)
        other = inputs | {"hidden_states": -inputs["hidden_states"]}
        compiled(**other)
        (output,) = compiled(**inputs)
    return expected, output, reports


def in_a_ring(rank: int) -> tuple[Tensor, Tensor, list[Report]]:
    """The same of a ring, with a kernel that is named, and keys and values that travel in eight bits."""
    import paracompile

    model, inputs = FAMILIES["flux"].build(batch=1)
    reports: list[Report] = []
    options = {
        "mesh": paracompile.init_mesh("cpu", max_ring_dim_size=2),
        "attention": "flash",
        "exchange_dtype": "int8",
        "report": reports.append,
        "timeout": 120,
    }
    with torch.no_grad():
        (expected,) = model(**inputs)
        (output,) = torch.compile(model, backend="paracompile", options=options)(**inputs)
    return expected, output, reports


@pytest.mark.full
def test_a_ring_with_a_kernel_of_choice_and_eight_bits(two_ranks: Pool) -> None:
    for expected, output, (report,) in two_ranks.run(in_a_ring):
        assert 1e-6 < (output - expected).abs().max() / expected.abs().max() < 0.01
        assert report.kernel_serves == 2 * FAMILIES["flux"].self_attentions
        assert any("exchanges in eight bits" in note for note in report.notes)


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_inductor_gives_the_eager_model_s_output(family: str, two_ranks: Pool) -> None:
    for expected, output, reports in two_ranks.run(inductor, family):
        assert_equal(output, expected)
        (report,) = reports
        assert report.ranks == 2
        assert report.collectives == {
            "all_to_all_single": 2 * FAMILIES[family].self_attentions,
            "all_gather_into_tensor": 1,
        }
