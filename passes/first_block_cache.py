"""Skips the middle blocks when the first block's residual hardly changed: a conditional inside the one graph.

    before                                  after
    h1 = block_0(h0)                        h1 = block_0(h0)
    h2 = block_1(h1)                        hit = |(h1 - h0) - previous| < rdt |previous|        (over all ranks)
    ...                                     h3 = cond(hit, reuse, compute, (h1, weights ..., state ...))
    h3 = block_2(h2)
    return norm(h3)                         reuse:   h1 + stored
                                            compute: block_1, block_2; stored := h3 - h1; previous := h1 - h0

The first block's residual as the sign of change is ParaAttention's first block cache (2024), the blocks that are kept
at both ends are cache-dit's DBCache, the extrapolation of what is stored is TaylorSeer (Liu et al., 2025).

State comes in as further graph inputs, behind the graph's own, and only `compute` writes to it, so that a skipped step
copies nothing. What is a number or two a call (the last timestep, how many hits in a row) is the *record*: it comes in
as one input and leaves as one more output, so that the host never waits for it.

    control  f32[n]    see `Control`: threshold (0: compute); whether nobody named the slot (1: nobody did); whether the
                       host knows that a step of the same generation ended since the slot's last call (1: it did)
    record   f32[n]    see `Record`
    state    what is watched (the previous residual); then for each stored value its residual and, for TaylorSeer, its
             differences

Runs on a graph that `mark_blocks` marked, sharded or not. Values with a part on each rank are stored as such parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import factorial

import torch
from torch import fx

from paracompile.cache_options import CacheOptions
from paracompile.errors import GraphError
from paracompile.layout.graph import is_tensor, readers_of
from paracompile.layout.sizes import sizes_of, symbols_in
from paracompile.mesh import Ranks
from paracompile.passes.cache_decision import (
    Clock,
    Control,
    Decision,
    Record,
    count_of,
    sign_of,
    sum_of_sizes,
)
from paracompile.passes.evaluation import evaluating
from paracompile.passes.found import CacheLayout, Found, Skipped
from paracompile.passes.mark_blocks import WATCHED, part_of, roles_of
from paracompile.passes.writer import GraphWriter, as_float
from paracompile.patterns.autocast import AUTOCAST_EDGES
from paracompile.patterns.exchanges import is_collective, is_wait
from paracompile.torch_private import FakeTensorMode, LazyGraphModule, detect_fake_mode, set_source

__all__ = ["COMPUTE", "COND", "REUSE", "first_block_cache"]

aten = torch.ops.aten

COND = torch.ops.higher_order.cond
REUSE, COMPUTE = "reuse", "compute"
"""The names of the two branches, submodules of the graph."""


def first_block_cache(
    gm: fx.GraphModule, example_inputs: Sequence[object], *, rules: CacheOptions, ranks: Ranks, found: Found
) -> fx.GraphModule:
    """Writes the conditional; a graph in which nothing was marked stays as it is.

    args:
        ranks: all ranks that share the work; they decide together.

    raises:
        GraphError: the middle blocks cannot be taken out of the graph.
    """
    if found.skipped is not None:
        found.cache = _Writer(gm, found.skipped, rules, ranks).run()
    return gm


@dataclass(frozen=True)
class _Kept:
    """A value that leaves the middle, and the one that it is a residual of (None: it is stored as it is)."""

    leave: fx.Node
    enter: fx.Node | None


class _Writer:
    def __init__(self, gm: fx.GraphModule, skipped: Skipped, rules: CacheOptions, ranks: Ranks) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.skipped = skipped
        self.rules = rules
        self.ranks = ranks
        fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
        assert fake_mode is not None
        self.fake_mode: FakeTensorMode = fake_mode
        self.write = GraphWriter(fake_mode, gm.graph)
        self.roles: dict[str, dict[str, fx.Node]] = {}
        for node in gm.graph.nodes:
            for role, form in roles_of(node).items():
                self.roles.setdefault(role, {}).setdefault(form, node)

    def run(self) -> CacheLayout:
        watched = self._watched()
        kept = self._kept()
        for node in (*watched, *(value.enter for value in kept if value.enter is not None)):
            self._to_front(node)
        self._sink(kept)
        middle = self._middle()
        self._gather(middle)
        layout = self._add_inputs(watched[0], kept)
        operands = self._operands(middle, watched, kept)
        with self.graph.inserting_after(middle[-1]):
            anchor = self.graph.call_function(operator.add, (0, 0))  # what follows is written before it
        with self.graph.inserting_before(anchor):
            decision = Decision(
                self.write,
                self.rules,
                self.ranks,
                control=self.control,
                record=self.record,
                previous=self.previous,
                times=[self._placeholder(index) for index in self.skipped.times],
                inputs=[self._placeholder(index) for index in self.skipped.inputs],
                free=self.skipped.free,
            )
            hit, clock = decision.hit(sign_of(self.write, watched, self.rules)), decision.clock
            shared = {**operands, clock.computed: None, clock.distance: None}
            compute = self._branch(list(shared), lambda write, place: self._compute(write, place, middle, kept, clock))
            reuse = self._branch(list(shared), lambda write, place: self._reuse(write, place, kept, clock))
            outputs = self._conditional(hit, reuse, compute, list(shared))
            record = decision.new_record(hit, fine=outputs[len(kept)])
        self.graph.erase_node(anchor)
        for value, output in zip(kept, outputs, strict=False):
            value.leave.replace_all_uses_with(output)
        for node in reversed(middle):
            self.graph.erase_node(node)
        self._add_output(record)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.gm.recompile()
        return layout

    # What is stored

    def _middle(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if _in_middle(node)]

    def _kept(self) -> list[_Kept]:
        """The values to store. What leaves the middle but does not depend on a stream is moved to the front."""
        kept: list[_Kept] = []
        streams = (forms.values() for role, forms in self.roles.items() if role == "after" or role.startswith("enter"))
        on_streams = _descendants(node for nodes in streams for node in nodes)
        for node in self._middle():
            if not is_tensor(node) or not _in_middle(node) or all(map(_in_middle, node.users)):
                continue
            enter = self._enter(node)
            if enter is None:
                self._check_types(node)
            if node in on_streams:
                kept.append(_Kept(node, enter))
            else:
                self._to_front(node)
        return kept

    def _enter(self, leave: fx.Node) -> fx.Node | None:
        """The value that what leaves the middle is a residual of, in its form; None where it is no stream."""
        for role, form in roles_of(leave).items():
            forms = self.roles.get(role.replace("leave", "enter"), {})
            if role.startswith("leave") and forms:
                return forms[form]
        return None

    def _to_front(self, node: fx.Node) -> None:
        """Moves a node out of the middle, with all that it depends on there."""
        for needed in _ancestors(node):
            needed.meta["cache_part"] = "front"

    def _check_types(self, node: fx.Node) -> None:
        """Autocast regions among skipped blocks stay there: a value outside its region could get another type."""
        if any(inside.target in AUTOCAST_EDGES for inside in self._middle()):
            raise GraphError(
                node,
                "it is read after the blocks that may be skipped, is no stream of them, and there are autocast regions "
                "among them",
                "leave out rdt",
            )

    def _sink(self, kept: list[_Kept]) -> None:
        """Moves what only the middle reads into it (the first block's text, for one): a skipped step needs none.

        Exchanges stay: all ranks must run them in one place, and a rank without tokens reads less of them than others.
        """
        used = {*self._watched(), *(value.enter for value in kept)}
        reached = False
        for node in reversed(self.graph.nodes):
            reached = reached or part_of(node) == "middle"
            if not reached or node.op != "call_function" or node.target is operator.getitem or node in used:
                continue
            if is_collective(node) or is_wait(node):
                continue
            if node.target in AUTOCAST_EDGES:
                break  # before it a node may compute in another type
            readers = readers_of(node)
            if part_of(node) == "front" and readers and all(part_of(reader) == "middle" for reader in readers):
                node.meta["cache_part"] = "middle"

    def _watched(self) -> tuple[fx.Node, ...]:
        """The values that tell how much changed, in one form: of parts each rank looks at its own."""
        roles = [self.roles[name] for name in WATCHED[self.rules.watch]]
        form = max(set.intersection(*map(set, roles)), key=lambda form: (form.count("/"), form))
        return tuple(forms[form] for forms in roles)

    def _gather(self, middle: list[fx.Node]) -> None:
        """Moves what stands between the nodes of the middle before or behind it, so that it is one piece."""
        inside = set(middle)
        behind: set[fx.Node] = set()
        between, within = [], False
        for node in self.graph.nodes:
            within = within or node is middle[0]
            if within and node not in inside:
                between.append(node)
            if node is middle[-1]:
                break
        anchor = middle[-1]
        for node in between:
            if node.target in AUTOCAST_EDGES:
                raise GraphError(
                    node,
                    "an autocast region begins or ends between blocks that may be skipped together",
                    "put the model's blocks under one autocast region, or leave out rdt",
                )
            if any(source in inside or source in behind for source in node.all_input_nodes):
                behind.add(node)
                anchor.append(node)
                anchor = node
            else:
                middle[0].prepend(node)

    # The graph's inputs and outputs

    def _add_inputs(self, before: fx.Node, kept: list[_Kept]) -> CacheLayout:
        shape = list(sizes_of(before.meta["val"]))
        shape[-1] = -(-shape[-1] // self.rules.downsample_factor)
        sample = before.meta["val"]
        with evaluating(self.fake_mode):
            like, added = [torch.empty(symbols_in(shape), dtype=sample.dtype, device=sample.device)], []
            for value in kept:
                if value.enter is not None:
                    added.append(len(like))
                made = value.leave.meta["val"]
                count = self.rules.taylor_order + 1 if value.enter is not None else 1
                like += [torch.empty(made.shape, dtype=made.dtype, device=made.device) for _ in range(count)]
            times = sum(count_of(self._placeholder(index)) for index in self.skipped.times)
            length = Record.length(times, len(self.skipped.inputs))
            record = torch.empty(symbols_in([length]), dtype=torch.float32, device=sample.device)
            control = torch.empty(Control.length(self.rules), dtype=torch.float32, device=sample.device)
        self.control = self._input("cache_control", control)
        self.record = self._input("cache_record", record)
        self.previous = self._input("cache_previous", like[0])
        rest = [self._input(f"cache_state_{number}", value) for number, value in enumerate(like[1:])]
        self.stored: dict[fx.Node, list[fx.Node]] = {}
        for value in kept:
            count = self.rules.taylor_order + 1 if value.enter is not None else 1
            self.stored[value.leave], rest = rest[:count], rest[count:]
        return CacheLayout(control, record, tuple(like), tuple(added), self.skipped)

    def _placeholder(self, index: int) -> fx.Node:
        node: fx.Node = self.graph.find_nodes(op="placeholder")[index]
        return node

    def _input(self, name: str, like: torch.Tensor) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["val"] = like
        set_source(node, None)
        return node

    def _add_output(self, record: fx.Node) -> None:
        (output,) = self.graph.find_nodes(op="output")
        output.args = ((*output.args[0], record),)

    # The two branches

    def _operands(self, middle: list[fx.Node], watched: Sequence[fx.Node], kept: list[_Kept]) -> dict[fx.Node, None]:
        """What both branches are given, in order: all that the middle reads, and the state."""
        inside = set(middle)
        found = {
            source: None
            for node in middle
            for source in node.all_input_nodes
            if source not in inside and source.op != "get_attr"
        }
        for source in found:
            if not is_tensor(source):
                raise GraphError(source, "it is no tensor and is read by blocks that may be skipped", "leave out rdt")
        entering = [value.enter for value in kept if value.enter is not None]
        return found | dict.fromkeys([*watched, *entering, *self._state()])

    def _state(self) -> list[fx.Node]:
        return [self.previous, *(node for nodes in self.stored.values() for node in nodes)]

    def _branch(
        self, operands: list[fx.Node], body: Callable[[GraphWriter, dict[fx.Node, fx.Node]], list[fx.Node]]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        place: dict[fx.Node, fx.Node] = {}
        for operand in operands:
            place[operand] = graph.placeholder(operand.name)
            place[operand].meta["val"] = operand.meta["val"]
        outputs = body(GraphWriter(self.fake_mode, graph), place)
        graph.output(tuple(outputs))
        return LazyGraphModule(self.gm, graph)

    def _compute(
        self,
        write: GraphWriter,
        place: dict[fx.Node, fx.Node],
        middle: list[fx.Node],
        kept: list[_Kept],
        clock: Clock,
    ) -> list[fx.Node]:
        """The blocks themselves; says whether all that they add is finite, and stores it."""
        for node in middle:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in place:
                    place[source] = write.graph.node_copy(source)
            place[node] = write.graph.node_copy(node, place.__getitem__)
        sign = sign_of(write, [place[node] for node in self._watched()], self.rules)
        state = [sign]
        sizes = [sum_of_sizes(write, as_float(write, sign))]
        outputs = []
        for value in kept:
            leave = place[value.leave]
            added = leave if value.enter is None else write(aten.sub.Tensor, leave, place[value.enter])
            sizes.append(sum_of_sizes(write, as_float(write, added)))
            stored = [place[node] for node in self.stored[value.leave]]
            state.append(added)
            for order in range(1, len(stored)):
                added = self._difference(write, added, stored[order - 1], order, place, clock)
                state.append(added)
            outputs.append(_contiguous(write, leave))
        total = write(aten.sum.default, write(aten.stack.default, sizes))
        fine = as_float(write, write(aten.isfinite.default, total))
        for old, new in zip(self._state(), state, strict=True):
            write(aten.copy_.default, place[old], new)
        return [*outputs, fine]

    def _difference(
        self,
        write: GraphWriter,
        new: fx.Node,
        old: fx.Node,
        order: int,
        place: dict[fx.Node, fx.Node],
        clock: Clock,
    ) -> fx.Node:
        """The difference quotient of one order more; zero until so many steps were computed."""
        change = write(aten.sub.Tensor, as_float(write, new), as_float(write, old))
        quotient = write(aten.div.Tensor, change, place[clock.distance])
        early = write(aten.lt.Scalar, place[clock.computed], order)
        quotient = write(aten.masked_fill.Scalar, quotient, early, 0)
        return write(aten._to_copy.default, quotient, dtype=new.meta["val"].dtype)

    def _reuse(
        self, write: GraphWriter, place: dict[fx.Node, fx.Node], kept: list[_Kept], clock: Clock
    ) -> list[fx.Node]:
        """What the blocks added when they were last computed, or its extrapolation to this step."""
        outputs = []
        if self.rules.accumulates:  # the next step is compared with this one
            sign = sign_of(write, [place[node] for node in self._watched()], self.rules)
            write(aten.copy_.default, place[self.previous], sign)
        for value in kept:
            first, *others = (place[node] for node in self.stored[value.leave])
            if value.enter is None:
                outputs.append(write(aten.clone.default, first, memory_format=torch.contiguous_format))
                continue
            added = first
            if others:
                added, power = as_float(write, first), place[clock.distance]
                for order, other in enumerate(others, 1):
                    weight = write(aten.div.Scalar, power, factorial(order))
                    term = write(aten.mul.Tensor, as_float(write, other), weight)
                    added = write(aten.add.Tensor, added, term)
                    power = write(aten.mul.Tensor, power, place[clock.distance])
                added = write(aten._to_copy.default, added, dtype=first.meta["val"].dtype)
            # What is stored comes first: the sum is laid out as it is, so that there is nothing to lay out anew.
            outputs.append(_contiguous(write, write(aten.add.Tensor, added, place[value.enter])))
        device = self.record.meta["val"].device
        outputs.append(write(aten.ones.default, [], dtype=torch.float32, device=device, pin_memory=False))
        return outputs

    def _conditional(
        self, hit: fx.Node, reuse: fx.GraphModule, compute: fx.GraphModule, operands: list[fx.Node]
    ) -> list[fx.Node]:
        branches = []
        for name, branch in ((REUSE, reuse), (COMPUTE, compute)):
            self.gm.add_submodule(name, branch)
            branches.append(self.graph.get_attr(name))
        chosen = self.graph.call_function(COND, (hit, *branches, tuple(operands)))
        (output,) = compute.graph.find_nodes(op="output")
        chosen.meta["val"] = tuple(node.meta["val"] for node in output.args[0])
        return [self.write(operator.getitem, chosen, index) for index in range(len(output.args[0]))]


def _in_middle(node: fx.Node) -> bool:
    return part_of(node) == "middle"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """Of the middle the node and all that it depends on."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if _in_middle(source) and source not in found:
            found.add(source)
            waiting.extend(source.all_input_nodes)
    return found


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.users)
    return found


def _contiguous(write: GraphWriter, value: fx.Node) -> fx.Node:
    """The value laid out as both branches return it: no part of a larger one."""
    made = value.meta["val"]
    if made.is_contiguous() and made.storage_offset() == 0 and value.op != "placeholder":
        return value
    return write(aten.clone.default, value, memory_format=torch.contiguous_format)
