"""The calling convention of a compiled graph: what is done with the arguments before it runs, and what is added.

the graph's inputs, as Dynamo passes them
-> agreed on by the ranks (`runtime.inputs`)
-> with a cache: the control, the record and the stored values behind them (`runtime.cached_call`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paracompile.captured import Captured
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.passes import CacheLayout
from paracompile.runtime.cached_call import CachedCall, StateLike
from paracompile.runtime.inputs import InputAgreement
from paracompile.runtime.slots import CallSigns

__all__ = ["as_called"]


def as_called(
    run: Callable[..., Any],
    captured: Captured,
    options: Options,
    ranks: Ranks,
    *,
    cache: CacheLayout | None,
    threshold: float,
) -> Callable[..., Any]:
    """What Dynamo calls with the graph's inputs.

    args:
        run: the compiled graph.
        cache: what it takes and gives besides.
        threshold: of the cache.
    """
    changing = captured.changing
    agree = InputAgreement(
        mode=options.inputs if options.shard_inputs and not ranks.is_single else "trust",
        indices=tuple(changing),
        group=ranks.group,
        source=ranks.members[0] if ranks.members else 0,
        names=tuple(node.name for node in changing.values()),
    )
    if cache is None:
        return lambda *args: run(*agree(args))
    return CachedCall(
        run,
        prepare=agree,
        like=_state_like(cache),
        threshold=threshold,
        static=tuple(captured.static),
        signs=_signs(captured, cache),
    )


def _state_like(cache: CacheLayout) -> StateLike:
    record, *state = ((tuple(like.shape), like.dtype, like.device) for like in (cache.record, *cache.state))
    return StateLike(record, tuple(state))


def _signs(captured: Captured, cache: CacheLayout) -> CallSigns:
    """What stays the same through a generation is what is neither denoised nor a time; without both, nothing tells."""
    skipped = cache.skipped
    if skipped.sample is None or not skipped.times:
        return CallSigns(())
    others = {skipped.sample, *skipped.times}
    return CallSigns(
        tuple(
            index
            for index, node in captured.changing.items()
            if isinstance(node.meta.get("example_value"), torch.Tensor) and index not in others
        )
    )
