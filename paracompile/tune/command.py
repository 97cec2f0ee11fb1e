"""The command `tune`: its arguments, read into a plan."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from paracompile.errors import ParacompileError
from paracompile.options import Compiler
from paracompile.tune.plan import (
    DTYPES,
    Plan,
    check_extras,
    check_single_process,
    device_or_default,
    dtype_or_default,
    read_prompts,
)
from paracompile.tune.settings import (
    FLAGS,
    KNOBS,
    Setting,
    Value,
    by_compile,
    knob_help,
    knob_value,
    plan_of,
    setting_of,
    sweep,
)

__all__ = ["add_parser"]

_CALL = ("num_inference_steps", "height", "width", "guidance_scale", "max_sequence_length")

_ABOUT = """\
Runs a diffusers pipeline with each setting of the first block cache, on the same prompts and seeds, and tells what each
saves and what it does to the pictures.

Three kinds of runs are made:
  plain      the transformer as it was loaded. Its pictures are what all others are compared with.
  no cache   compiled by paracompile with the same compiler, and no cache. What it takes is what all other times are
             divided by, so that compiled is compared with compiled; and its pictures show what compiling alone changes
             (rounding): no setting can be expected to come closer to the plain pictures than this.
  settings   every combination of the values given, compiled with the cache.

Times are of whole calls of the pipeline, text encoders and decoder included, and never of a call in which something was
compiled. They compare what ran on one idle machine: let nothing else run beside it. Settings that are added later are
divided by what "no cache" took then.

Finished pictures stay in the output folder. The same command, started again, makes only what is missing; with more
values, prompts or seeds it adds theirs."""

_EXAMPLE = """\
example:
  python -m paracompile tune --pipe FLUX.1-dev --prompts prompts.txt --rdt 0.04,0.06,0.08,0.10,0.12 \\
      --taylor-order 0,1 --steps 28 --min-psnr 30"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of `python -m paracompile`."""
    parser = commands.add_parser(
        "tune",
        help="what each setting of the first block cache saves, and what it does to the pictures",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--pipe", type=Path, required=True, metavar="PATH", help="folder that save_pretrained wrote")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, one prompt a line")
    parser.add_argument(
        "--seeds", type=_list_of(_whole(0)), default=[0], help="seeds of the noise, for each prompt (0)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/tune"), help="folder of all results (output/tune)")

    parser.add_argument(
        "--grid-rows", type=_whole(1), default=8, metavar="N", help="prompts in the grid of pictures at most (8)"
    )

    knobs = parser.add_argument_group("what is swept", "Values with commas between them; all combinations are run.")
    for name in KNOBS:
        values = _list_of(_knob(name))
        knobs.add_argument(f"--{FLAGS[name]}", type=values, dest=name, metavar="VALUES", help=knob_help(name))
    knobs.add_argument(
        "--setting",
        type=_setting,
        action="append",
        default=[],
        metavar="KNOB=VALUE,...",
        help="one more setting, such as rdt=0.2,taylor-order=1; may be given several times",
    )

    knobs.add_argument(
        "--magnitude",
        type=_list_of(_magnitude),
        default=[],
        metavar="LIMIT:MOST",
        help="MagCache's rule: steps are skipped, so many in a row at most, while the errors that magnitudes of an "
        "earlier picture foretell add up to no more than the limit; :RETAINED behind it is the part at the beginning "
        "that is computed (0.2)",
    )

    call = parser.add_argument_group("the pipeline's call", "What is not given is the pipeline's own default.")
    call.add_argument("--steps", type=_whole(1), dest="num_inference_steps", metavar="N", help="denoising steps")
    call.add_argument("--height", type=_whole(1), metavar="PIXELS")
    call.add_argument("--width", type=_whole(1), metavar="PIXELS")
    call.add_argument("--guidance", type=_finite, dest="guidance_scale", metavar="SCALE")
    call.add_argument("--max-sequence-length", type=_whole(1), metavar="TOKENS")
    call.add_argument(
        "--call",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument, as Python writes it (true_cfg_scale=4.0), or plain text; may be given several times",
    )

    how = parser.add_argument_group("how it is run")
    how.add_argument("--compiler", choices=get_args(Compiler), default="inductor", help="(inductor)")
    how.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    how.add_argument("--dtype", choices=tuple(DTYPES), help="of all weights (bfloat16 on cuda, float32 on the cpu)")

    wanted = parser.add_argument_group("what is recommended", "The fastest setting whose pictures reach all limits.")
    wanted.add_argument("--judge", type=Path, metavar="FILE", help="Python file with score(image, prompt) -> 0 to 1")
    wanted.add_argument("--min-psnr", type=_finite, metavar="DB", help="mean PSNR against the plain pictures")
    wanted.add_argument("--min-score", type=_finite, metavar="SCORE", help="mean score, with --judge")


def _run(options: argparse.Namespace) -> str:
    """What the user is told at the end.

    raises:
        ParacompileError: something that was given cannot work.
    """
    check_single_process()
    device = device_or_default(options.device)
    plan = Plan(
        pipe=options.pipe,
        prompts=read_prompts(options.prompts),
        seeds=options.seeds,
        settings=_settings(options),
        magnitudes=options.magnitude,
        call=_call(options),
        compiler=options.compiler,
        device=device,
        dtype=dtype_or_default(options.dtype, device),
        output=options.output,
        judge=options.judge,
        min_psnr=options.min_psnr,
        min_score=options.min_score,
        grid_rows=options.grid_rows,
    )
    check_extras()
    from paracompile.tune.course import tune  # imports what the check was for

    return tune(plan)


def _settings(options: argparse.Namespace) -> list[Setting]:
    values = {name: getattr(options, name) for name in KNOBS if getattr(options, name) is not None}
    if values and "rdt" not in values:
        raise ParacompileError("the thresholds are missing: give --rdt 0.04,0.08 beside the other knobs")
    swept = sweep(values) if values else []
    return by_compile(dict.fromkeys([*swept, *map(setting_of, options.setting)]))


def _call(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _CALL if getattr(options, name) is not None}
    for name, value in options.call:
        if name in given:
            raise ParacompileError(f"--call {name}: this argument was given already")
        given[name] = value
    return given


# Readers of single arguments; argparse shows what they raise behind the argument's name.


def _list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        return list(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return values


def _knob(name: str) -> Callable[[str], Value]:
    def value(text: str) -> Value:
        try:
            return knob_value(name, text)
        except ParacompileError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value


def _magnitude(text: str) -> tuple[float, ...]:
    try:
        rule = tuple(float(part) for part in text.split(":"))
        plan_of([1.0], rule)
    except (ValueError, ParacompileError) as error:
        message = f"{text!r} is not of the form LIMIT:MOST or LIMIT:MOST:RETAINED ({error})"
        raise argparse.ArgumentTypeError(message) from error
    return rule


def _setting(text: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    by_flag = {flag: knob for knob, flag in FLAGS.items()}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        knob = by_flag.get(name.strip().replace("_", "-"))
        if not sign or knob is None:
            known = ", ".join(by_flag)
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not of the form KNOB=VALUE with a knob of {known}")
        if knob in values:
            raise argparse.ArgumentTypeError(f"{name.strip()} is there twice")
        values[knob] = _knob(knob)(value.strip())
    return values


def _argument(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip().isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.strip(), value


def _whole(least: int) -> Callable[[str], int]:
    def value(text: str) -> int:
        number = int(text) if text.lstrip("+-").isdecimal() else least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return value


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number
