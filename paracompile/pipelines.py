"""One call that sets a pipeline of diffusers up: quantises, compiles and shards it, and keeps the ranks together."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from paracompile.cache_options import knobs
from paracompile.errors import OptionError
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.quantization import Quantization, quantise
from paracompile.runtime.agreement import Agreement
from paracompile.text_encoders import encoders_of, place
from paracompile.torch_private import tree_leaves

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
    vae: bool = False,
    text_encoders: bool = False,
    output: Output = "all",
    fullgraph: bool = False,
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
        vae: compiles the VAE's encoder and decoder as well; on several ranks they share its images.
        text_encoders: on several ranks, holds each text encoder on one rank only, which runs it and sends to the others
            what it gives: it saves memory, and no time. A pipeline that calls parts of an encoder is an error.
        output: on several ranks, "all" returns the result on each; "first" on rank 0, and None elsewhere.
        fullgraph: an error where Dynamo would break a transformer's graph; it then captures more of some models in one.
        options: of the backend, see `Options`: `rdt`, `mode`, ...

    Returns:
        the same pipeline.

    Raises:
        OptionError: no transformer in it, no VAE or no text encoder; an option that cannot work; torchrun's processes
            did not join.

    Example:
        pipe = paracompile.parallelize(FluxPipeline.from_pretrained(...).to("cuda"), rdt=0.08)
    """
    if output not in get_args(Output):
        raise OptionError("output", output, 'give "all" or "first"')
    chosen = Options.parse({"mesh": mesh, **options})
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        remedy = "torchrun started several processes, and they would each run alone: call init_process_group before"
        raise OptionError("mesh", mesh, remedy)
    ranks = Ranks.from_mesh(mesh)
    denoisers, coders = _denoisers(pipe), _coders(pipe) if vae else {}
    encoders = encoders_of(pipe) if text_encoders else {}
    for module in denoisers.values():
        if quantize is not None:
            quantise(module, quantize)
        module.compile(backend="paracompile", fullgraph=fullgraph, options={"mesh": mesh, **options})
    of_cache = {knob.name for knob in knobs()}
    uncached = {name: value for name, value in options.items() if name not in of_cache}
    for module in coders.values():
        module.compile(backend="paracompile", options={"mesh": mesh, **uncached})
    placed = {} if ranks.is_single else place(encoders, ranks, chosen.timeout)
    if not ranks.is_single:
        _keep_together(pipe, ranks, chosen, output, decodes_together=vae)
    if ranks.flat_rank == 0:
        quantized = {} if quantize is None else {"quantize": quantize}
        said = [_said(pipe, ranks), *_lines(denoisers, {**quantized, **options}), *_lines(coders, uncached)]
        said += [f"  {name} ({type(encoders[name]).__name__}): on rank {rank}" for name, rank in placed.items()]
        print("\n".join(said))  # noqa: T201 (what it promises)
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


def _coders(pipe: Any) -> dict[str, nn.Module]:
    """The two halves of a pipeline's VAE, by name."""
    vae = getattr(pipe, "vae", None)
    halves = {f"vae.{name}": getattr(vae, name, None) for name in ("encoder", "decoder")}
    found = {name: half for name, half in halves.items() if isinstance(half, nn.Module)}
    if not found:
        raise OptionError("vae", True, f"{type(pipe).__name__} has no VAE of an encoder and a decoder: leave it out")
    return found


def _said(pipe: Any, ranks: Ranks) -> str:
    axes = [f"{axis.name} {axis.size}" for axis in (ranks.batch, ranks.ring, ranks.ulysses) if axis.size > 1]
    where = f"{ranks.size} ranks ({', '.join(axes)})" if axes else "one rank"
    return f"paracompile: {type(pipe).__name__} on {where}"


def _lines(modules: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Iterable[str]:
    given = "".join(f", {name}={value!r}" for name, value in options.items() if name != "report")
    for name, module in modules.items():
        yield f"  {name} ({type(module).__name__}): compiled at its first call{given}"


def _keep_together(pipe: Any, ranks: Ranks, options: Options, output: Output, *, decodes_together: bool) -> None:
    """Has each call of a pipeline begin with rank 0's random state, on all ranks."""
    drops = output == "first" and ranks.flat_rank > 0
    shown = dict(getattr(pipe, "_progress_bar_config", None) or {})
    if ranks.flat_rank > 0:
        pipe.set_progress_bar_config(**{**shown, "disable": True})
    agreement = Agreement(ranks.members, options.timeout)
    original: Any = next(base for base in type(pipe).__mro__ if _MARK not in vars(base))
    signature = inspect.signature(original.__call__)

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _agree_on_randomness(agreement, args, kwargs)
        given = signature.bind(self, *args, **kwargs)
        if drops and not decodes_together and "output_type" in signature.parameters:
            given.arguments["output_type"] = "latent"  # so that it is not decoded
        result = original.__call__(*given.args, **given.kwargs)
        return None if drops else result

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
