"""One compile serves every size: resolutions, lengths of prompts, numbers in shapes.

The first call is compiled for its size. With the second one the sizes stay open, and no further size compiles anything.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from all_ranks import of_all_ranks
from capture import assert_equal
from denoising import ALWAYS, slots_of
from lockstep import run_lockstep
from open_sizes import COUNT, FAMILIES, built
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, WIDTH, Block, Denoiser, SelfAttention, Transformer
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from paracompile import cache_context, cache_stats
from paracompile.backend import paracompile
from paracompile.guards import Guards
from paracompile.layout.factors import Factor, Op, Rule
from paracompile.layout.shares import Shares
from paracompile.layout.sizes import (
    Size,
    at_least,
    common_divisor,
    common_multiple,
    divides,
    evaluate,
    hint,
    same,
    size_of,
)
from paracompile.passes import run_passes
from paracompile.patterns import rules
from paracompile.patterns.rules import register_rule
from paracompile.patterns.rules.labels import equation
from paracompile.report.open_sizes import fixed_sizes
from paracompile.report.report import Report
from paracompile.runtime.slots import begin_generation
from paracompile.torch_private import ConstantSource, PythonPrinter


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Sizes


@pytest.fixture
def env() -> ShapeEnv:
    return ShapeEnv()


def opened(env: ShapeEnv, number: int) -> Size:
    name = f"s{len(env.var_to_range)}"
    symbol = env.create_symbol(number, ConstantSource(name), DimDynamic.DYNAMIC, constraint_dim=None)
    size = size_of(env.create_symintnode(symbol, hint=number))
    assert isinstance(size, Size)
    return size


def guards(env: ShapeEnv) -> list[str]:
    """As Python, the first size being `a` and the second `b`."""
    names = dict(zip(env.var_to_range, sympy.symbols("a b", integer=True), strict=False))
    return [PythonPrinter().doprint(guard.expr.xreplace(names)) for guard in env.guards]


def test_a_size_is_a_number_that_knows_its_formula(env: ShapeEnv) -> None:
    rows, columns = opened(env, 6), opened(env, 8)
    tokens = 3 * rows * columns + 5
    assert hint(tokens) == 149
    assert evaluate(tokens, {rows.expression: 2, columns.expression: 7}) == 47
    assert (tokens - 5) // columns == 3 * rows
    assert (tokens - 5) % (3 * rows) == 0
    assert tokens - 3 * rows * columns == 5
    assert type(tokens - tokens) is int
    assert divmod(rows, 4) == (rows // 4, rows % 4)
    assert divmod(100, rows) == (100 // rows, 100 % rows)
    assert copy.deepcopy(tokens) is tokens
    assert not guards(env)


def test_what_only_happens_to_be_equal_is_not(env: ShapeEnv) -> None:
    rows, columns = opened(env, 8), opened(env, 8)
    assert rows != columns
    assert rows != 8
    assert rows * columns == columns * rows
    assert {rows: "rows", columns: "columns"} == {rows: "rows", columns: "columns"}
    assert not guards(env)


@pytest.mark.whole
@pytest.mark.parametrize(
    "decide, guard",
    [
        (lambda a, b: a < b, "a < b"),
        (lambda a, b: max(a, b), "b > a"),
        (lambda a, b: same(2 * a, b - 4), "(2*a) == ((-4) + b)"),
        (lambda a, b: a - b // 2 == 0, "(a + (-1)*(b // 2)) != 0"),
        (lambda a, b: int(a), "a == 6"),
        (lambda a, b: at_least(a, 4), "a >= 4"),
        (lambda a, b: at_least(a, 7), "a == 6"),
    ],
)
def test_what_is_decided_is_guarded(env: ShapeEnv, decide: Callable[[Size, Size], object], guard: str) -> None:
    decide(opened(env, 6), opened(env, 16))
    assert guards(env) == [guard]


@pytest.mark.parametrize("calculate", [lambda a: a / 2, lambda a: a**2, float, lambda a: a << 1, lambda a: 7 & a])
def test_what_would_lose_the_formula_is_refused(env: ShapeEnv, calculate: Callable[[Size], object]) -> None:
    with pytest.raises(TypeError, match="is open"):
        calculate(opened(env, 6))


def test_divisors_hold_at_all_sizes(env: ShapeEnv) -> None:
    rows, columns = opened(env, 6), opened(env, 8)
    half = columns // 2
    assert divides(rows, 12 * rows * half)
    assert not divides(6, rows)  # it only happens to be
    assert not divides(half, columns)  # not for an odd one
    assert common_divisor(12 * rows * columns, 8 * rows) == 4 * rows
    assert common_divisor(6, rows) == 1
    assert common_multiple(4 * rows, 6 * rows * half) == 12 * rows * half
    assert (common_divisor(12, 18), common_multiple(4, 6), divides(3, 9), divides(2, 9)) == (6, 12, True, False)
    assert not guards(env)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shares_of_an_open_length_are_those_of_each_number(env: ShapeEnv, ranks: int) -> None:
    image, text = opened(env, 50), opened(env, 20)
    shares = Shares(ranks, longest=image)
    for tokens, words in product(range(2 * ranks, 20), repeat=2):
        known = {image.expression: tokens, text.expression: words}
        for length, number in ((image, tokens), (text, words)):
            expected = Shares(ranks, longest=number if length is image else number + 1).of(number)
            assert tuple(evaluate(size, known) for size in shares.of(length)) == expected
            assert sum(expected) == number
        most = evaluate(shares.most((text, image)), known)
        held = [evaluate(shares.local((text, image), rank), known) for rank in range(ranks)]
        assert max(held) <= most <= max(held) + 1
    assert not guards(env)


# Models

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def check_all_sizes(family: str, backend: Backend, *, calls: int = 1) -> None:
    """Calls the family's model at all its sizes, and holds it against the model itself."""
    compiled: list[fx.GraphModule] = []

    def counted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return backend(gm, example_inputs)

    model, _ = built(family, 0)
    again = torch.compile(model, backend=counted, fullgraph=True)
    for number in range(COUNT):
        _, inputs = built(family, number)
        with torch.no_grad():
            (expected,) = model(**inputs)
            for _ in range(calls):
                assert_equal(again(**inputs)[0], expected)
    assert len(compiled) == 2


