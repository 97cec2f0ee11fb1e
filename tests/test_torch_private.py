"""What paracompile relies on in private names of torch, name by name; and that they stand in one place.

Runs with each version of torch that the package says it works with.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import SDPBackend
from torch.testing._internal.two_tensor import TwoTensor

from paracompile import torch_private
from paracompile.overlap import inductor_settings
from paracompile.torch_private import compilers

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]
SOURCE = sorted(path for folder in ("paracompile", "passes", "patterns") for path in (ROOT / folder).rglob("*.py"))
HERE = ROOT / "paracompile" / "torch_private"

aten = torch.ops.aten

Test = Callable[[], None]
tested: list[str] = []


def of(*names: str) -> Callable[[Test], Test]:
    """Says which names a test is of."""
    tested.extend(names)
    return lambda test: test


def handed_on(path: Path) -> Iterator[str]:
    """The names that a module hands on: private ones that it imports, and what it defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and any(is_private(f"{node.module}.{name.name}") for name in node.names):
            yield from (name.asname or name.name for name in node.names)
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield target.id


def is_private(name: str) -> bool:
    """Whether a dotted name of torch is private; operators and `__version__` are not."""
    parts = name.split(".")
    private = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return parts[0] == "torch" and parts[1:2] != ["ops"] and private


def test_each_private_name_has_one_test() -> None:
    names = [name for path in (HERE / "__init__.py", HERE / "compilers.py") for name in handed_on(path)]
    assert sorted(tested) == sorted(names)


# That they stand in one place


