"""From the plan to the recommendation: runs what is missing, measures all pictures, writes table, plot and grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import processor
from typing import Any

import torch
from tqdm import tqdm

from paracompile.tune.grid import Cell, grid
from paracompile.tune.metrics import Judge, Quality, load_judge, quality
from paracompile.tune.plan import Plan
from paracompile.tune.plot import plot
from paracompile.tune.results import Figures, Job, Results
from paracompile.tune.runs import Runner, load, run_jobs, state_of
from paracompile.tune.settings import NO_CACHE, PLAIN, Setting, setting_by_magnitude
from paracompile.tune.table import Limits, advice, csv_file, recommended, rows_of, text

__all__ = ["tune"]

Jobs = Mapping[Setting, Sequence[Job]]


def tune(plan: Plan) -> str:
    """Does it all.

    returns:
        what the user is told.

    raises:
        ParacompileError: what was given cannot work.
    """
    judge = None if plan.judge is None else load_judge(plan.judge)
    results = Results(plan.output, _facts(plan))
    runner = cache(lambda: Runner(load(plan.pipe, plan.device, plan.dtype), plan.call, plan.compiler))
    jobs = {
        setting: [Job(setting, prompt, seed) for prompt in plan.prompts for seed in plan.seeds]
        for setting in (PLAIN, NO_CACHE, *plan.settings, *_by_magnitude(plan, results, runner))
    }
    figures = run_jobs([job for places in zip(*jobs.values(), strict=True) for job in places], results, runner)
    qualities = _qualities(jobs, results, judge)
    return _report(plan, jobs, figures, qualities, results)


def _by_magnitude(plan: Plan, results: Results, runner: Callable[[], Runner]) -> list[Setting]:
    """The settings of MagCache's rule, whose table is measured with the first prompt and seed."""
    if not plan.magnitudes:
        return []
    ratios = results.magnitudes(lambda: runner().magnitudes(plan.prompts[0], plan.seeds[0]))
    return list(dict.fromkeys(setting_by_magnitude(ratios, rule) for rule in plan.magnitudes))


def _report(
    plan: Plan,
    jobs: Jobs,
    figures: Mapping[Job, Figures],
    qualities: Mapping[Job, Quality],
    results: Results,
) -> str:
    """Writes the files, and tells what is in them."""
    rows = rows_of(
        {setting: [figures[job] for job in each] for setting, each in jobs.items()},
        {setting: [qualities[job] for job in each] for setting, each in jobs.items()},
    )
    limits = Limits(plan.min_psnr, plan.min_score)
    chosen = recommended(rows, limits) if limits else None
    table_path, plot_path, grid_path = (plan.output / name for name in ("table.csv", "plot.png", "grid.png"))
    csv_file(rows, table_path)
    plot(rows, limits, chosen, _title(plan), plot_path)
    prompts = plan.prompts[: plan.grid_rows]
    shown = range(0, len(prompts) * len(plan.seeds), len(plan.seeds))  # the first seed of each prompt
    cells = {
        setting: [Cell(results.picture(each[place]), qualities[each[place]]) for place in shown]
        for setting, each in jobs.items()
    }
    grid(rows, cells, prompts).save(grid_path, optimize=True)
    files = f"table  {table_path}\nplot   {plot_path}\ngrid   {grid_path}"
    return "\n\n".join([text(rows), *([advice(rows, limits)] if limits else []), files])


def _qualities(jobs: Jobs, results: Results, judge: Judge | None) -> dict[Job, Quality]:
    """Every picture against the plain one of its prompt and seed."""
    found = {}
    for places in tqdm(list(zip(*jobs.values(), strict=True)), desc="comparing", unit="picture"):
        plain = results.picture(places[0])
        for job in places:
            found[job] = quality(results.picture(job), plain, job.prompt, judge)
    return found


def _facts(plan: Plan) -> dict[str, Any]:
    """What all pictures of an output folder have in common."""
    return {
        "pipe": str(plan.pipe.resolve()),
        "pipe_state": state_of(plan.pipe),
        "call": {name: value if isinstance(value, (int, float)) else repr(value) for name, value in plan.call.items()},
        "compiler": plan.compiler,
        "device": _device_name(plan),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers", "paracompile")},
    }


def _device_name(plan: Plan) -> str:
    if plan.device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{processor() or 'cpu'}, {threads} thread{'s' * (threads > 1)}"


def _title(plan: Plan) -> str:
    pictures = len(plan.prompts) * len(plan.seeds)
    of = f"{pictures} picture{'s' * (pictures > 1)} a setting"
    return f"{Path(plan.pipe).resolve().name}: {of}, {plan.compiler}, {_device_name(plan)}"
