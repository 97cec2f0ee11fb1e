"""One compile: options -> passes -> compiler -> callable."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from paracompile.artifacts import Compiled, note_compiled
from paracompile.calling import as_called, as_called_by_all, verified
from paracompile.captured import Captured
from paracompile.compiler import compile_regions, compile_whole
from paracompile.garbage import no_collections
from paracompile.guards import Guards
from paracompile.integrations import diffusers
from paracompile.layout.plan import Plan
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.overlap import inductor_settings
from paracompile.passes import Found, local_lengths, pipeline, run_passes
from paracompile.passes.attention_on_shards import Lengths
from paracompile.passes.cache_decision import Control
from paracompile.recompiles import make_room
from paracompile.report.dump import Dump
from paracompile.report.open_sizes import fixed_sizes
from paracompile.report.report import NO_BLOCKS, Report, in_pieces, report_of, serves_nothing
from paracompile.runtime.agreement import Agreement
from paracompile.runtime.cached_call import graph_compiled, graph_is_plain
from paracompile.runtime.eight_bits import KINDS
from paracompile.seen_again import seen_again, seen_again_as_captured
from paracompile.thresholds import default_rdt
from paracompile.torch_private import FakeTensorMode, TracingContext, tracing
from paracompile.warm_up import warm_up

Callback = Callable[..., Any]

diffusers.listen()  # torch.compile imports this module, so a pipeline's first step is heard
warm_up()


def paracompile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callback:
    """The backend: `torch.compile(model, backend="paracompile", options=options)`; see `Options` for the options.

    On several ranks the graph is sharded, and all agree on the graph, the options and the plan before any of them runs
    a collective. On one rank it goes to the compiler as it is, unless it has repeated blocks, attention masks that only
    hide keys, or blocks are to be skipped.

    raises:
        OptionError: options that cannot work.
        GraphError: a graph that cannot be sharded.
        RankError: another rank failed, or holds another graph; raised on every rank.
    """
    agreement = Agreement(_members(options), _timeout(options))
    captured = Captured(gm, example_inputs)
    with agreement.stage("options") as facts:
        chosen = Options.parse(options)
        ranks = Ranks.from_mesh(chosen.mesh)
        facts["options"] = chosen.fingerprint()
        note_compiled(Compiled.of(captured.model, captured.weights, ranks))
    parameters = [value for value in example_inputs if isinstance(value, nn.Parameter)]
    graph_compiled(parameters, rdt=chosen.rdt)
    optional = ranks.is_single and not chosen.caches and chosen.kernel == "auto"
    dump = Dump(chosen.dump, captured.name, ranks.flat_rank)
    dump("captured", gm)
    if optional and not _may_gain(captured, chosen):
        return _whole(captured, chosen)

    found = Found(why_a_piece=captured.why_a_piece)
    if found.why_a_piece is not None and not optional:
        warnings.warn(in_pieces(found.why_a_piece, ranks=ranks, caches=chosen.caches), stacklevel=2)
    if found.why_a_piece is not None and not ranks.is_single and not captured.may_be_shared():
        if chosen.caches:
            graph_is_plain(parameters, found.why_a_piece)
        return _whole_on_every_rank(captured, chosen, ranks, found, agreement)

    guards = Guards(captured) if captured.has_open_sizes else None
    lengths = None if chosen.shard_inputs else _lengths(gm, ranks, agreement)
    with agreement.stage("plan") as facts:
        captured.check_gradients()
        captured.check_static()
        if chosen.exchange_dtype == "fp8":
            captured.check_float8()
        threshold = _threshold(captured, chosen)
        try:
            local, report = _rewritten(captured, chosen, ranks, lengths, found, facts, dump)
        except Exception as error:
            if not optional:
                raise
            warnings.warn(f"paracompile: this graph is compiled in one piece, for {error}", stacklevel=2)
            return _whole(captured, chosen)
        if optional and not (_in_regions(captured, chosen) or found.masks_dropped):
            return _whole(captured, chosen)
        facts["plan"] = "\n".join([*map(describe, found.plans.values()), str(found.skipped)])
    with agreement.stage("compile"):
        program, compilation = compile_regions(local, chosen, {} if ranks.is_single else inductor_settings())
        compiled = verified(program, captured, found.ints) if chosen.verify else program
    if guards is not None:
        guards.share(agreement)
    make_room()
    if chosen.caches and found.cache is None:
        graph_is_plain(parameters, found.why_a_piece or "the blocks are on no residual stream")
        if found.why_a_piece is None:
            warnings.warn(NO_BLOCKS, stacklevel=2)
    if chosen.kernel != "auto" and found.kernel_declined and not found.kernel_serves:
        warnings.warn(serves_nothing(found), stacklevel=2)
    fixed = fixed_sizes(captured.shape_env)
    for sizes in fixed:
        warnings.warn(f"paracompile: {captured.model} is {sizes}", stacklevel=2)
    if chosen.report is not None and report is not None:
        made = replace(report, open_sizes=captured.open_sizes, fixed_sizes=fixed, compilation=compilation)
        chosen.report(made)
    run = as_called(compiled, captured, chosen, ranks, found, threshold, plan=Control.plan(chosen))
    return run if ranks.is_single else as_called_by_all(run, captured, chosen, ranks, agreement)


def _in_regions(captured: Captured, options: Options) -> bool:
    """Whether compiling equal blocks once is worth while."""
    return options.regions and options.compiler == "inductor" and captured.has_repeated_blocks()


def _may_gain(captured: Captured, options: Options) -> bool:
    """Whether one rank without a cache has anything to gain from the passes, and the passes may have its graph."""
    gains = _in_regions(captured, options) or (options.drop_masked_keys and captured.has_masks())
    return gains and captured.may_be_constant()


def _whole(captured: Captured, options: Options, why_a_piece: str | None = None) -> Callback:
    """A graph of which nothing is changed."""
    compiled = compile_whole(captured.gm, captured.example_inputs, options, {})
    if options.verify:
        compiled = verified(compiled, captured, ints=frozenset())
    if options.report is not None:
        options.report(Report(ranks=1, why_a_piece=why_a_piece))
    return compiled


def _whole_on_every_rank(
    captured: Captured, options: Options, ranks: Ranks, found: Found, agreement: Agreement
) -> Callback:
    """A piece of a model that leaves nothing to share: sizes may stay symbols in it."""
    with agreement.stage("plan") as facts:
        captured.check_static()
        found.seen_again = seen_again_as_captured(captured.gm)
        if options.shard_inputs:
            facts["graph"] = comparable(captured.gm.print_readable(print_output=False))
    with agreement.stage("compile"):
        compiled = _whole(captured, options, why_a_piece=found.why_a_piece)
    make_room()
    run = as_called(compiled, captured, options, ranks, found, threshold=0.0)
    return as_called_by_all(run, captured, options, ranks, agreement)


def _rewritten(
    captured: Captured,
    options: Options,
    ranks: Ranks,
    lengths: Sequence[Lengths] | None,
    found: Found,
    facts: dict[str, str],
    dump: Dump,
) -> tuple[fx.GraphModule, Report | None]:
    """The graph of this rank, after all passes, and the report of it if one is wanted.

    Where a pass cannot do with open sizes they are fixed, with a warning.
    """
    how = (captured, options, ranks, lengths, found, facts, dump)
    try:
        return _passed(*how)
    except Exception as error:
        if not captured.has_open_sizes:
            raise
        failure = error
    captured.fix_sizes()
    found.clear()
    made = _passed(*how)
    warnings.warn(
        f"paracompile: a graph of {captured.model} compiles for each size, as its passes failed where sizes stay open: "
        f"{type(failure).__name__}: {failure}",
        stacklevel=2,
    )
    return made


@no_collections()
def _passed(
    captured: Captured,
    options: Options,
    ranks: Ranks,
    lengths: Sequence[Lengths] | None,
    found: Found,
    facts: dict[str, str],
    dump: Dump,
) -> tuple[fx.GraphModule, Report | None]:
    reports: list[Report] = []

    def after(name: str, graph: fx.GraphModule) -> None:
        if name == "normalise":
            found.seen_again = seen_again(graph.graph)
            found.ints = captured.numbers.ints
        if name == "normalise" and lengths is None:  # graphs of shards differ in their sizes
            facts["graph"] = comparable(graph.print_readable(print_output=False, include_stride=True))
        if name == "schedule" and options.report is not None:  # the last graph that is all ATen
            reports.append(report_of(found, ranks, graph, caches=options.caches))
        dump(name, graph)

    passes = pipeline(
        ranks,
        found=found,
        drop_keys=options.drop_masked_keys,
        lengths=lengths,
        together=True,
        eight_bits=KINDS[options.exchange_dtype] if options.exchange_dtype else None,
        kernel=options.kernel,
        cache=options if options.caches else None,
        regions=options.regions,
    )
    # In Dynamo's own mode Inductor looks for the symbols of all numbers in each region, and makes constants of them.
    own = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode = TracingContext.get().fake_mode if captured.has_open_sizes else own  # where sizes are open they are guarded
    with tracing(TracingContext(mode)):
        local = run_passes(captured.gm, captured.example_inputs, passes, after=after)
    return local, reports[-1] if reports else None


def _threshold(captured: Captured, options: Options) -> float:
    if options.rdt != "auto":
        return options.rdt or 0.0
    return default_rdt(captured.classes, quantised=captured.is_quantised)


def _lengths(gm: fx.GraphModule, ranks: Ranks, agreement: Agreement) -> list[Lengths]:
    """The lengths of the shards of all ranks that share this rank's sequence, in its order."""
    said = agreement.exchange("lengths", facts={}, own=json.dumps(local_lengths(gm)))
    by_rank = dict(zip(agreement.ranks, said, strict=True))
    first = ranks.batch.rank * ranks.sequence_size
    members = ranks.members[first : first + ranks.sequence_size]
    return [[(query, key) for query, key in json.loads(by_rank[member])] for member in members]


