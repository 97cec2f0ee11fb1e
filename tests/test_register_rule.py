"""Rules for operators of one's own."""

from __future__ import annotations

import pytest
import torch
from random_tensors import draw, randomise
from rule_check import check
from small_models import BATCH, WIDTH, SelfAttention, assert_sharded, image_tokens
from torch import Tensor, nn

import paracompile
from paracompile.patterns import rules

pytestmark = pytest.mark.whole


@torch.library.custom_op("paracompile_tests::modulate", mutates_args=())
def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x: (batch, tokens, channels); scale, shift: (batch, channels)."""
    return x * (1 + scale[:, None]) + shift[:, None]


@modulate.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("paracompile_tests::zero_", mutates_args={"x"})
def zero_(x: Tensor) -> None:
    x.zero_()


MODULATE = torch.ops.paracompile_tests.modulate.default


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left for other tests."""
    monkeypatch.setattr(rules, "_REGISTERED", {})


class Modulated(SelfAttention):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(
            torch.ops.paracompile_tests.modulate(super().forward(x), condition, self.shift(condition))
        )


def test_an_operator_runs_on_a_rank_s_tokens_once_there_is_a_rule() -> None:
    inputs = [image_tokens(WIDTH), draw(BATCH, WIDTH)]
    without = assert_sharded(randomise(Modulated()), inputs)
    assert without.collectives["all_gather_into_tensor"] == 2
    assert any("modulate" in note and "has no rule" in note for note in without.report.notes)
    paracompile.register_rule(MODULATE, "btc, bc, bc -> btc")
    with_rule = assert_sharded(randomise(Modulated()), inputs)
    assert with_rule.collectives["all_gather_into_tensor"] == 1
    assert with_rule.report.notes == ()


def test_the_check_of_rules_serves_for_them_too() -> None:
    operands = draw(2, 6, 5), draw(2, 5), draw(2, 5)
    paracompile.register_rule(MODULATE, "btc, bc, bc -> btc")
    verdict = check(MODULATE, *operands)
    assert (verdict.wrong, verdict.missing, verdict.listed) == ([], [], 3)
    paracompile.register_rule(MODULATE, "btc, tc, bc -> btc")
    assert check(MODULATE, *operands, search=False).wrong


@pytest.mark.parametrize(
    "operator, rule, message",
    [
        (torch.ops.paracompile_tests.modulate, "btc -> btc", "give an overload"),
        (torch.ops.aten.linear.default, "btc, dc -> btd", "it has a rule already"),
        (torch.ops.aten.add.Tensor, "a, a -> a", "it has a rule already"),
        (torch.ops.paracompile_tests.zero_.default, "a -> a", "it writes to an operand"),
        (MODULATE, "btc, bc, bc", "write it as einsum does"),
        (MODULATE, "b1c, bc, bc -> b1c", "write it as einsum does"),
    ],
)
def test_what_cannot_be_registered(operator: object, rule: str, message: str) -> None:
    with pytest.raises(paracompile.OptionError, match=message):
        paracompile.register_rule(operator, rule)  # type: ignore[arg-type]
