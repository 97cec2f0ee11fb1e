"""The backend in one process: plain Inductor where nothing is shared, and what becomes of each option.

What a rank of two does is compiled with torch's "fake" process group, whose collectives do nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from random_tensors import draw, randomise
from small_models import BATCH, IMAGE, WIDTH, SelfAttention, Transformer, capture, close, image_tokens
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.variables.builder import VariableBuilder
from torch._inductor import list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from paracompile import compiler
from paracompile.backend import comparable, paracompile
from paracompile.errors import OptionError, ParacompileError
from paracompile.mesh import Ranks
from paracompile.overlap import KeepOrder, inductor_settings
from paracompile.report.report import Report

Given = tuple[fx.GraphModule, dict[str, Any]]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process is rank 0 of two; the other does not exist."""
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What Inductor is given: graphs, with settings. It only interprets them."""
    given: list[Given] = []

    def compile_fx(gm: fx.GraphModule, example_inputs: Any, config_patches: dict[str, Any] | None = None) -> Any:
        given.append((gm, config_patches or {}))
        return gm.forward

    monkeypatch.setattr(compiler, "compile_fx", compile_fx)
    return given


def call(model: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Calls a model compiled with the backend, without gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="paracompile", options=options)(*inputs)


# One rank


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.linear(x))) * x.sum()


def with_gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The result, and the gradients of the input and of all parameters."""
    x = draw(4, 6).requires_grad_()
    result = call(x)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("options", [{}, {"compiler": "aot_eager"}, {"compiler": "eager"}], ids=str)
def test_without_a_process_group_it_is_the_compiler_gradients_included(options: dict[str, Any]) -> None:
    model = randomise(Trained()).requires_grad_()
    plain = torch.compile(model, backend=options.get("compiler", "inductor"))
    ours = torch.compile(model, backend="paracompile", options=options)
    expected = with_gradients(model, plain)
    torch._dynamo.reset()
    close(with_gradients(model, ours), expected, 0.0)
    close(expected, with_gradients(model, model), 1e-5)


def test_model_compile_takes_the_backend_by_name() -> None:
    model = randomise(Transformer())
    expected = model(image_tokens())
    model.compile(backend="paracompile", options={"compiler": "eager"})
    with torch.no_grad():
        close(model(image_tokens()), expected, 0.0)


def key_mask(keys: int = IMAGE) -> Tensor:
    return (torch.arange(keys) < torch.tensor([keys - 7, keys - 1])[:, None])[:, None, None]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, attn_mask=mask)


@pytest.mark.parametrize(
    "masks, grad, options",
    [
        ([], False, {}),
        ([draw(IMAGE, IMAGE)], False, {}),
        ([draw(IMAGE, IMAGE) < 1], False, {}),
        ([draw(BATCH, 1, IMAGE, IMAGE) < 1], False, {}),
        ([draw(BATCH, 1, 1, IMAGE)], False, {}),
        ([key_mask()], True, {}),
        ([key_mask()], False, {"drop_masked_keys": False}),
    ],
    ids=["none", "additive", "queries", "rows and queries", "additive keys", "gradients", "not wanted"],
)
def test_dynamo_s_graph_is_handed_on_as_it_is(
    masks: list[Tensor], grad: bool, options: dict[str, Any], inductor: list[Given]
) -> None:
    seen: list[tuple[fx.GraphModule, str]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append((gm, gm.print_readable(print_output=False)))
        return paracompile(gm, example_inputs, options=options)

    model = randomise(Masked()).requires_grad_(grad)
    capture(model, [image_tokens(WIDTH), *masks], backend, grad=grad)
    (graph, text), (given, settings) = seen[0], inductor[0]
    assert given is graph
    assert given.print_readable(print_output=False) == text
    assert settings == {}


def test_a_mask_that_only_hides_keys_is_dropped_on_one_rank_too(inductor: list[Given]) -> None:
    model, inputs = randomise(Masked()), (image_tokens(WIDTH), key_mask())
    close(call(model, *inputs), model(*inputs))
    ((graph, settings),) = inductor
    assert "attention_to_visible" in str(graph.graph)
    assert settings == {}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inputs": "brodcast"}, ["'inputs' = 'brodcast'", "did you mean 'broadcast'"]),
        ({"mash": None}, ["'mash' = None", "did you mean 'mesh'"]),
        ({"compiler": "eager", "mode": "max-autotune"}, ["'mode' = 'max-autotune'", "only Inductor reads it"]),
        ({"rdt": -0.1}, ["'rdt' = -0.1", "not negative"]),
        ({"warmup_steps": 4}, ["'warmup_steps' = 4", 'give "rdt" as well']),
        ({"inductor": {"max_autotun": True}}, ["inductor['max_autotun']", "did you mean 'max_autotune'"]),
        ({"mesh": (2, 2)}, ["'mesh' = (2, 2)", "init_mesh"]),
        ({"timeout": "soon"}, ["'timeout' = 'soon'", "seconds"]),
    ],
)
def test_a_bad_option_is_told_through_torch_compile(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        call(torch.sin, draw(3), **options)
    assert isinstance(caught.value.inner_exception, OptionError)
    assert str(caught.value.inner_exception) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


LISTED = """
import sys, torch
assert "paracompile" in torch._dynamo.list_backends()
assert not [name for name in sys.modules if name.partition(".")[0] == "paracompile"]
"""


@pytest.mark.slow
def test_the_name_is_known_without_an_import() -> None:
    subprocess.run([sys.executable, "-c", LISTED], check=True, cwd="/")


# Settings of Inductor

MODE = "max-autotune"
PATCHES = {"max_autotune": False, "triton.cudagraphs": False}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"inductor": {"max-autotune": True}}, {"max_autotune": True}),
        ({"mode": MODE}, list_mode_options(MODE)),
        ({"mode": MODE, "inductor": PATCHES}, {**list_mode_options(MODE), **PATCHES}),
    ],
)
def test_inductor_gets_mode_and_patches_and_patches_win(
    options: dict[str, Any], expected: dict[str, Any], inductor: list[Given]
) -> None:
    assert set(PATCHES) < set(list_mode_options(MODE))
    call(torch.sin, draw(3), **options)
    assert inductor[0][1] == expected


