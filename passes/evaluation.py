"""What operators make of fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from paracompile.torch_private import FakeTensorMode, enable_python_dispatcher

__all__ = ["evaluating"]


@contextlib.contextmanager
def evaluating(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Operators called in this context make fake tensors, without gradients, and with a version counter.

    One that consists of others does so as Python's code, which knows open sizes; in C++ some ask for numbers (`matmul`,
    with torch 2.11).
    """
    with fake_mode, enable_python_dispatcher(), torch.inference_mode(False), torch.no_grad():
        yield
