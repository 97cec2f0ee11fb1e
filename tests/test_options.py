"""Options: what is taken, and that what is refused says why."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paracompile.errors import OptionError
from paracompile.options import Options

pytestmark = pytest.mark.whole


def test_defaults() -> None:
    options = Options.parse(None)
    assert options == Options() == Options.parse({})
    assert (options.mesh, options.inputs, options.rdt, options.compiler) == (None, "broadcast", None, "inductor")
    assert (options.mode, options.inductor, options.dump, options.report) == (None, {}, None, None)
    assert options.timeout == 600.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.inputs = "trust"  # type: ignore[misc]
    hash(options)


@pytest.mark.parametrize(
    "given",
    [
        {"inputs": "check"},
        {"inputs": "trust"},
        {"rdt": None},
        {"rdt": 0},
        {"rdt": 0.0},
        {"rdt": 0.08},
        {"rdt": "auto"},
        {"rdt": 0.08, "warmup_steps": 4, "taylor_order": 2},
        {"compiler": "eager"},
        {"compiler": "aot_eager", "inductor": {}},
        {"mode": "default"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs", "inductor": {"triton.cudagraphs": True}},
        {"inductor": {"max-autotune": True}},
        {"inductor": {"reorder_for_compute_comm_overlap_passes": []}},
        {"inductor": None},
        {"dump": "somewhere/new"},
        {"dump": Path("somewhere/new")},
        {"report": print},
        {"timeout": 1},
        {"call_timeout": 1},
        {"timeout": 0.5},
    ],
)
def test_taken(given: dict[str, Any]) -> None:
    Options.parse(given)


@pytest.mark.parametrize(
    "given, key, words",
    [
        ({"inputs": "brodcast"}, "inputs", ["'broadcast'", "did you mean"]),
        ({"inputs": True}, "inputs", ["'check'"]),
        ({"rdt": -0.1}, "rdt", ["not negative"]),
        ({"rdt": float("nan")}, "rdt", ["nan", "not negative"]),
        ({"rdt": True}, "rdt", ["True"]),
        ({"rdt": False}, "rdt", ["False"]),
        ({"rdt": "0.1"}, "rdt", ["finite number", '"auto"']),
        ({"compiler": "tensorrt"}, "compiler", ["'inductor'", "'aot_eager'"]),
        ({"mode": "max-autotun"}, "mode", ["'max-autotune'", "did you mean"]),
        ({"mode": 3}, "mode", ["'default'"]),
        ({"mode": "default", "compiler": "eager"}, "mode", ["only Inductor reads it", "\"compiler\": 'eager'"]),
        ({"inductor": {"max_autotune": True}, "compiler": "aot_eager"}, "inductor", ["only Inductor reads it"]),
        ({"inductor": ["max_autotune"]}, "inductor", ["dict"]),
        ({"inductor": {"max_autotun": True}}, "inductor['max_autotun']", ["'max_autotune'", "did you mean"]),
        ({"inductor": {"max_autotune": "yes"}}, "inductor['max_autotune']", ["bool"]),
        ({"dump": 3}, "dump", ["folder"]),
        ({"dump": ""}, "dump", ["folder"]),
        ({"dump": __file__}, "dump", ["there is a file of that name"]),
        ({"report": "yes"}, "report", ["function"]),
        ({"timeout": 0}, "timeout", ["more than 0"]),
        ({"timeout": -1.0}, "timeout", ["more than 0"]),
        ({"timeout": float("inf")}, "timeout", ["finite"]),
        ({"timeout": float("nan")}, "timeout", ["finite"]),
        ({"timeout": True}, "timeout", ["seconds"]),
        ({"call_timeout": 0}, "call_timeout", ["more than 0"]),
        ({"call_timeout": "1"}, "call_timeout", ["seconds"]),
        ({"mesh": (2, 2)}, "mesh", ["(2, 2)", "init_mesh"]),
        ({"shard_inputs": 0}, "shard_inputs", ["True or False"]),
        ({"drop_masked_keys": None}, "drop_masked_keys", ["True or False"]),
        ({"regions": "blocks"}, "regions", ["True or False"]),
        ({"verify": 1}, "verify", ["True or False"]),
        ({"shard_inputs": False, "verify": True}, "verify", ["no rank has the whole inputs"]),
        ({"shard_inputs": False, "inputs": "check"}, "inputs", ["shards differ"]),
        ({"input": "check"}, "input", ["no such option", "'inputs'", "mesh, inputs, shard_inputs, "]),
        (
            {"zzz": 1},
            "zzz",
            ["Options: rdt, warmup_steps, ", "drop_masked_keys, attention, "],
        ),
        ("mesh", "options", ["dict"]),
    ],
)
def test_refused(given: Any, key: str, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse(given)
    assert caught.value.key == key
    for word in [repr(key), *words]:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_user_s_dict_is_copied() -> None:
    patches = {"max-autotune": True}
    options = Options(inductor=patches)
    patches["nonsense"] = True
    assert options.inductor == {"max_autotune": True}


def test_a_mode_of_every_name_that_torch_knows() -> None:
    import torch._inductor

    for mode in torch._inductor.list_mode_options():
        assert Options(mode=mode).mode == mode


def test_fingerprint_holds_what_must_be_equal() -> None:
    base = Options().fingerprint()
    for same in (
        {"dump": "x"},
        {"report": print},
        {"timeout": 5},
        {"call_timeout": 5},
        {"rdt": 0},
        {"mode": "default"},
        {"inductor": {}},
    ):
        assert Options.parse(same).fingerprint() == base
    other = [{"inputs": "check"}, {"compiler": "eager"}, {"mode": "max-autotune"}, {"inductor": {"max_autotune": True}}]
    texts = {Options.parse(options).fingerprint() for options in other}
    assert len(texts) == 4
    assert base not in texts
    assert "inputs = 'check'\n" in Options(inputs="check").fingerprint()


FINGERPRINT = """
from paracompile.options import Options
def a_pass(graph): pass
patches = {"post_grad_custom_post_pass": a_pass, "reorder_for_compute_comm_overlap_passes": [a_pass]}
print(Options(inductor=patches).fingerprint())
"""


@pytest.mark.slow
def test_fingerprint_is_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True).stdout
    exec(FINGERPRINT, {"__name__": "__main__"})
    assert capsys.readouterr().out == elsewhere
    assert "a_pass" in elsewhere
    assert "0x" not in elsewhere
