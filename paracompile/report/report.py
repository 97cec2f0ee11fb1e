"""The report of one compiled graph: counts that a test can assert and a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx

import paracompile.runtime.placement as placement
from paracompile.errors import module_path, source_line
from paracompile.layout.graph import Operation, bytes_of, operations, value_of
from paracompile.layout.plan import Plan, Sharding
from paracompile.layout.sizes import bytes_in, hint
from paracompile.mesh import Ranks
from paracompile.passes.first_block_cache import COMPUTE
from paracompile.passes.found import TOKENS, Found
from paracompile.patterns.exchanges import is_collective, link_of
from paracompile.patterns.flops import flops_of
from paracompile.patterns.rules import rule_for
from paracompile.report.open_sizes import FixedSizes

_COUNTS = 0.05
"""The share of a model's products from which on the report names what every rank computes whole."""


@dataclass(frozen=True)
class Compilation:
    """What compiling a graph took.

    attributes:
        regions: how many regions one call may run, those of both branches of a conditional counted.
        different: how many of them were compiled.
        from_cache: how many of these Inductor's cache on disk held.
        seconds: the time it took.
    """

    regions: int
    different: int
    from_cache: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.regions} regions, {self.different} different, {self.from_cache} of these from the cache on disk, "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one graph.

    attributes:
        why_a_piece: why the graph is only a piece of its model; None where it is all of it.
        bytes_handed_on: bytes that ranks gather at the end of a piece, for what follows it.
        ranks: over how many ranks it was sharded; 1 where nothing was.
        dimension: what images, or tokens with convolutions between them, are cut along ("height", ...); else None.
        fused: attentions that the model writes out, and that were made one operator each (`fuse_attention`).
        attentions: attentions whose tokens the ranks exchange.
        cross_attentions: attentions cut along their queries alone, which send nothing.
        whole_attentions: attentions that every rank computes whole: that is cheaper, or they cannot be cut.
        collectives: how often one call starts each kind of collective.
        bytes_sent: bytes that one rank sends in one call.
        flops_whole: operations of all matrix products and attentions in the model.
        flops_rank: those of one rank, in a step in which all blocks are computed.
        blocks: blocks on the stream that the first block cache looks at; 0 without it.
        blocks_skipped: how many of them it may skip.
        flops_skipped: operations of one rank in these.
        state_bytes: bytes that it stores on a rank for each slot.
        open_sizes: sizes of the inputs that may be others in the next call, for which nothing is compiled.
        fixed_sizes: sizes that changed from call to call, and are compiled for nevertheless.
        kernel: what computes attention where it was not left to PyTorch.
        kernel_serves: how many attentions it computes.
        notes: what was gathered on the way or left whole, and why.
        compilation: what compiling took; None where the graph went to the compiler in one piece.
    """

    ranks: int
    why_a_piece: str | None = None
    bytes_handed_on: int = 0
    dimension: str | None = None
    fused: int = 0
    attentions: int = 0
    cross_attentions: int = 0
    whole_attentions: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    bytes_sent: int = 0
    flops_whole: int = 0
    flops_rank: int = 0
    blocks: int = 0
    blocks_skipped: int = 0
    flops_skipped: int = 0
    state_bytes: int = 0
    open_sizes: tuple[str, ...] = ()
    fixed_sizes: tuple[FixedSizes, ...] = ()
    kernel: str | None = None
    kernel_serves: int = 0
    notes: tuple[str, ...] = ()
    compilation: Compilation | None = field(default=None, compare=False)  # it tells a time

    def __str__(self) -> str:
        rows = [("ranks", str(self.ranks))]
        if self.ranks == 1:
            rows = [("ranks", "1, nothing was sharded")]
        else:
            share = self.flops_rank / self.flops_whole if self.flops_whole else 0.0
            rows += [
                ("attentions sharded", str(self.attentions)),
                ("attentions without communication", str(self.cross_attentions)),
                ("attentions left whole", str(self.whole_attentions)),
                ("collectives in a call", ", ".join(f"{count} {name}" for name, count in self.collectives.items())),
                ("bytes sent by a rank", f"{self.bytes_sent:,}"),
                ("work of a rank", f"{share:.1%} of the model's products"),
            ]
        if self.fused:
            rows.append(("attentions that were written out", str(self.fused)))
        if self.why_a_piece is not None:
            rows += [
                ("only a piece of the model", self.why_a_piece),
                ("bytes gathered for other pieces", f"{self.bytes_handed_on:,}"),
            ]
        if self.blocks:
            rest = 1 - self.flops_skipped / self.flops_rank if self.flops_rank else 1.0
            rows += [
                ("blocks that may be skipped", f"{self.blocks_skipped} of {self.blocks}"),
                ("work of a skipped step", f"{rest:.1%} of a step"),
                ("bytes stored for each slot", f"{self.state_bytes:,}"),
            ]
        if self.open_sizes:
            rows.append(("sizes that stay open", ", ".join(self.open_sizes)))
        if self.kernel is not None:
            rows.append((f"attentions by {self.kernel}", str(self.kernel_serves)))
        if self.compilation is not None:
            rows.append(("compiled", str(self.compilation)))
        width = max(len(name) for name, _ in rows)
        notes = [*map(str, self.fixed_sizes), *self.notes]
        return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + [f"- {note}" for note in notes])


NO_BLOCKS = (
    "paracompile: rdt was given, and this graph has no repeated blocks on a residual stream that reaches its output: "
    "nothing of it is ever skipped. Compile the transformer as one graph (fullgraph=True tells where it breaks)."
)


def in_pieces(why_a_piece: str, *, ranks: Ranks, caches: bool) -> str:
    """The warning for a model that runs in pieces, on several ranks or with blocks that were to be skipped."""
    shared = (
        " Each piece is sharded by itself and gathers what it hands on, and one without attention runs whole on every "
        "rank."
    )
    skipped = " Blocks are skipped only in a piece that holds all of them."
    return (
        f"paracompile: a graph is only a piece of its model, {why_a_piece}."
        + shared * (not ranks.is_single)
        + skipped * caches
        + " Nothing of this is lost where other arguments avoid the break (enable_model_cpu_offload in the place of "
        "sequential and group offload, quantised weights in that of layerwise casting); TORCH_LOGS=graph_breaks tells "
        "of every one."
    )


def serves_nothing(found: Found) -> str:
    """The warning for a kernel that was asked for, and that can serve no attention."""
    return (
        f"paracompile: attention={found.kernel!r} serves none of the {sum(found.kernel_declined.values())} attentions: "
        + " or ".join(found.kernel_declined)
    )


_TOO_FINE = "which would cut tokens into pieces too small to share"


def report_of(found: Found, ranks: Ranks, local: fx.GraphModule, *, caches: bool = False) -> Report:
    """The report of a graph of which only the compiling is still to come.

    args:
        found: what the passes found in it.
        ranks: the ranks that share the work, seen from this one.
        local: the graph that this rank runs.
        caches: blocks were to be skipped.
    """
    skippable = _skippable(local)
    here = operations(local.graph, rule_for) + skippable
    plans = list(found.plans.values())
    attentions = plans[-1].attentions if plans else {}
    cut = [operation for operation in attentions if operation in plans[-1].cuts]
    exchanged = [operation for operation in cut if plans[-1].exchanged(operation)]
    collectives: Counter[str] = Counter()
    sent = 0
    for node in _all_nodes(local):
        kind = _collective(node)
        if kind is not None:
            collectives[kind] += 1
            sent += _bytes_sent(kind, node, ranks)
    notes = [note for each in plans for note in (*_whole(each), *_gathers(each), *_misaligned(each))]
    notes += _together(found, local) + _in_eight_bits(local, ranks)
    notes += [
        f"{count} attentions not by {found.kernel} but as PyTorch chooses: {reason}"
        for reason, count in found.kernel_declined.items()
    ]
    if found.ranges:
        notes.append(
            f"one scale for all tokens: quantised layers exchange the range of {found.ranges} inputs in a call; with a "
            "scale for each row (PerRow) they would exchange nothing"
        )
    notes = [*_dimension(found), *notes]
    report = Report(
        ranks=ranks.size,
        why_a_piece=found.why_a_piece,
        dimension=found.dimensions[0][0] if found.dimensions else None,
        bytes_handed_on=_gathered_at_the_end(plans[-1]) if plans and found.why_a_piece is not None else 0,
        fused=found.fused,
        attentions=len(exchanged),
        cross_attentions=len(cut) - len(exchanged),
        whole_attentions=len(attentions) - len(cut),
        collectives=dict(collectives),
        bytes_sent=sent,
        flops_whole=sum(map(flops_of, plans[0].operations if plans else here)),
        flops_rank=sum(map(flops_of, here)),
        kernel=found.kernel,
        kernel_serves=found.kernel_serves,
        notes=tuple(notes),
    )
    if found.cache is None:
        return replace(report, notes=(*report.notes, NO_BLOCKS)) if caches else report
    return replace(
        report,
        blocks=len(found.cache.skipped.blocks),
        blocks_skipped=len(found.cache.skipped.middle),
        flops_skipped=sum(map(flops_of, skippable)),
        state_bytes=found.cache.state_bytes,
    )


def _gathered_at_the_end(plan: Plan) -> int:
    if not plan.operations:
        return 0
    (output,) = plan.operations[0].node.graph.find_nodes(op="output")
    return sum(bytes_of(value_of(node)) for node in output.all_input_nodes if node.target is placement.UNSHARD)


def _skippable(local: fx.GraphModule) -> list[Operation]:
    """The operations that a skipped step leaves out."""
    branch = getattr(local, COMPUTE, None)
    return operations(branch.graph, rule_for) if branch is not None else []


def _all_nodes(local: fx.GraphModule) -> Iterator[fx.Node]:
    """Those of the branches of a conditional, too."""
    branches = [branch for branch in local.children() if isinstance(branch, fx.GraphModule)]
    return (node for graph in (local, *branches) for node in graph.graph.nodes)


def _collective(node: fx.Node) -> str | None:
    namespace, _, rest = str(node.target).partition(".")
    name = rest.partition(".")[0]
    return name if namespace == "_c10d_functional" and name != "wait_tensor" else None


def _bytes_sent(kind: str, node: fx.Node, ranks: Ranks) -> int:
    buffer: Any = node.args[0]
    size = bytes_in(buffer.meta["val"])
    if kind == "all_gather_into_tensor":
        return size * (cast(int, node.args[1]) - 1)  # to each of the others
    if kind == "all_reduce":
        return 2 * size * (ranks.size - 1) // ranks.size  # as a ring sends it
    sizes, group = [hint(size) for size in cast(list[int], node.args[2])], node.args[3]
    if group not in (ranks.ring.group, ranks.ulysses.group):  # edges, of which a rank sends itself none
        return size
    own = sizes[ranks.ring.rank if group == ranks.ring.group else ranks.ulysses.rank]  # not sent
    return size * (sum(sizes) - own) // max(1, sum(sizes))


def _dimension(found: Found) -> list[str]:
    """Which spatial dimension is cut, and why not another one."""
    if not found.dimensions:
        return []
    plan = list(found.plans.values())[-1]
    positions = max((sharding.place.length for sharding in _shardings(plan)), default=0)
    (cut, cost), *others = [
        (name, f"({cost.share:.1%} of the products on the fullest rank, {cost.bytes:,} bytes exchanged)")
        for name, cost in found.dimensions
    ]
    dearer = "".join(f"; dearer: {name} {cost}" for name, cost in others)
    what = "tokens" if TOKENS in dict(found.dimensions) else "images"
    return [f"{what} are cut along their {cut}, {positions} positions where they are coarsest {cost}{dearer}"]


def _shardings(plan: Plan) -> list[Sharding]:
    results = (plan.result(value) for operation in plan.cuts for value in operation.results)
    return [sharding for sharding in results if sharding is not None]


def _together(found: Found, local: fx.GraphModule) -> list[str]:
    if not found.together:
        return []
    link = link_of(next(node.meta["val"].device for node in local.graph.nodes if is_collective(node)))
    return [
        f"queries, keys and values in one exchange: {found.together} attentions, each part below {link.balance:,} "
        f"bytes, so that its start ({link.start * 1e6:.0f} us) costs more than carrying it ({link.rate / 1e9:.0f} GB/s)"
    ]


def _in_eight_bits(local: fx.GraphModule, ranks: Ranks) -> list[str]:
    carried = [
        node
        for node in _all_nodes(local)
        if _collective(node) == "all_to_all_single"
        and node.args[-1] in (ranks.ring.group, ranks.ulysses.group)
        and node.meta["val"].dtype is torch.uint8
    ]
    return [f"{len(carried)} exchanges in eight bits, with a scale for each head of a token"] if carried else []


def _whole(plan: Plan) -> list[str]:
    """One line for each attention that every rank computes, where its work counts."""
    work = sum(map(flops_of, plan.operations))
    return [
        f"left whole {operation.node.name} ({attention.flops / work:.0%} of the model's products)"
        + (f", at {where}" if (where := source_line(operation.node)) else "")
        for operation, attention in plan.attentions.items()
        if operation not in plan.cuts and attention.flops > _COUNTS * work
    ]


def _gathers(plan: Plan) -> list[str]:
    """One line for each gather on the way; the last one, after which nothing is cut any more, is no news."""
    readers: dict[Any, list[Operation]] = {}
    for operation, value in plan.unmatched():
        if operation in plan.cuts or _leads_back(operation, plan):
            readers.setdefault(value, []).append(operation)
    return [
        f"gathered {value.node.name} ({bytes_of(value):,} bytes) for "
        + _spelled(operations[0], _why(operations[0], plan))
        + (f" and {len(operations) - 1} more" if len(operations) > 1 else "")
        for value, operations in readers.items()
    ]


def _why(operation: Operation, plan: Plan) -> str:
    if operation.rule is None:
        return "which has no rule"
    if operation in plan.misaligned:
        return _TOO_FINE
    return "which is cheaper whole" if operation in plan.left_whole else "which needs all tokens"


def _misaligned(plan: Plan) -> list[str]:
    """What makes a gather necessary that is found further up, where nobody would look for the reason."""
    readers = {operation for operation, _ in plan.unmatched()}
    return [
        f"whole before {_spelled(operation, _TOO_FINE)}"
        for operation in plan.misaligned
        if operation not in readers and (operation in plan.cuts or _leads_back(operation, plan))
    ]


def _leads_back(operation: Operation, plan: Plan) -> bool:
    """Whether anything cut depends on the operation."""
    cut = {operation.node for operation in plan.cuts}
    seen, waiting = {operation.node}, [operation.node]
    while waiting:
        for user in waiting.pop().users:
            if user in cut:
                return True
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _spelled(operation: Operation, why: str) -> str:
    node = operation.node
    where = " in ".join(filter(None, [source_line(node), module_path(node)]))
    return f"{node.name} = {node.target}, {why}" + (f", at {where}" if where else "")
