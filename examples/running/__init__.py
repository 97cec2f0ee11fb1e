"""What the scripts `run_*.py` share: flags, runs, what is shown. Each of them states only what is its family's."""

from running.command import Example, main

__all__ = ["Example", "main"]