@pytest.mark.usefixtures("two_ranks")
def test_a_sharded_graph_keeps_its_order_unless_a_patch_says_otherwise(inductor: list[Given]) -> None:
    patches: dict[str, Any] = {"reorder_for_locality": True, "reorder_for_compute_comm_overlap_passes": []}
    call(randomise(Transformer()), image_tokens(), mode=MODE, inductor=patches)
    settings = inductor[0][1]
    assert isinstance(settings.pop("post_grad_custom_post_pass"), KeepOrder)
    ours = inductor_settings()
    del ours["post_grad_custom_post_pass"]
    assert settings == {**ours, **list_mode_options(MODE), **patches}


class Witness(CustomGraphPass):
    """Inductor ran it: the setting has arrived."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "witness"


def test_a_setting_has_its_effect() -> None:
    witness = Witness()
    patches = {"post_grad_custom_pre_pass": witness, "fx_graph_cache": False}
    close(call(torch.sin, draw(3), inductor=patches), draw(3).sin(), 1e-6)
    assert witness.calls == 1
    assert torch._inductor.config.post_grad_custom_pre_pass is None


# Dump and report


def folders(root: Path) -> dict[str, list[str]]:
    """File names by folder, each file being Python that shows shapes and devices."""
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        text = file.read_text()
        (module,) = ast.parse(text).body
        assert isinstance(module, ast.ClassDef)
        assert f"f32[{BATCH}, " in text
        assert "cpu" in text
        found.setdefault(str(file.parent.relative_to(root)), []).append(file.name)
    return found


@pytest.mark.parametrize("model", [Transformer, Masked], ids=["no mask", "a mask"])
def test_dump_on_one_rank(model: type[nn.Module], tmp_path: Path) -> None:
    inputs = [image_tokens()] if model is Transformer else [image_tokens(WIDTH), key_mask()]
    call(randomise(model()), *inputs, dump=tmp_path / "new" / "folder", compiler="eager")
    names = ["captured"]
    if model is Masked:
        names += [
            "normalise",
            "fuse_attention",
            "static_lengths",
            "drop_masked_keys",
            "choose_kernels",
            "schedule",
            "dispatch_on_subclasses",
        ]
        names += ["cut_into_regions"]
    files = [f"{number:02d}_{name}.py" for number, name in enumerate(names)]
    assert folders(tmp_path / "new" / "folder") == {"graph_0_0/rank_0": files}


PASSES = (
    "normalise",
    "fuse_attention",
    "static_lengths",
    "compose_padding",
    "plan_layouts",
    "split_and_gather",
    "unified_attention",
    "lower",
    "drop_masked_keys",
    "choose_kernels",
    "schedule",
    "dispatch_on_subclasses",
    "cut_into_regions",
)


@pytest.mark.slow
@pytest.mark.usefixtures("two_ranks")
def test_dump_and_report_of_a_sharded_model_graph_by_graph(tmp_path: Path) -> None:
    reports: list[Report] = []
    model = randomise(Transformer())
    compiled = torch.compile(
        model, backend="paracompile", options={"compiler": "eager", "dump": str(tmp_path), "report": reports.append}
    )
    with torch.no_grad():
        for tokens in (IMAGE, IMAGE, IMAGE + 4):  # the second is known already, the third is a graph of its own
            assert compiled(draw(BATCH, tokens, 10)).shape == (BATCH, tokens, 10)
    files = ["00_captured.py", *(f"{number:02d}_{name}.py" for number, name in enumerate(PASSES, 1))]
    assert folders(tmp_path) == {"graph_0_0/rank_0": files, "graph_0_1/rank_0": files}
    assert [report.ranks for report in reports] == [2, 2]
    assert [report.attentions for report in reports] == [1, 1]
    for report, tokens in zip(reports, (IMAGE, IMAGE + 4), strict=True):
        assert report.collectives == {"all_to_all_single": 2, "all_gather_into_tensor": 1}
        assert report.bytes_sent == 4 * BATCH * tokens // 2 * (4 * WIDTH // 2 + 10)  # half of v, k, q, result; output
        assert report.flops_rank * 2 == report.flops_whole
    before, *_, after = ((tmp_path / "graph_0_0" / "rank_0" / name).read_text() for name in files)
    assert "scaled_dot_product_attention" in before
    assert "_c10d_functional" not in before
    assert "_c10d_functional.all_to_all_single" in after


def test_report_on_one_rank_is_called_once_a_graph() -> None:
    reports: list[Report] = []
    model = randomise(Transformer())
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", "report": reports.append})
    with torch.no_grad():
        for _ in range(2):
            compiled(image_tokens())
    assert reports == [Report(ranks=1)]


# Refusals of a sharded compile


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_wanted_gradients_are_declined(compiler: str) -> None:
    model = randomise(Transformer()).requires_grad_()
    compiled = torch.compile(model, backend="paracompile", options={"compiler": compiler})
    with pytest.raises(
        BackendCompilerFailed, match=r"gradients are wanted \(of l_self_\w+ and \d+ more inputs\)"
    ) as caught:
        compiled(image_tokens())
    assert isinstance(caught.value.inner_exception, ParacompileError)
    assert "torch.no_grad()" in str(caught.value)
    with torch.no_grad():
        assert compiled(image_tokens()).shape == (BATCH, IMAGE, 10)


def test_a_parameter_that_dynamo_does_not_call_static_is_an_error(
    two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a torch that calls it otherwise; weights would be sent to all ranks at each call."""
    monkeypatch.setattr(VariableBuilder, "mark_static_input", lambda *args, **kwargs: None)
    with pytest.raises(BackendCompilerFailed, match=r"to_q_parameters_weight_.*it is a parameter, and torch"):
        call(SelfAttention(), image_tokens(WIDTH), compiler="eager")


