"""The public interface on real processes: failures reach every rank, and nobody hangs.

Models are a few lines here; `test_families_on_gloo.py` has the real ones. Ranks wait 20 s for each other at most, so a
rank that were left alone would fail its test rather than hang it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils._pytree as pytree
from capture import assert_equal
from families import flux
from pool import Pool
from quick import quick
from random_tensors import draw, randomise
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from paracompile import init_mesh
from paracompile.report.report import Report

PATIENCE = 20.0  # seconds that ranks wait for each other in these tests
PROMPT = 15.0  # seconds in which a failure must have reached everyone


class Small(nn.Module):
    """Blocks of attention and an MLP over (batch, tokens, 24)."""

    def __init__(self, blocks: int = 2, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.qkv = nn.ModuleList(nn.Linear(24, 72) for _ in range(blocks))
        self.mlp = nn.ModuleList(nn.Linear(24, 24) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            query, key, value = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in qkv(x).chunk(3, dim=-1))
            if self.attends:
                value = scaled_dot_product_attention(query, key, value)
            x = x + mlp(value.transpose(1, 2).flatten(2))
        return x


def small(blocks: int = 2, attends: bool = True) -> nn.Module:
    return randomise(Small(blocks, attends))


def tokens(length: int = 20, seed: int = 1) -> Tensor:
    return draw(3, length, 24, seed=seed)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="paracompile", options={"compiler": "eager", "timeout": PATIENCE, **options})


def said_by(call: Callable[[], Any]) -> tuple[str, float]:
    """What a call raised, and the seconds it took to."""
    start = time.perf_counter()
    try:
        call()
    except Exception as failure:  # noqa: BLE001 - whatever a user would see
        return str(failure), time.perf_counter() - start
    return "", time.perf_counter() - start


def assert_all_told(results: list[tuple[str, float]], *texts: str) -> None:
    """Every rank's message holds all the texts, and came at once."""
    for message, seconds in results:
        for text in texts:
            assert text in message
        assert seconds < PROMPT


# What works


def in_every_way(rank: int) -> dict[str, tuple[Tensor, int]]:
    """The output and the ranks of the report, for every way to say the same."""
    found: dict[str, tuple[Tensor, int]] = {}

    def call(name: str, guard: Any, **options: Any) -> None:
        torch._dynamo.reset()
        reports: list[Report] = []
        with guard():
            output = compiled(small(), report=reports.append, **options)(tokens())
        (report,) = reports
        found[name] = output.clone(), report.ranks

    call("no mesh", torch.no_grad)
    call("init_mesh", torch.no_grad, mesh=init_mesh("cpu"))
    call("a mesh of one's own", torch.no_grad, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    call("inference mode", torch.inference_mode)
    call("gradients enabled, none wanted", torch.enable_grad)
    call("check", torch.no_grad, inputs="check")
    call("trust", torch.no_grad, inputs="trust")
    call("aot_eager", torch.no_grad, compiler="aot_eager")
    return found


@pytest.mark.slow
def test_every_way_to_say_it_gives_the_eager_result(two_ranks: Pool) -> None:
    expected = small()(tokens())
    for found in two_ranks.run(in_every_way):
        for name, (output, ranks) in found.items():
            assert ranks == 2, name
            assert_equal(output, expected)


def with_own_noise(rank: int) -> tuple[Tensor, Tensor]:
    model = small()
    torch.seed()
    noise = torch.randn(3, 20, 24)
    with torch.no_grad():
        return compiled(model)(noise), model(noise)


def test_four_ranks_that_draw_other_noise_give_rank_0_s_result(four_ranks: Pool) -> None:
    results = four_ranks.run(with_own_noise)
    for output, _ in results:
        assert_equal(output, results[0][1])
        assert torch.equal(output, results[0][0])


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64, torch.complex64),
]