def private_names(tree: ast.Module) -> list[str]:
    """Private names of torch that a module imports or reads; a private attribute of any object may be torch's."""
    imported: dict[str, str] = {"self": "", "cls": ""}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if is_private(name.name)]
            for name in node.names:
                bound = name.asname or name.name.split(".")[0]
                imported[bound] = name.name if name.asname else bound
        elif isinstance(node, ast.ImportFrom):
            imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Assign) and dotted(node.value).startswith("torch.ops."):
            imported |= {dotted(target): dotted(node.value) for target in node.targets}  # aten = torch.ops.aten
    found += [name for name in imported.values() if is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            root, _, rest = dotted(node).partition(".")
            name = f"{imported.get(root, root)}.{rest}"
            if root not in imported or is_private(name):
                found.append(name)
    return found


def dotted(node: ast.expr) -> str:
    """The name that an expression reads."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "..."


def test_private_names_of_torch_stand_in_one_place() -> None:
    elsewhere = [path for path in SOURCE if HERE not in path.parents]
    found = {str(path): private_names(ast.parse(path.read_text())) for path in elsewhere}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "from torch._ops import OpOverload",
        "from torch.distributed.distributed_c10d import _get_default_store",
        "import torch\nisinstance(x, torch._ops.OpOverload)",
        "import torch\ntorch._sync(x)",
        "from torch import distributed as dist\ndist._get_default_store()",
        "node._rename('x')",
        "value.storage()._cdata",
    ],
)
def test_the_search_sees_private_names(code: str) -> None:
    assert private_names(ast.parse(code)) != []


@pytest.mark.parametrize(
    "code", ["import torch\naten = torch.ops.aten\naten._to_copy", "import torch\ntorch.__version__", "self._own"]
)
def test_the_search_lets_others_pass(code: str) -> None:
    assert private_names(ast.parse(code)) == []


@pytest.mark.slow
def test_importing_the_package_imports_no_compiler() -> None:
    code = "import sys, paracompile; print('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


# While Dynamo compiles


def compiling(function: Callable[..., Any], *args: Any, see: Callable[[fx.GraphModule, list[Any]], Any]) -> list[Any]:
    """What `see` makes of each graph that Dynamo captures, while it does."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(see(gm, example_inputs))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return seen


def graph_of(function: Callable[..., Any], *args: Any) -> fx.Graph:
    (graph,) = compiling(function, *args, see=lambda gm, _: gm.graph)
    return graph


def targets_of(function: Callable[..., Any], *args: Any) -> list[Any]:
    return [node.target for node in graph_of(function, *args).nodes]


@of("InstructionTranslator")
def test_the_frame_that_is_compiled() -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1

    def see(*_: Any) -> None:
        frame = torch_private.InstructionTranslator.current_tx()
        assert frame.f_code is f.__code__
        assert isinstance(frame.f_locals["x"], Tensor)
        assert isinstance(frame.symbolic_locals, dict)
        assert isinstance(frame.stack, list)
        assert hasattr(frame.output, "side_effects")

    compiling(f, torch.ones(3), see=see)


@of("VariableTracker", "TensorVariable")
def test_values_that_live_on_are_visited() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, y

    def see(gm: fx.GraphModule, _: Any) -> set[str]:
        frame = torch_private.InstructionTranslator.current_tx()
        visit = torch_private.VariableTracker.visit
        more = {"side_effects": frame.output.side_effects}
        more = {name: value for name, value in more.items() if name in inspect.signature(visit).parameters}
        seen: list[Any] = []
        visit(seen.append, [frame.stack, list(frame.symbolic_locals.values())], **more)
        tensors = [each for each in seen if issubclass(type(each), torch_private.TensorVariable)]
        return {each.proxy.node.name for each in tensors if each.proxy.node.op == "placeholder"}

    (names,) = compiling(f, torch.ones(3), torch.ones(3), see=see)
    assert names == {"l_y_"}


@of("CompileContext")
def test_compiles_are_numbered() -> None:
    current = torch_private.CompileContext.current_compile_id
    assert current() is None
    seen = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(current())
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    for size in (3, 4):
        compiled(torch.ones(size))
    assert [(str(each), each.frame_compile_id) for each in seen] == [("0/0", 0), ("0/1", 1)]


@of("convert_frame", "eval_frame")
def test_dynamo_stands_on_the_stack_between_two_files() -> None:
    def see(*_: Any) -> list[str]:
        frame: FrameType | None = sys._getframe()
        files = []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        return files

    (files,) = compiling(lambda x: x + 1, torch.ones(3), see=see)
    begins = files.index(torch_private.convert_frame.__file__)
    assert begins < files.index(torch_private.eval_frame.__file__)


@of("graphs_of", "DeletedGuardManagerWrapper")
def test_a_graph_can_be_let_go() -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    def f(x: Tensor) -> Tensor:
        return x + x.shape[0]

    compiled = torch.compile(f, backend=counter, dynamic=False)
    for size in (3, 4, 3):
        compiled(torch.ones(size))
    assert counter.frame_count == 2
    first, other = torch_private.graphs_of(f.__code__)
    assert (str(first.compile_id), str(other.compile_id)) == ("0/0", "0/1")  # size 3 was used last
    deleted = torch_private.DeletedGuardManagerWrapper("why")
    other.guard_manager.extra_state.invalidate(other, deleted)
    assert any(isinstance(each.guard_manager, type(deleted)) for each in [other, *torch_private.graphs_of(f.__code__)])
    compiled(torch.ones(3))
    assert counter.frame_count == 2
    compiled(torch.ones(4))
    assert counter.frame_count == 3


@of("OptimizedModule", "innermost_backend")
def test_a_compiled_module_knows_its_backend_and_options() -> None:
    options = {"rdt": 0.1}
    compiled: Any = torch.compile(nn.Linear(3, 3), backend="paracompile", options=options)
    assert isinstance(compiled, torch_private.OptimizedModule)
    backend = torch_private.innermost_backend(compiled.dynamo_ctx.callback)
    assert backend.compiler_name == "paracompile"
    assert backend.kwargs == {"options": options}


@of("BackendCompilerFailed")
def test_an_error_of_a_backend_is_kept() -> None:
    error = ValueError("no")

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(torch_private.BackendCompilerFailed) as caught:
        compiling(lambda x: x + 1, torch.ones(3), see=fail)
    assert caught.value.inner_exception is error


@of("graph_break_reasons")
def test_breaks_are_told() -> None:
    def f(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x + 1

    compiling(f, torch.ones(3), see=lambda *_: None)
    last = torch_private.graph_break_reasons[-1]
    assert last.user_stack[-1].filename == __file__
    assert last.user_stack[-1].name == "f"
    assert last.graph_break
    assert isinstance(last.reason, str)


@of("LazyGraphModule")
def test_code_is_written_once_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[fx.Graph] = []
    python_code = fx.Graph.python_code
    monkeypatch.setattr(
        fx.Graph, "python_code", lambda graph, *a, **k: written.append(graph) or python_code(graph, *a, **k)
    )
    graph = fx.Graph()
    node = graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2.0))
    graph.output(node)
    gm = torch_private.LazyGraphModule(nn.Module(), graph)
    gm.recompile()
    forward = gm.forward
    assert not written
    for _ in range(2):
        assert forward(torch.ones(2)).tolist() == [2.0, 2.0]
        assert gm(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(written) == 1
    node.args = (node.args[0], 3.0)
    gm.recompile()
    assert gm(torch.ones(2)).tolist() == [3.0, 3.0]


@of("STATIC_INPUT")
def test_weights_are_marked() -> None:
    module = nn.BatchNorm1d(3).eval()
    nodes = graph_of(module, torch.ones(2, 3)).find_nodes(op="placeholder")
    static = [node.name for node in nodes if torch_private.STATIC_INPUT in node.meta["tensor_dict"]]
    assert len(static) == 4
    assert len(nodes) == 5


@of("Source", "source_of", "set_source", "parameter_sources", "set_parameter_sources", "ConstantSource")
def test_aot_autograd_knows_where_inputs_come_from() -> None:
    def see(gm: fx.GraphModule, _: Any) -> None:
        sources = [torch_private.source_of(node) for node in gm.graph.find_nodes(op="placeholder")]
        assert len(sources) == 3
        assert all(isinstance(source, torch_private.Source) for source in sources)
        assert torch_private.parameter_sources(gm) is not None

    compiling(nn.Linear(3, 3), torch.ones(2, 3), see=see)
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (node, graph.get_attr("two"))),))
    gm = fx.GraphModule({"two": torch.full((), 2.0)}, graph)
    gm.meta["dynamo_compile_id"] = None
    assert torch_private.parameter_sources(gm) is None
    torch_private.set_parameter_sources(gm, {})
    with pytest.raises(AssertionError, match="param_name_to_source"):
        compilers.aot_eager(gm, [torch.ones(3)])
    torch_private.set_parameter_sources(gm, {"two": torch_private.ConstantSource("two")})
    assert torch_private.source_of(node) is None
    with pytest.raises(AssertionError, match="_dynamo_source"):
        compilers.aot_eager(gm, [torch.ones(3)])
    torch_private.set_source(node, None)
    with torch.no_grad():
        assert compilers.aot_eager(gm, [torch.ones(3)])(torch.ones(3))[0].tolist() == [2.0] * 3


