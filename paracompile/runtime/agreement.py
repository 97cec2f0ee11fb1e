"""Ranks agree while they compile and before each call, through the key-value store that their group was started with.

Never through a collective: a rank that recompiles alone, or that failed before it came here, would leave the others in
a collective that nobody completes. The store needs nobody else, so every wait has an end and a message.

Before a call there is only one question, whether all ranks make it, and `Agreement.meet` mostly answers it in two
trips to the store: each rank adds one to a count, and reads it until it is full. Where that takes longer, the count is
closed (by one rank, so that either all go by it or none) and the ranks exchange what they are about, as
they do while compiling; so it does not matter which of them calls and which compiles.

One exchange, on each rank:

1. publish ``said/<rank>``: the stage, a hash of every fact, an error if there is one. A rank with an error is done.
2. read what every other rank said. The first error, or a rank at another stage, ends the wait at once.
3. compare the hashes. Only where they differ do two ranks publish the texts themselves, for a short diff.
4. settle the verdict by one atomic compare-and-set: "go", or that somebody gave up waiting. Without it a late rank
   would find everything in place and walk on alone into its first collective.
5. the last rank to have read everything deletes the keys.

The idea of comparing a hash of each rank's graph and of printing the difference is that of PyTorch's
``_inductor/fx_passes/spmd_check.py``, which does it with a collective.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from paracompile.errors import ParacompileError, RankError
from paracompile.torch_private import get_default_store

__all__ = ["Agreement"]

_GO = "go"
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 0.05  # seconds between two looks at the store
_DIFF_WAIT = 10.0  # seconds; the texts are a courtesy, the error stands without them
_DIFF_LINES, _DIFF_COLUMNS, _DIFF_WINDOW = 30, 160, 2000
_DIFF_FACTS = 3
_ERROR_CHARACTERS = 8000
_PROMPTLY = 0.2  # seconds in which ranks come to a call that need no exchange
_SHORTEST_PAUSE = 0.00005  # seconds, about a trip to the store
_CLOSED = 1 << 32  # above any count of ranks


@dataclass(eq=False)
class _Session:
    """What these ranks did together in this process, as long as their process group exists.

    Process-wide by nature, whichever Agreement object did it. All ranks count alike as long as they do alike; where
    they do not, the stages differ or somebody is absent, and either ends in an error.

    attributes:
        world: the default process group.
        name: tells its keys from those of an earlier group that had the same store.
        turns: numbers the meetings.
        graphs: numbers the graphs.
        counts: the last two counts: the store of each, and its key there.
    """

    world: weakref.ref[Any]
    name: str
    turns: Iterator[int] = field(default_factory=itertools.count)
    graphs: Iterator[int] = field(default_factory=itertools.count)
    counts: deque[tuple[Store, str]] = field(default_factory=deque)

    @classmethod
    def of(cls, ranks: tuple[int, ...]) -> _Session:
        known = _sessions.get(ranks)
        if known is not None and known.world() is dist.group.WORLD:
            return known
        listed = "-".join(map(str, ranks))
        number = get_default_store().add(f"paracompile/sessions/{listed}/{dist.get_rank()}", 1)
        _sessions[ranks] = made = cls(weakref.ref(dist.group.WORLD), f"paracompile/{listed}/{number}")
        return made


_sessions: dict[tuple[int, ...], _Session] = {}


class Agreement:
    """The ranks of one mesh, agreeing stage by stage on what they are about to do.

    Args:
        ranks: the mesh's global ranks, in the same order on every rank. With one rank, or under the "fake" backend,
            where the others do not exist, everything is agreed at once.
        timeout: seconds that a rank waits for the others, counted from its own arrival.
        option: the option that says how long.
    """

    def __init__(self, ranks: Sequence[int], timeout: float, *, option: str = "timeout") -> None:
        self.ranks = tuple(ranks)
        self.timeout = timeout
        self.option = option

    @property
    def is_trivial(self) -> bool:
        """Whether there is nobody to agree with."""
        return len(self.ranks) < 2 or (dist.is_initialized() and dist.get_backend() == "fake")

    def next_graph(self) -> int:
        """A number for one more graph, the same on all ranks."""
        return 0 if self.is_trivial else next(_Session.of(self.ranks).graphs)

    def exchange(self, stage: str, *, facts: Mapping[str, str], error: str | None = None, own: str = "") -> list[str]:
        """Publish this rank's facts or its error, and wait until all ranks have said the same.

        Args:
            stage: a name for this moment ("options", "plan"); ranks that meet in different stages are told.
            facts: name -> text; texts of any length, they are sent only where they differ.
            error: this rank failed, with this message. It is published and the call returns without waiting, so that
                the caller raises its own error.
            own: a short text that may differ from rank to rank.

        Returns:
            every rank's `own`, in the order of `ranks`.

        Raises:
            RankError: another rank failed (with its message), is at another stage, has other facts (with a diff), or
                did not come in time. It is raised on every rank that has no error of its own.
            ParacompileError: there is no process group, or this rank is not one of `ranks`.
        """
        if self.is_trivial:
            return [own] * len(self.ranks)
        with self._turn(stage) as store:
            return self._exchange(store, stage, facts, error, own)

    def meet(self, stage: str, *, own: str = "") -> None:
        """Wait until every rank is at the same stage: an exchange without facts that is cheap enough for each call.

        Args:
            own: what messages about this rank say besides.

        Raises:
            RankError: as `exchange`.
        """
        if self.is_trivial:
            return
        with self._turn(stage) as store:
            if not self._count(store, stage):
                self._exchange(store, stage, {}, None, own)

    @contextmanager
    def _turn(self, stage: str) -> Iterator[Store]:
        """One meeting of the ranks, with the part of the store that belongs to it."""
        if not dist.is_initialized():
            raise ParacompileError(
                f"ranks {_listed(self.ranks)} are to agree, but torch.distributed is not initialised"
            )
        me = dist.get_rank()
        if me not in self.ranks:
            raise ParacompileError(f"rank {me} is not one of the ranks {_listed(self.ranks)} that are to agree")
        try:
            session = _Session.of(self.ranks)
            yield PrefixStore(f"{session.name}/{next(session.turns)}", get_default_store())
        except dist.DistError as failure:
            raise RankError(
                f"stage {stage!r}: rank {me} lost the store that ranks agree through: the process that serves it "
                f"(usually rank 0's, or torchrun) has probably ended; look at its log. ({failure})"
            ) from failure

    def _exchange(self, store: Store, stage: str, facts: Mapping[str, str], error: str | None, own: str) -> list[str]:
        me = dist.get_rank()
        said = {
            "stage": stage,
            "error": None if error is None else error[:_ERROR_CHARACTERS],
            "own": own,
            "facts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()},
        }
        store.set(f"said/{me}", json.dumps(said))
        if error is not None:
            return []
        return _Exchange(store, self, me, stage).settle(facts, said)

    def _count(self, store: Store, stage: str) -> bool:
        """Whether all ranks came to this stage promptly; the answer is the same on all of them."""
        everyone = len(self.ranks)
        key = f"count/{hashlib.sha256(stage.encode()).hexdigest()[:16]}"
        come = store.add(key, 1)
        self._forget_old_count(store, key, delete=come == 1)  # by one rank, and the one with time to spare
        deadline = time.monotonic() + _PROMPTLY
        pause = _SHORTEST_PAUSE
        while come < everyone:
            if time.monotonic() > deadline:
                return self._close(store, key)
            time.sleep(pause)
            pause = min(2 * pause, _FIRST_PAUSE)
            come = store.add(key, 0)
        return come == everyone or _was_full(store, key)

    def _close(self, store: Store, key: str) -> bool:
        """Closes a count; one rank alone does, or another would find what has been counted since."""
        if store.add(f"{key}/closing", 1) > 1:
            return _was_full(store, key)
        full = store.add(key, _CLOSED) - _CLOSED == len(self.ranks)
        store.set(f"{key}/full", str(full))
        return full

    def _forget_old_count(self, store: Store, key: str, *, delete: bool) -> None:
        counts = _Session.of(self.ranks).counts
        counts.append((store, key))
        if len(counts) > 2:  # who is at the third has left the second, so all of them have left the first
            old, its_key = counts.popleft()
            if delete:
                old.delete_key(its_key)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, str]]:
        """Do something that every rank does, and agree on it at the end.

        ``with agreement.stage("plan") as facts: ...; facts["graph"] = text``: an exception in the body is published
        to the others and raised on; otherwise the facts are exchanged when the body ends.

        Raises:
            RankError: as `exchange`.
        """
        facts: dict[str, str] = {}
        try:
            yield facts
        except BaseException as failure:  # an interrupt too: the others must not wait for a rank that is leaving
            with suppress(ParacompileError):
                self.exchange(name, facts={}, error=f"{type(failure).__name__}: {failure}")
            raise
        self.exchange(name, facts=facts)


def _was_full(store: Store, key: str) -> bool:
    """Whether a count was full when it was closed, as the rank that closed it says."""
    answer: bytes = store.get(f"{key}/full")
    return answer == b"True"


class _Exchange:
    """One exchange, seen from one rank that has no error of its own."""

    def __init__(self, store: Store, agreement: Agreement, me: int, stage: str) -> None:
        self.store, self.me, self.stage = store, me, stage
        self.ranks, self.timeout, self.option = agreement.ranks, agreement.timeout, agreement.option

    def settle(self, facts: Mapping[str, str], own: dict[str, Any]) -> list[str]:
        said = self._hear(own)
        names = sorted({name for each in said.values() for name in each["facts"]})
        different = [name for name in names if len({each["facts"].get(name) for each in said.values()}) > 1]
        if different:
            raise RankError("\n".join(self._difference(name, facts, said) for name in different[:_DIFF_FACTS]))
        verdict = self._verdict(_GO)
        if verdict != _GO:
            raise RankError(verdict)
        self._clean()
        return [str(said[rank]["own"]) for rank in self.ranks]

    def _hear(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """What every rank said. Raises at the first error, other stage or verdict, or when time is up."""
        said = {self.me: own}
        deadline = time.monotonic() + self.timeout
        pause = _FIRST_PAUSE
        while True:
            for rank in self.ranks:
                if rank not in said and self.store.check([f"said/{rank}"]):
                    said[rank] = json.loads(self.store.get(f"said/{rank}"))
            self._refuse(said)
            missing = [rank for rank in self.ranks if rank not in said]
            if not missing:
                return said
            late = time.monotonic() > deadline
            if late or self.store.check(["verdict"]):
                # "go" means that somebody heard everyone, so what is missing here arrived just now: look once more.
                verdict = self._verdict(self._absent(missing))
                if verdict != _GO:
                    raise RankError(verdict)
                continue
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _refuse(self, said: Mapping[int, Mapping[str, Any]]) -> None:
        failed = [rank for rank in self.ranks if rank in said and said[rank]["error"] is not None]
        if failed:
            first = failed[0]
            others = f" (and {_ranks(failed[1:])})" if failed[1:] else ""
            raise RankError(
                f"{_ranks([first])}{others} failed at stage {said[first]['stage']!r}: {said[first]['error']}"
            )
        for rank in self.ranks:
            if rank in said and said[rank]["stage"] != self.stage:
                raise RankError(
                    f"{self._at(self.me, said)} and {self._at(rank, said)}: the ranks do not do the same things in the "
                    "same order. Probably one of them was called with other shapes or arguments than the others: call "
                    "the model with the same on every rank, and equally often"
                )

    def _at(self, rank: int, said: Mapping[int, Mapping[str, Any]]) -> str:
        own = f" ({said[rank]['own']})" if said[rank]["own"] else ""
        return f"rank {rank} is at stage {said[rank]['stage']!r}{own}"

    def _absent(self, missing: Sequence[int]) -> str:
        return (
            f"stage {self.stage!r}: {_ranks(missing)} did not come within the {self.timeout:g} s that rank {self.me} "
            "waited. Probably one rank called the model or recompiled alone (with other shapes or arguments than the "
            f"others), or failed before it came here: look at the log of {_ranks(missing)}. "
            f'options={{"{self.option}": seconds}} lets ranks wait longer'
        )

    def _verdict(self, proposal: str) -> str:
        """What the ranks go by: the first proposal to arrive, whoever made it."""
        return bytes(self.store.compare_set("verdict", "", proposal)).decode()

    def _difference(self, name: str, facts: Mapping[str, str], said: Mapping[int, Mapping[str, Any]]) -> str:
        """Which ranks say what of one fact, and a diff of two of them; the same text on every rank."""
        camps: dict[str | None, list[int]] = {}
        for rank in self.ranks:
            camps.setdefault(said[rank]["facts"].get(name), []).append(rank)
        first, second = (camp[0] for camp in itertools.islice(camps.values(), 2))
        sides = " / ".join(_ranks(camp) for camp in camps.values())
        head = f"stage {self.stage!r}: ranks differ in {name!r} ({sides})"
        if self.me in (first, second):
            self.store.set(f"text/{name}/{self.me}", _packed(facts.get(name, "")))
        texts = [self._text(name, rank) for rank in (first, second)]
        if texts[0] is None or texts[1] is None:
            return f"{head}; the texts did not arrive"
        return f"{head}:\n{_diff(texts[0], texts[1], f'rank {first}', f'rank {second}')}"

    def _text(self, name: str, rank: int) -> str | None:
        key = f"text/{name}/{rank}"
        deadline = time.monotonic() + min(_DIFF_WAIT, self.timeout)
        with suppress(dist.DistError):
            while time.monotonic() < deadline:
                if self.store.check([key]):
                    return _unpacked(self.store.get(key))
                time.sleep(_LAST_PAUSE)
        return None

    def _clean(self) -> None:
        # Nobody may need the keys any more, and a rank that has gone its way must not fail over tidying up.
        with suppress(RuntimeError):
            if self.store.add("read", 1) == len(self.ranks):
                for key in ("verdict", "read", *(f"said/{rank}" for rank in self.ranks)):
                    self.store.delete_key(key)


def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpacked(text: bytes) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"


def _diff(first: str, second: str, first_name: str, second_name: str) -> str:
    """A short unified diff. Common ends are cut off before difflib, which is quadratic, sees the texts."""
    left, right = first.splitlines(), second.splitlines()
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    start = max(0, shared - 2)
    left, right = left[start : start + _DIFF_WINDOW], right[start : start + _DIFF_WINDOW]
    lines = list(difflib.unified_diff(left, right, first_name, second_name, n=2, lineterm=""))
    if not lines:  # equal lines: the texts differ in how lines end, or beyond the window
        return f"  (line {shared + 1} on; {len(first)} and {len(second)} characters)"
    shown = [f"  {line[:_DIFF_COLUMNS]}" for line in lines[:_DIFF_LINES]]
    # difflib counts from where the texts were cut; the reader counts from the top.
    note = f"  (lines counted from line {start + 1})\n" if start else ""
    more = f"\n  ... {len(lines) - _DIFF_LINES} more lines" if len(lines) > _DIFF_LINES else ""
    return note + "\n".join(shown) + more
