"""Ranks agree through the store, on real gloo processes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from pool import Pool, PoolError

from paracompile.errors import OptionError, RankError
from paracompile.runtime.agreement import Agreement, _diff

GRAPH = "\n".join(f"%add_{line} = add(%x_{line}, %y_{line})" for line in range(3000))


def said_by(agreement: Agreement, stage: str, facts: dict[str, str], error: str | None = None) -> str | None:
    """The RankError's text, or None when all agreed."""
    try:
        agreement.exchange(stage, facts=facts, error=error)
    except RankError as failure:
        return str(failure)
    return None


def keys(size: int) -> int:
    """Keys in the default store, once every rank has come here."""
    dist.barrier()
    count = dist.distributed_c10d._get_default_store().num_keys()
    dist.barrier()
    return count


def agree_often(rank: int, size: int) -> tuple[list[str | None], float, int]:
    agreement = Agreement(range(size), timeout=60)
    before = keys(size)
    start = time.perf_counter()
    said = [said_by(agreement, f"stage {turn}", {"graph": GRAPH, "options": "mode = None\n"}) for turn in range(20)]
    return said, (time.perf_counter() - start) / 20, keys(size) - before


def test_equal_facts_pass_and_leave_no_keys(two_ranks: Pool) -> None:
    for said, seconds, left in two_ranks.run(agree_often, 2):
        assert said == [None] * 20
        assert left <= 2  # the barriers' own
        assert seconds < 1


def differ(rank: int, size: int) -> str | None:
    changed = GRAPH.replace("%add_1234 = add", "%add_1234 = sub") if rank == 1 else GRAPH
    return said_by(Agreement(range(size), timeout=60), "plan", {"graph": changed, "options": "same"})


@pytest.mark.whole
@pytest.mark.parametrize("size", [2, 4])
def test_different_facts_raise_on_all_with_a_diff(size: int, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    texts = pool.run(differ, size)
    assert len(set(texts)) == 1
    text = texts[0]
    others = {2: "rank 0", 4: "ranks 0, 2, 3"}[size]
    assert f"stage 'plan': ranks differ in 'graph' ({others} / rank 1)" in text
    assert "-%add_1234 = add(%x_1234, %y_1234)" in text
    assert "+%add_1234 = sub(%x_1234, %y_1234)" in text
    assert "'options'" not in text
    assert len(text) < 1000


def fact_of_one(rank: int) -> str | None:
    return said_by(Agreement((0, 1), timeout=60), "plan", {"extra": "a\nb"} if rank == 0 else {})


def test_a_fact_that_one_rank_lacks(two_ranks: Pool) -> None:
    for text in two_ranks.run(fact_of_one):
        assert "ranks differ in 'extra' (rank 0 / rank 1)" in text
        assert "-a" in text


def fail_on_two(rank: int) -> tuple[str, str, float]:
    agreement = Agreement(range(4), timeout=60)
    start = time.perf_counter()
    try:
        with agreement.stage("passes") as facts:
            facts["graph"] = "same"
            if rank == 2:
                raise OptionError("mode", "fast", "give another")
    except (RankError, OptionError) as failure:
        kind, text = type(failure).__name__, str(failure)
    waited = time.perf_counter() - start
    with agreement.stage("after") as facts:
        facts["graph"] = "same"
    return kind, text, waited


def test_an_error_on_one_rank_is_raised_on_all(four_ranks: Pool) -> None:
    results = four_ranks.run(fail_on_two)
    own = "paracompile option 'mode' = 'fast': give another"
    assert results[2][:2] == ("OptionError", own)
    for rank in (0, 1, 3):
        assert results[rank][:2] == ("RankError", f"rank 2 failed at stage 'passes': OptionError: {own}")
    assert max(waited for *_, waited in results) < 10


def come_late(rank: int) -> tuple[str | None, float]:
    agreement = Agreement((0, 1), timeout=1.0)
    if rank == 1:
        time.sleep(3)
    start = time.perf_counter()
    return said_by(agreement, "plan", {"graph": GRAPH}), time.perf_counter() - start


def test_an_absent_rank_times_out_and_a_late_one_is_told(two_ranks: Pool) -> None:
    (early, waited), (late, _) = two_ranks.run(come_late)
    assert 1 <= waited < 3
    assert early == late  # had the late rank walked on, it would wait in its first collective for ever
    assert "rank 1 did not come within the 1 s that rank 0 waited" in early
    assert "recompiled alone" in early
    assert "timeout" in early


def other_stage(rank: int) -> str | None:
    return said_by(Agreement((0, 1), timeout=60), "options" if rank else "plan", {})


def test_ranks_at_different_stages_are_told_at_once(two_ranks: Pool) -> None:
    for text in two_ranks.run(other_stage):
        assert "stage 'plan'" in text
        assert "stage 'options'" in text


def part_of_the_world(rank: int) -> str | None:
    mine = (0, 2) if rank in (0, 2) else (1, 3)
    return said_by(Agreement(mine, timeout=60), "plan", {"graph": str(mine)})


def test_two_meshes_do_not_disturb_each_other(four_ranks: Pool) -> None:
    assert four_ranks.run(part_of_the_world) == [None] * 4


def test_one_rank_needs_nobody() -> None:
    with Agreement((0,), timeout=1).stage("plan") as facts:
        facts["graph"] = "alone"


def test_the_diff_is_short_and_quick_on_texts_that_share_nothing() -> None:
    start = time.perf_counter()
    text = _diff(GRAPH, GRAPH.replace("add", "sub"), "rank 0", "rank 1")
    assert time.perf_counter() - start < 10
    assert len(text.splitlines()) < 40


def boom(rank: int) -> int:
    if rank == 1:
        raise ValueError("only here")
    return rank


def pid(rank: int) -> int:
    import os

    return os.getpid()


def test_the_pool_tells_a_rank_s_failure_and_recovers(two_ranks: Pool) -> None:
    before = two_ranks.run(pid)
    assert two_ranks.run(pid) == before  # one pool, kept
    with pytest.raises(PoolError, match=r"(?s)boom.*rank 1: .*ValueError: only here"):
        two_ranks.run(boom)
    assert not set(two_ranks.run(pid)) & set(before)


def test_of_ranks_that_give_up_on_a_full_count_all_go_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three comes between the others' last look at the count and their closing it."""
    store = dist.HashStore()
    agreement = Agreement(range(3), timeout=10)
    monkeypatch.setattr(Agreement, "_forget_old_count", lambda *_, **__: None)
    looked, came = threading.Barrier(3), threading.Barrier(3)
    asked = threading.local()

    def clock() -> float:
        asked.times = getattr(asked, "times", 0) + 1
        if asked.times > 1:  # not the beginning, which says how long to wait
            looked.wait(10)
            came.wait(10)
        return 1e9 * asked.times

    monkeypatch.setattr("paracompile.runtime.agreement.time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(agreement._count, store, "a call") for _ in range(2)]
        looked.wait(10)
        last = agreement._count(store, "a call")
        came.wait(10)
        assert [each.result(10) for each in waiting] == [last, last] == [True, True]
