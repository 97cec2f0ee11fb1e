"""Partial attentions and their log-sum-exp: against float64, and merged in any order and number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
from random_tensors import draw
from small_models import IMAGE, WIDTH, Mesh, assert_sharded, heads, image_tokens, mesh_name
from small_models import merge as merge_heads
from torch import Tensor

from paracompile.runtime.kernels import attention_with_lse, reference
from paracompile.runtime.ring import merge

QUERIES, KEYS, HEADS, SIZE, BATCH = 5, 7, 6, 8, 2
Partial = tuple[Tensor, Tensor]


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: Tensor | None, scale: float | None
) -> Partial:
    """The definition, head by head in float64, with the sums written out."""
    groups = query.shape[-3] // max(1, key.shape[-3])
    key, value = (part.double().repeat_interleave(groups, dim=-3) for part in (key, value))
    scores = torch.einsum("...qc,...kc->...qk", query.double(), key) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    if offset is not None:
        scores = scores - offset.double()
    if 0 in scores.shape:
        shape = (*scores.shape[:-1], value.shape[-1])
        return query.new_zeros(shape).double(), query.new_full(shape[:-1], -math.inf).double()
    largest = scores.amax(-1, keepdim=True)
    seen = largest != -math.inf
    weights = torch.where(seen, (scores - torch.where(seen, largest, 0.0)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    result = torch.where(seen, weights @ value / torch.where(seen, total, 1.0), 0.0)
    return result, (total.log() + largest).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """One call of attention."""

    batch: tuple[int, ...] = (BATCH,)
    key_batch: tuple[int, ...] | None = None
    heads: int = HEADS
    key_heads: int = HEADS
    queries: int = QUERIES
    keys: int = KEYS
    value_size: int = SIZE
    mask: Callable[[], Tensor] | None = None
    offset: Callable[[], Tensor] | None = None
    scale: float | None = None
    factor: float = 1.0
    dtype: torch.dtype = torch.float32

    def arguments(self) -> tuple[Any, ...]:
        query = draw(*self.batch, self.heads, self.queries, SIZE, seed=1) * self.factor
        key_batch = self.batch if self.key_batch is None else self.key_batch
        key = draw(*key_batch, self.key_heads, self.keys, SIZE, seed=2)
        value = draw(*key_batch, self.key_heads, self.keys, self.value_size, seed=3)
        mask, offset = (make() if make else None for make in (self.mask, self.offset))
        return *(part.to(self.dtype) for part in (query, key, value)), mask, offset, self.scale


def sees(*shape: int) -> Tensor:
    """Hides about half, and all keys from query 1."""
    seen = draw(*shape, seed=4) > 0
    if shape[-2] > 1:
        seen[..., 1, :] = False
    return seen


def additive(*shape: int, hidden: float = -math.inf) -> Tensor:
    return (draw(*shape, seed=5) * 2).masked_fill(~sees(*shape), hidden)


CASES = {
    "plain": Case(),
    "no batch": Case(batch=()),
    "two batch dimensions": Case(batch=(BATCH, 3)),
    "keys of one row for all": Case(key_batch=(1,)),
    "queries of one row for all": Case(batch=(1,), key_batch=(BATCH,)),
    "batches that broadcast both ways": Case(batch=(BATCH, 1), key_batch=(1, 3)),
    "keys without a batch": Case(key_batch=()),
    "keys of one row for all, grouped": Case(key_batch=(1,), key_heads=2),
    "keys of one row for all, boolean": Case(key_batch=(1,), mask=lambda: sees(BATCH, HEADS, QUERIES, KEYS)),
    "queries of one row for all, additive": Case(
        batch=(1,),
        key_batch=(BATCH,),
        mask=lambda: additive(BATCH, 1, QUERIES, KEYS),
        offset=lambda: draw(BATCH, 1, QUERIES, 1, seed=6),
    ),
    "no keys, of one row for all": Case(key_batch=(1,), keys=0),
    "queries of one row for all, no keys": Case(batch=(1,), key_batch=(BATCH,), keys=0),
    "one query": Case(queries=1),
    "one key": Case(keys=1),
    "many keys": Case(keys=600),
    "no keys": Case(keys=0),
    "no queries": Case(queries=0),
    "no heads": Case(heads=0, key_heads=0),
    "no keys, mask": Case(keys=0, mask=lambda: sees(QUERIES, 0)),
    "no keys, grouped": Case(keys=0, key_heads=2, value_size=3),
    "scale": Case(scale=0.9),
    "large scores": Case(factor=100.0),
    "smaller values": Case(value_size=3),
    "larger values": Case(value_size=11),
    "grouped": Case(key_heads=2),
    "one key head": Case(key_heads=1),
    "grouped, smaller values": Case(key_heads=3, value_size=3),
    "boolean": Case(mask=lambda: sees(BATCH, HEADS, QUERIES, KEYS)),
    "boolean, queries x keys": Case(mask=lambda: sees(QUERIES, KEYS)),
    "boolean, keys of each row": Case(mask=lambda: sees(BATCH, 1, 1, KEYS)),
    "boolean, each head": Case(mask=lambda: sees(HEADS, QUERIES, KEYS)),
    "boolean, one column": Case(mask=lambda: sees(BATCH, HEADS, QUERIES, 1)),
    "boolean, two batch dimensions": Case(batch=(BATCH, 3), mask=lambda: sees(3, 1, QUERIES, KEYS)),
    "boolean, no batch": Case(batch=(), mask=lambda: sees(QUERIES, KEYS)),
    "boolean, hides all": Case(mask=lambda: torch.zeros(QUERIES, KEYS, dtype=torch.bool)),
    "boolean, grouped": Case(key_heads=2, mask=lambda: sees(HEADS, QUERIES, KEYS)),
    "additive": Case(mask=lambda: additive(BATCH, HEADS, QUERIES, KEYS)),
    "additive, keys of each row": Case(mask=lambda: additive(BATCH, 1, 1, KEYS)),
    "additive, -1e4": Case(mask=lambda: draw(QUERIES, KEYS, seed=5).masked_fill(sees(QUERIES, KEYS), -1e4)),
    "additive, smaller values, grouped": Case(
        key_heads=3, value_size=3, mask=lambda: additive(BATCH, HEADS, QUERIES, KEYS)
    ),
    "additive, hides all": Case(mask=lambda: torch.full((QUERIES, KEYS), -math.inf)),
    "additive with an offset": Case(
        mask=lambda: additive(BATCH, HEADS, QUERIES, KEYS),
        offset=lambda: draw(BATCH, 1, QUERIES, 1, seed=6) * 10,
    ),
}


def same(found: Partial, expected: Partial, tolerance: float = 3e-6, lse_tolerance: float = 3e-6) -> None:
    """Relative to the largest value; where no key is seen, exactly 0 and -inf."""
    for one, other, allowed in zip(found, expected, (tolerance, lse_tolerance), strict=True):
        assert one.shape == other.shape
        assert not one.isnan().any()
        finite = other[other.isfinite()]
        largest = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=allowed * largest)
    unseen = expected[1] == -math.inf
    assert torch.equal(found[1] == -math.inf, unseen)
    assert (found[0][unseen] == 0).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_and_its_lse_are_those_of_float64(case: Case) -> None:
    arguments = case.arguments()
    result, lse = attention_with_lse(*arguments)
    assert (result.dtype, lse.dtype) == (torch.float32, torch.float32)
    same((result, lse), exact(*arguments), tolerance=3e-5 if case.factor > 1 else 3e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keys and case.key_heads == HEADS])
def test_the_reference_is_that_of_float64(name: str) -> None:
    *tensors, scale = CASES[name].arguments()
    found = reference(*tensors, SIZE**-0.5 if scale is None else scale)
    same(found, exact(*tensors, scale), tolerance=3e-5 if CASES[name].factor > 1 else 3e-6)


def test_the_reference_keeps_the_precision_of_double() -> None:
    query, key, value, mask, *_ = CASES["boolean"].arguments()
    doubles = [part.double() for part in (query, key, value)]
    result, lse = reference(*doubles, mask, None, 0.3)
    expected, _ = exact(*doubles, mask, None, 0.3)
    assert (result.dtype, lse.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_double_keeps_its_precision_around_a_ring(masked: bool) -> None:
    weight = draw(3 * WIDTH, WIDTH).double() * WIDTH**-0.5
    mask = sees(IMAGE, IMAGE) if masked else None

    def model(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in torch.nn.functional.linear(x, weight).chunk(3, dim=-1))
        return merge_heads(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))

    assert_sharded(model, [image_tokens(WIDTH).double(), weight], {"ring": 3}, tolerance=1e-14)


@pytest.mark.parametrize("mesh", [{"ring": 2}, {"ring": 2, "ulysses": 2}, {"ulysses": 2}], ids=mesh_name)
def test_autocast_takes_queries_and_keys_to_the_type_of_the_values(mesh: Mesh) -> None:
    """Norms and rotations leave queries and keys in float32, and the values come from a linear."""
    weight = draw(3 * WIDTH, WIDTH) * WIDTH**-0.5

    def model(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = (heads(part) for part in torch.nn.functional.linear(x, weight).chunk(3, dim=-1))
            return merge_heads(torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v))

    sharded = assert_sharded(model, [image_tokens(WIDTH), weight], mesh, tolerance=1e-2)
    assert sharded.result.dtype is torch.bfloat16


HALF = ("plain", "many keys", "grouped", "smaller values", "boolean", "additive", "no keys", "boolean, hides all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_has_an_lse_in_float32(name: str, dtype: torch.dtype) -> None:
    """The scores are summed in float32: the LSE is that of the rounded inputs, far below the type's own rounding."""
    query, key, value, mask, *rest = CASES[name].arguments()
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    arguments = (*(part.to(dtype) for part in (query, key, value)), mask, *rest)
    result, lse = attention_with_lse(*arguments)
    assert (result.dtype, lse.dtype) == (dtype, torch.float32)
    same((result, lse), exact(*arguments), tolerance=2 * torch.finfo(dtype).eps, lse_tolerance=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_strides_do_not_matter(masked: bool) -> None:
    """Heads come transposed, keys and values as windows of one buffer; results lie tokens outermost."""
    query = draw(BATCH, QUERIES, HEADS, SIZE).transpose(1, 2)
    buffer = draw(BATCH, HEADS, KEYS, 2 * SIZE, seed=2)
    mask = sees(KEYS, QUERIES).t() if masked else None
    arguments = (query, buffer[..., :SIZE], buffer[..., ::2], mask, None, None)
    result, lse = attention_with_lse(*arguments)
    same((result, lse), exact(*arguments))
    assert result.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_an_offset_keeps_the_lse_exact_where_large_numbers_hide_all_of_a_row(hidden: float) -> None:
    """softmax(scores + c) is softmax(scores), but float32 cannot hold scores + c: less the offset it need not."""
    query, key, value, *_ = Case().arguments()
    mask = torch.full((QUERIES, KEYS), hidden)
    _, lse = attention_with_lse(query, key, value, mask, mask.amax(-1, keepdim=True), None)
    found = lse.double()
    rounded = ((query @ key.transpose(-2, -1) * SIZE**-0.5 + hidden) - hidden).double().logsumexp(-1)
    torch.testing.assert_close(found, rounded, rtol=0, atol=1e-5)


def test_queries_keys_and_values_that_lie_interleaved_go_around_the_ring() -> None:
    """The last dimension's stride is 3: PyTorch's flash kernel for the CPU would read past it in silence."""
    weight = draw(3 * WIDTH, WIDTH) * WIDTH**-0.5

    def model(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = heads(torch.nn.functional.linear(x, weight), HEADS).unflatten(-1, (-1, 3)).unbind(-1)
        return merge_heads(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    assert_sharded(model, [image_tokens(WIDTH), weight], {"ring": 2})


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "mesh",
    [{"ring": 2}, {"ulysses": 2}, {"ring": 2, "ulysses": 2}, {"batch": 2}, {"batch": 2, "ring": 2}],
    ids=mesh_name,
)
@pytest.mark.parametrize("rows", ["queries", "keys"])
def test_queries_or_keys_of_one_row_serve_all_rows_of_the_others(rows: str, mesh: Mesh) -> None:
    weight = draw(3 * WIDTH, WIDTH) * WIDTH**-0.5

    def model(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in torch.nn.functional.linear(x, weight).chunk(3, dim=-1))
        q, k, v = (q[:1], k, v) if rows == "queries" else (q, k[:1], v[:1])
        return x + merge_heads(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    sharded = assert_sharded(model, [image_tokens(WIDTH), weight], mesh)
    assert not any("attention" in name for name in sharded.whole_operations())


FAKES = (
    "plain",
    "no batch",
    "batches that broadcast both ways",
    "queries of one row for all, no keys",
    "no keys",
    "no queries",
    "grouped",
    "larger values",
    "boolean",
    "additive with an offset",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAKES)
def test_fake_shapes_are_the_real_ones(name: str, dtype: torch.dtype) -> None:
    query, key, value, *rest = CASES[name].arguments()
    arguments = (*(part.to(dtype) for part in (query, key, value)), *rest)
    torch.library.opcheck(attention_with_lse, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_operator_compiles() -> None:
    """Also with sizes that are symbols, through AOTAutograd."""
    torch.library.opcheck(attention_with_lse, CASES["additive with an offset"].arguments())


# Merging


def run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def merged(first: Partial, second: Partial) -> Partial:
    result, lse = merge(run, *first, *second)
    return result, lse


def in_a_row(parts: Sequence[Partial]) -> Partial:
    return reduce(merged, parts)


def backwards(parts: Sequence[Partial]) -> Partial:
    return reduce(merged, parts[::-1])


def in_pairs(parts: Sequence[Partial]) -> Partial:
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return merged(in_pairs(parts[middle:]), in_pairs(parts[:middle]))


def partials(case: Case, lengths: Sequence[int]) -> list[Partial]:
    """Attention to each part of the keys by itself, in float32."""
    query, key, value, mask, offset, scale = case.arguments()
    found, start = [], 0
    for length in lengths:
        window = slice(start, start + length)
        part = mask[..., window] if mask is not None and mask.shape[-1] > 1 else mask
        result, lse = attention_with_lse(query, key[..., window, :], value[..., window, :], part, offset, scale)
        found.append((result.float(), lse))
        start += length
    assert start == case.keys
    return found


MERGED = (
    "plain",
    "keys of one row for all, grouped",
    "queries of one row for all, additive",
    "large scores",
    "grouped, smaller values",
    "boolean",
    "boolean, keys of each row",
    "boolean, one column",
    "boolean, hides all",
    "additive",
    "additive with an offset",
)


@pytest.mark.parametrize("order", [in_a_row, backwards, in_pairs])
@pytest.mark.parametrize(
    "lengths", [(7,), (3, 4), (1, 6), (0, 7), (7, 0), (0, 0, 7), (2, 0, 5), (2, 2, 2, 1), (1,) * 7], ids=str
)
@pytest.mark.parametrize("name", MERGED)
def test_parts_in_any_order_and_number_give_the_whole(
    name: str, lengths: tuple[int, ...], order: Callable[[Sequence[Partial]], Partial]
) -> None:
    case = CASES[name]
    found = order(partials(case, lengths))
    same(found, exact(*case.arguments()), tolerance=1e-4 if case.factor > 1 else 3e-6)


def test_a_part_in_which_nothing_is_seen_changes_no_bit() -> None:
    (part,) = partials(CASES["boolean"], [KEYS])
    nothing = torch.zeros_like(part[0]), torch.full_like(part[1], -math.inf)
    for found in (merged(part, nothing), merged(nothing, part)):
        assert torch.equal(found[0], part[0])
        assert torch.equal(found[1], part[1])


def test_nothing_merged_with_nothing_is_nothing() -> None:
    nothing = torch.zeros(BATCH, HEADS, QUERIES, SIZE), torch.full((BATCH, HEADS, QUERIES), -math.inf)
    result, lse = merged(nothing, nothing)
    assert torch.equal(result, nothing[0])
    assert torch.equal(lse, nothing[1])


@pytest.mark.parametrize("apart", [50.0, 1e3, 1e30])
def test_parts_whose_lse_are_far_apart(apart: float) -> None:
    """The lighter part weighs nothing, and nothing overflows."""
    heavy = draw(1, 1, 3, 4), torch.full((1, 1, 3), apart)
    light = draw(1, 1, 3, 4, seed=2), torch.full((1, 1, 3), -apart)
    for found in (merged(heavy, light), merged(light, heavy)):
        same(found, (heavy[0].double(), heavy[1].double()), tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_half_precision_parts_stays_in_float32(dtype: torch.dtype) -> None:
    """As the ring does: the first part is taken to float32, the others are merged as they come."""
    query, key, value, *_ = (part.to(dtype) if isinstance(part, Tensor) else part for part in Case().arguments())
    parts = [attention_with_lse(query, key[..., w, :], value[..., w, :], None, None, None) for w in _windows((3, 2, 2))]
    found = reduce(merged, parts[1:], (parts[0][0].float(), parts[0][1]))
    assert found[0].dtype is torch.float32
    same(
        found,
        exact(query, key, value, None, None, None),
        tolerance=2 * torch.finfo(dtype).eps,
        lse_tolerance=1e-5,
    )


def _windows(lengths: Sequence[int]) -> list[slice]:
    return [slice(sum(lengths[:index]), sum(lengths[: index + 1])) for index in range(len(lengths))]
