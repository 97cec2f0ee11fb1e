"""Exchanges in eight bits: half the bytes of bfloat16, a stated error, and nothing else changes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from capture import captured, shard
from quick import quick
from random_tensors import draw
from small_models import (
    SIZE,
    WIDTH,
    Joint,
    Mesh,
    assert_sharded,
    image_tokens,
    mesh_name,
    text_tokens,
)
from torch import Tensor, fx

from paracompile.captured import Captured
from paracompile.errors import OptionError
from paracompile.options import Options
from paracompile.runtime.eight_bits import SCALE, packed, unpacked

FP8, INT8 = torch.float8_e4m3fn, torch.int8
MESHES: list[Mesh] = [2, 3, {"ring": 2}, {"ring": 2, "ulysses": 2}, {"batch": 2, "ulysses": 2}]


def run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


CPU = torch.device("cpu")


# The journey of numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
def test_how_far_a_number_comes_back(dtype: torch.dtype, size: int, kind: torch.dtype) -> None:
    x = (draw(5, 3, size) * torch.tensor([1e-3, 1.0, 1e3])[:, None]).to(dtype)
    carried = packed(run, x, kind, CPU)
    assert (carried.dtype, carried.shape) == (torch.uint8, (5, 3, size + SCALE))
    back = unpacked(run, carried, size, kind, dtype, CPU)
    assert (back.dtype, back.shape) == (dtype, x.shape)
    largest = x.float().abs().amax(-1, keepdim=True)
    bound = (x.float().abs() / 16).maximum(largest / 2**18) if kind is FP8 else largest / 254
    bound = 1.01 * bound + torch.finfo(dtype).eps * x.float().abs()
    assert bool(((back.float() - x.float()).abs() <= bound).all())


@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
def test_zeros_stay_and_a_large_row_costs_others_nothing(kind: torch.dtype) -> None:
    x = torch.zeros(3, 8)
    x[1] = 1e20
    x[2] = 1e-20
    torch.testing.assert_close(
        unpacked(run, packed(run, x, kind, CPU), 8, kind, torch.float32, CPU), x, rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
def test_what_is_no_number_is_seen(kind: torch.dtype) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = torch.nan
    back = unpacked(run, packed(run, x, kind, CPU), 4, kind, torch.float32, CPU)
    assert back[0].isnan().all()
    torch.testing.assert_close(back[1], x[1])


@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
def test_inductor_packs_and_unpacks_the_same(kind: torch.dtype) -> None:
    """Heads before tokens, as attention has them: Inductor lays out what it makes of them as it likes."""
    x = (draw(1, 12, 3, 20) * torch.tensor([1e-3, 1.0, 1e30])[:, None]).transpose(1, 2)
    x[0, 1, 1] = torch.nan

    def there(x: Tensor) -> Tensor:
        return cast(Tensor, packed(run, x, kind, CPU))

    def back(x: Tensor) -> Tensor:
        return cast(Tensor, unpacked(run, x, 20, kind, torch.float32, CPU))

    carried = there(x)
    torch.testing.assert_close(torch.compile(back)(carried), back(carried), equal_nan=True, rtol=1e-6, atol=0.0)
    # Inductor multiplies where eager divides: a number may become the next one of its eight bits.
    largest = x.nan_to_num().abs().amax(-1, keepdim=True)
    arrived = (back(torch.compile(there)(x)) / largest, back(carried) / largest)
    torch.testing.assert_close(*arrived, equal_nan=True, rtol=0.0, atol=0.08)


# In a graph


def streams() -> tuple[Tensor, Tensor]:
    return image_tokens(WIDTH), text_tokens()


def sent(graph: fx.GraphModule) -> list[torch.dtype]:
    nodes = [node for node in graph.graph.nodes if "all_to_all_single" in str(node.target)]
    return [node.args[0].meta["val"].dtype for node in nodes]


@pytest.mark.whole
@pytest.mark.sampled(4)
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
@pytest.mark.parametrize("together", [False, True])
def test_all_of_attention_travels_so(mesh: Mesh, together: bool) -> None:
    sharded = assert_sharded(Joint(), streams(), mesh, tolerance=0.03, eight_bits=FP8, together=together)
    plainly = assert_sharded(Joint(), streams(), mesh, together=together)
    assert set(sent(sharded.graphs[0])) == {torch.uint8}
    assert set(sent(plainly.graphs[0])) == {torch.float32}
    exchanges = plainly.collectives["all_to_all_single"]
    assert sharded.collectives == plainly.collectives
    assert f"{exchanges} exchanges in eight bits, with a scale for each head of a token" in sharded.report.notes
    assert not any("eight bits" in note for note in plainly.report.notes)
    assert sharded.report.bytes_sent < plainly.report.bytes_sent


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_bytes_of_an_exchange(dtype: torch.dtype, share: int) -> None:
    """A head of a token is `size` bytes and its scale."""
    model, inputs = Joint().to(dtype), [value.to(dtype) for value in streams()]
    small = assert_sharded(model, inputs, 2, tolerance=0.05, eight_bits=FP8).graphs[0]
    large = assert_sharded(model, inputs, 2, tolerance=0.05).graphs[0]

    def size(graph: fx.GraphModule) -> int:
        return sum(node.args[0].meta["val"].nbytes for node in graph.graph.nodes if "all_to_all" in str(node.target))

    assert size(small) * share * SIZE == size(large) * (SIZE + SCALE)


@pytest.mark.parametrize("kind, bound", [(FP8, 0.03), (INT8, 0.005)], ids=str)
@pytest.mark.parametrize("family", quick(["flux", "wan", "hunyuan_video"], "wan"))
def test_families(family: str, kind: torch.dtype, bound: float) -> None:
    """With random weights, which nothing has made robust, in units of the largest value."""
    of = captured(family)
    for found in shard(of, {"ulysses": 2}, eight_bits=kind).run(of.arguments):
        difference = (found - of.expected).abs().max() / of.expected.abs().max()
        assert 1e-6 < difference < bound


# As an option


@pytest.mark.parametrize("value", ["fp16", 8, True])
def test_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="give one of 'fp8', 'int8' or None"):
        Options.parse({"exchange_dtype": value})


def test_what_is_verified_travels_as_it_is() -> None:
    with pytest.raises(OptionError, match="eight bits differs by more than rounding: leave it out"):
        Options.parse({"exchange_dtype": "fp8", "verify": True})
    assert "exchange_dtype = 'fp8'" in Options(exchange_dtype="fp8").fingerprint()


def test_a_gpu_without_float8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    of = captured("flux")
    seen = Captured(of.gm, of.example_inputs)
    seen.check_float8()  # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(OptionError, match=r"from compute capability 8.9 on, and this one has 8.0: take .int8."):
        seen.check_float8()
