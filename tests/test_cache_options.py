"""The options of the first block cache: their limits, who reads them, and what ranks compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import build, compiled, prompts, steps_of
from torch._dynamo.exc import BackendCompilerFailed

from paracompile.cache_options import Knob, knobs
from paracompile.errors import OptionError
from paracompile.options import Options

pytestmark = pytest.mark.whole

README = Path(__file__).parents[1] / "README.md"
RDT = {"rdt": 0.1}

# Key, values that are taken beside the default, values that are not, and how they are told
LIMITS: list[tuple[str, list[Any], list[Any], str]] = [
    ("warmup_steps", [1, 50], [-1], "of at least 0"),
    ("max_consecutive_hits", [1, 50], [0, -1], "of at least 1"),
    ("downsample_factor", [2, 16], [0, -2], "of at least 1"),
    ("taylor_order", [1, 2], [3, -1], "from 0 to 2"),
    ("first_blocks", [2, 9], [-1], "of at least 0"),
    ("last_blocks", [1, 9], [-1], "of at least 0"),
]
KEYS = [key for key, *_ in LIMITS]

# Key, a value that is taken, values that are not, and how they are told
POLICY: list[tuple[str, Any, list[Any], str]] = [
    ("steps", "1?0", ["", "12", "yes", 101, ["1"]], "give a letter for each step"),
    ("watch", "modulation", ["Residual", "time", None, 1], "give one of 'residual', 'modulation'"),
    ("coefficients", [1, 0.5], [[], "1", 1.0, [math.nan], ["1"], [True]], "give the polynomial's coefficients"),
]


@pytest.mark.parametrize("key, taken, refused, told", POLICY, ids=[key for key, *_ in POLICY])
def test_what_stands_for_a_policy(key: str, taken: Any, refused: list[Any], told: str) -> None:
    value = getattr(Options.parse({**RDT, key: taken}), key)
    assert value == (tuple(taken) if isinstance(taken, list) else taken)
    assert Options.parse({**RDT, key: taken}).fingerprint() != Options.parse(RDT).fingerprint()
    with pytest.raises(OptionError, match='give "rdt" as well'):
        Options.parse({key: taken})
    for wrong in refused:
        with pytest.raises(OptionError, match=told) as caught:
            Options.parse({**RDT, key: wrong})
        assert caught.value.key == key


@pytest.mark.parametrize("knob", knobs(), ids=lambda knob: knob.name)
def test_the_readme_says_what_each_means(knob: Knob) -> None:
    default = json.dumps(knob.default) if isinstance(knob.default, str) else str(knob.default)
    row = f"| `{knob.name}` | `{default}`{knob.absent and f' ({knob.absent})'} | {knob.meaning} |"
    assert row in README.read_text().splitlines()


by_key = pytest.mark.parametrize("key, taken, refused, limits", LIMITS, ids=KEYS)


@by_key
def test_limits(key: str, taken: list[Any], refused: list[Any], limits: str) -> None:
    for value in taken:
        assert getattr(Options.parse({**RDT, key: value}), key) == value
    default = getattr(Options(), key)
    others = [True, False, "1", 1.0, 0.0, 1.5, math.nan, math.inf, [1], *([] if default is None else [None])]
    for value in [*refused, *others]:
        with pytest.raises(OptionError, match="give a whole number") as caught:
            Options.parse({**RDT, key: value})
        assert caught.value.key == key
        assert repr(value) in str(caught.value)
        assert limits in str(caught.value)


@by_key
@pytest.mark.parametrize("rdt", [{}, {"rdt": None}, {"rdt": 0}], ids=str)
def test_only_the_cache_reads_them(
    rdt: dict[str, Any], key: str, taken: list[Any], refused: list[Any], limits: str
) -> None:
    Options.parse({**rdt, key: getattr(Options(), key)})
    for value in [*taken, *refused, True, 1.0]:
        with pytest.raises(OptionError, match=r'only the first block cache reads it: give "rdt" as well') as caught:
            Options.parse({**rdt, key: value})
        assert caught.value.key == key


@pytest.mark.parametrize("rdt", [0.08, 1, 1e-9, 1e9, "auto"])
def test_thresholds_that_ask_for_a_cache(rdt: Any) -> None:
    options = Options.parse({"rdt": rdt})
    assert options.caches
    assert options.rdt == rdt


@pytest.mark.parametrize("rdt", [None, 0, 0.0, -0.0])
def test_thresholds_that_ask_for_none(rdt: Any) -> None:
    assert not Options.parse({"rdt": rdt}).caches


@pytest.mark.parametrize("rdt", [-0.1, math.nan, math.inf, -math.inf, True, False, "0.1", "Auto", "", [0.1], 1j])
def test_thresholds_that_are_none(rdt: Any) -> None:
    with pytest.raises(OptionError, match=r'finite number that is not negative.*, or "auto"') as caught:
        Options.parse({"rdt": rdt})
    assert caught.value.key == "rdt"
    assert repr(rdt) in str(caught.value)


def test_a_cache_needs_the_whole_model() -> None:
    with pytest.raises(OptionError, match="needs the whole model: remove shard_inputs"):
        Options.parse({**RDT, "shard_inputs": False})
    Options.parse({"rdt": 0, "shard_inputs": False})


def test_ranks_compare_all_of_them() -> None:
    base = Options.parse(RDT).fingerprint()
    others = [{**RDT, key: taken[0]} for key, taken, *_ in LIMITS] + [{"rdt": 0.2}, {"rdt": "auto"}, {}]
    texts = {Options.parse(options).fingerprint() for options in others}
    assert len(texts) == len(others)
    assert base not in texts
    assert Options.parse({"rdt": 1}).fingerprint() == Options.parse({"rdt": 1.0}).fingerprint()
    assert Options.parse({"rdt": 0}).fingerprint() == Options().fingerprint()
    for key in KEYS:
        assert f"\n{key} = " in base


def first_call(**options: Any) -> str:
    """What the first call of a small Wan (three blocks) raises."""
    with pytest.raises(BackendCompilerFailed) as caught:
        next(steps_of(compiled(build("wan"), **options), prompts("wan")))
    assert isinstance(caught.value.inner_exception, OptionError)
    torch._dynamo.reset()
    return str(caught.value)


@pytest.mark.slow
def test_more_blocks_than_the_model_has() -> None:
    assert "'first_blocks' = 3: the model has 3 blocks, blocks.0 to blocks.2" in first_call(first_blocks=3)
    assert "'last_blocks' = 2: the model has 3 blocks, blocks.0 to blocks.2" in first_call(last_blocks=2)
    assert "none is left to skip" in first_call(first_blocks=2, last_blocks=1)


def test_a_bad_option_is_told_through_torch_compile() -> None:
    assert "option 'taylor_order' = 3: give a whole number from 0 to 2" in first_call(taylor_order=3)
