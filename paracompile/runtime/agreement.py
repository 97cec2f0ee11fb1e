"""Ranks agree at compile time, through the key-value store that the process group was started with.

Never through a collective: a rank that recompiles alone, or that failed before it came here, would leave the others in
a collective that nobody completes. The store needs nobody else, so every wait has an end and a message.

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
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from paracompile.errors import ParacompileError, RankError

__all__ = ["Agreement"]

_GO = "go"
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 0.05  # seconds between two looks at the store
_DIFF_WAIT = 10.0  # seconds; the texts are a courtesy, the error stands without them
_DIFF_LINES, _DIFF_COLUMNS, _DIFF_WINDOW = 30, 160, 2000
_DIFF_FACTS = 3
_ERROR_CHARACTERS = 8000

# Process-wide by nature: it counts how often this process has met these ranks, whichever Agreement object did it. All
# ranks count alike as long as they compile alike; where they do not, the stages differ or somebody is absent, and
# either ends in an error.
_turns: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)


class Agreement:
    """The ranks of one mesh, agreeing stage by stage on what they are about to do.

    Args:
        ranks: the mesh's global ranks, in the same order on every rank. With one rank, or under the "fake" backend,
            where the others do not exist, everything is agreed at once.
        timeout: seconds that a rank waits for the others, counted from its own arrival.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self.ranks = tuple(ranks)
        self.timeout = timeout

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
        if len(self.ranks) < 2:
            return [own]
        if not dist.is_initialized():
            raise ParacompileError(
                f"ranks {_listed(self.ranks)} are to agree, but torch.distributed is not initialised"
            )
        if dist.get_backend() == "fake":
            return [own] * len(self.ranks)
        me = dist.get_rank()
        if me not in self.ranks:
            raise ParacompileError(f"rank {me} is not one of the ranks {_listed(self.ranks)} that are to agree")
        turn = next(_turns[self.ranks])
        prefix = f"paracompile/agreement/{'-'.join(map(str, self.ranks))}/{turn}"
        said = {
            "stage": stage,
            "error": None if error is None else error[:_ERROR_CHARACTERS],
            "own": own,
            "facts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()},
        }
        try:
            store = PrefixStore(prefix, _get_default_store())
            store.set(f"said/{me}", json.dumps(said))
            if error is not None:
                return []
            return _Exchange(store, self.ranks, me, stage, self.timeout).settle(facts, said)
        except dist.DistError as failure:
            raise RankError(
                f"stage {stage!r}: rank {me} lost the store that ranks agree through: the process that serves it "
                f"(usually rank 0's, or torchrun) has probably ended; look at its log. ({failure})"
            ) from failure

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


class _Exchange:
    """One exchange, seen from one rank that has no error of its own."""

    def __init__(self, store: Store, ranks: tuple[int, ...], me: int, stage: str, timeout: float) -> None:
        self.store, self.ranks, self.me, self.stage, self.timeout = store, ranks, me, stage, timeout

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
                    f"rank {self.me} is at stage {self.stage!r} and rank {rank} at stage {said[rank]['stage']!r}: the "
                    "ranks do not compile the same things in the same order. Probably one of them compiled a graph "
                    "that the others took from their cache: call the model with the same shapes on every rank"
                )

    def _absent(self, missing: Sequence[int]) -> str:
        return (
            f"stage {self.stage!r}: {_ranks(missing)} did not come within the {self.timeout:g} s that rank {self.me} "
            "waited. Probably one rank recompiled alone (called with other shapes or arguments than the others), "
            f"or failed before its compile: look at the log of {_ranks(missing)}. "
            'options={"timeout": seconds} lets ranks wait longer'
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
