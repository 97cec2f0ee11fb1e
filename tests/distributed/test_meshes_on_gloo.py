"""Families on every kind of mesh on real processes: one a mesh here, all of them marked `full`."""

from __future__ import annotations

import pytest
import torch
from capture import assert_equal
from families import ALL_FAMILIES
from pool import Pool
from quick import quick
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

MESHES: dict[str, dict[str, int]] = {
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "batch": {"batch": 2},
    "unified": {"ring": 2, "ulysses": 2},
    "batch and sequence": {"batch": 2, "ulysses": 2},
}
CHOSEN = [
    ("ulysses", "hunyuan_video"),
    ("ring", "ltx_video"),
    ("batch", "stable_diffusion_3"),
    ("unified", "qwen_image"),
    ("batch and sequence", "flux"),
]


def outputs(rank: int, family: str, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """What the eager model gives, and what the compiled one does, in one graph."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model, inputs = ALL_FAMILIES[family].build(batch=3, text=11)  # shared by two ranks as 2 and 1
    options = {"mesh": mesh, "compiler": "eager", "timeout": 120}
    with torch.no_grad():
        (expected,) = model(**inputs)
        (output,) = torch.compile(model, backend="paracompile", options=options, fullgraph=True)(**inputs)
    return expected, output


def check(mesh: str, family: str, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue("two_ranks" if len(MESHES[mesh]) == 1 else "four_ranks")
    for expected, output in pool.run(outputs, family, MESHES[mesh]):
        assert_equal(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, family", quick(CHOSEN, *CHOSEN[-2:]))
def test_a_family_on_each_mesh(mesh: str, family: str, request: pytest.FixtureRequest) -> None:
    check(mesh, family, request)


@pytest.mark.full
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_all_families_on_each_mesh(mesh: str, family: str, request: pytest.FixtureRequest) -> None:
    if (mesh, family) not in CHOSEN:
        check(mesh, family, request)
