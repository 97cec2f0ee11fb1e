"""Checks a rule of `paracompile.patterns.rules` by brute force, on concrete tensors.

*Wrong*: every factor that the rule lists is cut over several ranks, evenly and not, as one segment and as two; each
rank runs the operator on its part; the parts are put together again and must be the unsharded result.

*Missing*: every way to halve one dimension of each operand (or to leave it whole) and one dimension of each result is
tried; what works for two fills with random values ought to be listed. Only cuts of plain dimensions are tried this way.

*Windows*: along a factor with a halo, each rank runs the operator on the window that its part of the result is made of.

The method is that of PyTorch's `torch/distributed/tensor/_ops/strategy_validation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from paracompile.layout.factors import Factor, Local, Op, Operand, Rule, Span
from paracompile.layout.halos import Halo
from paracompile.patterns.rules import rule_for

UNINITIALISED = {torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format}
"""Operators whose values mean nothing: only shapes are compared."""


@dataclass
class Verdict:
    """What a check found: how many independent factors were cut (`listed`), windows taken and sums made of parts."""

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    listed: int = 0
    halos: int = 0
    sums: int = 0


def check(target: Any, *args: Any, rule: Rule | None = None, search: bool = True, **kwargs: Any) -> Verdict:
    """Checks one call. `rule` stands in for the table's; without `search` missing factors are not looked for."""
    rule = rule or rule_for(target)
    assert rule is not None, f"{target} has no rule"
    op, tensors = describe(target, args, kwargs)
    factors = [factor for factor in rule.factors(op) if factor.is_independent]
    halos = [factor.halo for factor in rule.factors(op) if factor.halo is not None]
    sums = [factor for factor in rule.factors(op) if factor.sums]
    verdict = Verdict(listed=len(factors), halos=len(halos), sums=len(sums))
    for factor in factors:
        verdict.wrong += wrong_cuts(op, rule, factor, tensors)
    for halo in halos:
        verdict.wrong += wrong_windows(op, rule, halo, tensors)
    for factor in sums:
        verdict.wrong += wrong_sums(op, factor, tensors)
    if search:
        verdict.missing = missing_factors(op, rule, factors, tensors)
    return verdict


# One call as an Op