# As Dynamo writes things into a graph


@of("set_grad_enabled")
def test_gradients_off_stands_in_a_graph() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x + 1

    assert torch_private.set_grad_enabled in targets_of(f, torch.ones(3))


@of("check")
def test_a_check_stands_in_a_graph() -> None:
    def f(x: Tensor) -> Tensor:
        length = int(x.item())
        torch._check(length > 1)
        return torch.zeros(length)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = targets_of(f, torch.tensor(3))
    assert torch_private.check in found or torch.ops.aten._assert_scalar.default in found


@of("enter_autocast", "exit_autocast")
def test_autocast_stands_in_a_graph() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    graph = graph_of(f, torch.ones(3, 3))
    (enter,) = graph.find_nodes(op="call_function", target=torch_private.enter_autocast)
    (leave,) = graph.find_nodes(op="call_function", target=torch_private.exit_autocast)
    assert enter.args[:2] == ("cpu", torch.bfloat16)
    assert leave.args == (enter,)


@of("vmap_increment_nesting", "vmap_decrement_nesting")
def test_vmap_stands_in_a_graph() -> None:
    targets = targets_of(torch.vmap(lambda x: x.sum()), torch.ones(3, 3))
    begins = targets.index(torch_private.vmap_increment_nesting)
    assert begins < targets.index(torch_private.vmap_decrement_nesting)


@of("get_dynamic_layer_stack_depth", "pop_dynamic_layer_stack")
def test_levels_of_functorch_can_be_left() -> None:
    before = torch_private.get_dynamic_layer_stack_depth()
    torch_private.vmap_increment_nesting(3, "error")
    assert torch_private.get_dynamic_layer_stack_depth() == before + 1
    torch_private.pop_dynamic_layer_stack()
    assert torch_private.get_dynamic_layer_stack_depth() == before


