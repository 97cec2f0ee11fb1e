"""What a GPU would be asked to do at real sizes: kernels, copies, types, bytes. Nothing is computed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from quick import quick

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


def run(library: Path, *arguments: str) -> Any:
    command = [sys.executable, fake_cuda.__file__, str(library), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_attention_takes_the_kernel_that_pytorch_chooses_and_no_mask_becomes_a_matrix(library: Path) -> None:
    seen = run(library, "kernels")
    assert {name: found["kernel"] for name, found in seen.items()} == {
        "half": ["cudnn"],
        "half, 100": ["cudnn"],  # padded, as PyTorch does
        "half, 192": ["flash"],
        "float32": ["efficient"],
        "half, keys hidden": ["efficient"],
        "half, additive": ["efficient"],
        "half, 100, keys hidden": ["efficient"],
    }
    for name, found in seen.items():
        # The result and its LSE; besides, queries, keys and values where they are padded.
        assert found["peak"] < (4.3 if "100" in name else 1.1), name


STEPS = {"one rank": 1, "ulysses 8": 1, "ring 8": 8, "ring 2 x ulysses 4": 2}
ATTENTIONS = {
    # (each once for all ranks, to be done in steps of a ring), and whether a mask hides keys from the latter
    "flux": (0, 3, False),
    "hunyuan_video": (2, 3, True),  # two among the text's tokens alone
    "wan": (2, 2, False),  # two to the text
    "stable_diffusion_3": (0, 3, False),
}


@pytest.mark.full
@pytest.mark.parametrize("model", ATTENTIONS)
def test_graphs_at_real_size(model: str, library: Path) -> None:
    seen = run(library, "graphs", model)
    once, in_steps, masked = ATTENTIONS[model]
    assert len(seen) == 2 * len(STEPS)
    for mesh, steps in STEPS.items():
        for cache in ("no cache", "a cache"):
            found = seen[f"{mesh}, {cache}"]
            kernels = ["cudnn"] * once + ["visible" if masked else "cudnn"] * in_steps * steps
            assert sorted(found["attentions"]) == sorted(kernels), mesh
            assert found["looks"] == int(masked), mesh
            assert found["crossings"] == [], mesh
            assert found["misaligned"] == [], mesh
            assert found["sent"] == ([] if mesh == "one rank" else ["torch.bfloat16"]), mesh
            assert found["early_waits"] == 0, mesh
            # A ring sums up in float32; the cache compares residuals of the first block in it.
            assert found["upcasts"] == (in_steps if steps > 1 else 0) + (5 if cache == "a cache" else 0), mesh


@pytest.mark.full
@pytest.mark.parametrize("model", ATTENTIONS)
def test_the_code_for_a_gpu_keeps_the_order_of_exchanges(model: str, library: Path) -> None:
    """No exchange starts later, and none is awaited earlier, than in the graph, in which `early_waits` are none."""
    seen = run(library, "code", model)
    assert list(seen) == [mesh for mesh in STEPS if mesh != "one rank"]
    for mesh, regions in seen.items():
        assert sum(found["asked"].count("start") for found in regions) > 0
        for found in regions:
            asked, calls = found["asked"], found["calls"]
            assert [kind for kind in calls if kind != "product"] == [kind for kind in asked if kind != "product"], mesh
            assert calls.count("product") == asked.count("product"), mesh
            for kind, ends in (("start", int.__le__), ("wait", int.__ge__)):
                assert all(map(ends, products_before(calls, kind), products_before(asked, kind))), (mesh, kind)
            assert found["host"] == [], mesh


@pytest.mark.parametrize("model", quick(ATTENTIONS, "hunyuan_video"))
def test_every_region_may_be_a_cuda_graph_without_what_the_host_looks_at(model: str, library: Path) -> None:
    """Recorded, attention to the keys that one prompt leaves would be that of all prompts."""
    seen = run(library, "recorded", model)
    _, attentions, masked = ATTENTIONS[model]
    assert [found["excluded"] for found in seen] == [None] * len(seen)
    assert all(found["parts"] > 0 for found in seen)
    assert sum(found["changed"] > 0 for found in seen) == 1  # the last block that may be skipped stores what they add
    assert [name for found in seen for name in found["recorded"]] == []
    looks = ["attention_to_visible"] * attentions + ["visible_keys"] if masked else []
    assert sorted(name for found in seen for name in found["left"]) == looks


def products_before(calls: list[str], kind: str) -> list[int]:
    """How many products there are before each call of this kind."""
    return [calls[:place].count("product") for place, found in enumerate(calls) if found == kind]


@pytest.mark.parametrize("model", quick(list(ATTENTIONS), "wan"))
def test_no_index_meets_a_number_that_it_cannot_hold(model: str, library: Path) -> None:
    assert run(library, "too_wide", model) == []


SHARED_MEMORY = 232_448
"""Bytes that a block of threads may have on an H200."""


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="PyTorch for CPUs comes without Triton; make test WITHOUT=full TORCH=2.15.0, say, has it",
)


@needs_triton
@pytest.mark.parametrize("axis", [None, "ulysses", "ring"])
@pytest.mark.parametrize("model", quick(list(ATTENTIONS), "flux"))
def test_triton_compiles_what_inductor_writes(model: str, axis: str | None, library: Path) -> None:
    kernels = run(library, "compiled", model, *([axis] if axis else []))
    assert any("bitwise_xor" in kernel for kernel in kernels), "whether inputs changed, at least"
    assert max(kernels.values()) <= SHARED_MEMORY


@needs_triton
def test_flex_attention_with_a_mask_has_room(library: Path) -> None:
    assert max(run(library, "flex").values()) <= SHARED_MEMORY
