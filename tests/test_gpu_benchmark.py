"""The benchmark for GPUs on a CPU: everything but its figures, so that it works on the first day that it meets one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quick import quick

BENCHMARK = Path(__file__).parent.parent / "examples" / "benchmarks" / "gpu"

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> tuple[int, list[str], dict[str, Any]]:
    """The exit code, the lines on the screen and the figures."""
    out = folder / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stdout.splitlines(), json.loads(out.read_text())


@pytest.mark.full
def test_kernels_and_a_model_of_real_size(tmp_path: Path) -> None:
    code, lines, figures = run(tmp_path, "kernels", "flux", "--variants", "rank of 2, rdt")
    assert code == 0, lines
    assert len(figures["kernels"]) == 3 * 3 * 5 + 3  # of flash, by name, for each head size
    assert lines[-1].startswith("0 bad, 0 out of time")
    assert len(lines) == 3 * 3 * 5 + 3 + 1 + 1
    (measured,) = figures["flux"].values()
    assert measured["hits"] == [False, True]
    assert measured["collectives"] == {"all_to_all_single": 8, "all_reduce": 1, "all_gather_into_tensor": 1}
    assert set(measured) == {
        *("first call", "step", "step, host", "skipped step", "skipped step, host"),
        *("hits", "regions", "collectives"),
    }


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["families", "graphs", "ranks", "waits"])
def test_small_models(part: str, tmp_path: Path) -> None:
    code, lines, figures = run(tmp_path, part, "--limit", "1200")
    assert code == 0, lines
    assert len(figures[part]) == {"families": 4 * 4, "graphs": 4 + 1, "ranks": 4 * 6, "waits": 4 * 4}[part]


def test_what_runs_out_of_time_is_said(tmp_path: Path) -> None:
    code, lines, figures = run(tmp_path, "kernels", "flux", "--variants", "eager", "--limit", "0")
    assert code == 2
    assert sorted(line[: line.index(":")] for line in lines[:-1]) == ["late flux", "late kernels"]
    assert lines[-1].startswith("0 bad, 2 out of time")
    assert set(figures["flux"]) == {"eager had no more time"}


@pytest.mark.parametrize("wrong", quick([["kernel"], ["flux", "--variants", "paracompil"]], ["kernel"]))
def test_what_there_is_not_is_said(wrong: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--device", "cpu", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"no such {'variant' if len(wrong) > 1 else 'part'}: {wrong[-1]}" in done.stderr
