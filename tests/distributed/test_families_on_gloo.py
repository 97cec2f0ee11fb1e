"""Real diffusers models through `torch.compile(model, backend="paracompile")` on two real processes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from capture import assert_equal, deviation
from families import FAMILIES, Inputs
from pool import Pool
from quick import quick
from random_tensors import randomise
from torch import Tensor, nn

from paracompile import init_mesh
from paracompile.report.report import Report

all_families = pytest.mark.parametrize(
    "family", [name if name == "flux" else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)


def run_compiled(model: nn.Module, inputs: Inputs, **options: Any) -> tuple[Tensor, list[Report]]:
    """The output of one call of the compiled model, and the report of every graph."""
    reports: list[Report] = []
    options = {"compiler": "eager", "report": reports.append, "timeout": 60, **options}
    (output,) = torch.compile(model, backend="paracompile", options=options)(**inputs)
    return output, reports


def on_a_mesh(rank: int, family: str) -> tuple[Tensor, Tensor, list[Report]]:
    model, inputs = FAMILIES[family].build()
    with torch.no_grad():
        (expected,) = model(**inputs)
        output, reports = run_compiled(model, inputs, mesh=init_mesh("cpu"))
    return output, expected, reports


@all_families
def test_two_processes_give_the_eager_model_s_output(family: str, two_ranks: Pool) -> None:
    for output, expected, reports in two_ranks.run(on_a_mesh, family):
        assert_equal(output, expected)
        (report,) = reports  # one graph
        assert report.ranks == 2
        assert report.attentions == FAMILIES[family].self_attentions
        assert report.cross_attentions == FAMILIES[family].cross_attentions
        assert report.collectives == {"all_to_all_single": 2 * report.attentions, "all_gather_into_tensor": 1}


def in_place_without_a_mesh(rank: int) -> tuple[Tensor, Tensor, list[Report]]:
    model, inputs = FAMILIES["wan"].build()
    reports: list[Report] = []
    with torch.inference_mode():
        (expected,) = model(**inputs)
        model.compile(backend="paracompile", options={"compiler": "eager", "report": reports.append, "timeout": 60})
        (output,) = model(**inputs)
    return output.clone(), expected.clone(), reports


@pytest.mark.slow
def test_a_model_compiled_in_place_takes_all_ranks_when_no_mesh_is_given(two_ranks: Pool) -> None:
    for output, expected, reports in two_ranks.run(in_place_without_a_mesh):
        assert_equal(output, expected)
        assert [report.ranks for report in reports] == [2]


def with_own_noise(rank: int) -> tuple[Tensor, Tensor]:
    """Each rank's output for its own noise, and what the eager model makes of the same noise."""
    model, inputs = FAMILIES["flux"].build()
    torch.seed()
    inputs["hidden_states"] = torch.randn_like(inputs["hidden_states"])
    with torch.no_grad():
        (expected,) = model(**inputs)
        output, _ = run_compiled(model, inputs)
    return output, expected


@pytest.mark.full
def test_ranks_that_draw_other_noise_all_give_rank_0_s_result(two_ranks: Pool) -> None:
    (first, expected), (second, other) = two_ranks.run(with_own_noise)
    assert deviation(other, expected) > 1000
    assert_equal(first, expected)
    assert torch.equal(first, second)


def in_low_precision(rank: int, family: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The exact output, the eager model's in `dtype`, and the sharded model's in `dtype`."""
    model, inputs = FAMILIES[family].build()
    streams = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    inputs |= {name: inputs[name].to(dtype).float() for name in streams if name in inputs}
    if family == "flux":  # multiplied by 1000 in the model's type: numbers whose product it holds
        inputs |= {"timestep": torch.tensor([0.125, 0.25, 0.5]), "guidance": torch.tensor([2.0, 4.0, 2.0])}
    with torch.no_grad():
        (exact,) = model(**inputs)
        model.to(dtype)
        inputs |= {name: inputs[name].to(dtype) for name in streams if name in inputs}
        (expected,) = model(**inputs)
        output, _ = run_compiled(model, inputs)
    return exact, expected, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, dtype",
    quick(product(("flux", "wan"), (torch.bfloat16, torch.float16)), ("flux", torch.bfloat16)),
    ids=str,
)
def test_low_precision_loses_no_more_than_the_eager_model_does(
    family: str, dtype: torch.dtype, two_ranks: Pool
) -> None:
    for exact, expected, output in two_ranks.run(in_low_precision, family, dtype):
        assert output.dtype == expected.dtype == dtype
        largest, step = exact.abs().max(), torch.finfo(dtype).eps
        lost, lost_sharded = ((found.float() - exact).abs() / largest for found in (expected, output))
        apart = (output.float() - expected.float()).abs() / largest
        assert 0 < lost.max() < 6 * step
        assert lost_sharded.max() < 1.5 * lost.max()
        assert lost_sharded.mean() < 1.05 * lost.mean()
        assert apart.max() < 2 * step


def with_lora(rank: int) -> tuple[Tensor, Tensor, Tensor, list[Report]]:
    from peft import LoraConfig

    model, inputs = FAMILIES["flux"].build()
    with torch.no_grad():
        (plain,) = model(**inputs)
        model.add_adapter(
            LoraConfig(r=5, lora_alpha=10, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"])
        )
        randomise(model)
        (expected,) = model(**inputs)
        output, reports = run_compiled(model, inputs)
    return plain, expected, output, reports


@pytest.mark.slow
def test_lora_layers_are_sharded_too(two_ranks: Pool) -> None:
    for plain, expected, output, reports in two_ranks.run(with_lora):
        assert deviation(plain, expected) > 1000
        assert_equal(output, expected)
        assert [report.collectives for report in reports] == [{"all_to_all_single": 8, "all_gather_into_tensor": 1}]


def with_lora_scales(rank: int, options: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor], int]]:
    from peft import LoraConfig

    model, inputs = FAMILIES["flux"].build()
    model.add_adapter(LoraConfig(r=5, lora_alpha=10, target_modules=["to_q", "proj_mlp"]))
    randomise(model)
    reports: list[Report] = []
    compiled = torch.compile(
        model, backend="paracompile", options={"compiler": "eager", "timeout": 60, "report": reports.append, **options}
    )
    results = []
    for scale in (1.0, 0.5, 0.6, 0.7, 0.8, 0.9):
        with torch.no_grad():
            found, expected = (
                list(called(**inputs, joint_attention_kwargs={"scale": scale})) for called in (compiled, model)
            )
        results.append((found, expected, len(reports)))
    return results


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"rdt": 1e-9}], ids=str)
def test_a_lora_scale_that_changes_compiles_nothing_anew(options: dict[str, Any], two_ranks: Pool) -> None:
    for results in two_ranks.run(with_lora_scales, options):
        for found, expected, _ in results:
            assert_equal(found[0], expected[0])
        compiles = [count for _, _, count in results]
        assert compiles[2:] == compiles[2:3] * 4  # the scales of the layers become numbers as well, as they are scaled
