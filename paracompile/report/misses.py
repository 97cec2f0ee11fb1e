"""Says, after the first generation of a model in which no step could ever be skipped, why."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch

from paracompile.passes.cache_decision import Record
from paracompile.passes.fingerprints import NUMBERS, changed
from paracompile.report.cache_stats import names_of
from paracompile.runtime.cached_call import ModelCache, held_in, plain_models
from paracompile.runtime.history import Line
from paracompile.runtime.slots import UNKNOWN, Generation

__all__ = ["warn_of_misses"]

_ENOUGH = 4
"""So many steps of a slot: the first is computed, and with what changes at each step the second and third may be."""


def warn_of_misses(generation: Generation) -> None:
    """Looks, once for each model, at a generation that ends; waits for the device where it does."""
    called = held_in(generation)
    _judge_plain([model for model in plain_models() if not model.judged], generation, alone=not called)
    for model, held in called:
        lines = list(held.history.lines.values())
        if not model.judged and any(len(line.records) >= _ENOUGH for line in lines):
            _judge(model, lines)


def _judge(model: ModelCache, lines: Sequence[Line]) -> None:
    model.judged = True
    read = [(line, torch.stack(line.records).tolist()) for line in lines]
    if any(record[Record.REUSABLE] for _, records in read for record in records):
        return
    names = names_of(line.title for line in lines)
    reasons = "; ".join(
        f"slot {name!r}: {_why(line, records)}"
        for name, (line, records) in zip(names, read, strict=True)
        if len(records) >= _ENOUGH
    )
    warnings.warn(
        f"paracompile: rdt is given, but no step of this generation could be skipped. {reasons}. "
        "paracompile.cache_context names the passes of a loop of your own",
        stacklevel=2,
    )


def _judge_plain(models: Sequence[ModelCache], generation: Generation, *, alone: bool) -> None:
    """Of pieces it is enough that one holds blocks, and was called: then the others are not `alone`."""
    if not models or generation.steps < _ENOUGH:
        return
    reasons: Counter[str] = Counter()
    for model in models:
        model.judged = True
        reasons.update(model.plain)
    if alone:
        ((why, _),) = reasons.most_common(1)
        warnings.warn(
            "paracompile: rdt is given, but no step of this generation could be skipped: none of the model's "
            f"{reasons.total()} graphs has two blocks or more to skip ({why})",
            stacklevel=2,
        )


def _why(line: Line, records: Sequence[Sequence[float]]) -> str:
    if line.title == UNKNOWN:
        return "nothing tells its calls from those of another pass"
    remembered = [record[len(record) - NUMBERS * len(line.inputs) :] for record in records]
    changes = [changed(before, after) for before, after in pairwise(remembered)]
    bound = line.inputs[: len(line.inputs) - line.free]
    fickle = [name for number, name in enumerate(bound) if len({each[number] for each in changes}) > 1]
    if fickle and not line.named:
        return f"{', '.join(map(repr, fickle))} changes in some steps and not in others"
    if not any(record[Record.COMPUTED] for record in records):
        return "what its blocks add is not finite"
    return "no step of it follows one of the same pass"
