"""What options are checked by: each raises an OptionError that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real

from paracompile.errors import OptionError

__all__ = ["close", "number", "one_of"]


def close(key: str, known: Iterable[str]) -> str:
    """Names like this one, as a question to append; nothing where there are none."""
    matches = difflib.get_close_matches(key, list(known), n=3)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}" if matches else ""


def one_of(key: str, value: object, choices: tuple[str, ...], otherwise: str = "") -> None:
    """Raises where the value is none of the choices; `otherwise` says what else may be given."""
    if not isinstance(value, str) or value not in choices:
        hint = close(value, choices) if isinstance(value, str) else ""
        given = ", ".join(repr(choice) for choice in choices)
        raise OptionError(key, value, f"give one of {given}{otherwise and f' {otherwise}'}{hint}")


def number(key: str, value: object, remedy: str) -> float:
    """The value as a float; raises where it is no number."""
    # bool is an int to Python; True for a number of seconds or a ratio is a slip.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(key, value, remedy)
    return float(value)