def in_lockstep(mesh: dict[str, int]) -> Backend:
    """A backend that runs all ranks' graphs in this process, and hands on what the first one makes."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs = of_all_ranks(gm, example_inputs, mesh, regions=True).graphs

        def run(*args: Any) -> Any:
            first, *others = run_lockstep(graphs, [args] * len(graphs), mesh)
            for other in others:
                torch.testing.assert_close(other, first, rtol=0, atol=0)
            return first

        return run

    return backend


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(FAMILIES, "wan"))
def test_one_rank_with_a_cache(family: str) -> None:
    def skipping(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return paracompile(gm, example_inputs, options={"compiler": "eager", "rdt": 0.1})

    check_all_sizes(family, skipping, calls=2)


MESHES = {"two": {"ulysses": 2}, "four": {"ring": 2, "ulysses": 2}, "a ring": {"ring": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("family, mesh", quick(product(FAMILIES, MESHES), ("qwen_image", "two")))
def test_several_ranks(family: str, mesh: str) -> None:
    check_all_sizes(family, in_lockstep(MESHES[mesh]))


def test_ranks_that_share_an_image_compile_for_each_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return in_lockstep({"ulysses": 2})(gm, example_inputs)

    again = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for size in ((8, 10), (12, 14), (9, 15), (12, 14)):
            image = draw(1, 3, *size)
            assert_equal(again(image), model(image))
    assert len(compiled) == 3


FIXED = {
    "mochi": (("hidden_states.shape[3]", "hidden_states.shape[4]"), "transformer_mochi.py"),
    "qwen_image": (
        ("encoder_hidden_states_mask.shape[1]", "encoder_hidden_states.shape[1]"),
        "transformer_qwenimage.py",
    ),
}
"""Sizes that models' own code asks the numbers of, and where; Qwen-Image does so with a mask."""


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(FIXED, "qwen_image"))
def test_a_size_whose_number_the_model_asks_for_compiles_anew_and_is_named(family: str) -> None:
    reports: list[Report] = []
    options = {"compiler": "eager", "rdt": 0.1, "report": reports.append}
    model, _ = built(family, 0, masked=True)
    compiled = torch.compile(model, backend="paracompile", fullgraph=True, options=options)
    names, file = FIXED[family]
    for number in range(3):
        _, inputs = built(family, number, masked=True)
        with torch.no_grad(), pytest.warns(match=file) if number else contextlib.nullcontext():
            assert_equal(compiled(**inputs)[0], model(**inputs)[0])
    first, *others = reports
    assert first.fixed_sizes == first.open_sizes == ()
    assert len(others) == 2
    for report in others:
        assert set(names) == {name for sizes in report.fixed_sizes for name in sizes.names}
        assert not set(names) & set(report.open_sizes)
        assert f"compiled anew for each {names[0]}" in str(report)