@of("refs_tensor")
def test_a_tensor_of_a_number_stands_in_a_graph() -> None:
    found: list[Any] = []
    torch.compiler.reset()

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    compiled = torch.compile(lambda x, scale: x + torch.tensor(scale), backend=backend)
    for scale in (0.5, 0.25):  # a constant, the first time
        compiled(torch.ones(3), scale)
    assert torch_private.refs_tensor in found


@of("SYMBOLIC")
def test_functions_of_numbers_are_found() -> None:
    assert {"sqrt", "sin", "cos", "log2"} <= torch_private.SYMBOLIC.keys()
    assert torch_private.SYMBOLIC["sqrt"](4.0) == 2.0


# Tracing


@of("FakeTensor", "FakeTensorMode")
def test_fake_tensors_know_their_mode() -> None:
    mode = torch_private.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        made = torch.ones(3) + torch.ones(3)
    assert isinstance(made, torch_private.FakeTensor)
    assert made.fake_mode is mode
    assert mode.allow_non_fake_inputs is True


@of("TracingContext", "detect_fake_mode", "tracing")
def test_the_context_says_which_mode() -> None:
    mode, other = torch_private.FakeTensorMode(), torch_private.FakeTensorMode()
    with mode:
        fake = torch.ones(3)
    assert torch_private.detect_fake_mode([torch.ones(3)]) is None
    assert torch_private.detect_fake_mode([fake]) is mode
    with torch_private.tracing(torch_private.TracingContext(other)):
        assert torch_private.detect_fake_mode([]) is other
        with torch_private.tracing(None):
            assert torch_private.detect_fake_mode([fake]) is mode


@of(
    "DispatchKey",
    "DispatchKeySet",
    "ExcludeDispatchKeyGuard",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "has_data_mutation",
    "unwrapped",
)
def test_writes_in_place_are_traced_as_new_tensors() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        keys = torch_private.DispatchKeySet(torch_private.DispatchKey.Functionalize)
        mode = torch_private.FunctionalTensorMode(pre_dispatch=True, export=True)
        with torch_private.ExcludeDispatchKeyGuard(keys), mode:
            one, two = map(torch_private.FunctionalTensor.to_functional, (x, y))
            one.add_(two)
            assert torch_private.has_data_mutation(one)
            assert not torch_private.has_data_mutation(two)
            return torch_private.unwrapped(one)

    traced = make_fx(f, pre_dispatch=True, tracing_mode="fake")(torch.ones(3), torch.ones(3))
    (add,) = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert add.target is aten.add.Tensor
    assert traced.graph.find_nodes(op="output")[0].args == (add,)


@of("rename")
def test_a_node_takes_a_name() -> None:
    graph = fx.Graph()
    one, two = graph.placeholder("one"), graph.placeholder("two")
    torch_private.rename(one, "three")
    torch_private.rename(two, "three")
    assert (one.name, two.name) == ("three", "three_1")


# Tensors and operators


@of("OpOverload", "schema_of")
def test_operators_have_schemas() -> None:
    assert isinstance(aten.add.Tensor, torch_private.OpOverload)
    assert not isinstance(aten.add, torch_private.OpOverload)
    schema = torch_private.schema_of(aten.add_.Tensor)
    assert schema.is_mutable
    assert [(each.name, each.is_write, each.kwarg_only) for each in schema.arguments] == [
        ("self", True, False),
        ("other", False, False),
        ("alpha", False, True),
    ]
    assert schema.arguments[2].default_value == 1
    assert torch_private.schema_of(aten.view.default).returns[0].alias_info is not None
    assert str(torch_private.schema_of(aten.equal.default).returns[0].type) == "bool"