def _members(options: Any) -> tuple[int, ...]:
    """The ranks to agree with, read from options that may still be wrong: those of the mesh, or the world's."""
    mesh = options.get("mesh") if isinstance(options, Mapping) else None
    if isinstance(mesh, DeviceMesh):
        return tuple(sorted(int(rank) for rank in mesh.mesh.flatten().tolist()))
    return tuple(range(dist.get_world_size())) if dist.is_available() and dist.is_initialized() else ()


def _timeout(options: Any) -> float:
    wanted = options.get("timeout") if isinstance(options, Mapping) else None
    usable = isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and 0 < wanted < float("inf")
    return float(wanted) if usable else Options.timeout  # type: ignore[arg-type]


def comparable(code: str) -> str:
    """A graph's text without what differs between ranks that hold the same: comments (paths), and each rank's GPU."""
    lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return re.sub(r"device\(type='(\w+)', index=\d+\)", r"device(type='\1')", "\n".join(lines))


def describe(plan: Plan) -> str:
    """The plan as text: the same on every rank that decided the same."""
    lines = []
    for operation in plan.operations:
        for value in operation.results:
            sharding = plan.result(value)
            if sharding is not None:
                lines.append(f"{operation.node.name}[{value.index}]: {sharding}")
    return "\n".join(lines)
