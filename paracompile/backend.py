"""One compile: options -> passes -> compiler -> callable."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paracompile.artifacts import Compiled, note_compiled
from paracompile.compiler import compile_regions, compile_whole
from paracompile.errors import GraphError, ParacompileError
from paracompile.integrations import diffusers
from paracompile.layout.graph import Operation, is_static, operations
from paracompile.layout.plan import Plan
from paracompile.mesh import Ranks
from paracompile.options import Options
from paracompile.overlap import inductor_settings
from paracompile.passes import CacheLayout, CachePasses, CacheRules, local_lengths, pipeline, run_passes
from paracompile.passes.attention_on_shards import Lengths
from paracompile.passes.context_parallel import flops_of
from paracompile.passes.drop_masked_keys import attends_to_visible
from paracompile.passes.first_block_cache import COMPUTE
from paracompile.patterns.blocks import find_blocks
from paracompile.patterns.rules import rule_for
from paracompile.recompiles import make_room
from paracompile.report.dump import Dump
from paracompile.report.report import Report, report_of
from paracompile.runtime.agreement import Agreement
from paracompile.runtime.cached_call import CachedCall, StateLike, graph_compiled
from paracompile.runtime.inputs import InputAgreement
from paracompile.runtime.slots import CallSigns
from paracompile.seen_again import seen_again
from paracompile.thresholds import default_rdt
from paracompile.warm_up import warm_up

Callback = Callable[..., Any]

diffusers.listen()  # torch.compile imports this module, so a pipeline's first step is heard already
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
    with agreement.stage("options") as facts:
        chosen = Options.parse(options)
        ranks = Ranks.from_mesh(chosen.mesh)
        facts["options"] = chosen.fingerprint()
        note_compiled(Compiled.of(*_identity(gm, example_inputs), ranks))
    diffusers.listen()  # it may have been imported since
    graph_compiled([value for value in example_inputs if isinstance(value, nn.Parameter)], caches=chosen.caches)
    dump = Dump(chosen.dump, _compile_name(), ranks.flat_rank)
    dump("captured", gm)
    optional = ranks.is_single and not chosen.caches
    repeats = chosen.regions and chosen.compiler == "inductor" and bool(find_blocks(gm.graph))
    masks = chosen.drop_masked_keys and _has_masks(gm)
    if optional and not ((repeats or masks) and _may_be_constant(gm, example_inputs)):
        return _whole(gm, example_inputs, chosen)

    lengths = None if chosen.shard_inputs else _lengths(gm, ranks, agreement)
    with agreement.stage("plan") as facts:
        _check_gradients(gm, example_inputs)
        _check_static(gm, example_inputs)
        plans: list[Plan] = []
        reports: list[Report] = []
        layouts: list[CacheLayout] = []
        gains = [repeats]
        in_place: set[int] = set()

        def after(name: str, graph: fx.GraphModule) -> None:
            if name == "drop_masked_keys":
                gains.append(attends_to_visible(graph))
            if name == "normalise":
                in_place.update(seen_again(graph.graph))
            if name == "normalise" and lengths is None:  # graphs of shards differ in their sizes
                facts["graph"] = comparable(graph.print_readable(print_output=False, include_stride=True))
            if name == "schedule" and chosen.report is not None:  # the last graph that is all ATen
                reports.append(_report(graph, ranks, plans, layouts, chosen))
            dump(name, graph)

        threshold = _threshold(chosen, gm, example_inputs)
        passes = pipeline(
            ranks,
            planned=plans.append,
            drop_keys=chosen.drop_masked_keys,
            lengths=lengths,
            cache=_cache_passes(chosen, layouts.append) if chosen.caches else None,
            regions=chosen.regions,
        )
        try:
            local = run_passes(gm, example_inputs, passes, after=after)
        except Exception as error:
            if not optional:
                raise
            warnings.warn(f"paracompile: this graph is compiled in one piece, for {error}", stacklevel=2)
            return _whole(gm, example_inputs, chosen)
        if optional and not any(gains):
            return _whole(gm, example_inputs, chosen)
        facts["plan"] = "\n".join([*map(describe, plans), *(str(layout.skipped) for layout in layouts)])
    with agreement.stage("compile"):
        compiled, compilation = compile_regions(local, chosen, {} if ranks.is_single else inductor_settings())
    make_room()
    if chosen.caches and not layouts:
        warnings.warn(_NO_BLOCKS, stacklevel=2)
    if chosen.report is not None:
        chosen.report(replace(reports[-1], compilation=compilation))
    agree = InputAgreement(
        mode=chosen.inputs if chosen.shard_inputs and not ranks.is_single else "trust",
        indices=tuple(index for index, node in _placeholders(gm) if not is_static(node)),
        group=ranks.group,
        source=ranks.members[0] if ranks.members else 0,
        names=tuple(node.name for _, node in _placeholders(gm) if not is_static(node)),
        in_place=frozenset(in_place),
    )
    if not layouts:
        return lambda *args: compiled(*agree(args))
    (layout,) = layouts
    return CachedCall(
        compiled,
        prepare=agree,
        like=_state_like(layout),
        threshold=threshold,
        static=tuple(index for index, node in _placeholders(gm) if is_static(node)),
        signs=_signs(gm, layout),
    )


def _whole(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callback:
    """A graph of which nothing is changed."""
    compiled = compile_whole(gm, example_inputs, options, {})
    if options.report is not None:
        options.report(Report(ranks=1))
    return compiled


def _identity(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str, list[torch.Tensor]]:
    """The class of the module that a graph is of, and its weights."""
    weights = [value for (_, node), value in zip(_placeholders(gm), example_inputs, strict=True) if is_static(node)]
    return next(iter(_classes(gm)), "a function"), weights


_NO_BLOCKS = (
    "paracompile: rdt was given, and this graph has no repeated blocks on a residual stream that reaches its output: "
    "nothing of it is ever skipped. Compile the transformer as one graph (fullgraph=True tells where it breaks)."
)


def _cache_passes(options: Options, laid_out: Callable[[CacheLayout], object]) -> CachePasses:
    rules = CacheRules(
        warmup_steps=options.warmup_steps,
        max_consecutive_hits=options.max_consecutive_hits,
        downsample_factor=options.downsample_factor,
        taylor_order=options.taylor_order,
    )
    return CachePasses(options.first_blocks, options.last_blocks, rules, laid_out)


def _threshold(options: Options, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> float:
    if options.rdt != "auto":
        return options.rdt or 0.0
    return default_rdt(_classes(gm), quantised=any(map(is_traceable_wrapper_subclass, example_inputs)))


def _classes(gm: fx.GraphModule) -> list[str]:
    """The names of the classes of the modules in a graph, the outermost first."""
    root = InstructionTranslator.current_tx().f_locals.get("self")  # in no module's stack
    roots = [type(root).__name__] if isinstance(root, nn.Module) else []
    stacks = [node.meta.get("nn_module_stack", {}).values() for node in gm.graph.nodes]
    return roots + [getattr(kind, "__name__", str(kind)) for stack in stacks for _, kind in stack]


def _state_like(layout: CacheLayout) -> StateLike:
    record, *state = ((tuple(like.shape), like.dtype, like.device) for like in (layout.record, *layout.state))
    return StateLike(record, tuple(state))


def _signs(gm: fx.GraphModule, layout: CacheLayout) -> CallSigns:
    """What stays the same through a generation is what is neither denoised nor a time; without both, nothing tells."""
    if layout.skipped.sample is None or not layout.skipped.times:
        return CallSigns(())
    others = {layout.skipped.sample, *layout.skipped.times}
    conditioning = (
        index
        for index, node in _placeholders(gm)
        if isinstance(node.meta.get("example_value"), torch.Tensor) and not is_static(node) and index not in others
    )
    return CallSigns(tuple(conditioning))


def _report(
    gm: fx.GraphModule, ranks: Ranks, plans: Sequence[Plan], layouts: Sequence[CacheLayout], options: Options
) -> Report:
    """The report of a graph of which only the compiling is still to come."""
    skippable = _skippable_operations(gm)
    report = report_of(plans, ranks, gm, operations(gm.graph, rule_for) + skippable, flops_of)
    if not options.caches:
        return report
    if not layouts:
        return replace(report, notes=(*report.notes, _NO_BLOCKS))
    (layout,) = layouts
    return replace(
        report,
        blocks=len(layout.skipped.blocks),
        blocks_skipped=len(layout.skipped.middle),
        flops_skipped=sum(map(flops_of, skippable)),
        state_bytes=layout.state_bytes,
    )


def _skippable_operations(gm: fx.GraphModule) -> list[Operation]:
    """The operations that a skipped step leaves out."""
    branch = getattr(gm, COMPUTE, None)
    return operations(branch.graph, rule_for) if branch is not None else []


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


def _placeholders(gm: fx.GraphModule) -> list[tuple[int, fx.Node]]:
    return list(enumerate(gm.graph.find_nodes(op="placeholder")))


def _may_be_constant(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether the passes, which take sizes and numbers for constants and know no gradients, may have the graph.

    Sizes that Dynamo made symbols of because a second one was met may become numbers again: another size is compiled in
    regions sooner than one graph for all sizes in one piece. Symbols in the first compile were asked for
    (`dynamic=True`); a number that is no size may change at each step.
    """
    if _wants_gradients(gm, example_inputs):
        return False
    values = [node.meta.get("example_value") for _, node in _placeholders(gm)]
    sizes = set().union(*(free_symbols(value) for value in values if isinstance(value, torch.Tensor)))
    numbers = set().union(*(free_symbols(value) for value in values if isinstance(value, _SYMBOLS)))
    identity = CompileContext.current_compile_id()
    asked_for = identity is None or identity.frame_compile_id == 0
    return not (sizes | numbers) if asked_for else numbers <= sizes


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _has_masks(gm: fx.GraphModule) -> bool:
    """Whether any attention of Dynamo's graph has a mask."""
    return any(
        node.target is F.scaled_dot_product_attention
        and (len(node.args) > 3 or node.kwargs.get("attn_mask") is not None)
        for node in gm.graph.nodes
    )


def _wants_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """The inputs that gradients are wanted of."""
    if not torch.is_grad_enabled():
        return []
    return [
        node.name
        for (_, node), value in zip(_placeholders(gm), example_inputs, strict=True)
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]


def _check_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    wanted = _wants_gradients(gm, example_inputs)
    if wanted:
        others = f" and {len(wanted) - 1} more inputs" if wanted[1:] else ""
        raise ParacompileError(
            f"gradients are wanted (of {wanted[0]}{others}), and a graph that is sharded or cached has none: call the "
            "model under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
        )


def _check_static(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Raises a GraphError where a parameter is not static: by another torch it may be called otherwise.

    Such a weight would be sent to all ranks at each call, and nothing would tell.
    """
    for (_, node), value in zip(_placeholders(gm), example_inputs, strict=True):
        if isinstance(value, nn.Parameter) and not is_static(node):
            raise GraphError(
                node,
                f"it is a parameter, and torch {torch.__version__} does not say so as paracompile reads it",
                "use a version of torch that paracompile was tested with, and report this",
            )


def _compile_name() -> str:
    identity = CompileContext.current_compile_id()
    return "graph_" + ("0" if identity is None else str(identity).replace("/", "_"))