def test_what_is_no_line_of_the_model_names_the_readme(env: ShapeEnv) -> None:
    int(opened(env, 6))
    assert [str(sizes) for sizes in fixed_sizes(env)] == [
        "compiled anew for each s0, fixed by paracompile, as the README tells under Sizes"
    ]


def test_what_equals_a_fixed_size_is_fixed_by_the_same(env: ShapeEnv) -> None:
    one, other = opened(env, 6), opened(env, 6)
    assert same(one, other)
    int(other)
    assert [sizes.names for sizes in fixed_sizes(env)] == [("s1", "s0")]


def test_what_another_rank_guards_is_guarded(env: ShapeEnv) -> None:
    length = fx.Graph().placeholder("length")
    length.meta["example_value"] = opened(env, 12).formula
    (symbol,) = env.var_to_range
    said = [json.dumps([]), json.dumps([f"{symbol} < 20"])]
    agreement: Any = SimpleNamespace(exchange=lambda what, facts, own: said)
    captured: Any = SimpleNamespace(shape_env=env, placeholders=[length])
    Guards(captured).share(agreement)
    assert guards(env) == ["a < 20"]


def test_what_divides_a_size_does_not_fix_it(env: ShapeEnv) -> None:
    rows, columns = opened(env, 6), opened(env, 8)
    assert rows.formula % 2 == 0
    assert columns.formula // 2 == 4
    assert [sizes.names for sizes in fixed_sizes(env)] == [("s1",)]


@pytest.mark.slow
def test_the_default_compiler() -> None:
    """Lengths above 64, up to which Inductor asks itself whether a loop is short."""
    reports: list[Report] = []
    model = randomise(Transformer(3))
    compiled = torch.compile(model, backend="paracompile", options={"rdt": 0.1, "report": reports.append})
    for length in (70, 91, 128, 77, 250):
        tokens = draw(BATCH, length, 10)
        with torch.no_grad():
            for _ in range(2):
                assert_equal(compiled(tokens), model(tokens))
    assert len(reports) == 2
    assert reports[1].open_sizes == ("x.shape[1]",)
    assert reports[1].compilation is not None
    assert reports[1].compilation.different < reports[1].compilation.regions


