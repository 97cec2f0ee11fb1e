"""No search for garbage while passes rewrite a graph or a compiler compiles it.

That makes millions of small objects, nearly all of which live until it is done. Python's collector looks at them again
whenever their number has grown by a quarter: with Dynamo's part one second in seven of the first call of 57 blocks.
What garbage there is waits until then. While a rank waits for others, the collector runs.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["no_collections"]


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Stops the collector, for all threads; it goes on afterwards if it ran before."""
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ran:
            gc.enable()
