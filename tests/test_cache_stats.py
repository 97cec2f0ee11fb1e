"""What the statistics say, as a table, as a dict and as lines of JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from denoising import PASSES, STEPS, Cut, build, compiled, generate, prompts, steps_of
from torch import nn

from paracompile import CacheStats, cache_stats, reset_cache
from paracompile.report.cache_stats import Step, names_of, stats_of
from paracompile.runtime.history import History

STATS = CacheStats(
    {
        "cond": (Step(False, None), Step(True, 0.0421), Step(False, 0.25)),
        "unconditional": (Step(False, None),),
    }
)


def test_the_table() -> None:
    assert str(STATS).splitlines() == [
        "slot           steps  hits  difference of each step (* hit)",
        "cond               3     1  - 0.042* 0.250",
        "unconditional      1     0  -",
    ]
    assert str(CacheStats({})) == "first block cache: no call yet"


def test_numbers_and_the_dict() -> None:
    assert (STATS.steps, STATS.hits) == (4, 1)
    assert STATS.as_dict() == {
        "cond": {"steps": 3, "hits": 1, "differences": [None, 0.0421, 0.25], "hit": [False, True, False]},
        "unconditional": {"steps": 1, "hits": 0, "differences": [None], "hit": [False]},
    }
    assert json.loads(json.dumps(STATS.as_dict())) == STATS.as_dict()
    assert (CacheStats({}).steps, CacheStats({}).hits, CacheStats({}).as_dict()) == (0, 0, {})


def test_lines_of_json_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    for _ in range(2):
        STATS.append_to(file)
    STATS.append_to(str(file))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    once = [
        {"slot": "cond", "step": 0, "hit": False, "difference": None},
        {"slot": "cond", "step": 1, "hit": True, "difference": 0.0421},
        {"slot": "cond", "step": 2, "hit": False, "difference": 0.25},
        {"slot": "unconditional", "step": 0, "hit": False, "difference": None},
    ]
    assert lines == 3 * once


def record(number: int, ratio: float = 0.1, hit: float = 0.0) -> torch.Tensor:
    """Ratio, hit, streak, computed, steps, whether it could be reused, and a time with its direction."""
    return torch.tensor([ratio, hit, 0.0, 1.0, float(number), 1.0, 0.5, -1.0])


def history(*calls: tuple[int, str, torch.Tensor], whole: bool = False) -> History:
    """Of calls of slots of graphs, which are numbered."""
    made = History(whole=whole)
    for graph, title, of_call in calls:
        made.add(made.line(graph, title, named=True, inputs=(), free=0), of_call)
    return made


def steps(stats: CacheStats) -> dict[str, int]:
    return {name: len(of_slot) for name, of_slot in stats.slots.items()}


def test_records_before_the_last_first_step_are_of_another_generation() -> None:
    graph = 1
    records = [record(1), record(2), record(1, math.nan), record(2, 0.5, 1.0), record(3, math.inf)]
    calls = [(graph, "cond", each) for each in records]
    assert stats_of([history(*calls)]).slots == {"cond": (Step(False, None), Step(True, 0.5), Step(False, None))}
    assert steps(stats_of([history(*calls, whole=True)])) == {"cond": 5}  # a loop that is known to be one


def test_pieces_of_a_model_are_told_apart() -> None:
    one, other = 1, 2
    histories = [
        history((one, "cond", record(1))),
        history((other, "cond", record(1)), (other, "cond", record(2)), (other, "uncond", record(1))),
    ]
    assert steps(stats_of(histories)) == {"cond": 1, "cond, graph 2": 2, "uncond": 1}
    assert names_of(["cond", "uncond", "cond", "cond"]) == ["cond", "uncond", "cond, graph 2", "cond, graph 3"]


def test_a_slot_that_was_not_called_for_long_is_let_go() -> None:
    made = history(*((graph, "cond", record(1)) for graph in (1, *[2] * 4096, 3)))
    assert [(line.graph, len(line.records)) for line in made.lines.values()] == [(2, 4096), (3, 1)]


def test_graphs_of_a_model_are_told_apart() -> None:
    """Two passes of one step through other layers, or another batch where guidance ends."""
    one, other = 1, 2
    calls = [(one, "cond", record(1)), (other, "cond", record(1)), (one, "cond", record(2)), (one, "cond", record(3))]
    for whole in (True, False):
        assert steps(stats_of([history(*calls, whole=whole)])) == {"cond": 3, "cond, graph 2": 1}


def test_graphs_of_another_size_before_are_of_another_generation() -> None:
    """In a loop of one's own, of which nobody says where it begins."""
    small, large = 1, 2
    before = [(small, "cond", record(number)) for number in (1, 2)]
    after = [(large, name, record(number)) for number in (1, 2) for name in PASSES]
    assert steps(stats_of([history(*before, *after)])) == {"cond": 2, "uncond": 2}
    again = [(small, "cond", record(1))]
    assert steps(stats_of([history(*before, *after, *again)])) == {"cond": 1}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch._dynamo.reset()
    return compiled(build("wan"), max_consecutive_hits=1)


def test_of_a_model(model: nn.Module) -> None:
    generate(model, prompts("wan"), naming="diffusers")
    stats = cache_stats(model)
    pattern = [False, True, False, True, False]
    assert {name: [step.hit for step in of_slot] for name, of_slot in stats.slots.items()} == dict.fromkeys(
        PASSES, pattern
    )
    assert (stats.steps, stats.hits) == (2 * STEPS, 4)
    for first, *others in stats.slots.values():
        assert first.difference is None
        assert all(step.difference is not None and 0 < step.difference < 10 for step in others)
    assert cache_stats(model) == stats  # asking changes nothing


def test_they_stay_readable_until_the_next_call(model: nn.Module) -> None:
    generate(model, prompts("wan"), naming="diffusers", steps=3)
    before = cache_stats(model)
    reset_cache(model)
    assert cache_stats(model) == before
    next(steps_of(model, prompts("wan"), naming="paracompile"))
    assert steps(cache_stats(model)) == {"cond": 1, "uncond": 1}


@pytest.mark.slow
def test_of_a_generation_that_is_cut_off_what_it_did(model: nn.Module) -> None:
    reset_cache(model)
    with pytest.raises(Cut):
        generate(model, prompts("wan"), naming="paracompile", cut=(2, "uncond"))
    assert steps(cache_stats(model)) == {"cond": 3, "uncond": 2}
    generate(model, prompts("wan"), naming="paracompile", steps=4)
    assert steps(cache_stats(model)) == {"cond": 4, "uncond": 4}
