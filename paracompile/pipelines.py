"""One call that sets a pipeline of diffusers up: quantises, compiles and shards it, and keeps the ranks together."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from paracompile.errors import OptionError
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.quantization import Quantization, quantise
from paracompile.runtime.agreement import Agreement

__all__ = ["parallelize"]

Pipeline = TypeVar("Pipeline")
Output = Literal["all", "first"]

_DENOISERS = "transformer"
"""What pipelines call the parts that denoise: "transformer", "transformer_2"."""

_MARK = "_paracompile_ranks"


def parallelize(
    pipe: Pipeline,
    *,
    mesh: DeviceMesh | None = None,
    quantize: Quantization | None = None,
    output: Output = "all",
    **options: Any,
) -> Pipeline:
    """Has a pipeline run by paracompile, on one rank or on many; prints in a few lines what was done.

    Its transformers are compiled in place, so that everything else that knows them (adapters, offloading, saving) still
    finds the same modules. On several ranks each call of the pipeline begins with rank 0's random state, also that of
    generators that are passed, so that all ranks end with the same picture; a progress bar is shown on rank 0 only. The
    pipeline's class becomes a subclass of its own for that.

    Args:
        pipe: a pipeline, with its weights loaded and on the device (or offloaded, on one rank).
        mesh: the ranks that share the work, see `init_mesh`; None: all ranks of the world.
        quantize: quantises the transformers' linear layers first, see `quantise`.
        output: on several ranks, "all" returns the result on each; "first" on rank 0, and None elsewhere.
        options: of the backend, see `Options`: `rdt`, `mode`, ...

    Returns:
        the same pipeline.

    Raises:
        OptionError: no transformer in it; an option that cannot work.

    Example:
        pipe = paracompile.parallelize(FluxPipeline.from_pretrained(...).to("cuda"), rdt=0.08)
    """
    if output not in get_args(Output):
        raise OptionError("output", output, 'give "all" or "first"')
    chosen = Options.parse({"mesh": mesh, **options})
    ranks = Ranks.from_mesh(mesh)
    denoisers = _denoisers(pipe)
    for module in denoisers.values():
        if quantize is not None:
            quantise(module, quantize)
        module.compile(backend="paracompile", options={"mesh": mesh, **options})
    if not ranks.is_single:
        _keep_together(pipe, ranks, chosen, output)
    if ranks.flat_rank == 0:
        print("\n".join(_said(pipe, denoisers, ranks, quantize, options)))  # noqa: T201 (what it promises)
    return pipe


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers among a pipeline's parts, by name."""
    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in parts.items() if name.split("_")[0] == _DENOISERS}
    if not found:
        raise OptionError(
            "pipe",
            type(pipe).__name__,
            f"it has no transformer (its modules: {', '.join(parts) or 'none'}): give a pipeline that has one, or "
            'compile what denoises by module.compile(backend="paracompile")',
        )
    return found


def _said(
    pipe: Any, denoisers: Mapping[str, nn.Module], ranks: Ranks, quantize: Any, options: Mapping[str, Any]
) -> Iterable[str]:
    axes = [f"{axis.name} {axis.size}" for axis in (ranks.batch, ranks.ring, ranks.ulysses) if axis.size > 1]
    where = f"{ranks.size} ranks ({', '.join(axes)})" if axes else "one rank"
    yield f"paracompile: {type(pipe).__name__} on {where}"
    given = [f"{name}={value!r}" for name, value in options.items()]
    if quantize is not None:
        given.insert(0, f"quantize={quantize!r}")
    for name, module in denoisers.items():
        yield f"  {name} ({type(module).__name__}): compiled at its first call{', ' if given else ''}{', '.join(given)}"


def _keep_together(pipe: Any, ranks: Ranks, options: Options, output: Output) -> None:
    """Has each call of a pipeline begin with rank 0's random state, on all ranks."""
    shown = dict(getattr(pipe, "_progress_bar_config", None) or {})
    if ranks.flat_rank > 0:
        pipe.set_progress_bar_config(**{**shown, "disable": True})
    agreement = Agreement(ranks.members, options.timeout)
    original: Any = next(base for base in type(pipe).__mro__ if _MARK not in vars(base))

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _agree_on_randomness(agreement, args, kwargs)
        result = original.__call__(self, *args, **kwargs)
        return None if output == "first" and ranks.flat_rank > 0 else result

    same = {key: vars(original)[key] for key in ("__module__", "__doc__") if key in vars(original)}
    pipe.__class__ = type(
        original.__name__,
        (original,),
        {**same, "__qualname__": original.__qualname__, "__call__": call, _MARK: ranks},
    )


def _agree_on_randomness(agreement: Agreement, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Gives the default generators, and those among the arguments, the state that they have on the first rank.

    Raises:
        RankError: ranks were given other generators; one of them did not come.
    """
    passed = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Generator)]
    generators = [torch.default_generator, *_of_device(), *passed]
    states = [_text(generator.get_state()) for generator in generators]
    kinds = ", ".join(generator.device.type for generator in generators)
    said = agreement.exchange("a pipeline's call", facts={"generators": kinds}, own=json.dumps(states))
    for generator, state in zip(generators, json.loads(said[0]), strict=True):
        generator.set_state(_state(state))


def _of_device() -> list[torch.Generator]:
    """The default generator of this process's GPU."""
    return [torch.cuda.default_generators[torch.cuda.current_device()]] if torch.cuda.is_available() else []


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
