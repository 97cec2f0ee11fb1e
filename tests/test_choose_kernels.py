"""The kernel that attention is computed by: it is taken, wherever it can serve, and what it declines is said."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import as_used
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttention
from families import FAMILIES
from quick import quick
from random_tensors import draw
from small_models import (
    BATCH,
    WIDTH,
    Joint,
    Mesh,
    SelfAttention,
    assert_sharded,
    image_tokens,
    mesh_name,
    mesh_sizes,
    text_tokens,
)
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import attention as torch_attention

from paracompile.errors import OptionError
from paracompile.options import Options
from paracompile.passes.choose_kernels import choose_kernels
from paracompile.patterns.kernels import why_not
from paracompile.report.report import Report
from paracompile.runtime import flash
from paracompile.runtime.functions import FUNCTIONS, named
from paracompile.runtime.kernels import attention_by, attention_with_lse, reference

pytestmark = pytest.mark.whole

SDPA = torch.ops.aten.scaled_dot_product_attention.default
STEP = torch.ops.paracompile.attention_with_lse.default

MESHES: list[Mesh] = [2, {"ring": 2}, {"ring": 2, "ulysses": 2}, {"batch": 2}]


class Kernel:
    """A kernel of a user's own that counts its calls."""

    __qualname__ = "Kernel"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        result, lse = reference(query, key, value, None, None, scale)
        return (result, lse) if return_lse else result