@of("TorchDispatchMode")
def test_a_mode_sees_each_operator() -> None:
    seen = []

    class See(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    with See():
        torch.ones(3).add_(1)
    assert seen == [aten.ones.default, aten.add_.Tensor]


@of("is_traceable_wrapper_subclass")
def test_tensors_made_of_tensors_are_told_apart() -> None:
    one = torch.ones(3)
    assert torch_private.is_traceable_wrapper_subclass(TwoTensor(one, one))
    assert not torch_private.is_traceable_wrapper_subclass(nn.Parameter(one))
    assert not torch_private.is_traceable_wrapper_subclass(3)


@of("forget_originals")
def test_what_fake_tensors_were_made_of_can_be_swapped() -> None:
    weight = TwoTensor(torch.ones(3), torch.ones(3))
    mode = torch_private.FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(weight)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(weight, TwoTensor(torch.zeros(3), torch.zeros(3)))
    torch_private.forget_originals(mode)
    torch.utils.swap_tensors(weight, TwoTensor(torch.zeros(3), torch.zeros(3)))
    assert not weight.a.any()
    assert fake.shape == (3,)


@of("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten")
def test_nested_arguments_have_leaves() -> None:
    assert torch_private.tree_leaves((1, [2, {"a": 3}])) == [1, 2, 3]
    leaves, structure = torch_private.tree_flatten((1, [2, {"a": 3}]))
    assert torch_private.tree_unflatten([-leaf for leaf in leaves], structure) == (-1, [-2, {"a": -3}])
    assert torch_private.tree_map(str, (1, [2, {"a": 3}])) == ("1", ["2", {"a": "3"}])
    assert torch_private.tree_map_only(int, lambda x: -x, (1, [2.0, {"a": 3}])) == (-1, [2.0, {"a": -3}])


@of(
    "FloorDiv",
    "Max",
    "Min",
    "Mod",
    "PythonMod",
    "sympy_interp",
    "PythonReferenceAnalysis",
    "PythonPrinter",
    "own_expression",
)
def test_expressions_of_sizes() -> None:
    env = ShapeEnv()
    one, other = (
        env.create_symbol(value, torch_private.ConstantSource(f"s{value}"), DimDynamic.DYNAMIC, constraint_dim=None)
        for value in (7, 8)
    )
    a, b = (env.create_symintnode(symbol, hint=value) for symbol, value in ((one, 7), (other, 8)))
    assert (a // b).node.expr == torch_private.FloorDiv(one, other)
    assert (a % b).node.expr == torch_private.Mod(one, other)
    assert isinstance((-a % b).node.expr, (torch_private.Mod, torch_private.PythonMod))  # by the signs
    assert torch.sym_max(a, b).node.expr == torch_private.Max(one, other)
    assert torch.sym_min(a, b).node.expr == torch_private.Min(one, other)
    expression = torch_private.FloorDiv(one + 1, other) + torch_private.Mod(one, 4)
    known = {one: 15, other: 8}
    assert torch_private.sympy_interp(torch_private.PythonReferenceAnalysis, known, expression) == 2 + 3
    assert eval(torch_private.PythonPrinter().doprint(expression), {str(one): 15, str(other): 8}) == 2 + 3
    assert a + 1 == b
    assert torch_private.own_expression(a) == one
    assert b.node.expr == one + 1 or a.node.expr == other - 1  # the guard says so


@of("enable_python_dispatcher")
def test_operators_made_of_others_know_open_sizes() -> None:
    env = ShapeEnv()
    symbol = env.create_symbol(7, torch_private.ConstantSource("s"), DimDynamic.DYNAMIC, constraint_dim=None)
    rows = env.create_symintnode(symbol, hint=7)
    with torch_private.FakeTensorMode(shape_env=env), torch_private.enable_python_dispatcher():
        made = torch.ops.aten.linear.default(torch.ones(2, rows, 5), torch.ones(3, 5))
    assert made.shape[1].node.expr == symbol
    assert not env.guards


@of("memory_of")
def test_tensors_share_memory() -> None:
    with torch_private.FakeTensorMode():
        fake = torch.ones(3)
        shared, other = fake[1:], fake.clone()
    for one, two, three in ((fake, shared, other), (torch.ones(3),) * 2 + (torch.ones(3),)):
        assert torch_private.memory_of(one) == torch_private.memory_of(two) != torch_private.memory_of(three)


@of("version_of")
def test_writes_are_counted() -> None:
    x = torch.ones(3)
    before = torch_private.version_of(x)
    x.add_(1)
    assert before == 0
    assert torch_private.version_of(x) == 1
    with torch.inference_mode():
        assert torch_private.version_of(torch.ones(3)) is None


@of("OrderedSet")
def test_a_set_keeps_its_order() -> None:
    assert list(torch_private.OrderedSet([3, 1, 3, 2])) == [3, 1, 2]
    assert not torch_private.OrderedSet()


@of("fused_sdp_choice")
def test_attention_says_which_kernel_it_takes() -> None:
    query = torch.ones(1, 2, 8, 16)
    assert SDPBackend(torch_private.fused_sdp_choice(query, query, query, None, 0.0, False, scale=0.1)) in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.MATH,
    )


# Process groups


@of("get_default_store", "group_named", "device_types_of", "flattened")
def test_a_process_group_has_a_store_a_name_and_devices() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch_private.get_default_store().add("key", 2) == 2
        mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "ulysses"))
        group = torch_private.flattened(mesh).get_group()
        assert torch_private.group_named(group.group_name) is group
        assert "cpu" in [each.type for each in torch_private.device_types_of(group)]
        with pytest.raises(RuntimeError):
            torch_private.group_named("nobody")
    finally:
        dist.destroy_process_group()


