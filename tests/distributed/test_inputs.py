"""Ranks agree on a compiled graph's inputs, on real gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from paracompile.errors import ParacompileError, RankError
from paracompile.mesh import Ranks, init_mesh
from paracompile.runtime.inputs import InputAgreement, digest

WEIGHT = 2  # the position among the arguments that is no run-time input


def arguments(seed: int) -> list[Any]:
    """Inputs of every awkward kind; another seed gives other values of the same shapes, dtypes and strides."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    nan = normal(3)
    nan[1] = float("nan")
    return [
        normal(2, 7, 5),
        7,
        normal(5, 5),
        normal(2, 7, 5, dtype=torch.bfloat16),
        normal((), dtype=torch.float64),
        torch.randint(0, 1000, (11,), generator=draw),
        normal(3, 3) > 0,
        normal(4, 3, dtype=torch.complex64),
        torch.empty(0, 4),
        normal(5, 7).t(),
        normal(6, 8)[:, ::2],
        normal(1, 5).expand(4, 5),
        normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        nan,
        normal(4, dtype=torch.complex64).conj(),
        "text",
        normal(3, 2).to(torch.float8_e4m3fn),
        normal(9)[1:],
    ]


INPUTS = tuple(index for index in range(len(arguments(0))) if index != WEIGHT)


def same(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor):
        return bool(left == right)
    kind = left.shape == right.shape and left.dtype == right.dtype
    return kind and bool(digest(left) == digest(right))


def broadcast(rank: int, size: int, guard: str) -> list[str]:
    """What went wrong, in words."""
    wrong = []
    world = dist.group.WORLD
    group = world.group_name if guard == "none" else world
    before, own, expected = arguments(rank), arguments(rank), arguments(1)
    with {"none": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[guard]():
        got = InputAgreement("broadcast", INPUTS, group, source=1)(own)
    for index, (new, mine, untouched, want) in enumerate(zip(got, own, before, expected, strict=True)):
        if not same(mine, untouched):
            wrong.append(f"argument {index} was written to")
        if index == WEIGHT:
            if new is not mine:
                wrong.append("the weight was replaced")
            continue
        if index in (1, 15):
            continue
        if not same(new, want):
            wrong.append(f"argument {index}: {new} instead of {want}")
        if new.stride() != want.stride():
            wrong.append(f"argument {index}: strides {new.stride()} instead of {want.stride()}")
        if rank == 1 and new is not mine:
            wrong.append(f"argument {index}: the source's own was replaced")
    return wrong


@pytest.mark.parametrize("guard", ["none", "no_grad", "inference"])
def test_broadcast_gives_the_source_s_inputs(two_ranks: Pool, guard: str) -> None:
    assert two_ranks.run(broadcast, 2, guard) == [[], []]


def overwritten(rank: int, guard: str) -> list[str]:
    """What went wrong with inputs that the caller sees again, in words."""
    wrong = []
    own, others = arguments(rank), arguments(1)
    versions = [None if not isinstance(value, Tensor) else value._version for value in own]
    if rank == 0:
        with torch.inference_mode():
            own[0] = own[0].clone()
    before = list(own)
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}[guard]():
        InputAgreement("broadcast", INPUTS, dist.group.WORLD, source=1, in_place=frozenset(INPUTS))(own)
    for index in INPUTS:
        if index in (1, 8, 15):  # the number, the empty tensor, the text
            continue
        if own[index] is not before[index] or not same(own[index], others[index]):
            wrong.append(f"argument {index}: {own[index]} instead of {others[index]}")
        if not own[index].is_inference() and own[index]._version != versions[index]:
            wrong.append(f"argument {index} has another version")
    return wrong


@pytest.mark.parametrize("guard", ["no_grad", "inference"])
def test_what_the_caller_sees_again_receives_the_source_s_values_itself(two_ranks: Pool, guard: str) -> None:
    assert two_ranks.run(overwritten, guard) == [[], []]


def count_broadcasts(rank: int) -> int:
    with torch.profiler.profile() as profile:
        InputAgreement("broadcast", INPUTS, dist.group.WORLD, source=0)(arguments(rank))
    return sum(event.count for event in profile.key_averages() if event.key == "c10d::broadcast_")


def test_one_broadcast_for_all_inputs(two_ranks: Pool) -> None:
    assert two_ranks.run(count_broadcasts) == [1, 1]


def unseeded(rank: int) -> Tensor:
    torch.seed()
    noise = torch.randn(2, 16, 8)
    return InputAgreement("broadcast", (0,), dist.group.WORLD, source=0)([noise])[0]