class InEveryType(Small):
    """Its output in every type; each is gathered in its own."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        y = super().forward(x).abs()
        return [y.to(dtype) for dtype in DTYPES]


def in_every_type(rank: int, compiler: str) -> list[Tensor]:
    with torch.no_grad():
        found = compiled(randomise(InEveryType()), compiler=compiler)(tokens(length=21))
    assert [each.dtype for each in found] == DTYPES
    return [each.to(torch.complex128) for each in found]


@pytest.mark.parametrize("compiler", quick(["eager", "inductor"], "eager"))
def test_outputs_of_every_type_are_gathered(compiler: str, two_ranks: Pool) -> None:
    with torch.no_grad():
        expected = [each.to(torch.complex128) for each in randomise(InEveryType())(tokens(length=21))]
    for found in two_ranks.run(in_every_type, compiler):
        for output, right in zip(found, expected, strict=True):
            assert output.shape == right.shape
            assert (output - right).abs().max() <= 0.26 * right.abs().max()  # one step of float8_e5m2


class SeenAgain(Small):
    """Writes to one input, and hands back another, a view of it, and one that it has written a part of."""

    def forward(self, x: Tensor, running: Tensor, record: Tensor) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x)
        running.mul_(0.5).add_(y.mean(0))
        record[:, 1] = x[:, 3]
        return {"y": y, "inputs": [x, x[:, :4]], "record": record}


def two_calls(model: Callable[..., Any], seed: int) -> list[Any]:
    """Of each call the output, and the inputs afterwards."""
    found: list[Any] = []
    for first in (seed, seed + 10):
        inputs = [tokens(seed=first), tokens(seed=first + 1).mean(0), tokens(seed=first + 2)]
        with torch.no_grad():
            found += [model(*inputs), inputs]
    return found


def what_is_seen_again(rank: int) -> list[Any]:
    return two_calls(compiled(randomise(SeenAgain())), seed=1 + 4 * rank)


def test_inputs_that_the_model_writes_or_hands_back_are_rank_0_s_everywhere(two_ranks: Pool) -> None:
    expected = two_calls(randomise(SeenAgain()), seed=1)
    for found in two_ranks.run(what_is_seen_again):
        pytree.tree_map(assert_equal, found, expected)


def with_other_inputs(rank: int) -> list[tuple[str, float]]:
    """Equal inputs first: the check is made at each call, not at the first."""
    model = compiled(small(), inputs="check")
    with torch.no_grad():
        return [said_by(lambda seed=seed: model(tokens(seed=seed))) for seed in (1, 1 + rank, 1)]


def test_check_raises_on_every_rank_when_inputs_differ(two_ranks: Pool) -> None:
    for before, different, after in two_ranks.run(with_other_inputs):
        assert before[0] == after[0] == ""
        assert_all_told([different], "the ranks were called with different inputs", "rank 1 and rank 0 differ")


# A failure on one rank


def with_bad_option_on_one(rank: int) -> tuple[str, float]:
    model = compiled(small(), inputs="shout" if rank == 1 else "broadcast")
    with torch.no_grad():
        return said_by(lambda: model(tokens()))


def test_an_option_that_is_wrong_on_one_rank_only(two_ranks: Pool) -> None:
    results = two_ranks.run(with_bad_option_on_one)
    try:
        assert_all_told(results, "paracompile option 'inputs' = 'shout'")
    except AssertionError:
        two_ranks.close()  # ranks that have agreed unequally often never agree again
        raise


def with_other_options(rank: int) -> tuple[str, float]:
    model = compiled(small(), inputs="trust" if rank == 1 else "broadcast")
    with torch.no_grad():
        return said_by(lambda: model(tokens()))


def test_options_that_differ_are_shown_on_every_rank(two_ranks: Pool) -> None:
    results = two_ranks.run(with_other_options)
    assert_all_told(results, "ranks differ in 'options'", "-inputs = 'broadcast'", "+inputs = 'trust'")


def with_other_depth(rank: int) -> tuple[str, float]:
    model = compiled(small(blocks=2 + rank))
    with torch.no_grad():
        return said_by(lambda: model(tokens()))


def test_models_that_differ_are_told_on_every_rank(two_ranks: Pool) -> None:
    assert_all_told(two_ranks.run(with_other_depth), "ranks differ in 'graph'")


def with_a_pass_that_fails(rank: int) -> tuple[str, float]:
    def fail(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> fx.GraphModule:
        raise ValueError("this pass failed on one rank")

    with mock.patch("paracompile.passes.schedule", fail) if rank == 1 else contextlib.nullcontext(), torch.no_grad():
        return said_by(lambda: compiled(small())(tokens()))


def test_a_pass_that_fails_on_one_rank_fails_on_all(two_ranks: Pool) -> None:
    first, second = two_ranks.run(with_a_pass_that_fails)
    assert_all_told([first, second], "ValueError: this pass failed on one rank")
    assert "rank 1 failed at stage 'plan'" in first[0]


def with_a_compiler_that_fails(rank: int) -> tuple[str, float]:
    def fail(*args: Any) -> Any:
        raise ValueError("no compiler here")

    with (
        mock.patch("paracompile.compiler.compile_whole", fail) if rank == 0 else contextlib.nullcontext(),
        torch.no_grad(),
    ):
        return said_by(lambda: compiled(small())(tokens()))


def test_a_compiler_that_fails_on_one_of_four_ranks_fails_on_all(four_ranks: Pool) -> None:
    results = four_ranks.run(with_a_compiler_that_fails)
    assert_all_told(results, "ValueError: no compiler here")
    assert_all_told(results[1:], "rank 0 failed at stage 'compile'")


def after_a_failure(rank: int) -> Tensor:
    """A failure on one rank leaves the ranks able to agree again."""
    for failing in (with_a_pass_that_fails, with_other_depth):
        failing(rank)
        torch._dynamo.reset()
    with torch.no_grad():
        return compiled(small())(tokens())


def test_ranks_compile_again_after_a_failure(two_ranks: Pool) -> None:
    for output in two_ranks.run(after_a_failure):
        assert_equal(output, small()(tokens()))


# What is declined on every rank


def without_attention(rank: int) -> tuple[str, float]:
    with torch.no_grad():
        return said_by(lambda: compiled(small(attends=False))(tokens()))


def test_a_model_without_attention_is_an_error_on_every_rank(two_ranks: Pool) -> None:
    results = two_ranks.run(without_attention)
    assert_all_told(results, "no scaled_dot_product_attention", "set_attention_backend('native')")


def with_gradients(rank: int, of: str) -> tuple[str, float]:
    model, x = small(), tokens()
    (model if of == "the weights" else x).requires_grad_(True)
    return said_by(lambda: compiled(model)(x))


@pytest.mark.parametrize("of", ["the weights", "the input"])
def test_gradients_are_declined_on_every_rank(of: str, two_ranks: Pool) -> None:
    assert_all_told(two_ranks.run(with_gradients, of), "gradients are wanted", "torch.no_grad()")


# Other shapes


def at_resolutions(
    rank: int, sizes: list[tuple[int, int]], limit: int
) -> tuple[list[Tensor], list[Tensor], int, list[str]]:
    """Outputs and eager outputs at each size, the number of sharded graphs, and the warnings of paracompile."""
    reports: list[Report] = []
    found, expected = [], []
    with torch._dynamo.config.patch(recompile_limit=limit), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = flux()
        options = {"compiler": "eager", "timeout": PATIENCE, "report": reports.append}
        run = torch.compile(model, backend="paracompile", dynamic=False, options=options)
        with torch.no_grad():
            for size in sizes:
                _, inputs = flux(image=size)
                expected += model(**inputs)
                found += run(**inputs)
    return found, expected, len(reports), [str(each.message) for each in caught if "paracompile" in str(each.message)]


@pytest.mark.slow
@pytest.mark.full
def test_every_resolution_is_sharded_and_right(two_ranks: Pool) -> None:
    sizes = [(6, 8), (4, 8), (6, 8)]
    for found, expected, graphs, warned in two_ranks.run(at_resolutions, sizes, 8):
        for output, right in zip(found, expected, strict=True):
            assert_equal(output, right)
        assert graphs == 2
        assert warned == []


@pytest.mark.full
def test_more_sizes_than_dynamo_compiles_by_itself(two_ranks: Pool) -> None:
    sizes = [(6, 8), (4, 8), (10, 4), (6, 8)]
    for found, expected, graphs, warned in two_ranks.run(at_resolutions, sizes, 2):
        for output, right in zip(found, expected, strict=True):
            assert_equal(output, right)
        assert graphs == 3
        assert warned == []


# Numbers that change


class SmallScaled(Small):
    def forward(self, x: Tensor, scale: float = 1.0, count: int = 2) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale) + count / 7


def with_numbers_of_its_own(rank: int) -> list[tuple[Tensor, Tensor]]:
    model = randomise(SmallScaled())
    call = compiled(model)
    pairs = []
    for number in range(4):
        scale, count = 0.5 + number / 10, 3 + number
        differ = rank if number > 1 else 0  # as long as numbers are constants, ranks must have the same
        with torch.no_grad():
            pairs.append((call(tokens(), scale + differ, count + differ), model(tokens(), scale, count)))
    return pairs


def test_the_first_rank_s_numbers_count(two_ranks: Pool) -> None:
    for pairs in two_ranks.run(with_numbers_of_its_own):
        for found, expected in pairs:
            assert_equal(found, expected)
