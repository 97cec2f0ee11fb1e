"""The examples as their user runs them: each script in processes of its own, and what it shows is checked.

Continuous integration runs one; `make test-all` each, as one process and as two.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import pytest
import torch
from PIL import Image
from test_parallelize import saved_adapter

from running.command import Example, parse_arguments
from running.quiet import import_class, quiet_imports
from running.runs import Ranks, load, parallelize_arguments
from running.shown import SHOWN, save, side_by_side, table

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = tuple(sorted(script.stem.removeprefix("run_") for script in FOLDER.glob("run_*.py")))
HEAD = 8  # between pictures, and below them
CAPTION = 24


def example(name: str) -> Example:
    found: Example = importlib.import_module(f"run_{name}").EXAMPLE
    return found


@dataclass(frozen=True)
class Shown:
    """What a script said.

    attributes:
        lines: on standard output.
        progress: what it wrote to standard error.
        file: what it saved.
    """

    lines: list[str]
    progress: str
    file: Path

    @property
    def rows(self) -> dict[str, str]:
        """The table's."""
        first, last = (number for number, line in enumerate(self.lines) if re.fullmatch("-+", line))
        split = (re.split(r" {2,}", line.strip()) for line in self.lines[first + 1 : last])
        return dict(split)

    def difference(self, when: str = "") -> float:
        """Of the latents, in units of the largest value."""
        found = re.fullmatch(r"(\S+) \(largest value (\S+)\)", self.rows[f"largest difference{when}, latents"])
        assert found is not None
        return float(found[1]) / float(found[2])

    @property
    def hits(self) -> int:
        return sum(int(value.split()[0]) for name, value in self.rows.items() if name.startswith("hits"))


def shown_by(name: str, folder: Path, *flags: str, ranks: int = 1) -> Shown:
    file = folder / f"made.{'mp4' if example(name).fps else 'png'}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, FOLDER / f"run_{name}.py", "--device", "cpu", "--output", file, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Shown(done.stdout.splitlines(), done.stderr, file)