class JoinedAnew(Block):
    """Joins text and image and takes them apart again, as FLUX does: `[:, 4:]` takes all rows, of any number."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(torch.cat([text, image], dim=1))
        return x[:, :4], x[:, 4:]


class OfTwoStreams(Denoiser):
    def __init__(self) -> None:
        super().__init__(block=JoinedAnew)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **more: Any) -> tuple[Tensor]:
        x = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1))
        text, image = x[:, :4], x[:, 4:]
        for block in self.blocks:
            text, image = block(text, image)
        return (self.proj_out(image),)


def test_batches_stay_open_with_the_cache() -> None:
    """What a call is told by has a number for each row."""
    reports: list[Report] = []
    model = randomise(OfTwoStreams().requires_grad_(False))
    options = {"rdt": ALWAYS, "compiler": "eager", "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=options)
    for rows in (2, 3, 5, 4):
        tokens = draw(rows, 12, 10)
        for number, time in enumerate((0.9, 0.8)):
            with cache_context("only"):
                (found,) = compiled(tokens, torch.full((rows,), time))
            (exact,) = model(tokens, torch.full((rows,), time))
            if number == 0:
                assert_equal(found, exact)
            else:  # it was skipped; the statistics would still be those of the size before, if this one had none
                assert (found - exact).abs().max() > 1e-3 * exact.abs().max()
        assert [[step.hit for step in steps] for steps in cache_stats(model).slots.values()] == [[False, True]]
    assert len(reports) == 2
    assert reports[1].open_sizes == ("hidden_states.shape[0]",)


def test_a_loop_of_one_s_own_keeps_state_of_its_latest_sizes() -> None:
    model = randomise(OfTwoStreams().requires_grad_(False))
    compiled = torch.compile(model, backend="paracompile", options={"rdt": ALWAYS, "compiler": "eager"})
    for rows in range(2, 42):
        with cache_context("only"):
            compiled(draw(rows, 12, 10), torch.full((rows,), 0.9))
    assert len(slots_of(model)) == 1 + 16  # the first size has a graph of its own
    other = begin_generation()
    for rows in range(42, 62):
        compiled(draw(rows, 12, 10), torch.full((rows,), 0.9))
    other.over = True
    for rows, kept in ((26, True), (25, False)):
        with cache_context("only"):
            compiled(draw(rows, 12, 10), torch.full((rows,), 0.8))
        assert cache_stats(model).slots["only"][-1].hit == kept


@torch.library.custom_op("paracompile_tests::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(-1)


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _told_numbers(op: Op) -> Sequence[Factor]:
    assert {type(size) for size in op.operands[0]} == {int}
    return equation("bt_ -> bt_")(op)


@pytest.mark.parametrize("rule, compiles", [(Rule(_told_numbers), 4), ("bt_ -> bt_", 2)], ids=["Rule", "letters"])
def test_operators_of_one_s_own(rule: str | Rule, compiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_REGISTERED", {})
    register_rule(turned._opoverload, rule)
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return in_lockstep({"ulysses": 2})(gm, example_inputs)

    attention = randomise(SelfAttention())
    again = torch.compile(lambda x: attention(turned(x)), backend=backend)
    with torch.no_grad():
        for length in (12, 15, 18, 21):
            tokens = draw(BATCH, length, WIDTH)
            assert_equal(again(tokens), attention(turned(tokens)))
    assert len(compiled) == compiles


def test_where_a_pass_cannot_do_with_open_sizes_each_is_compiled_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(gm: fx.GraphModule, *args: Any, **how: Any) -> fx.GraphModule:
        made = run_passes(gm, *args, **how)
        if any(isinstance(node.meta.get("val"), torch.SymInt) for node in made.graph.nodes):
            raise TypeError("as a pass might")
        return made

    monkeypatch.setattr("paracompile.backend.run_passes", failing)
    reports: list[Report] = []
    model = randomise(Transformer(2))
    options = {"rdt": 0.1, "compiler": "eager", "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=options)
    for number, length in enumerate((12, 15, 18)):
        tokens = draw(BATCH, length, 10)
        with torch.no_grad(), pytest.warns(match="as a pass might") if number else contextlib.nullcontext():
            assert_equal(compiled(tokens), model(tokens))
    assert len(reports) == 3
