"""`python -m paracompile COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paracompile.errors import ParacompileError
from paracompile.tune.command import add_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    returns:
        the exit status: 0; 1 where it cannot be done; 130 where it was interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m paracompile", description="Tools around the backend.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except ParacompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last finished picture", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
