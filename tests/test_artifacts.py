"""Compiled code in a file: another process with empty caches compiles nothing, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import paracompile
from paracompile import OptionError, ParacompileError, artifacts

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, paracompile
from random_tensors import randomise
from small_models import Denoiser, image_tokens

reports = []

def output_of(blocks):
    options = {{"rdt": 0.1, "report": reports.append}}
    model = torch.compile(randomise(Denoiser(blocks)), backend="paracompile", options=options)
    with torch.no_grad():
        return float(model(hidden_states=image_tokens(), timestep=torch.ones(2))[0].double().sum())

what, path = sys.argv[1:]
if what == "load":
    paracompile.load_compiled(path)
output, refused = output_of(3), None
if what == "save":
    paracompile.save_compiled(path)
else:
    try:
        output_of(4)
    except Exception as error:
        refused = str(error)
compilation = reports[0].compilation
print(json.dumps([compilation.different, compilation.from_cache, output, refused]))
"""


def process(what: str, path: Path, caches: Path) -> list[Any]:
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), what, str(path)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_another_machine_compiles_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "model.compiled"
    different, cached, expected, _ = process("save", file, tmp_path / "here")
    assert different > 3
    assert cached == 0
    different_there, cached, output, refused = process("load", file, tmp_path / "there")
    assert (different_there, cached) == (different, different)
    assert output == pytest.approx(expected, rel=1e-6)
    assert "what it loaded is not for Denoiser (weights" in refused
    assert "Save it anew with this model on this mesh" in refused


def test_what_was_saved_is_loaded_and_another_model_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_here", "_loaded"):
        monkeypatch.setattr(artifacts, name, {})
    file, inputs = tmp_path / "new folder" / "model.compiled", torch.ones(3, 8)
    model = nn.Linear(8, 8)
    with fresh_cache(), torch.no_grad():
        torch.compile(model, backend="paracompile")(inputs)
        paracompile.save_compiled(file)
    torch._dynamo.reset()
    counters.clear()
    with fresh_cache(), torch.no_grad():
        paracompile.load_compiled(file)
        torch.testing.assert_close(torch.compile(model, backend="paracompile")(inputs), model(inputs))
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
        assert not counters["inductor"]["fxgraph_cache_miss"]
        message = r"what it loaded is not for Linear \(weights .* but for Linear .*model.compiled.*Save it"
        with pytest.raises(BackendCompilerFailed, match=message):
            torch.compile(nn.Linear(8, 9), backend="paracompile")(inputs)


def write(path: Path, **changed: str) -> Path:
    header = json.dumps({"made by": {**artifacts._made_by(), **changed}, "holds": []}).encode()
    path.write_bytes(artifacts._MAGIC + struct.pack("<Q", len(header)) + header + b"nothing")
    return path


@pytest.mark.parametrize("what", ["paracompile", "torch", "Python", "the device"])
def test_another_version_or_device_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(ParacompileError, match=f"was made with {what} 0.0.1, and here it is .*Save it anew here"):
        paracompile.load_compiled(write(tmp_path / "file", **{what: "0.0.1"}))


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no file 'absent'"):
        paracompile.load_compiled(tmp_path / "absent")
    (tmp_path / "absent.rank-1-of-2").touch()
    with pytest.raises(OptionError, match=r"there is no file 'absent', but \['absent.rank-1-of-2'\]"):
        paracompile.load_compiled(tmp_path / "absent")
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(OptionError, match="no file that save_compiled wrote"):
        paracompile.load_compiled(tmp_path / "other")


def test_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_here", {})
    with pytest.raises(ParacompileError, match="there is nothing to save"):
        paracompile.save_compiled(tmp_path / "file")
