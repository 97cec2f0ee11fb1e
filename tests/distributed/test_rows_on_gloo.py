"""Real pipelines whose tokens are cut in rows: two ranks, the default compiler, one prompt."""

from __future__ import annotations

import pytest
import torch
from fast_links import fast_links
from pipelines import PIPELINES, build
from pool import Pool
from torch import Tensor

from paracompile.report.report import Report

pytestmark = pytest.mark.full


def latents(name: str, sharded: bool) -> tuple[Tensor, list[Report]]:
    """What the pipeline draws."""
    torch._dynamo.reset()
    entry, pipeline, reports = PIPELINES[name], build(name), list[Report]()
    if sharded:
        options = {"rdt": 1e-9, "report": reports.append, "timeout": 300}
        pipeline.transformer = torch.compile(pipeline.transformer, backend="paracompile", options=options)
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    with torch.no_grad(), fast_links():
        drawn = pipeline(**{**entry.prompt(1), **entry.call, **call})[0]
    return drawn[0] if isinstance(drawn, list) else drawn, reports


def on_a_rank(rank: int, name: str) -> tuple[Tensor, list[str | None]]:
    drawn, reports = latents(name, sharded=True)
    return drawn, [report.dimension for report in reports]


@pytest.mark.parametrize("name", ["SanaPipeline", "SanaVideoPipeline"])
def test_two_ranks_draw_what_one_draws(name: str, two_ranks: Pool) -> None:
    expected, _ = latents(name, sharded=False)
    for drawn, dimensions in two_ranks.run(on_a_rank, name):
        assert set(dimensions) <= {"height", "width", "frames"}
        assert dimensions
        torch.testing.assert_close(drawn, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))
