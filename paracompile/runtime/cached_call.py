"""Calls a graph with a first block cache: brings its state, and keeps what it says.

State belongs to a model, a generation and a slot, never to the compiled callable: two models of one class that were
compiled with equal options share one callable. A model is known by its parameters, which come in as arguments; a slot
is one trajectory of a generation (the conditional pass, the unconditional one), see `slots`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from paracompile.runtime.slots import UNKNOWN, Call, CallSigns, Generation, current_generation, current_name

__all__ = ["CachedCall", "ModelCache", "StateLike", "caches_of", "forget_all", "graph_compiled"]

_MOST_SLOTS = 8  # of calls that nobody named; the oldest go first
_MOST_RECORDS = 4096  # of one slot


@dataclass(frozen=True)
class StateLike:
    """What a graph takes besides its own inputs: a control tensor, a record, and the stored values.

    attributes:
        record, state: (shape, dtype, device) of each.
    """

    record: tuple[tuple[int, ...], torch.dtype, torch.device]
    state: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


@dataclass(eq=False)
class Slot:
    """The state of one trajectory in one graph.

    attributes:
        name: what it is called in statistics.
        record: the last record; zeros where nothing is stored.
        state: the stored values.
        call: the signs of the last call, where calls are told apart by them.
    """

    name: str
    record: Tensor
    state: list[Tensor]
    call: Call | None = None


@dataclass(eq=False)
class Held:
    """All that is stored for one generation of one model.

    attributes:
        slots: by graph.
        history: the records, by slot's name.
    """

    slots: weakref.WeakKeyDictionary[CachedCall, list[Slot]] = field(default_factory=weakref.WeakKeyDictionary)
    history: dict[str, list[Tensor]] = field(default_factory=dict)

    def remember(self, slot: Slot, record: Tensor) -> None:
        slot.record = record
        records = self.history.setdefault(slot.name, [])
        records.append(record)
        del records[:-_MOST_RECORDS]


@dataclass(eq=False)
class ModelCache:
    """All that is stored for one model.

    attributes:
        threshold: what `set_rdt` said; None: what the options said.
        history: the records of the generation that was called last, by slot's name.
        caches: whether any graph of the model was compiled with a cache; None: none was compiled yet.
        held: by generation.
    """

    threshold: float | None = None
    history: dict[str, list[Tensor]] = field(default_factory=dict)
    caches: bool | None = None
    held: weakref.WeakKeyDictionary[Generation, Held] = field(default_factory=weakref.WeakKeyDictionary)

    def slots(self) -> list[Slot]:
        """All that there are."""
        of_graphs = [of_graph for held in list(self.held.values()) for of_graph in list(held.slots.values())]
        return [slot for slots in of_graphs for slot in slots]

    def forget(self, generation: Generation | None = None) -> None:
        """Forgets the state of a generation, or of all; what was recorded stays readable until the next call."""
        if generation is None:
            self.held.clear()
        else:
            self.held.pop(generation, None)

    def begin_call(self) -> Held:
        """What is stored for the generation that a call belongs to."""
        held = self.held.setdefault(current_generation(), Held())
        self.history = held.history
        return held


_caches = cast(MutableMapping[Tensor, ModelCache], WeakIdKeyDictionary())
"""By parameter."""


def caches_of(parameters: Iterable[Tensor], *, make: bool = True) -> list[ModelCache]:
    """The caches of the model with these parameters, one in most cases; made if there is none yet and `make` says so.

    A model whose graph breaks has one for each piece that was called before the first question.
    """
    parameters = list(parameters)
    found = {id(known): known for parameter in parameters if (known := _caches.get(parameter)) is not None}
    if not make:
        return list(found.values())
    first = next(iter(found.values()), None) or ModelCache()
    for parameter in parameters:
        if parameter not in _caches:
            _caches[parameter] = first
    return list(found.values()) or [first]


def graph_compiled(parameters: Sequence[Tensor], *, caches: bool) -> None:
    """Notes whether the graph of a model with these parameters has a cache."""
    for known in caches_of(parameters) if parameters else []:
        known.caches = known.caches or caches
        if known.threshold is not None and not known.caches:
            warnings.warn(
                "paracompile: set_rdt was called for a model that is now compiled without a first block cache: it has "
                'no effect. Give torch.compile "rdt" among its options.',
                stacklevel=2,
            )


def forget_all(generation: Generation | None = None) -> None:
    """Forgets the state of every model: of a generation, or of all."""
    for known in list(_caches.values()):
        known.forget(generation)


@cache
def _control(threshold: float, unnamed: bool, device: torch.device) -> Tensor:
    """Made once: no copy to the device at each step."""
    with torch.inference_mode(False):
        return torch.tensor([threshold, float(unnamed)], dtype=torch.float32, device=device)


@dataclass(eq=False)
class CachedCall:
    """The callable of one graph.

    attributes:
        compiled: takes the graph's arguments, control, record and state; the record comes last in what it returns.
        prepare: what is done to the arguments first: ranks agree on them, quantised weights are taken apart.
        like: the state that it takes.
        threshold: of the options.
        static: the places of parameters and buffers among the arguments.
        signs: which arguments tell calls apart.
    """

    compiled: Callable[..., Any]
    prepare: Callable[[Sequence[Any]], list[Any]]
    like: StateLike
    threshold: float
    static: tuple[int, ...]
    signs: CallSigns
    _own: ModelCache = field(default_factory=ModelCache)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        model = self._model(args)
        held = model.begin_call()
        slots = held.slots.setdefault(self, [])
        slot = self._slot(slots, args)
        threshold = self.threshold if model.threshold is None else model.threshold
        control = _control(threshold, slot.call is not None, slot.record.device)
        try:
            *outputs, record = self.compiled(*self.prepare(args), control, slot.record, *slot.state)
        except BaseException:
            slots[:] = [other for other in slots if other is not slot]  # some of its state may be written, some not
            raise
        held.remember(slot, record)
        return tuple(outputs)

    def _model(self, args: Sequence[Any]) -> ModelCache:
        parameter = next((args[place] for place in self.static if isinstance(args[place], nn.Parameter)), None)
        if parameter is None:
            return self._own
        known = _caches.get(parameter)
        if known is None:
            known = _caches[parameter] = ModelCache()
        return known

    def _slot(self, slots: list[Slot], args: Sequence[Any]) -> Slot:
        """The slot of this call among those of its generation, and made there if it is new."""
        name = current_name()
        if name is not None:
            named = next((slot for slot in slots if slot.name == name and slot.call is None), None)
            if named is None:
                named = self._new(name)
                slots.append(named)
            return named
        call = self.signs.of(args)
        if call is None:
            slots[:] = [slot for slot in slots if slot.name != UNKNOWN]
            slots.append(self._new(UNKNOWN))  # nothing tells it from others: never reused
            return slots[-1]
        for slot in slots:
            if slot.call is not None and call.continues(slot.call):
                return slot
        told = [slot for slot in slots if slot.call is not None and slot.call.alive()]
        slots[:] = [slot for slot in slots if slot.call is None] + told[-_MOST_SLOTS + 1 :]
        taken = {slot.name for slot in slots}
        number = next(number for number in range(1, _MOST_SLOTS + 2) if f"call {number}" not in taken)
        slots.append(self._new(f"call {number}", call))
        return slots[-1]

    def _new(self, name: str, call: Call | None = None) -> Slot:
        with torch.inference_mode(False), torch.no_grad():
            record, *state = (
                torch.zeros(shape, dtype=dtype, device=device)
                for shape, dtype, device in (self.like.record, *self.like.state)
            )
        return Slot(name, record, state, call)
