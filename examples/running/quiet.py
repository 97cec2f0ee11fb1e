"""The libraries are imported without what they say of themselves; what anybody says later is shown."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

__all__ = ["import_class", "quiet_imports"]

USED_LATER = ("torchao.quantization", "torch._inductor.config")
"""What diffusers, transformers or a compile would import, at a time when warnings are shown."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Nothing below an error is logged or warned of, in this thread, while a library is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def import_class(name: str) -> type:
    """A class of diffusers, imported with all that comes with it."""
    with quiet_imports():
        for module in USED_LATER:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        found: type = getattr(importlib.import_module("diffusers"), name)
    return found
