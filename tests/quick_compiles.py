"""What makes graphs compile quicker in tests, and changes nothing of what they compute; for each process of its own."""

from __future__ import annotations

import gc

import torch
import torch._dynamo


def quick_compiles() -> None:
    """Call it when what a process needs is imported."""
    torch.set_num_threads(1)  # two threads of one core are slower than one
    gc.set_threshold(100_000, 20, 20)  # graphs are many objects, which each collection looks at
    gc.collect()
    gc.freeze()  # nor need it look at modules
    torch._dynamo.config.run_gc_after_compile = False
    # With the CPU's caches flushed, it times guards once for each graph, for a log that no test reads.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
