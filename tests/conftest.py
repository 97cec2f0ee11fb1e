"""What holds for every test: one thread, Dynamo forgets between tests, its structured log stays out of reports."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)  # two threads of one core are slower than one
    logging.getLogger("torch.__trace").propagate = False  # thousands of empty lines under every failure


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
