"""What the scripts `run_*.py` beside this folder share: flags, runs, what is shown. Each of them states only its family."""

from running.command import Example, main

__all__ = ["Example", "main"]
