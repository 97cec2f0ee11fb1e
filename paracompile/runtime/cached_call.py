"""Calls a graph with a first block cache: brings its state, and keeps what it says.

State belongs to a model, a generation and a slot, never to the compiled callable: two models of one class that were
compiled with equal options share one callable. A model is known by its parameters, which come in as arguments; a slot
is one trajectory of a generation (the conditional pass, the unconditional one), see `slots`.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from paracompile.layout.sizes import evaluate
from paracompile.runtime.history import History
from paracompile.runtime.slots import UNKNOWN, Call, CallSigns, Generation, current_generation, current_name
from paracompile.torch_private import is_traceable_wrapper_subclass

__all__ = [
    "CachedCall",
    "Held",
    "ModelCache",
    "StateLike",
    "caches_of",
    "forget_all",
    "graph_compiled",
    "graph_is_plain",
    "held_in",
    "plain_models",
]

_MOST_SLOTS = 8  # of calls of one name, or of none
_MOST_SIZES = 16  # that one generation has state of in one graph


@dataclass(frozen=True, eq=False)
class StateLike:
    """What a graph takes besides its own inputs: a control tensor, a record, and the stored values.

    attributes:
        record, state: (shape, dtype, device) of each; sizes may be formulas.
        added: which of the state is what blocks added to a stream.
        symbols: by symbol of these formulas, the place of its value among the graph's arguments.
    """

    record: tuple[tuple[int, ...], torch.dtype, torch.device]
    state: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
    added: tuple[int, ...] = ()
    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        """What the symbols are in a call."""
        return tuple(args[place] for place in self.symbols.values())

    def at(self, sizes: Sequence[int]) -> tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]:
        """The record and the state at these."""
        if not self.symbols:
            return (self.record, *self.state)
        known = dict(zip(self.symbols, sizes, strict=True))
        return tuple(
            (tuple(evaluate(size, known) for size in shape), dtype, device)
            for shape, dtype, device in (self.record, *self.state)
        )


@dataclass(eq=False)
class Slot:
    """The state of one trajectory in one graph.

    attributes:
        title: what it is called in statistics.
        name: what its calls are named; None where nobody names them.
        place: which call of a step it is, among those of its name.
        record: the last record; zeros where nothing is stored.
        state: the stored values.
        call: the signs of its first call, where nobody names them.
        step: the step of its last call, as its generation counts them.
        shared: whether several calls of one step took it for theirs: what it holds is nobody's, and places are shifted.
    """

    title: str
    name: str | None
    place: int
    record: Tensor
    state: list[Tensor]
    call: Call | None = None
    step: int | None = None
    shared: bool = False


@dataclass(eq=False)
class SlotsOfGraph:
    """The slots of one graph in one generation, at one set of sizes.

    attributes:
        like: what each is given, the record first: (shape, dtype, device). Held by a weak key, it must not hold that.
        all: they, in the order in which they were made.
        calls: by name, the step of the last call, and how many calls of that step there were.
        number: that no others have, or had.
    """

    like: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
    all: list[Slot] = field(default_factory=list)
    calls: dict[str | None, tuple[int, int]] = field(default_factory=dict)
    number: int = field(default_factory=count().__next__)

    def place(self, name: str | None, step: int) -> int:
        """Which call of this step and this name the present one is, from 0."""
        last, calls = self.calls.get(name, (step, 0))
        calls = calls if last == step else 0
        self.calls[name] = step, calls + 1
        return calls

    def keep(self, slots: Iterable[Slot]) -> None:
        self.all[:] = slots


@dataclass(eq=False)
class Held:
    """All that is stored for one generation of one model.

    attributes:
        slots: by graph, and by its sizes, the latest last.
        history: what the slots recorded.
    """

    slots: weakref.WeakKeyDictionary[StateLike, dict[tuple[int, ...], SlotsOfGraph]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    history: History = field(default_factory=History)

    def slots_of(self, like: StateLike, args: Sequence[Any]) -> SlotsOfGraph:
        """Those of a graph at the sizes of a call; of many sizes the latest are kept."""
        sizes = like.sizes(args)
        known = self.slots.setdefault(like, {})
        known[sizes] = known.pop(sizes) if sizes in known else SlotsOfGraph(like.at(sizes))
        while len(known) > _MOST_SIZES:
            del known[next(iter(known))]
        return known[sizes]

    def remember(self, graph: CachedCall, slots: SlotsOfGraph, slot: Slot, record: Tensor) -> None:
        slot.record = record
        line = self.history.line(
            slots.number, slot.title, named=slot.name is not None, inputs=graph.inputs, free=graph.free
        )
        self.history.add(line, record)


@dataclass(eq=False)
class ModelCache:
    """All that is stored for one model.

    attributes:
        threshold: what `set_rdt` said; None: what the options said.
        history: of the generation that was called last.
        asked: the `rdt` that its last graph was compiled with.
        caches: whether any graph of the model was compiled with a cache; None: none was compiled yet.
        plain: graphs that were to have one, and have nothing that it could skip: how many, by the reason.
        judged: whether a generation was looked at for steps that can be skipped.
        held: by generation.
        observers: are called after each call, with its slot and what blocks added to each stream when last computed.
    """

    threshold: float | None = None
    history: History = field(default_factory=History)
    asked: object = None
    caches: bool | None = None
    plain: Counter[str] = field(default_factory=Counter)
    judged: bool = False
    held: weakref.WeakKeyDictionary[Generation, Held] = field(default_factory=weakref.WeakKeyDictionary)
    observers: list[Callable[[Slot, Sequence[Tensor]], None]] = field(default_factory=list)

    def slots(self) -> list[Slot]:
        """All that there are."""
        of_graphs = [of_graph for held in list(self.held.values()) for of_graph in list(held.slots.values())]
        return [slot for of_graph in of_graphs for slots in list(of_graph.values()) for slot in slots.all]

    def forget(self, generation: Generation | None = None) -> None:
        """Forgets the state of a generation, or of all; what was recorded stays readable until the next call."""
        if generation is None:
            self.held.clear()
        else:
            self.held.pop(generation, None)

    def begin_call(self) -> Held:
        """What is stored for the generation that a call belongs to."""
        generation = current_generation()
        held = self.held.get(generation)
        if held is None:
            held = self.held[generation] = Held(history=History(whole=generation.is_loop))
        self.history = held.history
        return held


_caches = cast(MutableMapping[Tensor, ModelCache], WeakIdKeyDictionary())
"""By parameter, see `_standing_for`."""


def _standing_for(parameter: Tensor) -> Tensor:
    """The parameter; of a quantised one a tensor that it is made of, as torch moves none that is referred to weakly."""
    found: Any = parameter
    while is_traceable_wrapper_subclass(found):
        names, _ = found.__tensor_flatten__()
        found = getattr(found, names[0])
    return cast(Tensor, found)


def caches_of(parameters: Iterable[Tensor], *, make: bool = True) -> list[ModelCache]:
    """The caches of the model with these parameters, one in most cases; made if there is none yet and `make` says so.

    A model whose graph breaks has one for each piece that was called before the first question.
    """
    parameters = [_standing_for(parameter) for parameter in parameters]
    found = {id(known): known for parameter in parameters if (known := _caches.get(parameter)) is not None}
    if not make:
        return list(found.values())
    first = next(iter(found.values()), None) or ModelCache()
    for parameter in parameters:
        if parameter not in _caches:
            _caches[parameter] = first
    return list(found.values()) or [first]


def graph_compiled(parameters: Sequence[Tensor], *, rdt: object) -> None:
    """Notes which threshold a graph of the model with these parameters is compiled with, if any.

    Where that is another one than before, the user compiled the model again, and what `set_rdt` said is over.
    """
    for known in caches_of(parameters) if parameters else []:
        if known.asked is not None and rdt is not None and rdt != known.asked:
            known.threshold = None
        known.asked = known.asked if rdt is None else rdt
        known.caches = known.caches or bool(rdt)
        if known.threshold is not None and not known.caches:
            warnings.warn(
                "paracompile: set_rdt was called for a model that is now compiled without a first block cache: it has "
                'no effect. Give torch.compile "rdt" among its options.',
                stacklevel=2,
            )


def graph_is_plain(parameters: Sequence[Tensor], why: str) -> None:
    """Notes that a graph of the model with these parameters has nothing to skip."""
    for known in caches_of(parameters)[:1] if parameters else []:
        known.plain[why] += 1


def plain_models() -> list[ModelCache]:
    """The models, or pieces of models, of which a graph has nothing to skip."""
    models = {id(model): model for model in _caches.values()}.values()
    return [model for model in models if model.plain]


def held_in(generation: Generation) -> list[tuple[ModelCache, Held]]:
    """All that is stored for a generation, by model; of a model in pieces they may be several."""
    models = {id(model): model for model in _caches.values()}.values()
    return [(model, held) for model in models if (held := model.held.get(generation)) is not None]


def forget_all(generation: Generation | None = None) -> None:
    """Forgets the state of every model: of a generation, or of all."""
    for known in list(_caches.values()):
        known.forget(generation)


@cache
def _control(threshold: float, unnamed: bool, known: bool, plan: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: no copy to the device at each step."""
    with torch.inference_mode(False):
        return torch.tensor([threshold, float(unnamed), float(known), *plan], dtype=torch.float32, device=device)


