"""Inputs that are shards already (`"shard_inputs": False`): each rank gets its slice of the whole attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pool, PoolError
from torch import Tensor

from paracompile import init_mesh

BATCH, HEADS, SIZE = 2, 6, 12


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(tokens: int) -> dict[str, tuple[Tensor | None, int | None]]:
    """A mask of every kind that a shard can have, and the dimension along which it is cut."""
    padding = torch.arange(tokens) < torch.tensor([tokens - 4, tokens - 1])[:, None]
    seen = draw(BATCH, 1, tokens, 1, seed=5) > -1
    nothing = padding.clone()
    nothing[1] = False
    return {
        "none": (None, None),
        "padding": (padding[:, None, None], -1),
        "for all": (padding[:1], -1),
        "for each head": (draw(BATCH, HEADS, 1, tokens, seed=6) > -1, -1),
        "additive": (draw(BATCH, 1, 1, tokens, seed=7), -1),
        "queries": (seen, -2),
        "a row sees nothing": (nothing[:, None, None], -1),
    }


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how) * 2


def compare(rank: int, ranks: int, tokens: int, ring: int, how: dict[str, Any]) -> dict[str, float]:
    """The largest difference to the slice of the whole attention, for every kind of mask."""
    options = {"mesh": init_mesh("cpu", max_ring_dim_size=ring), "shard_inputs": False, "compiler": "eager"}
    compiled = torch.compile(attend, backend="paracompile", options={**options, "timeout": 60}, dynamic=False)
    q, k, v = (draw(BATCH, HEADS, tokens, SIZE, seed=seed) for seed in range(3))
    own = [torch.chunk(x, ranks, 2)[rank] for x in (q, k, v)]
    found = {}
    with torch.no_grad():
        kinds = masks(tokens) if not how.get("is_causal") else {"causal": (None, None)}
        for name, (mask, dim) in kinds.items():
            expected = torch.chunk(attend(q, k, v, mask, **how), ranks, 2)[rank]
            part = mask if mask is None or dim is None else torch.chunk(mask, ranks, dim)[rank]
            found[name] = float((compiled(*own, part, **how) - expected).abs().max())
    return found


@pytest.mark.parametrize("tokens, ring", [(16, 1), (17, 1), (17, 2)])
def test_two_ranks_get_their_slices(tokens: int, ring: int, two_ranks: Pool) -> None:
    for found in two_ranks.run(compare, 2, tokens, ring, {}):
        assert len(found) == 7
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("ring", [1, 2])
def test_causal_attention_and_a_scale(ring: int, two_ranks: Pool) -> None:
    for found in two_ranks.run(compare, 2, 17, ring, {"is_causal": True, "scale": 0.7}):
        assert found["causal"] < 1e-5


@pytest.mark.slow
def test_four_ranks_get_their_slices(four_ranks: Pool) -> None:
    for found in four_ranks.run(compare, 4, 30, 2, {}):
        assert max(found.values()) < 1e-5, found


def cut_otherwise(rank: int) -> None:
    q, k, v = (draw(BATCH, HEADS, 16, SIZE, seed=seed) for seed in range(3))
    own = [x[:, :, :7] if rank == 0 else x[:, :, 7:] for x in (q, k, v)]
    options = {"mesh": init_mesh("cpu"), "shard_inputs": False, "compiler": "eager", "timeout": 60}
    with torch.no_grad():
        torch.compile(attend, backend="paracompile", options=options)(*own, None)


def part_of_a_mask(rank: int) -> None:
    q, k, v = (draw(BATCH, HEADS, 16, SIZE, seed=seed) for seed in range(3))
    own = [torch.chunk(x, 2, 2)[rank] for x in (q, k, v)]
    options = {"mesh": init_mesh("cpu"), "shard_inputs": False, "compiler": "eager", "timeout": 60}
    with torch.no_grad():
        torch.compile(attend, backend="paracompile", options=options)(*own, torch.ones(8, 8, dtype=torch.bool))


@pytest.mark.whole
@pytest.mark.parametrize(
    "function, message",
    [(cut_otherwise, r"\[7, 9\] tokens on the ranks"), (part_of_a_mask, "nothing of other ranks' keys")],
)
def test_what_is_refused_is_refused_on_every_rank(function: Any, message: str, two_ranks: Pool) -> None:
    with pytest.raises(PoolError, match=message) as caught:
        two_ranks.run(function)
    assert "rank 0" in str(caught.value)
    assert "rank 1" in str(caught.value)
