"""Models drawn at random, on meshes of 2 to 4 ranks: equal to the unsharded model, or refused by a readable error.

`PARACOMPILE_RANDOM_CASES=600 pytest tests/test_random_models.py` draws so many, others each time (`--hypothesis-seed`
chooses which), and tells how many are refused, by cause. Without it the same 40 are drawn each time.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, note, settings
from random_models import Recipe, build, recipes
from small_models import assert_sharded

from paracompile.errors import ParacompileError

CASES = int(os.environ.get("PARACOMPILE_RANDOM_CASES", "0"))
TOLERANCE = 2e-5
REMEDY = re.compile(r"\b(give|call|pass|use|compile|leave|remove|set|shard|see)\b", re.IGNORECASE)


@pytest.mark.timeout(300 + 10 * CASES)
def test_equal_or_refused_by_an_error_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=CASES or 40,
        derandomize=not CASES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(recipes())
    def draw(recipe: Recipe) -> None:
        outcomes[_outcome(recipe)] += 1

    draw()
    if CASES:
        with capsys.disabled():
            sys.stdout.writelines(f"\n{count} of {outcomes.total()} {what}" for what, count in outcomes.most_common())
    assert outcomes["equal"] > 0.7 * outcomes.total(), outcomes


def _outcome(recipe: Recipe) -> str:
    model, inputs = build(recipe)
    try:
        assert_sharded(model, inputs, recipe.mesh, tolerance=TOLERANCE, together=recipe.together)
    except ParacompileError as error:
        message = str(error)
        note(message)
        assert REMEDY.search(message)
        return f"refused: {_cause(message)}"
    return "equal"


def _cause(message: str) -> str:
    """A message without what is particular to one model."""
    return re.sub(r"'[^']*'|\d+", "_", message.splitlines()[0])[:120]
