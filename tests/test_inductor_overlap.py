"""What Inductor makes of the order of nodes: in the code it generates, computation runs under the exchanges.

One process compiles what one rank of two runs, with torch's "fake" process group, whose collectives do nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from quick import quick
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import paracompile
from paracompile import patterns
from paracompile.patterns.exchanges import Link

pytestmark = pytest.mark.slow

_START = re.compile(r"(\w+) = torch\.ops\._c10d_functional\.(all_to_all_single|all_gather_into_tensor)\.default\(")
_WAIT = re.compile(r"torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)\)")
_LINEAR = re.compile(r"extern_kernels\.(?:addmm|bmm|mm)\(")
_ATTENTION = re.compile(r"torch\.ops\.(aten\._scaled_dot_product|paracompile\.attention_with_lse)\w*")
_KERNEL = re.compile(r"\bcpp_fused_(\w+)\(")


@dataclass(frozen=True)
class Code:
    """A compiled graph's calls, in order: kinds "start", "wait", "linear", "attention", "kernel", each with a name."""

    calls: Sequence[tuple[str, str]]

    def starts(self) -> list[str]:
        return [name for kind, name in self.calls if kind == "start"]

    def between(self, first: tuple[str, str], last: tuple[str, str]) -> list[tuple[str, str]]:
        start, stop = self.calls.index(first), self.calls.index(last)
        assert start < stop
        return list(self.calls[start + 1 : stop])

    def linears_under(self, collective: str) -> int:
        """How many matrix products run between a collective's start and its wait."""
        calls = self.between(("start", collective), ("wait", collective))
        return sum(kind == "linear" for kind, _ in calls)


def read(source: str, region: int) -> list[tuple[str, str]]:
    """The calls of the generated module's `call`; the exchanges of each region have names of their own."""
    calls = []
    for line in source[source.index("def call(") :].splitlines():
        if start := _START.search(line):
            calls.append(("start", f"{start[1]} of {region}"))
        elif wait := _WAIT.search(line):
            calls.append(("wait", f"{wait[1]} of {region}"))
        elif _LINEAR.search(line):
            calls.append(("linear", ""))
        elif _ATTENTION.search(line):
            calls.append(("attention", ""))
        elif kernel := _KERNEL.search(line):
            calls.append(("kernel", kernel[1]))
    return calls


@pytest.fixture(scope="module")
def _two_ranks_on_paper() -> Iterator[None]:
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def compile_family(family: str, mesh: DeviceMesh | None = None, **lists: int) -> Code:
    """Compiles a family's model, cut down to so many blocks in each list that no region is met twice.

    Exchanges cost nothing to start, so that none is put together with others.
    """
    model, inputs = FAMILIES[family].build()
    for name, count in lists.items():
        setattr(model, name, getattr(model, name)[:count])
    reports: list[Any] = []
    options: dict[str, Any] = {"mesh": mesh, "inductor": {"fx_graph_cache": False}, "report": reports.append}
    torch._dynamo.reset()
    with torch.no_grad(), mock.patch.object(patterns.exchanges, "_OTHERWISE", Link(start=0.0, rate=1.0)):
        _, sources = run_and_get_code(torch.compile(model, backend="paracompile", options=options), **inputs)
    assert len(sources) == reports[0].compilation.regions > 2
    return Code([call for region, source in enumerate(sources) for call in read(source, region)])


@pytest.fixture(scope="module")
def flux_code(_two_ranks_on_paper: None) -> Code:
    return compile_family("flux", transformer_blocks=1, single_transformer_blocks=1)


@pytest.fixture(scope="module")
def wan_code(_two_ranks_on_paper: None) -> Code:
    return compile_family("wan", blocks=2)


@pytest.fixture(params=quick(["flux", "wan"], "flux"))
def code(request: pytest.FixtureRequest) -> Code:
    found: Code = request.getfixturevalue(f"{request.param}_code")
    return found


def exchanges(code: Code) -> list[tuple[str, str, str, str]]:
    """The all-to-alls of v, k, q and of the result, for each attention; the gather at the end is left out."""
    *all_to_alls, _ = code.starts()
    return list(zip(*(all_to_alls[number::4] for number in range(4)), strict=True))


def test_every_exchange_of_an_attention_is_where_it_was_put(code: Code) -> None:
    assert len(exchanges(code)) == 2
    for v, k, q, result in exchanges(code):
        for operand in (v, k, q):
            assert ("attention", "") not in code.between(("start", operand), ("wait", operand))
            assert ("attention", "") in code.between(("wait", operand), ("start", result))


def test_k_and_q_are_computed_while_v_travels(code: Code) -> None:
    """FLUX's first block has two projections each (image and text), the other blocks one."""
    for v, k, q, _ in exchanges(code):
        assert code.linears_under(v) >= 2
        linears = [kind for kind, _ in code.between(("start", v), ("start", k))].count("linear")
        assert linears >= 1
        assert all(kind != "wait" for kind, _ in code.between(("start", v), ("start", q)))


def test_q_is_computed_while_k_travels(code: Code) -> None:
    for _, k, _, _ in exchanges(code):
        assert code.linears_under(k) >= 1


def test_the_mlp_of_a_single_block_runs_while_its_attention_s_result_travels(flux_code: Code) -> None:
    """Its product does; the activation behind it is part of the kernel that joins both, as without exchanges."""
    _, (*_, result) = exchanges(flux_code)
    assert flux_code.linears_under(result) >= 2  # with the next modulation
    before, after = flux_code.calls[: flux_code.calls.index(("wait", result))], flux_code.calls
    joining = next(name for kind, name in after[len(before) :] if kind == "kernel")
    assert "gelu" in joining
    assert "cat" in joining


def test_what_needs_no_tokens_runs_while_a_result_travels(code: Code) -> None:
    """FLUX: the modulation of the next block; Wan: keys and values of the text for cross attention."""
    (*_, result), _ = exchanges(code)
    assert code.linears_under(result) >= 1


@pytest.mark.full
@pytest.mark.usefixtures("_two_ranks_on_paper")
@pytest.mark.parametrize("family, lists", [("flux", {"transformer_blocks": 1, "single_transformer_blocks": 1})])
def test_in_a_ring_the_next_keys_travel_under_the_attention_on_the_present_ones(
    family: str, lists: dict[str, int]
) -> None:
    code = compile_family(family, paracompile.init_mesh("cpu", max_ring_dim_size=2), **lists)
    *passed_on, _ = code.starts()
    assert len(passed_on) == 2
    for exchange in passed_on:
        assert ("attention", "") in code.between(("start", exchange), ("wait", exchange))
