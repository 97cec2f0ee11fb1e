"""All that paracompile reads of torch beside its public names, in one place: what to look at when torch changes.

Each name stands beside what it is for, and `tests/test_torch_private.py` tests what is relied on. All are in torch
2.11.0 and in 2.13.0 and were tested with both; the one that differs says so. Anywhere else the linter refuses modules
and a test all names. What compiles graphs is in `paracompile.torch_private.compilers`, as it takes a second to
import and only the backend needs it.

Operators, `torch.ops.aten._to_copy` among them, are not private here: graphs are written in them, the tables of rules
are about them, and one that is gone is an error at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch import _check as check  # of what holds for a size; torch 2.13 writes an operator into the graph instead
from torch._C import (
    DispatchKey,  # Functionalize is left out while normalise traces
    DispatchKeySet,
)
from torch._C import _ExcludeDispatchKeyGuard as ExcludeDispatchKeyGuard  # a context that leaves keys out
from torch._C import _set_grad_enabled as set_grad_enabled  # as it stands in a graph
from torch._C._distributed_c10d import _resolve_process_group as group_named  # as collectives do
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list as graphs_of,  # of code; the one used last comes first
)
from torch._C._functorch import (
    get_dynamic_layer_stack_depth,  # how many levels functorch is in
    pop_dynamic_layer_stack,
)
from torch._dispatch.python import enable_python_dispatcher  # operators made of others run as Python
from torch._dynamo import (
    convert_frame,  # its file on the stack: here Dynamo begins to compile
    eval_frame,  # its file on the stack: here what is compiled was called
)
from torch._dynamo.eval_frame import (
    OptimizedModule,  # what torch.compile makes of a module
    innermost_backend,  # the backend that torch.compile was given
)
from torch._dynamo.exc import BackendCompilerFailed  # what an error in a backend arrives as
from torch._dynamo.guards import DeletedGuardManagerWrapper  # the guards of a graph that was let go
from torch._dynamo.source import ConstantSource  # says that a tensor is a constant of the graph
from torch._dynamo.symbolic_convert import InstructionTranslator  # the frame that Dynamo compiles
from torch._dynamo.utils import (
    counters,  # counters["inductor"]["fxgraph_cache_hit"]: graphs that were in Inductor's cache
    graph_break_reasons,  # all so far in this process, each with the user's stack
)
from torch._dynamo.variables import TensorVariable  # a tensor in that frame, and its node
from torch._dynamo.variables.base import (
    VariableTracker,  # any value in it; `visit` takes side effects as well from torch 2.12 on
)
from torch._functorch._aot_autograd.functional_utils import (
    has_data_mutation,  # of a FunctionalTensor: was it written to
)
from torch._functorch.predispatch import _vmap_decrement_nesting as vmap_decrement_nesting  # ends what torch.vmap maps
from torch._functorch.predispatch import _vmap_increment_nesting as vmap_increment_nesting  # begins it, in a graph
from torch._guards import (
    CompileContext,  # the number of the present compile
    Source,  # where Dynamo reads an input
    TracingContext,  # where AOTAutograd and Inductor find the fake mode
    detect_fake_mode,  # the mode of the context, or else of the tensors
    tracing,  # sets the context
)
from torch._ops import OpOverload  # an operator, as it stands in a graph
from torch._refs import tensor as refs_tensor  # torch.tensor of a number, as it stands in a graph
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # shapes without values
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode  # no writes in place
from torch.amp.autocast_mode import _enter_autocast as enter_autocast  # as it stands in a graph
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as get_default_store  # the store that all ranks share
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule  # writes its code once that is called
from torch.utils._ordered_set import OrderedSet  # what Inductor's passes are given
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # a context that sees each operator
    is_traceable_wrapper_subclass,  # a tensor made of tensors, such as a quantised weight
)
from torch.utils._pytree import (
    tree_flatten,  # the leaves of nested values, and their structure
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from torch.utils._sympy.functions import (  # how torch writes a // b, max(a, b) and so on of sizes
    FloorDiv,
    Max,
    Min,
    Mod,
    PythonMod,
)
from torch.utils._sympy.interp import sympy_interp  # calculates an expression, by an analysis
from torch.utils._sympy.printers import PythonPrinter  # writes an expression as Python
from torch.utils._sympy.reference import PythonReferenceAnalysis  # calculates as Python does

# Functions of torch itself

fused_sdp_choice: Callable[..., int] = torch._fused_sdp_choice
"""Takes what attention takes; the number of the `SDPBackend` that would compute it."""

SYMBOLIC: Mapping[str, Any] = {
    name.removeprefix("_sym_"): getattr(torch, name) for name in dir(torch) if name.startswith("_sym_")
}
"""What stands in a graph for functions of Python's numbers, by the names that they have for tensors: `sqrt`, `sin`."""


def unwrapped(value: FunctionalTensor) -> Tensor:
    """The plain tensor that a functional one ended as, all that was written to it included."""
    torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(value.elem)


# What tensors and operators know of themselves


def memory_of(tensor: Tensor) -> int:
    """A number that tensors have in common which share their storage; fake ones as well, which have no address."""
    number: int = tensor.untyped_storage()._cdata
    return number


def forget_originals(fake_mode: FakeTensorMode) -> None:
    """Lets go of what fake tensors were made of: torch moves no quantised weight that anything refers to weakly."""
    describer = fake_mode.fake_tensor_converter.meta_converter.describer
    describer.lookup_tensor.clear()
    describer.lookup_storage.clear()


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written to; of one that was made in inference mode torch does not count."""
    return None if tensor.is_inference() else tensor._version


def schema_of(operator: OpOverload[..., Any]) -> torch.FunctionSchema:
    """`arguments`, `returns` and `is_mutable` of an operator."""
    return operator._schema


def own_expression(number: torch.SymInt) -> Any:
    """The sympy expression that a symbolic number was made with, be its symbols known to be others by now."""
    return number.node._expr


# What Dynamo attaches to a graph, and AOTAutograd reads


STATIC_INPUT = "_dynamo_static_input_type"
"""A key of `meta["tensor_dict"]` of a graph's input that is a parameter or a buffer."""


def source_of(placeholder: fx.Node) -> Source | None:
    """Where an input comes from; None if Dynamo did not say."""
    source: Source | None = getattr(placeholder, "_dynamo_source", None)
    return source


def set_source(placeholder: fx.Node, source: Source | None) -> None:
    """Says where an input comes from; None: not from the model. AOTAutograd fails where nothing was said."""
    placeholder._dynamo_source = source


def parameter_sources(gm: fx.GraphModule) -> dict[str, Source] | None:
    """Where each parameter of a graph comes from, by its name; None for a graph that is not Dynamo's."""
    return getattr(gm, "_param_name_to_source", None)


def set_parameter_sources(gm: fx.GraphModule, sources: Mapping[str, Source]) -> None:
    """Says where each parameter comes from: with this, AOTAutograd takes a graph for Dynamo's."""
    gm._param_name_to_source = dict(sources)  # type: ignore[assignment]


def is_boxed(function: Any) -> bool:
    """Whether a compiled function takes one list of arguments, and empties it."""
    return getattr(function, "_boxed_call", False) is True


def rename(node: fx.Node, name: str) -> None:
    """Gives a node this name, or one like it where the graph has another of that name."""
    node._rename(name)


# What process groups and meshes know


def device_types_of(group: ProcessGroup) -> list[torch.device]:
    """The kinds of devices that a group can send from."""
    return group._device_types


def flattened(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of one dimension over all ranks of this one; made once, by all of them together."""
    return mesh._flatten()
