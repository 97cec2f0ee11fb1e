"""What holds for every test: one thread, Dynamo forgets between tests and finds torch's settings as they were."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from quick_compiles import quick_compiles
from torch._C._dynamo.guards import GlobalStateGuard


def pytest_configure() -> None:
    # pytest gives every logger that does not propagate a handler, for which this one would write down each compile
    logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish() -> None:
    quick_compiles()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `full` those cases of sampled tests that `make test` leaves out."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("full"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in cases.values():
        (count,) = of_test[0].get_closest_marker("sampled").args
        kept = {number * len(of_test) // count for number in range(count)}
        for number, item in enumerate(of_test):
            if number not in kept:
                item.add_marker("full")


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
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were() -> Iterator[None]:
    """Of torch: autocast, gradients, threads. A later test would fail at a guard of Dynamo, or pass by chance."""
    before = GlobalStateGuard()
    yield
    assert before.check(), f"the test left another setting of torch behind: {before.reason()}"