# What compiles graphs


@of("aot_eager")
def test_aot_eager_compiles_a_graph() -> None:
    with torch.no_grad():
        compiled = torch.compile(lambda x: x + 1, backend=lambda gm, args: compilers.aot_eager(gm, args))
        assert compiled(torch.ones(3)).tolist() == [2.0] * 3


@of("is_boxed")
def test_what_takes_a_list_says_so() -> None:
    assert torch_private.is_boxed(make_boxed_func(lambda x: x))
    assert not torch_private.is_boxed(lambda x: x)


@of("config")
def test_settings_have_names_and_types() -> None:
    names = compilers.config.get_config_copy()
    assert inductor_settings().keys() <= names.keys()
    assert compilers.config.get_type("max_autotune") is bool


@of("list_mode_options")
def test_modes_have_settings() -> None:
    assert {"default", "reduce-overhead", "max-autotune"} <= compilers.list_mode_options().keys()
    assert compilers.list_mode_options("reduce-overhead") == {"triton.cudagraphs": True}


@of("CustomGraphPass")
def test_a_pass_in_inductor_needs_an_identity() -> None:
    assert compilers.CustomGraphPass.__abstractmethods__ == {"__call__", "uuid"}


@of("preserve_node_ordering")
def test_a_node_can_be_made_to_wait_for_another() -> None:
    gm = make_fx(lambda x, y: (x.sin(), y.cos()), tracing_mode="fake")(torch.ones(3), torch.ones(3))
    sin, cos = (node for node in gm.graph.nodes if node.op == "call_function")
    compilers.preserve_node_ordering(gm.graph, {cos: torch_private.OrderedSet([sin])})
    waits = [node for node in gm.graph.nodes if sin in node.all_input_nodes and node.op == "call_function"]
    assert [str(node.target) for node in waits] == ["control_deps"]


@pytest.mark.slow
@of("compile_fx", "AsyncCompile", "counters", "cpp_builder", "pick_vec_isa")
def test_inductor_compiles_a_graph_and_finds_it_again() -> None:
    compilers.pick_vec_isa()
    wait, waited = compilers.AsyncCompile.wait, []

    def noted(self: Any, scope: dict[str, Any]) -> None:
        waited.append(scope)
        wait(self, scope)

    hits = []
    with pytest.MonkeyPatch.context() as patched, fresh_cache(), torch.no_grad():
        patched.setattr(compilers.AsyncCompile, "wait", noted)
        for _ in range(2):
            torch.compiler.reset()
            before = torch_private.counters["inductor"]["fxgraph_cache_hit"]
            settings = {"config_patches": {"max_autotune": False}}
            run = torch.compile(lambda x: x.sin() + 1, backend=partial(compilers.compile_fx, **settings))
            torch.testing.assert_close(run(torch.ones(3)), torch.ones(3).sin() + 1)
            hits.append(torch_private.counters["inductor"]["fxgraph_cache_hit"] - before)
    assert hits == [0, 1]
    assert waited
