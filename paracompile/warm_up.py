"""Asks early what Inductor asks late.

Before it writes its first kernel for a CPU, Inductor compiles and runs small programs to learn which vector
instructions there are: 7 seconds on a new machine, one afterwards, in which Python has nothing to do. A thread asks as
soon as the backend is loaded, so that the answer is there when Dynamo has traced the model.
"""

from __future__ import annotations

import threading

import torch

from paracompile.torch_private.compilers import pick_vec_isa


def warm_up() -> None:
    """Starts the thread; where there is a GPU there is nothing to ask."""
    if not torch.cuda.is_available():
        threading.Thread(target=pick_vec_isa, name="paracompile warm-up", daemon=True).start()