class Masked(Kernel):
    """One that takes masks as well."""

    def __call__(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        result, lse = reference(query, key, value, mask, None, scale)
        return (result, lse) if return_lse else result


def without_lse(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Functions that a test named are forgotten."""
    before = dict(FUNCTIONS)
    yield
    FUNCTIONS.clear()
    FUNCTIONS.update(before)


def streams() -> tuple[Tensor, Tensor]:
    return image_tokens(WIDTH), text_tokens()


# What it computes


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
@pytest.mark.parametrize("kernel", ["flash", "math", "function"])
def test_every_attention_is_computed_by_it(kernel: str, mesh: Mesh) -> None:
    own = Kernel()
    called = named(own) if kernel == "function" else kernel
    sharded = assert_sharded(Joint(), streams(), mesh, kernel=called)
    report, plainly = sharded.report, assert_sharded(Joint(), streams(), mesh).report
    steps = mesh["ring"] if isinstance(mesh, dict) and "ring" in mesh else 1
    assert (report.kernel, report.kernel_serves, report.notes) == (called, steps, plainly.notes)
    assert SDPA not in {node.target for node in sharded.graphs[0].graph.nodes}
    assert f"attentions by {called}" in str(report)
    assert (report.flops_rank, report.collectives) == (plainly.flops_rank, plainly.collectives)
    assert own.calls == (prod(mesh_sizes(mesh).values()) * steps if kernel == "function" else 0)


class Padded(nn.Module):
    """Attention with a mask for every query, and one that only hides keys."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(), SelfAttention()

    def forward(self, x: Tensor, mask: Tensor, visible: Tensor) -> Tensor:
        x = x + self.first(x, attn_mask=mask)
        return x + self.second(x, attn_mask=visible[:, None, None])


TOKENS = 21


def padded() -> tuple[Tensor, ...]:
    mask = draw(1, 1, TOKENS, TOKENS) > -0.5
    mask[..., 0] = True
    visible = torch.arange(TOKENS).expand(BATCH, TOKENS) < torch.tensor([[TOKENS - 4], [TOKENS - 9]])[:BATCH]
    return draw(BATCH, TOKENS, WIDTH), mask, visible


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mesh", [2, {"ring": 2}], ids=mesh_name)
@pytest.mark.parametrize("drop_keys", [True, False])
def test_masks(mesh: Mesh, drop_keys: bool) -> None:
    """A kernel without masks still gets what drops the hidden keys; one with masks gets all."""
    for own, declined in ((Kernel(), 1 if drop_keys else 2), (Masked(), 0)):
        own_name = named(own)
        report = assert_sharded(Padded(), padded(), mesh, kernel=own_name, drop_keys=drop_keys).report
        steps = 2 if isinstance(mesh, dict) else 1
        assert report.kernel_serves == (2 - declined) * steps
        reason = "it has a mask, and the function takes no `mask`"
        said = f"{declined * steps} attentions not by {own_name} but as PyTorch chooses: {reason}"
        assert (said in report.notes) == bool(declined)
        assert own.calls > 0 or declined == 2


def test_a_ring_needs_the_lse() -> None:
    report = assert_sharded(Joint(), streams(), {"ring": 2}, kernel=named(without_lse)).report
    assert report.kernel_serves == 0
    assert any("it is in a ring, and the function takes no `return_lse`" in note for note in report.notes)


@pytest.mark.slow
def test_flex_attention() -> None:
    """Compiled by itself, with a mask and without."""
    query, key, value = (draw(2, 3, tokens, 16) for tokens in (20, 33, 33))
    mask = draw(1, 1, 20, 33) > 0
    mask[..., 3, :] = False  # a query that sees nothing
    for given in (None, mask):
        result = attention_by(query, key, value, given, None, "flex")
        expected, _ = reference(query, key, value, given, None, 0.25)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert attention_with_lse(query, key, value, None, None, None, "flex")[1].isnan().all()  # it is not told on the CPU


def test_grouped_queries_and_broadcast_keys() -> None:
    query, key, value = draw(2, 4, 5, 16), draw(1, 2, 7, 16), draw(1, 2, 7, 16)
    expected = F.scaled_dot_product_attention(
        query, key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), enable_gqa=True
    )
    for kernel in ("math", "flash", named(Kernel())):
        torch.testing.assert_close(attention_by(query, key, value, None, None, kernel), expected)
    torch.library.opcheck(
        attention_by, (query, key, value, None, None, "math"), test_utils=("test_schema", "test_faketensor")
    )


def test_a_function_that_makes_another_shape_is_told() -> None:
    def half(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        return query[..., :1].clone()

    with pytest.raises(ValueError, match=r"it made \(2, 3, 5, 1\) in torch.float32, and \(2, 3, 5, 16\) was expected"):
        attention_by(*(draw(2, 3, 5, 16) for _ in range(3)), None, None, named(half))


# As a user runs it


@pytest.mark.slow
@pytest.mark.parametrize("compiler", quick(["eager", "inductor"], "eager"))
def test_as_an_option(compiler: str) -> None:
    """Batch 1, the cache on, computed and skipped."""
    own, of = Masked(), as_used.build("flux")
    reports: list[Report] = []
    options: dict[str, Any] = {"max_consecutive_hits": 2}
    expected, hits = as_used.steps(of, options, compiler="eager")
    given = {**options, "attention": own, "report": reports.append}
    found, found_hits = as_used.steps(of, given, compiler=compiler)
    assert as_used.largest_difference(found, expected) < 1e-5
    assert found_hits == hits
    (report,) = reports
    assert report.kernel == named(own)
    assert report.kernel_serves == sum(isinstance(part, FluxAttention) for part in of[0].modules())
    assert own.calls == sum(1 if hit else report.kernel_serves for hit in hits)


@pytest.mark.full
def test_flex_attention_as_an_option() -> None:
    """Under Inductor, whose first call runs operators where Dynamo may not do all that it does elsewhere."""
    of = as_used.build("flux")
    expected, hits = as_used.steps(of, {}, compiler="eager")
    found, found_hits = as_used.steps(of, {"attention": "flex"})
    assert found_hits == hits
    assert as_used.largest_difference(found, expected) < 5e-5


def test_what_serves_nothing_is_a_warning() -> None:
    model, inputs = FAMILIES["flux"].build(batch=1)
    with torch.no_grad():
        (expected,) = model(**inputs)
        model.compile(backend="paracompile", options={"attention": "cudnn", "compiler": "eager"})
        with pytest.warns(UserWarning, match="attention='cudnn' serves none of the .* attentions: it runs on cpu"):
            (found,) = model(**inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", ["flashy", 3, None])
def test_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"give one of 'auto', 'cudnn', 'flash', .* or a function"):
        Options.parse({"attention": value})


def test_names_are_the_same_in_every_process() -> None:
    assert named(without_lse) == f"{__name__}.without_lse" == Options(attention=without_lse).kernel
    first, second = Kernel(), Kernel()
    assert [named(first), named(second), named(first)] == [
        f"{__name__}.Kernel",
        f"{__name__}.Kernel#1",
        f"{__name__}.Kernel",
    ]
    assert f"attention = '{__name__}.without_lse'" in Options(attention=without_lse).fingerprint()


# What a kernel declines


def node(
    target: Any, device: str, dtype: torch.dtype, size: int, value_size: int | None = None, **more: Any
) -> fx.Node:
    """An attention of fake tensors."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def operand(last: int) -> fx.Node:
        made = graph.placeholder("operand")
        made.meta["val"] = FakeTensor(
            mode, torch.empty(1, 2, 8, last, dtype=dtype, device="meta"), torch.device(device)
        )
        return made

    query, key, value = operand(size), operand(size), operand(value_size or size)
    if target is SDPA:
        args = (query, key, value, more.get("mask"), more.get("dropout", 0.0), more.get("causal", False))
    else:
        args = (query, key, value, more.get("mask"), None, None)
    attended = graph.call_function(target, args)
    attended.meta["val"] = value.meta["val"]
    return attended


@pytest.mark.parametrize(
    "kernel, given, reason",
    [
        ("flash", ("cuda", torch.bfloat16, 128), None),
        ("flash", ("cuda", torch.float32, 128), "it computes in float32"),
        ("flash", ("cuda", torch.bfloat16, 512), "its head size 512 is above 256"),
        ("flash", ("cuda", torch.bfloat16, 64, 96), "its keys have size 64 and its values 96"),
        ("flash", ("cpu", torch.float32, 512), None),
        ("cudnn", ("cuda", torch.float16, 100), None),
        ("cudnn", ("cuda", torch.bfloat16, 256), "its head size 256 is above 128"),
        ("cudnn", ("cpu", torch.bfloat16, 64), "it runs on cpu"),
        ("efficient", ("cuda", torch.float32, 512, 64), None),
        ("efficient", ("cuda", torch.float64, 64), "it computes in float64"),
        ("math", ("cpu", torch.float64, 3), None),
        ("flex", ("cuda", torch.float64, 64), "it computes in float64"),
        ("flex", ("cpu", torch.float32, 64), None),
    ],
)
@pytest.mark.parametrize("target", [SDPA, STEP], ids=["by itself", "in a ring"])
def test_what_it_can_serve(target: Any, kernel: str, given: tuple[Any, ...], reason: str | None) -> None:
    if kernel == "flex" and given[0] == "cpu" and target is STEP:
        reason = "it is in a ring, and flex attention tells no LSE on the CPU"
    assert why_not(kernel, node(target, *given)) == reason


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient", "math", "flex"])
def test_masks_and_more(kernel: str) -> None:
    given = (SDPA, "cuda", torch.bfloat16, 64)
    assert why_not(kernel, node(*given, mask=node(*given))) == (
        None if kernel in ("efficient", "math", "flex") else "it has a mask"
    )
    assert why_not(kernel, node(*given, causal=True)) == "it is causal"
    assert why_not(kernel, node(*given, dropout=0.1)) == "it drops out"


# FlashAttention 3 and 4


@pytest.fixture
def newer_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Pretends that packages are installed and a GPU is there; the implementations that are started, in order."""

    def pretend(installed: set[str], major: int, fails: str = "") -> list[str]:
        started: list[str] = []
        for name in ("FA3", "FA4"):

            def start(name: str = name) -> SimpleNamespace:
                if name == fails:
                    raise RuntimeError("built for another torch")
                started.append(name)
                return SimpleNamespace(remove=lambda: started.append(f"{name} removed"))

            monkeypatch.setitem(torch_attention._registry._FLASH_ATTENTION_IMPLS, name, start)
        monkeypatch.setattr(flash, "_is_installed", installed.__contains__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        return started

    yield pretend
    torch_attention.restore_flash_attention_impl(_raise_warn=False)


FA3, FA4 = "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    "installed, major, taken",
    [
        (set(), 9, None),
        ({FA3}, 9, "FA3"),
        ({FA3, FA4}, 9, "FA3"),
        ({FA4}, 9, "FA4"),
        ({FA3, FA4}, 10, "FA4"),
        ({FA3}, 10, None),
        ({FA3, FA4}, 8, None),
    ],
)
def test_the_newest_flash_that_serves_is_taken(
    newer_flash: Callable[..., list[str]], installed: set[str], major: int, taken: str | None
) -> None:
    started = newer_flash(installed, major)
    device = torch.device("cuda")
    assert flash.newest_flash(device) == flash.newest_flash(device) == taken
    assert started == ([taken] if taken else [])
    assert flash.newest_flash(torch.device("cpu")) is None


def test_one_that_does_not_start_is_told(newer_flash: Callable[..., list[str]]) -> None:
    started = newer_flash({FA3, FA4}, 9, fails="FA3")
    with pytest.warns(UserWarning, match="flash_attn_interface is installed and does not start: built for another"):
        assert flash.newest_flash(torch.device("cuda")) == "FA4"
    assert started == ["FA4"]


def test_auto_gives_flash_what_it_serves(
    newer_flash: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown on the CPU, whose kernel of that name stands for it."""
    monkeypatch.setitem(choose_kernels.__globals__, "newest_flash", lambda device: "FA3")
    report = assert_sharded(Padded(), padded(), 2, kernel="auto", drop_keys=False).report
    assert (report.kernel, report.kernel_serves) == ("FA3", 0)
    assert report.notes == ("2 attentions not by FA3 but as PyTorch chooses: it has a mask",)
    report = assert_sharded(Joint(), streams(), 2).report
    assert report.kernel_serves > 0


def test_the_example_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageAttention runs on GPUs only: what it is called with is seen here, and not its products."""
    called: list[dict[str, Any]] = []

    def sageattn(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Any:
        called.append(how)
        result, lse = reference(query, key, value, None, None, how["sm_scale"])
        return (result, lse) if how["return_lse"] else result

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    path = Path(__file__).parents[1] / "examples" / "sage_attention.py"
    spec = importlib.util.spec_from_file_location("sage_attention", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(example := importlib.util.module_from_spec(spec))
    for mesh, told in ((2, False), ({"ring": 2}, True)):
        called.clear()
        assert assert_sharded(Joint(), streams(), mesh, kernel=named(example.sage)).report.kernel_serves
        assert {how["return_lse"] for how in called} == {told}
        assert {how["tensor_layout"] for how in called} == {"HND"}
