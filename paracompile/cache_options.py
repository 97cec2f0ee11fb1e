"""The options of the first block cache, each stated once.

With a field stands what it means and which values it takes. Its errors, its row in the README's table and its flag in
`python -m paracompile tune` are made from that.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args

from paracompile.checks import number, one_of
from paracompile.errors import OptionError

__all__ = ["CacheOptions", "Knob", "Watch", "knobs"]

Watch = Literal["residual", "modulation"]


@dataclass(frozen=True)
class Knob:
    """What is said of one option.

    attributes:
        name, default: of the field.
        meaning: in one sentence, as Markdown.
        absent: what None stands for, where that is the default.
        whole: the least and the largest whole number that it takes (None: no limit); None: it takes something else.
    """

    name: str
    default: Any
    meaning: str
    absent: str = ""
    whole: tuple[int, int | None] | None = None


def _about(meaning: str, absent: str = "", whole: tuple[int, int | None] | None = None) -> dict[str, Any]:
    return {"meaning": meaning, "absent": absent, "whole": whole}


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """When blocks are skipped, and what stands for them.

    Raises:
        OptionError: a value of the wrong type, one that cannot work, or one that nothing reads, as there is no `rdt`.
    """

    rdt: float | Literal["auto"] | None = field(
        default=None,
        metadata=_about(
            "threshold of the first block cache: the largest relative difference of the first block's residual, from "
            'the last computed step to this one, at which the others are skipped; `"auto"` takes the one that '
            "ParaAttention has for the model's class (FLUX, HunyuanVideo, Mochi, CogVideoX; an error for others)",
            absent="off",
        ),
    )
    warmup_steps: int = field(
        default=0, metadata=_about("steps at the beginning of a generation that are always computed", whole=(0, None))
    )
    max_consecutive_hits: int | None = field(
        default=None, metadata=_about("how often in a row blocks may be skipped", absent="no limit", whole=(1, None))
    )
    downsample_factor: int = field(
        default=1, metadata=_about("compare only every n-th channel of the residual", whole=(1, None))
    )
    taylor_order: int = field(
        default=0,
        metadata=_about(
            "what stands for skipped blocks: `0` what they added last, `1` and `2` its extrapolation over the steps "
            "(TaylorSeer)",
            whole=(0, 2),
        ),
    )
    steps: str | None = field(
        default=None,
        metadata=_about(
            'a letter for each step of a generation: `"1"` computes, `"0"` skips where anything is stored, `"?"` '
            "lets `rdt` decide, and so do steps after the last letter; `paracompile.steps_by_magnitude` makes one by "
            "MagCache's rule, of what `paracompile.magnitude_ratios` measures",
        ),
    )
    watch: Watch = field(
        default="residual",
        metadata=_about(
            'what tells how much changed: `"residual"`, what the first blocks add, or `"modulation"`, what the first '
            "of them makes of its input for its first product (TeaCache's signal)",
        ),
    )
    coefficients: tuple[float, ...] | None = field(
        default=None,
        metadata=_about(
            "TeaCache's rule: changes from step to step go through this polynomial (highest power first) and add up to "
            "the threshold",
        ),
    )
    first_blocks: int = field(
        default=1,
        metadata=_about(
            "blocks at the front that are always computed, and decide; `0` with `watch` `modulation`: the first one is "
            "skipped, too",
            whole=(0, None),
        ),
    )
    last_blocks: int = field(default=0, metadata=_about("blocks at the end that are always computed", whole=(0, None)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "rdt", _rdt(self.rdt))
        one_of("watch", self.watch, get_args(Watch))
        _check_steps(self.steps)
        object.__setattr__(self, "coefficients", _coefficients(self.coefficients))
        if self.first_blocks == 0 and type(self.first_blocks) is int and self.watch == "residual":
            remedy = 'the residual of the first blocks decides: give at least 1, or "watch": "modulation"'
            raise OptionError("first_blocks", 0, remedy)
        for knob in knobs():
            value = getattr(self, knob.name)
            if value == knob.default and type(value) is type(knob.default):  # 1.0 and True equal 1
                continue
            if not self.caches and knob.name != "rdt":
                remedy = 'only the first block cache reads it: give "rdt" as well, or remove it'
                raise OptionError(knob.name, value, remedy)
            if knob.whole is not None:
                _check_whole(knob.name, value, *knob.whole)

    @property
    def caches(self) -> bool:
        """Whether the first block cache is asked for."""
        return bool(self.rdt)

    @property
    def accumulates(self) -> bool:
        """Whether changes from step to step add up, rather than the change since the last computed step."""
        return self.coefficients is not None


def knobs() -> list[Knob]:
    """All options of the cache, in the order in which they are listed."""
    return [_of(each) for each in fields(CacheOptions)]


def _of(each: Field[Any]) -> Knob:
    return Knob(each.name, each.default, **each.metadata)


def _rdt(value: object) -> float | Literal["auto"] | None:
    if value is None or value == "auto":
        return value
    remedy = 'give a finite number that is not negative (0 or None: no cache), or "auto"'
    rdt = number("rdt", value, remedy)
    if not 0 <= rdt < math.inf:
        raise OptionError("rdt", value, remedy)
    return rdt


def _check_steps(value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value or set(value) - set("01?")):
        raise OptionError("steps", value, 'give a letter for each step: "1" compute, "0" skip, "?" by rdt')


def _coefficients(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    remedy = "give the polynomial's coefficients, the highest power first, as finite numbers"
    if not isinstance(value, (list, tuple)) or not value:
        raise OptionError("coefficients", value, remedy)
    numbers = tuple(number("coefficients", each, remedy) for each in value)
    if not all(map(math.isfinite, numbers)):
        raise OptionError("coefficients", value, remedy)
    return numbers


def _check_whole(key: str, value: object, least: int, most: int | None) -> None:
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value > (most or value):
        raise OptionError(key, value, f"give a whole number {limits}")