def test_unseeded_noise_becomes_one(four_ranks: Pool) -> None:
    first, *others = four_ranks.run(unseeded)
    assert all(torch.equal(first, other) for other in others)


def over_a_mesh(rank: int) -> tuple[Any, ...]:
    ranks = Ranks.from_mesh(init_mesh("cpu"))
    agreement = InputAgreement("broadcast", (0,), ranks.ulysses.group, source=ranks.members[0])
    return ranks.ulysses.size, ranks.sequence_rank, ranks.members, int(agreement([torch.tensor(rank + 5)])[0])


def test_groups_and_ranks_of_a_mesh(four_ranks: Pool) -> None:
    assert four_ranks.run(over_a_mesh) == [(4, rank, (0, 1, 2, 3), 5) for rank in range(4)]


def check(rank: int, seeds: tuple[int, ...], changes: dict[int, Any]) -> str | None:
    args = arguments(seeds[rank])
    if rank == len(seeds) - 1:
        for index, value in changes.items():
            args[index] = value
    names = tuple(f"input_{index}" for index in INPUTS)
    agreement = InputAgreement("check", INPUTS, dist.group.WORLD, source=0, names=names)
    try:
        with torch.inference_mode():
            got = agreement(args)
    except RankError as failure:
        return str(failure)
    assert all(new is old for new, old in zip(got, args, strict=True))
    return None


def test_check_passes_equal_inputs_nan_included(two_ranks: Pool) -> None:
    assert two_ranks.run(check, (3, 3), {}) == [None, None]
    # Strides are no difference, and weights are not looked at.
    assert two_ranks.run(check, (3, 3), {9: arguments(3)[9].contiguous(), WEIGHT: torch.ones(1)}) == [None, None]


def test_check_names_inputs_and_ranks_everywhere(four_ranks: Pool) -> None:
    shifted = arguments(3)[0]
    shifted[1, 6, 4] = shifted[1, 6, 4].nextafter(torch.tensor(9.0))
    texts = four_ranks.run(check, (3, 3, 3, 3), {0: shifted, 1: 8, 5: torch.zeros(12)})
    assert len(set(texts)) == 1
    assert "'input_0' (values): rank 3 and rank 0 differ" in texts[0]
    assert "'input_1' (shape, dtype or number): rank 3 and rank 0 differ" in texts[0]
    assert "'input_5' (shape, dtype or number)" in texts[0]
    assert "'input_3'" not in texts[0]
    assert "generator" in texts[0]


def test_check_finds_every_kind_of_input(two_ranks: Pool) -> None:
    text = two_ranks.run(check, (3, 4), {})[1]
    missing = [i for i in INPUTS if f"'input_{i}'" not in text]
    assert missing == [1, 8, 15]  # the number, the empty tensor, the text: equal for all seeds


def trust(rank: int) -> bool:
    args = arguments(rank)
    got = InputAgreement("trust", INPUTS, "no such group", source=0)(args)
    return got is not args and all(new is old for new, old in zip(got, args, strict=True))


def test_trust_is_the_identity(two_ranks: Pool) -> None:
    assert two_ranks.run(trust) == [True, True]


def sparse(rank: int) -> str:
    with pytest.raises(ParacompileError) as caught:
        InputAgreement("broadcast", (0,), dist.group.WORLD, source=0, names=("ids",))([torch.eye(3).to_sparse()])
    return str(caught.value)


def test_inputs_that_cannot_be_sent_are_refused(two_ranks: Pool) -> None:
    for text in two_ranks.run(sparse):
        assert "'ids'" in text
        assert "trust" in text


@pytest.mark.parametrize("size", [1, 7, 8, 4096, 65536 * 4])
def test_digest_tells_small_changes(size: int) -> None:
    values = torch.randn(size)
    seen = {int(digest(values)), int(digest(-values)), int(digest(values.abs().neg()))}
    changed = values.clone()
    changed[-1] = changed[-1].nextafter(torch.tensor(100.0))
    seen.add(int(digest(changed)))
    if size > 8:
        two = values.clone()
        two[[1, 3]] *= -1  # two sign bits, which a weighted sum cancels
        seen |= {int(digest(two)), int(digest(values.flip(0))), int(digest(values.roll(2)))}
        assert len(seen) == 7
    else:
        assert len(seen) >= 3


def test_digest_ignores_strides_and_offsets() -> None:
    values = torch.randn(6, 4)
    assert digest(values.t()) == digest(values.t().contiguous())
    assert digest(values.flatten()[1:]) == digest(values.flatten()[1:].clone())
