"""Calls that not all ranks make: each ends in an error within seconds, on every rank, and spoils no later call."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from capture import assert_equal
from pool import GROUP_TIMEOUT, Pool
from quick import quick
from test_backend_on_gloo import compiled, said_by, small, tokens
from torch import Tensor

from paracompile import backend, init_mesh
from paracompile.runtime.agreement import Agreement

PROMPT = 5.0  # seconds in which every rank must have been told

Told = list[tuple[str, float]]


def calls(model: Callable[..., Any], *lengths: int) -> Told:
    """What calls of these lengths raised."""
    with torch.no_grad():
        return [said_by(lambda length=length: model(tokens(length))) for length in lengths]


def assert_fine(told: Told) -> None:
    assert [text for text, _ in told] == [""] * len(told)


def assert_refused(told: Told, *texts: str) -> None:
    for text, seconds in told:
        for wanted in texts:
            assert re.search(wanted, text), text
        assert seconds < PROMPT


# Other things on other ranks


def with_other_compiled_sizes(rank: int, inputs: str) -> Told:
    return calls(compiled(small(), inputs=inputs), 20, 28, 28, 20 if rank else 28, 20, 28)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", quick(["broadcast", "check", "trust"], "broadcast"))
def test_other_sizes_that_are_compiled_already(four_ranks: Pool, inputs: str) -> None:
    results = four_ranks.run(with_other_compiled_sizes, inputs)
    for _, _, _, different, *after in results:
        assert_refused(
            [different],
            r"rank 0 is at stage 'call 3 of graph \d+ of Small at sizes 28' \(l_x_ of 3x28x24\)",
            r"rank [123] is at stage 'call 3 of graph \d+ of Small at sizes 20' \(l_x_ of 3x20x24\)",
            "call the model with the same on every rank",
        )
        assert_fine(after)
    for *before, _, _, _ in results:
        assert_fine(before)


def with_a_new_size_on_one(rank: int) -> Told:
    return calls(compiled(small()), 20, 28 if rank else 20, 20)


def test_one_rank_compiles_and_the_other_calls(two_ranks: Pool) -> None:
    for before, different, after in two_ranks.run(with_a_new_size_on_one):
        assert_fine([before, after])
        assert_refused([different], r"'call 2 of graph \d+ of Small' \(l_x_ of 3x20", "rank 1 is at stage 'options'")


def alone(rank: int) -> Told:
    model = compiled(small(), call_timeout=2.0)
    told = calls(model, 20, 20)
    if rank == 0:
        time.sleep(3)
    return told + calls(model, 20, 20)


@pytest.mark.slow
def test_one_rank_that_calls_alone_and_another_that_comes_too_late(four_ranks: Pool) -> None:
    for *before, refused, after in four_ranks.run(alone):
        assert_fine([*before, after])
        assert_refused([refused], r"call 3 of graph \d+ of Small", "rank 0 did not come within the 2 s", "call_timeout")


def late(rank: int) -> Told:
    model = compiled(small())
    told = calls(model, 20, 20)
    if rank == 0:
        time.sleep(1)
    return told + calls(model, 20, 20)


def test_a_rank_that_comes_later_than_promptly(two_ranks: Pool) -> None:
    for told in two_ranks.run(late):
        assert_fine(told)


# Process groups that are no more


def remade(rank: int, of_mesh: bool) -> tuple[Told, Tensor]:
    def made() -> Callable[..., Any]:
        return compiled(small(), mesh=init_mesh("cpu") if of_mesh else None)

    model = made()
    told = calls(model, 20, 20)
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    told += calls(model, 20)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("again", store),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=GROUP_TIMEOUT),
    )
    told += calls(model, 20)
    torch.compiler.reset()
    with torch.no_grad():
        return told, made()(tokens())


@pytest.mark.whole
@pytest.mark.parametrize("of_mesh", [False, True], ids=["world", "mesh"])
def test_a_group_that_was_destroyed_and_made_anew(two_ranks: Pool, of_mesh: bool) -> None:
    for (*before, destroyed, anew), output in two_ranks.run(remade, of_mesh):
        assert_fine(before)
        assert_refused([destroyed, anew], r"call 3 of graph \d+ of Small", "was destroyed", "torch.compiler.reset")
        assert_equal(output, small()(tokens()))


# Threads


def in_two_threads(rank: int) -> list[str]:
    """The second call comes while the first waits for another rank."""
    model = compiled(small(), call_timeout=2.0)
    assert_fine(calls(model, 20))
    told: list[str] = []

    def call() -> None:
        told.extend(text for text, _ in calls(model, 20))

    if rank == 0:
        first = threading.Thread(target=call)
        first.start()
        time.sleep(0.5)
        call()
        first.join()
    else:
        time.sleep(1)
        call()
    return told


def test_a_second_thread_is_refused_and_the_first_goes_on(two_ranks: Pool) -> None:
    first, other = two_ranks.run(in_two_threads)
    assert len(first) == 2
    assert re.search(r"call 2 of graph \d+ of Small: another thread of this process", first[0])
    assert first[1] == ""
    assert other == [""]


# What it costs


def many_meetings(rank: int, size: int) -> tuple[float, int]:
    agreement = Agreement(range(size), timeout=20)
    store = dist.distributed_c10d._get_default_store()
    agreement.meet("start")
    dist.barrier()
    before = store.num_keys()
    start = time.perf_counter()
    for _ in range(200):
        agreement.meet("call")
    seconds = (time.perf_counter() - start) / 200
    dist.barrier()
    return seconds, store.num_keys() - before


@pytest.mark.parametrize("size", [2, 4])
def test_meetings_are_quick_and_leave_no_keys(size: int, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    for seconds, keys in pool.run(many_meetings, size):
        assert seconds < 0.01  # of it 0.0001 to 0.0002 on an idle machine
        assert keys <= 4  # two counts, and the barriers' own


# A failure in the first call


def wrong_on_one(rank: int) -> Told:
    """What one rank computes differs from the original graph; all are told, and not in a collective."""
    compile_regions = backend.compile_regions

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        program, compilation = compile_regions(*args, **kwargs)
        return (lambda *arguments: tuple(1.1 * output for output in program(*arguments))), compilation

    told = calls(compiled(small(), verify=True), 20, 20)
    torch._dynamo.reset()
    with mock.patch.object(backend, "compile_regions", spoiled if rank == 1 else compile_regions):
        return told + calls(compiled(small(), verify=True), 20, 20)


def test_one_rank_s_graph_that_is_wrong_is_an_error_on_all(two_ranks: Pool) -> None:
    for *right, wrong, again in two_ranks.run(wrong_on_one):
        assert_fine(right)
        assert_refused([wrong, again], '"verify": the compiled graph and the original differ in output 0')
