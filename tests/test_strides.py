"""`as_strided` is spelled as what it selects, and the same on ranks that hold a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_tensors import draw, randomise
from small_models import (
    WIDTH,
    Mesh,
    SelfAttention,
    assert_sharded,
    capture,
    close,
    heads,
    image_tokens,
    mesh_name,
    normalised,
    targets,
)
from torch import Tensor

from paracompile.errors import GraphError
from paracompile.passes.normalise import normalise

pytestmark = pytest.mark.whole

Select = Callable[[Tensor], Tensor]

SELECTS: dict[str, Select] = {
    "rows": lambda x: x.as_strided((2, 3), (24, 4)),
    "a transpose": lambda x: x.as_strided((4, 6, 2), (1, 4, 24)),
    "a reshape": lambda x: x.as_strided((4, 12), (12, 1)),
    "windows that overlap": lambda x: x.as_strided((2, 5, 8), (24, 4, 1)),
    "across rows": lambda x: x.as_strided((3, 4), (7, 5), 2),
    "backwards in turn": lambda x: x.as_strided((5, 2, 3), (1, 11, 4), 3),
    "one position repeated": lambda x: x.as_strided((2, 3, 4), (24, 0, 1)),
    "repeated last": lambda x: x.as_strided((6, 3), (4, 0), 1),
    "a number": lambda x: x.as_strided((), (), 9),
    "nothing": lambda x: x.as_strided((2, 0, 3), (24, 4, 1)),
    "dimensions of one": lambda x: x.as_strided((1, 6, 1), (7, 4, 3), 5),
    "of a transpose": lambda x: x.transpose(1, 2).as_strided((3, 4), (7, 5), 2),
    "of a permutation": lambda x: (x * 2).permute(2, 0, 1).as_strided((3, 4), (7, 5), 2),
    "of what is made transposed": lambda x: x.transpose(1, 2).exp().as_strided((3, 4), (7, 5), 2),
    "of a slice": lambda x: (x * 2)[:, 1:].as_strided((2, 3), (24, 4)),
    "of a row, beyond it": lambda x: (x * 2)[0].as_strided((4, 3), (12, 4)),
    "of a slice with an offset": lambda x: (x * 2)[1, 2:].as_strided((2, 3), (24, 4), 1),
    "of itself": lambda x: x.as_strided((4, 12), (12, 1)).as_strided((3, 3), (13, 2), 4),
    "of a copy into another order": lambda x: (
        torch.empty(2, 4, 6).transpose(1, 2).copy_(x).as_strided((3, 4), (7, 5), 2)
    ),
    "of an expanded value's source": lambda x: (x * 2)[:, :1].expand(2, 6, 4).as_strided((2, 4), (24, 1)),
    "of complex": lambda x: torch.view_as_complex(x.unflatten(-1, (2, 2))).as_strided((3, 2), (5, 2), 1).abs(),
}


@pytest.mark.parametrize("name", SELECTS)
def test_it_is_what_it_selects(name: str) -> None:
    select, x = SELECTS[name], draw(2, 6, 4)
    graph = normalised(select, x)
    assert "as_strided.default" not in targets(graph)
    (found,) = graph(x)
    close(found, select(x), 0.0)


def written(x: Tensor) -> Tensor:
    y = x * 2
    y.as_strided((2, 3), (2, 5)).add_(1)
    return y


REFUSED: dict[str, Select] = {
    "the gaps of an input": lambda x: x.as_strided((2, 3), (40, 4)),
    "other bits": lambda x: (x * 2)[:, 1:].view(torch.int32).as_strided((2, 3), (24, 4), 0),
    "written": written,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_tensor_holds_and_what_is_written_is_refused(name: str) -> None:
    x = draw(2, 12, 4)[:, ::2]
    with pytest.raises(GraphError, match="select with slices, unfold, expand or indices"):
        capture(REFUSED[name], [x], lambda gm, example_inputs: normalise(gm, example_inputs).forward)


class MergedByStrides(SelfAttention):
    """Heads are put together by reading attention's result as it lies: by token, as its queries do."""

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = (heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(q, k, v, **how)
        return self.to_out(attended.as_strided((rows, tokens, width), (tokens * width, width, 1)))


@pytest.mark.parametrize("mesh", [2, {"ring": 3}, {"batch": 2}, {"batch": 2, "ulysses": 2}], ids=mesh_name)
def test_ranks_that_hold_a_part_select_the_same(mesh: Mesh) -> None:
    assert_sharded(randomise(MergedByStrides()), [image_tokens(WIDTH)], mesh)