def describe(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Op, list[Tensor]]:
    """The call as rules see it, and its tensor operands."""
    tensors: list[Tensor] = []

    def stand_in(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return Operand(len(tensors) - 1)
        return [stand_in(item) for item in value] if isinstance(value, (list, tuple)) else value

    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    arguments = {argument.name: stand_in(given.get(argument.name, argument.default_value)) for argument in schema}
    assert set(given) <= set(arguments), f"{target} has no arguments {set(given) - set(arguments)}"
    results = run(target, arguments, tensors)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    dtypes = tuple(tensor.dtype for tensor in tensors)
    return Op(target, arguments, shapes, tuple(tuple(result.shape) for result in results), dtypes), tensors


def run(target: Any, arguments: dict[str, Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Calls `target` with `tensors` in place of the stand-ins."""

    def real(value: Any) -> Any:
        if isinstance(value, Operand):
            return tensors[value.index]
        return [real(item) for item in value] if isinstance(value, list) else value

    schema = [argument for argument in target._schema.arguments if argument.name in arguments]
    result = target(
        *(real(arguments[argument.name]) for argument in schema if not argument.kwarg_only),
        **{argument.name: real(arguments[argument.name]) for argument in schema if argument.kwarg_only},
    )
    return list(result) if isinstance(result, (tuple, list)) else [result]


def run_local(op: Op, rule: Rule, local: Local, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Calls what `rule` says that a rank calls."""
    changed = rule.localise(op, local) if rule.localise else {}
    if rule.local_target is None:
        return run(op.target, op.arguments | changed, tensors)
    kept = {name: value for name, value in op.arguments.items() if holds_tensor(value)}
    return run(rule.local_target, kept | changed, tensors)


def holds_tensor(value: Any) -> bool:
    return isinstance(value, Operand) or (isinstance(value, list) and any(map(holds_tensor, value)))


# Wrong factors


def wrong_cuts(op: Op, rule: Rule, factor: Factor, tensors: Sequence[Tensor]) -> Iterator[str]:
    """Cuts `factor` in every way and yields what went wrong."""
    reference = run(op.target, op.arguments, tensors)
    for segments in segmentations(factor):
        for ranks, even in ((2, True), (2, False), (3, True), (3, False)):
            parts = [[p for s in segments for p in piece(s, rank, ranks, even)] for rank in range(ranks)]
            if not all(parts):
                continue
            try:
                found = run_ranks(op, rule, factor, tensors, parts, reference)
            except Exception as error:  # noqa: BLE001 - whatever the operator raises
                yield f"{factor}: parts {parts}: {type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            if not all(map(same, found, reference, [op.target] * len(found))):
                yield f"{factor}: parts {parts}: values differ"


def segmentations(factor: Factor) -> list[list[range]]:
    """The factor's positions as segments that no window cuts, and the same with each segment halved."""
    spans = [span for span in (*factor.operands, *factor.results) if span is not None]
    edges = {edge for span in spans for edge in (span.start, span.start + span.length)} | {0, factor.size}
    middles = {(start + end) // 2 for start, end in pairwise(sorted(edges))}
    return [[range(*bounds) for bounds in pairwise(sorted(each))] for each in (edges, edges | middles)]


def piece(segment: range, rank: int, ranks: int, even: bool) -> range:
    """A rank's positions of one segment; if not `even`, all but the last have only one."""
    edges = [len(segment) * index // ranks for index in range(ranks + 1)]
    if not even and len(segment) >= ranks:
        edges = [*range(ranks), len(segment)]
    return segment[edges[rank] : edges[rank + 1]]


def run_ranks(
    op: Op,
    rule: Rule,
    factor: Factor,
    tensors: Sequence[Tensor],
    parts: Sequence[Sequence[int]],
    reference: Sequence[Tensor],
) -> list[Tensor]:
    """The operator on every rank's part of the factor, and its results put together."""
    found = [torch.zeros_like(result, memory_format=torch.contiguous_format) for result in reference]
    for positions in parts:
        cut = [take(tensor, span, positions) for tensor, span in zip(tensors, factor.operands, strict=True)]
        local = Local(
            operands=tuple(tuple(tensor.shape) for tensor in cut),
            results=tuple(map(cut_shape, op.results, factor.results, [positions] * len(op.results))),
            operand_starts=tuple(window_start(span, factor.size, positions) for span in factor.operands),
            result_starts=tuple(window_start(span, factor.size, positions) for span in factor.results),
        )
        results = run_local(op, rule, local, cut)
        assert len(results) == len(reference), "another number of results"
        for whole, part, shape, span in zip(found, results, local.results, factor.results, strict=True):
            assert tuple(part.shape) == shape, f"local shape {tuple(part.shape)}, not {shape}"
            assert part.dtype == whole.dtype, "another dtype"
            put(whole, part, span, positions)
    return found


def window_start(span: Span | None, size: int, positions: Sequence[int]) -> int:
    """Where a window begins among a rank's positions."""
    if span is None or span.length == size:
        return 0
    return sum(position < span.start for position in positions) * span.inner


def within(span: Span, positions: Sequence[int]) -> Tensor:
    """Those of the factor's positions that lie in the span, counted from its start."""
    inside = [position - span.start for position in positions if 0 <= position - span.start < span.length]
    return torch.tensor(inside, dtype=torch.long)


def cut_shape(shape: tuple[int, ...], span: Span, positions: Sequence[int]) -> tuple[int, ...]:
    size = span.outer * len(within(span, positions)) * span.inner
    return (*shape[: span.dim], size, *shape[span.dim + 1 :])


def spread(tensor: Tensor, span: Span, length: int) -> Tensor:
    """`tensor` with the span's dimension taken apart into outer, factor and inner."""
    shape = tensor.shape
    return tensor.reshape(*shape[: span.dim], span.outer, length, span.inner, *shape[span.dim + 1 :])


def take(tensor: Tensor, span: Span | None, positions: Sequence[int]) -> Tensor:
    """A rank's part of an operand, with the operand's order of strides."""
    if span is None:
        return tensor
    assert tensor.shape[span.dim] == span.outer * span.length * span.inner, "the span is not the dimension"
    part = spread(tensor, span, span.length).index_select(span.dim + 1, within(span, positions))
    return like_strides(part.reshape(cut_shape(tuple(tensor.shape), span, positions)), tensor)


def like_strides(part: Tensor, tensor: Tensor) -> Tensor:
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    return part.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def put(whole: Tensor, part: Tensor, span: Span, positions: Sequence[int]) -> None:
    """Writes a rank's part of a result into the whole one."""
    index = within(span, positions)
    if len(index):
        spread(whole, span, span.length).index_copy_(span.dim + 1, index, spread(part, span, len(index)))


def same(found: Tensor, reference: Tensor, target: Any) -> bool:
    if found.shape != reference.shape or found.dtype != reference.dtype:
        return False
    if target in UNINITIALISED:
        return True
    if reference.is_floating_point() or reference.is_complex():
        return torch.allclose(found, reference, rtol=1e-4, atol=1e-5, equal_nan=True)
    return torch.equal(found, reference)


# Windows


def wrong_windows(op: Op, rule: Rule, halo: Halo, tensors: Sequence[Tensor]) -> Iterator[str]:
    """Makes every part of the result of its window of the first operand and yields what went wrong."""
    (reference,) = run(op.target, op.arguments, tensors)
    parts = [(start, stop) for start in range(halo.size_out) for stop in range(start + 1, halo.size_out + 1)]
    for start, stop in parts:
        try:
            found = on_window(op, rule, halo, tensors, start, stop)
        except Exception as error:  # noqa: BLE001 - whatever the operator raises
            yield f"{halo}: part {start, stop}: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if not same(found, reference.narrow(halo.dim, start, stop - start), op.target):
            yield f"{halo}: part {start, stop}: values differ"


def on_window(op: Op, rule: Rule, halo: Halo, tensors: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Positions `[start, stop)` of the result, made of what they need and nothing else."""
    window = halo.window(start, stop)
    part = tensors[0].narrow(halo.dim, window.start, window.stop - window.start)
    if halo.edge == "filled":
        sizes = [[*part.shape] for _ in range(2)]
        sizes[0][halo.dim], sizes[1][halo.dim] = window.before, window.after
        before, after = (part.new_full(size, halo.value) for size in sizes)
        part = torch.cat([before, part, after], halo.dim)
    assert rule.on_window is not None, "no way to call the operator on a window"
    (found,) = run(
        rule.window_target or op.target, op.arguments | rule.on_window(op, halo, window), [part, *tensors[1:]]
    )
    return found.narrow(halo.dim, window.skip, window.count)


# Sums


def wrong_sums(op: Op, factor: Factor, tensors: Sequence[Tensor]) -> Iterator[str]:
    """Adds up what the operator makes of parts of what it sums over (of means, by their shares)."""
    (reference,) = run(op.target, op.arguments, tensors)
    is_mean = "mean" in str(op.target)
    for edge in range(1, factor.size):
        found = torch.zeros_like(reference)
        for part in (range(edge), range(edge, factor.size)):
            cut = [take(tensor, span, part) for tensor, span in zip(tensors, factor.operands, strict=True)]
            (made,) = run(op.target, op.arguments, cut)
            found = found + (made * (len(part) / factor.size) if is_mean else made)
        if not same(found, reference, op.target):
            yield f"{factor}: edge {edge}: values differ"


# Missing factors


def missing_factors(op: Op, rule: Rule, factors: Sequence[Factor], tensors: Sequence[Tensor]) -> list[str]:
    """The cuts `operand dims -> result dims` (None: whole) that work although no factor describes them."""
    listed = {plain(factor) for factor in factors}
    found = set(working(op, rule, tensors)) - listed
    for seed in (1, 2):
        if found:
            found &= set(
                working(op, rule, [refill(tensor, seed + index) for index, tensor in enumerate(tensors)], found)
            )
    return [f"{operands} -> {results}" for operands, results in sorted(found, key=str)]


Assignment = tuple[tuple[int | None, ...], tuple[int, ...]]


def plain(factor: Factor) -> Assignment | None:
    """The factor as a cut of plain dimensions, if cutting it in half is that."""
    spans = [span for span in (*factor.operands, *factor.results) if span is not None]
    if any(span.outer > 1 or span.length != factor.size for span in spans):
        return None
    return tuple(span.dim if span else None for span in factor.operands), tuple(span.dim for span in factor.results)


def working(
    op: Op, rule: Rule, tensors: Sequence[Tensor], candidates: set[Assignment] | None = None
) -> Iterator[Assignment]:
    reference = run(op.target, op.arguments, tensors)
    for operand_dims in product(*([None, *even_dims(shape)] for shape in op.operands)):
        halves = [[half(t, dim, rank) for t, dim in zip(tensors, operand_dims, strict=True)] for rank in (0, 1)]
        known: dict[str, list[list[Tensor]] | None] = {}
        for result_dims in product(*(even_dims(shape) for shape in op.results)):
            if candidates is not None and (operand_dims, result_dims) not in candidates:
                continue
            expected = [[half(t, dim, rank) for t, dim in zip(reference, result_dims, strict=True)] for rank in (0, 1)]
            local = [
                Local(
                    tuple(tuple(tensor.shape) for tensor in halves[rank]),
                    tuple(tuple(tensor.shape) for tensor in expected[rank]),
                    (0,) * len(op.operands),
                    (0,) * len(op.results),
                )
                for rank in (0, 1)
            ]
            try:
                key = str([rule.localise(op, each) for each in local] if rule.localise else "")
            except Exception:  # noqa: BLE001 - then it does not work
                continue
            if key not in known:
                try:
                    known[key] = [run_local(op, rule, local[rank], halves[rank]) for rank in (0, 1)]
                except Exception:  # noqa: BLE001 - then it does not work
                    known[key] = None
            found = known[key]
            if found is None:
                continue
            pairs = [pair for rank in (0, 1) for pair in zip(found[rank], expected[rank], strict=False)]
            if len(found[0]) == len(reference) and all(same(part, other, op.target) for part, other in pairs):
                yield operand_dims, result_dims


def even_dims(shape: Sequence[int]) -> list[int]:
    return [dim for dim, size in enumerate(shape) if size > 1 and size % 2 == 0]


def half(tensor: Tensor, dim: int | None, rank: int) -> Tensor:
    if dim is None:
        return tensor
    size = tensor.shape[dim] // 2
    return like_strides(tensor.narrow(dim, rank * size, size), tensor)


def refill(tensor: Tensor, seed: int) -> Tensor:
    """Other values of the same kind; integers are shuffled, so that indices stay in range."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.is_floating_point() or tensor.is_complex():
        values = torch.randn(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), generator=generator)
        return like_strides(values.to(tensor.dtype), tensor)
    order = torch.randperm(tensor.numel(), generator=generator)
    return like_strides(tensor.flatten()[order].reshape(tensor.shape), tensor)
