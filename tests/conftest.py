"""What holds for every test: one thread, Dynamo forgets between tests and finds torch's settings as they were."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

# The process that hands tests out to workers reads this, too, and needs no torch: that is imported where it is used.


def pytest_configure() -> None:
    # pytest gives every logger that does not propagate a handler, for which this one would write down each compile
    logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish() -> None:
    from quick_compiles import quick_compiles

    quick_compiles()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of each test's list of cases, run one in so many, evenly spread; of tests marked `whole` all"
    parser.addoption("--one-in", type=int, default=1, help=text)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks `full` what `sampled` leaves out; of what is then chosen by marks `--one-in` takes its share."""
    for cases in _by_test(item for item in items if not item.get_closest_marker("full")):
        sampled = cases[0].get_closest_marker("sampled")
        if sampled:
            kept = _spread(cases, *sampled.args)
            for item in cases:
                if item not in kept:
                    item.add_marker("full")
    yield
    left_out = set()
    for cases in _by_test(item for item in items if not item.get_closest_marker("whole")):
        left_out |= {*cases}.difference(_spread(cases, math.ceil(len(cases) / config.getoption("--one-in"))))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _by_test(items: Iterable[pytest.Item]) -> Iterable[list[pytest.Item]]:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return cases.values()


def _spread(cases: list[pytest.Item], count: int) -> list[pytest.Item]:
    """So many of the cases, or all, evenly spread."""
    return [cases[number * len(cases) // count] for number in range(min(count, len(cases)))]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays with one worker, for what was captured and compiled; all that uses a pool of ranks, for the pool."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "ranks" if "/distributed/" in file else file

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def _forget_with_the_module() -> Iterator[None]:
    _forget()
    yield
    _forget()


@pytest.fixture(autouse=True)
def _forget_with_each_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("shares_graphs") is None:
        _forget()


def _forget() -> None:
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were() -> Iterator[None]:
    """Of torch: autocast, gradients, threads. A later test would fail at a guard of Dynamo, or pass by chance."""
    from torch._C._dynamo.guards import GlobalStateGuard

    before = GlobalStateGuard()
    yield
    assert before.check(), f"the test left another setting of torch behind: {before.reason()}"
