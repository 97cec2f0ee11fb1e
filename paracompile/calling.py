"""The calling convention of a compiled graph: what is done with the arguments before it runs, and what is added.

the graph's inputs, as Dynamo passes them
-> ints that may change as tensors, as Dynamo passes floats
-> agreed on by the ranks (`runtime.inputs`)
-> with a cache: the control, the record and the stored values behind them (`runtime.cached_call`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from paracompile.captured import Captured
from paracompile.errors import source_line
from paracompile.layout.sizes import free_symbols_of, sizes_of
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.passes import CacheLayout, Found
from paracompile.runtime.agreement import Agreement
from paracompile.runtime.cached_call import CachedCall, StateLike
from paracompile.runtime.inputs import InputAgreement
from paracompile.runtime.pieces import handing_on
from paracompile.runtime.shared_call import SharedCall
from paracompile.runtime.slots import CallSigns
from paracompile.runtime.verified_call import VerifiedCall

__all__ = ["as_called", "as_called_by_all", "verified"]


def as_called(
    run: Callable[..., Any],
    captured: Captured,
    options: Options,
    ranks: Ranks,
    found: Found,
    threshold: float,
    plan: tuple[float, ...] = (),
) -> Callable[..., Any]:
    """What Dynamo calls with the graph's inputs.

    args:
        run: the compiled graph.
        found: what the passes found in it.
        threshold: of the cache.
        plan: of its steps, as `Control` has it.
    """
    changing = captured.changing
    mode = options.inputs if options.shard_inputs and not ranks.is_single else "trust"
    of_piece = found.why_a_piece is not None and mode != "trust"
    agree = InputAgreement(
        mode=mode,
        indices=tuple(changing),
        group=ranks.group,
        source=ranks.members[0] if ranks.members else 0,
        names=tuple(node.name for node in changing.values()),
        of_piece=of_piece,
        in_place=found.seen_again,
    )

    def prepare(args: Sequence[Any]) -> list[Any]:
        return agree([torch.tensor(value) if place in found.ints else value for place, value in enumerate(args)])

    cache = found.cache
    if cache is None:
        return handing_on(run, prepare, agree.indices) if of_piece else lambda *args: run(*prepare(args))
    return CachedCall(
        run,
        prepare=prepare,
        like=_state_like(cache, captured),
        threshold=threshold,
        plan=plan,
        static=tuple(captured.static),
        signs=_signs(cache),
        inputs=tuple(captured.placeholders[index].name for index in cache.skipped.inputs),
        free=cache.skipped.free,
    )


def as_called_by_all(
    run: Callable[..., Any], captured: Captured, options: Options, ranks: Ranks, agreement: Agreement
) -> SharedCall:
    """What every rank calls together.

    args:
        run: what this rank calls.
        ranks: those that share the graph's work.
        agreement: that of the ranks that compiled it.
    """
    tensors = {
        node.name: place
        for place, node in captured.changing.items()
        if isinstance(node.meta.get("example_value"), torch.Tensor)
    }
    return SharedCall(
        run,
        name=f"graph {agreement.next_graph()} of {captured.model}",
        inputs=tensors,
        groups=(ranks.group, ranks.sequence_group, *(axis.group for axis in (ranks.batch, ranks.ring, ranks.ulysses))),
        compiling=agreement,
        calling=Agreement(agreement.ranks, options.call_timeout, option="call_timeout"),
        symbols=tuple(captured.symbols.values()),
    )


def verified(run: Callable[..., Any], captured: Captured, ints: frozenset[int]) -> VerifiedCall:
    """The compiled graph, compared with the captured one at its first call.

    args:
        ints: the places of ints that the compiled graph takes as tensors.
    """

    def original(*args: Any) -> Any:
        return captured.gm(*(value.item() if place in ints else value for place, value in enumerate(args)))

    (output,) = captured.gm.graph.find_nodes(op="output")
    values = [node.meta.get("example_value") for node in captured.gm.graph.nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.dtype.is_floating_point}
    return VerifiedCall(
        run,
        original=original,
        inputs=[repr(node.name) for node in captured.placeholders],
        outputs=[
            f"{number} ({source_line(value) or value.name})" if isinstance(value, fx.Node) else str(number)
            for number, value in enumerate(output.args[0])
        ],
        tolerance=max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5,
    )


def _state_like(cache: CacheLayout, captured: Captured) -> StateLike:
    record, *state = ((sizes_of(like), like.dtype, like.device) for like in (cache.record, *cache.state))
    symbols = free_symbols_of((cache.record, *cache.state))
    return StateLike(record, tuple(state), cache.added, {symbol: captured.symbols[symbol] for symbol in symbols})


def _signs(cache: CacheLayout) -> CallSigns:
    """What stays the same through a generation is what is neither denoised nor a time; without both, nothing tells.

    Python's numbers come as new tensors each time.
    """
    skipped = cache.skipped
    if skipped.sample is None or not skipped.times:
        return CallSigns(())
    return CallSigns(tuple(index for index in skipped.conditioning if index not in skipped.numbers))
