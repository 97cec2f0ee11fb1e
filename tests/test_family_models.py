"""A check of the tests themselves: the small models would show a mistake in any attention, weight or size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from capture import captured, deviation, sharded
from families import FAMILIES
from torch import Tensor

all_families = pytest.mark.parametrize("family", FAMILIES)


@contextmanager
def half_hidden(number: int, *, last: bool) -> Iterator[list[tuple[int, ...]]]:
    """Attention `number` of the model sees one half of its keys only. Gives the queries' shapes of all attentions."""
    attention = torch.nn.functional.scaled_dot_product_attention
    seen: list[tuple[int, ...]] = []

    def hide(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(seen) == number:
            half = key.shape[-2] // 2
            window = slice(half, None) if last else slice(half)
            key, value = key[..., window, :], value[..., window, :]
        seen.append(tuple(query.shape))
        return attention(query, key, value, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", hide):
        yield seen


@all_families
@pytest.mark.parametrize("last", [False, True], ids=["first half", "last half"])
def test_hiding_half_of_any_attention_s_keys_moves_the_output(family: str, last: bool) -> None:
    whole = captured(family)
    count = FAMILIES[family].self_attentions + FAMILIES[family].cross_attentions
    for number in range(count):
        with half_hidden(number, last=last) as seen, torch.no_grad():
            (output,) = whole.model(**whole.inputs)
        assert len(seen) == count
        assert deviation(output, whole.expected) > 10, f"attention {number}"


@all_families
def test_no_parameter_is_zero(family: str) -> None:
    for name, parameter in captured(family).model.named_parameters():
        assert parameter.count_nonzero() == parameter.numel(), name


@all_families
def test_sizes_are_pairwise_different(family: str) -> None:
    with half_hidden(0, last=False) as seen, torch.no_grad():
        captured(family).model(**captured(family).inputs)
    batch, heads, _, head_size = max(seen)
    plan = sharded(family, 2).plans[0]
    segments = max(plan.segments.values.values(), key=len)
    text = captured(family).inputs["encoder_hidden_states"].shape[1]
    sizes = [batch, heads, head_size, *{*segments, sum(segments), text}]
    assert len(set(sizes)) == len(sizes)