def check(name: str, shown: Shown, *, ranks: int, runs: int = 3) -> None:
    """What holds for each of them.

    args:
        runs: how many pictures are side by side.
    """
    for noise in ("Warning", "WARNING", "torchao", "torchvision", "deprecated", "truncated", "Loading"):
        assert noise not in shown.progress, shown.progress
    for run in ("plain", "warm-up", "paracompile"):
        assert f"{run}: 100%" in shown.progress
    assert shown.lines[0] == f"paracompile: {example(name).pipeline} on " + (
        "one rank" if ranks == 1 else f"{ranks} ranks (ulysses {ranks})"
    )
    assert shown.rows["ranks"] == f"{ranks}"
    assert int(shown.rows["attentions rewritten"]) > 0 or ranks == 1
    if ranks > 1:
        assert 45 < float(shown.rows["share of the flops on a rank"].removesuffix("%")) < 65
    call = example(name).call
    times = max(1, SHOWN // call["width"])
    size = (HEAD + runs * (times * call["width"] + HEAD), CAPTION + times * call["height"] + HEAD)
    if not example(name).fps:
        assert f"picture: {shown.file}" in shown.lines
        assert Image.open(shown.file).size == size
    else:
        assert f"video: {shown.file} ({call['num_frames']} frames)" in shown.lines
        frames = imageio.mimread(shown.file)
        assert len(frames) == call["num_frames"]
        assert frames[0].shape == (size[1] // 2 * 2, size[0] // 2 * 2, 3)


# With some of their flags


@pytest.mark.full
def test_flux_on_two_ranks_with_inductor(tmp_path: Path) -> None:
    shown = shown_by("flux", tmp_path, "--no-vae", ranks=2)
    check("flux", shown, ranks=2)
    assert shown.difference() < 1e-5
    assert shown.hits == 15
    assert 0.01 < shown.difference(" with hits") < 0.1
    assert shown.lines[-1].startswith("try next: ")


@pytest.mark.full
def test_a_video_by_two_transformers(tmp_path: Path) -> None:
    shown = shown_by("wan", tmp_path, "--two-transformers", "--compiler", "eager")
    check("wan", shown, ranks=1)
    assert shown.difference() < 1e-6
    for number in (1, 2):
        for slot in ("cond", "uncond"):
            assert f"hits with rdt 0.1, slot '{slot}' of transformer {number}" in shown.rows
    assert shown.hits > 5


@pytest.mark.slow
def test_quantised_and_without_the_cache(tmp_path: Path) -> None:
    shown = shown_by("sd3", tmp_path, "--quantize", "int8", "--rdt", "0", "--steps", "6", "--compiler", "eager")
    check("sd3", shown, ranks=1, runs=2)
    assert "quantize='int8'" in shown.lines[1]
    assert 0 < shown.difference() < 0.05
    assert not any(name.startswith("hits") for name in shown.rows)


# Each of them


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_without_arguments(name: str, tmp_path: Path) -> None:
    shown = shown_by(name, tmp_path)
    check(name, shown, ranks=1)
    assert shown.difference() < 1e-4
    assert shown.hits > 0


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks_with_the_vae(name: str, tmp_path: Path) -> None:
    shown = shown_by(name, tmp_path, "--vae", "--compiler", "eager", ranks=2)
    check(name, shown, ranks=2)
    assert shown.difference() < 1e-5
    assert shown.hits > 0
    assert 45 < float(shown.rows["VAE decoder, share of the flops on a rank"].removesuffix("%")) < 75


@pytest.mark.full
@pytest.mark.timeout(900)
def test_wan_2_2_on_two_ranks(tmp_path: Path) -> None:
    shown = shown_by("wan", tmp_path, "--two-transformers", "--compiler", "eager", ranks=2)
    check("wan", shown, ranks=2)
    assert shown.difference() < 1e-5
    assert shown.hits > 0


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_machines_pass_keys_and_values_around_and_trade_heads_within(tmp_path: Path) -> None:
    """Two agents of torchrun, as on two machines with two ranks each: neighbours share a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path / "made.png"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", FOLDER / "run_flux.py", "--device=cpu"),
        *("--ring=2", "--no-vae", "--compiler=eager", "--steps=6", f"--output={file}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    agents = [subprocess.Popen(command, **how) for _ in range(2)]
    ended = [agent.communicate() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    (lines,) = (out.splitlines() for out, _ in ended if out)  # only the machine of rank 0 speaks
    shown = Shown(lines, "", file)
    assert lines[0] == "paracompile: FluxPipeline on 4 ranks (ring 2, ulysses 2)"
    assert shown.rows["ranks"] == "4"
    assert shown.difference() < 1e-5
    assert file.exists()


# Their parts


def parsed(name: str, *arguments: str) -> argparse.Namespace:
    return parse_arguments(example(name), arguments)


def test_all_eight_are_there() -> None:
    assert NAMES == ("cogvideox", "flux", "hunyuan_video", "ltx", "mochi", "qwen_image", "sd3", "wan")


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed(name, "--help")
    said = capsys.readouterr().out
    flags = "--model --ulysses --ring --batch --rdt --quantize --attention --mode --steps --seed --height --width"
    for flag in f"{flags} --offload --lora --vae --compiler --output --report".split():
        assert flag in said
    assert ("--frames" in said) == bool(example(name).fps)
    assert example(name).model in said


def test_what_cannot_be_run_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (("--model", "some/model", "--device", "cpu"), "--model needs one CUDA device a rank"),
        (("--offload", "--device", "cpu"), "--offload needs a CUDA device and a single rank"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parsed("flux", *arguments)
        assert told in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        parsed("flux", "--offload", "--device", "cuda")


@pytest.mark.full
def test_what_hardware_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "run_flux.py", "--device", "cpu", "--quantize", "fp8", "--no-plain"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    *_, line = done.stderr.strip().splitlines()
    assert line.endswith('(from compute capability 8.9 on): "int8" works here')
    assert "Traceback" not in done.stderr


def test_a_saved_pipeline_is_loaded_in_its_types(tmp_path: Path) -> None:
    of = example("wan")
    of.small(parsed("wan", "--device", "cpu")).save_pretrained(tmp_path)
    options = parsed("wan", "--device", "cpu")
    options.model, options.vae = str(tmp_path), False
    pipeline = load(of, import_class(of.pipeline), options, Ranks(0, 1, torch.device("cpu")))
    types = {name: getattr(pipeline, name).dtype for name in ("transformer", "text_encoder", "vae")}
    assert types == {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    assert pipeline.vae.use_tiling


def test_a_lora_is_loaded(tmp_path: Path) -> None:
    options = parsed("flux", "--device", "cpu", "--lora", str(saved_adapter(tmp_path, seed=1, rank=4)))
    of = example("flux")
    pipeline = load(of, import_class(of.pipeline), options, Ranks(0, 1, torch.device("cpu")))
    assert pipeline.get_active_adapters() == ["default_0"]


def test_flags_are_what_parallelize_takes() -> None:
    flags = "--rdt 0.2 --quantize int8 --attention math --mode max-autotune-no-cudagraphs --vae"
    one_rank = Ranks(0, 1, torch.device("cpu"))
    assert parallelize_arguments(parsed("flux", "--device", "cpu", *flags.split()), one_rank) == {
        "compiler": "inductor",
        "vae": True,
        "quantize": "int8",
        "rdt": 0.2,
        "attention": "math",
        "mode": "max-autotune-no-cudagraphs",
    }
    assert parallelize_arguments(parsed("flux", "--device", "cpu", "--rdt", "0", "--no-vae"), one_rank) == {
        "compiler": "inductor",
        "vae": False,
    }


def test_imports_are_quiet_and_later_warnings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_imports():
            logging.getLogger("torchao").warning("of the library")
            warnings.warn("of the library", stacklevel=1)
        logging.getLogger("paracompile").warning("ours")
        warnings.warn("ours", stacklevel=1)
    assert [str(each.message) for each in caught] == ["ours"]
    assert [record.message for record in caplog.records] == ["ours"]


def test_without_a_writer_of_mp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    frames = np.random.default_rng(0).random((5, 20, 30, 3), dtype=np.float32)
    said = save(frames, tmp_path / "made.mp4", fps=8)
    assert said == (
        f"video: {tmp_path / 'made.gif'} (5 frames, as there is no imageio-ffmpeg to write an mp4 "
        "(pip install 'paracompile[video]'))"
    )
    image: Any = Image.open(tmp_path / "made.gif")
    assert (image.n_frames, image.size) == (5, (30, 20))


def test_pictures_side_by_side() -> None:
    red, blue = np.zeros((2, 50, 120, 3), np.float32), np.zeros((2, 50, 120, 3), np.float32)
    red[..., 0], blue[..., 2] = 1, 1
    both = side_by_side({"red": red, "blue": blue})
    assert both.shape == (2, CAPTION + 2 * 50 + HEAD, HEAD + 2 * (2 * 120 + HEAD), 3)
    assert both[0, 40, 20].tolist() == [1, 0, 0]
    assert both[1, 40, 300].tolist() == [0, 0, 1]


def test_table() -> None:
    assert table([("a", "1"), ("long name", "22")]).splitlines() == [
        "-------------",
        "a           1",
        "long name  22",
        "-------------",
    ]