@dataclass(eq=False)
class CachedCall:
    """The callable of one graph.

    attributes:
        compiled: takes the graph's arguments, control, record and state; the record comes last in what it returns.
        prepare: what is done to the arguments first: ranks agree on them, quantised weights are taken apart.
        like: the state that it takes.
        threshold: of the options.
        plan: what the control says of each step.
        static: the places of parameters and buffers among the arguments.
        signs: which arguments tell calls apart.
        inputs: the names of what a call brings, in the order in which the record remembers it.
        free: how many of these, the last, change in the course of a generation.
    """

    compiled: Callable[..., Any]
    prepare: Callable[[Sequence[Any]], list[Any]]
    like: StateLike
    threshold: float
    plan: tuple[float, ...]
    static: tuple[int, ...]
    signs: CallSigns
    inputs: tuple[str, ...]
    free: int
    _own: ModelCache = field(default_factory=ModelCache)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        model = self._model(args)
        held = model.begin_call()
        slots = held.slots_of(self.like, args)
        generation, name = current_generation(), current_name()
        slot = self._slot(slots, generation, name, args)
        known = generation.is_loop and slot.step is not None and slot.step < generation.steps
        slot.shared = slot.shared or slot.step == generation.steps  # in the first step, where no place tells them apart
        slot.step = generation.steps
        threshold = self.threshold if model.threshold is None else model.threshold
        control = _control(threshold, name is None, known, self.plan, slot.record.device)
        try:
            *outputs, record = self.compiled(*self.prepare(args), control, slot.record, *slot.state)
        except BaseException:
            slots.keep(other for other in slots.all if other is not slot)  # some of its state may be written, some not
            raise
        held.remember(self, slots, slot, record)
        for observe in model.observers:
            observe(slot, [slot.state[place] for place in self.like.added])
        return tuple(outputs)

    def _model(self, args: Sequence[Any]) -> ModelCache:
        parameters = (args[place] for place in self.static if isinstance(args[place], nn.Parameter))
        first = next(parameters, None)
        if first is None:
            return self._own
        return _caches.get(_standing_for(first)) or caches_of([first, *parameters])[0]

    def _slot(self, slots: SlotsOfGraph, generation: Generation, name: str | None, args: Sequence[Any]) -> Slot:
        """The slot of this call among those of its generation, and made there if it is new."""
        if generation.is_loop and generation.steps > 0:
            if any(slot.shared for slot in slots.all if slot.name == name):
                slots.keep([slot for slot in slots.all if slot.name != name])
            return self._by_place(slots, name, slots.place(name, generation.steps))
        if name is not None:
            return self._by_place(slots, name, 0)
        return self._by_signs(slots, generation, args)

    def _by_place(self, slots: SlotsOfGraph, name: str | None, place: int) -> Slot:
        for slot in slots.all:
            if (slot.name, slot.place) == (name, place):
                return slot
        if place >= _MOST_SLOTS:  # never ending a step, it would take all memory
            return self._untold(slots)
        return self._new(slots, name, place)

    def _by_signs(self, slots: SlotsOfGraph, generation: Generation, args: Sequence[Any]) -> Slot:
        """Of calls that nobody named, while no step is known to have ended."""
        call = self.signs.of(args)
        if call is None and not generation.is_loop:
            return self._untold(slots)
        unnamed = [slot for slot in slots.all if slot.name is None]
        for slot in unnamed:
            if call is not None and slot.call is not None and call.continues(slot.call):
                return slot
        if not generation.is_loop:
            unnamed = [slot for slot in unnamed if slot.call is not None and slot.call.alive()]
            unnamed = unnamed[-_MOST_SLOTS + 1 :]
            slots.keep([*(slot for slot in slots.all if slot.name is not None), *unnamed])
        taken = {slot.place for slot in unnamed}
        place = next(place for place in range(_MOST_SLOTS + 1) if place not in taken)
        return self._untold(slots) if place == _MOST_SLOTS else self._new(slots, None, place, call)

    def _untold(self, slots: SlotsOfGraph) -> Slot:
        """For a call that nothing tells from others: a slot that is never reused."""
        slots.keep(slot for slot in slots.all if slot.title != UNKNOWN)
        return self._new(slots, None, -1, title=UNKNOWN)

    def _new(
        self, slots: SlotsOfGraph, name: str | None, place: int, call: Call | None = None, title: str | None = None
    ) -> Slot:
        with torch.inference_mode(False), torch.no_grad():
            record, *state = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in slots.like)
        if title is None:
            title = f"call {place + 1}" if name is None else name if place == 0 else f"{name} {place + 1}"
        slots.all.append(Slot(title, name, place, record, state, call))
        return slots.all[-1]