@pytest.mark.usefixtures("two_ranks")
def test_no_attention_is_an_error_on_several_ranks() -> None:
    with pytest.raises(BackendCompilerFailed, match="no scaled_dot_product_attention"):
        call(torch.sin, draw(BATCH, IMAGE), compiler="eager")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_constant_inside_the_model_reaches_the_compiler_of_a_sharded_graph(two_ranks: None, compiler: str) -> None:
    attention = randomise(SelfAttention())
    shifts = [0.5, 1.5]
    x = image_tokens(WIDTH)
    found = call(lambda x: attention(x) + torch.tensor(shifts).repeat(x.shape[-1] // 2), x, compiler=compiler)
    assert found.shape == x.shape


def test_graphs_of_ranks_on_different_gpus_compare_equal() -> None:
    line = "arange: 'f32[4]' = torch.ops.aten.arange.default(4, device = device(type='cuda', index={}))"
    texts = {comparable(f"# File: /{gpu}/model.py\n{line.format(gpu)}") for gpu in range(2)}
    assert texts == {line.replace(", index={}", "")}
    assert comparable(line.format(0)) != comparable(line.format(0).replace("arange.default(4", "arange.default(5"))


def test_ranks_of_a_batch_axis_dump_into_folders_of_their_own(two_ranks: None, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("batch",))
    call(randomise(SelfAttention()), image_tokens(WIDTH), mesh=mesh, compiler="eager", dump=tmp_path)
    assert {path.parent.name for path in tmp_path.glob("*/*/*.py")} == {"rank_0"}
    seen = Ranks.simulated(batch=2, ulysses=2, rank=3)
    assert seen.flat_rank == 3
