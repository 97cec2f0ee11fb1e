"""The settings of a sweep: every combination of the values that each knob of the first block cache is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from paracompile.cache_options import Knob, knobs
from paracompile.errors import OptionError, ParacompileError
from paracompile.options import Options
from paracompile.step_plans import steps_by_magnitude

__all__ = [
    "FLAGS",
    "KNOBS",
    "NO_CACHE",
    "PLAIN",
    "Setting",
    "Value",
    "by_compile",
    "knob_help",
    "knob_text",
    "knob_value",
    "plan_of",
    "setting_by_magnitude",
    "setting_of",
    "sweep",
]

Value = float | int | str | tuple[float, ...] | None

KNOBS: dict[str, Knob] = {knob.name: knob for knob in knobs()}
"""The options of the cache by name; all but the first are fixed in the graph."""

FLAGS: dict[str, str] = {name: name.replace("_", "-") for name in KNOBS} | {"steps": "step-plan"}
"""What each is called on the command line, where --steps is the pipeline's."""

_SPELLED = {
    "rdt": "numbers above 0; one compile serves all",
    "max_consecutive_hits": "none: no limit",
    "coefficients": "with colons between them; 1:0: as they are",
}
"""How values are given on the command line, where that does not go without saying."""

_NOT_ASKED, _RETAINED = 1e-6, 0.2


@dataclass(frozen=True)
class Setting:
    """One way of running the pipeline.

    attributes:
        name: what it is called in the table.
        knobs: options of the cache that are not the default, the threshold first; empty without a cache.
        compiled: whether the transformer is compiled at all.
    """

    name: str
    knobs: tuple[tuple[str, Value], ...] = ()
    compiled: bool = True

    @property
    def rdt(self) -> float | None:
        """The threshold; None without a cache."""
        rdt = dict(self.knobs).get("rdt")
        return rdt if isinstance(rdt, float) else None

    @property
    def fixed(self) -> tuple[object, ...]:
        """What the graph depends on: settings that are equal in this share one compile."""
        return self.compiled, self.rdt is not None, *self.others

    @property
    def others(self) -> tuple[tuple[str, Value], ...]:
        """The knobs besides the threshold."""
        return self.knobs[1:]

    @property
    def folder(self) -> str:
        """A name for a folder, the same whatever else is in the sweep."""
        return self.name.replace(", ", "-").replace(" ", "_")


PLAIN = Setting("plain", compiled=False)
"""The transformer as it was loaded: its pictures are what all others are compared with."""

NO_CACHE = Setting("no cache")
"""Compiled like all settings, without a cache: its wall time is what theirs is compared with."""


def setting_of(values: Mapping[str, Value]) -> Setting:
    """The setting with these options.

    raises:
        OptionError: a value that cannot work.
    """
    rdt = values.get("rdt")
    if not isinstance(rdt, (int, float)) or not 0 < rdt < math.inf:
        raise OptionError("rdt", rdt, "give finite thresholds above 0 (the run without a cache is made in any case)")
    Options.parse(values)
    knobs = tuple((name, values[name]) for name in KNOBS if name in values and values[name] != KNOBS[name].default)
    return Setting(", ".join(f"{FLAGS[name]} {knob_text(value)}" for name, value in knobs), knobs)


def plan_of(ratios: Sequence[float], rule: tuple[float, ...]) -> str:
    """The plan of steps by MagCache's rule: limit, most, and where there is a third, retained.

    raises:
        OptionError: a rule that cannot work.
        ValueError: not two or three numbers.
    """
    limit, most, retained = rule if len(rule) == 3 else (*rule, _RETAINED)
    return steps_by_magnitude(ratios, limit=limit, most=int(most), retained=retained)


def setting_by_magnitude(ratios: Sequence[float], rule: tuple[float, ...]) -> Setting:
    """The setting that skips by this plan; its threshold is never asked."""
    setting = setting_of({"rdt": _NOT_ASKED, "steps": plan_of(ratios, rule)})
    return replace(setting, name=f"magnitude {knob_text(rule)} ({plan_of(ratios, rule)})")


def sweep(values: Mapping[str, Sequence[Value]]) -> list[Setting]:
    """All combinations, each once; the threshold changes fastest, so that what shares a compile is together.

    raises:
        OptionError: a value that cannot work.
    """
    names = [name for name in reversed(KNOBS) if name in values]
    combinations = itertools.product(*(values[name] for name in names))
    return list(dict.fromkeys(setting_of(dict(zip(names, each, strict=True))) for each in combinations))


def by_compile(settings: Iterable[Setting]) -> list[Setting]:
    """The settings in the order in which the fewest compiles are needed, that of their first ones otherwise."""
    groups: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.fixed, []).append(setting)
    return [setting for group in groups.values() for setting in group]


def knob_text(value: Value) -> str:
    """A value as the command line has it."""
    return ":".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def knob_help(name: str) -> str:
    """What a knob means, and how its values are given."""
    meaning = KNOBS[name].meaning.replace("`", "")
    if name == "rdt":  # of "auto" there is nothing to compare
        meaning = meaning.partition(";")[0]
    return f"{meaning} ({_SPELLED[name]})" if name in _SPELLED else meaning


def knob_value(name: str, text: str) -> Value:
    """Reads one value.

    raises:
        ParacompileError: not a number, or not numbers.
    """
    if name == "max_consecutive_hits" and text.lower() == "none":
        return None
    if name in ("steps", "watch"):
        return text
    try:
        if name == "coefficients":
            return tuple(float(part) for part in text.split(":"))
        return int(text) if KNOBS[name].whole else float(text)
    except ValueError:
        kind = {"rdt": "a number", "coefficients": "numbers with colons between them"}.get(name, "a whole number")
        raise ParacompileError(f"{text!r} is not {kind}") from None
