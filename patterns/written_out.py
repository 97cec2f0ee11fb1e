"""Finds attention that a model writes out: softmax(Q K^T) V, as three operators and what stands between them.

    scores = matmul(q, k.transpose(-1, -2)) * scale + mask      (or bmm, baddbmm, einsum; masked_fill, where)
    softmax(scores, -1) @ v

Inductor has patterns for some spellings, and looks for them in what AOTAutograd made, which is too late to be cut over
ranks. Here each dimension of a product has a letter, as in einsum. That over which softmax runs is the keys'; which
operand is the query's, and which of its letters are channels, follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from paracompile.layout.graph import named_arguments
from paracompile.layout.sizes import sizes_of

__all__ = ["Term", "WrittenOut", "find_written_out"]

aten = torch.ops.aten

Filled = tuple[fx.Node, float, bool]
"""A mask, the number that scores get by it, and whether that is where it is False."""

_HIDES = 1e30
"""A number below minus this stays itself whatever score is added to it."""

_SCALES = {  # whether they divide
    aten.mul.Tensor: False,
    aten.mul.Scalar: False,
    aten.div.Tensor: True,
    aten.div.Scalar: True,
}


@dataclass(frozen=True)
class Term:
    """An operand of a product, with a letter for each of its dimensions."""

    node: fx.Node
    letters: str

    def size(self, letter: str) -> int:
        return sizes_of(self.node.meta["val"])[self.letters.index(letter)]


@dataclass(frozen=True)
class WrittenOut:
    """One attention. Queries are `(*batch, queries, channels)`, in whatever order their letters say.

    attributes:
        result: the node that makes the result, and its letters.
        query, key, value: the operands, with the letters that they share.
        batch: the letters that all have, in the order in which the scores have them.
        queries, keys, channels, features: the letters of the queries, of the keys, of what is summed up for a score,
            and of what a value holds.
        scale: what scores are multiplied by.
        added: what is then added to them, broadcast to (*batch, queries, keys).
        filled: masks, broadcast alike, with what stands for scores; applied after `added`.
    """

    result: Term
    query: Term
    key: Term
    value: Term
    batch: str
    queries: str
    keys: str
    channels: str
    features: str
    scale: float
    added: tuple[fx.Node, ...]
    filled: tuple[Filled, ...]


@dataclass(frozen=True)
class _Product:
    node: fx.Node
    left: Term
    right: Term
    letters: str
    scale: float = 1.0
    added: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Scores:
    product: _Product
    scale: float = 1.0
    added: tuple[fx.Node, ...] = ()
    filled: tuple[Filled, ...] = ()

    @property
    def is_masked(self) -> bool:
        return bool(self.added or self.filled)


def find_written_out(graph: fx.Graph) -> Iterator[WrittenOut]:
    """Every attention that is written out, and of whose scores and weights nothing else is read.

    A query that sees no key, by masks of -inf, is NaN when written out; as one operator it is what that gives (0).

    With more channels than queries and keys it is left as it is: there channels attend to each other, with tokens for
    their features, or the scores are few.
    """
    for softmax in graph.find_nodes(op="call_function", target=aten.softmax.int):
        source, dim = softmax.args[0], softmax.args[1]
        assert isinstance(source, fx.Node)
        if dim not in (-1, source.meta["val"].dim() - 1):
            continue
        scores, weighted = _scores_of(source), _weighted_by(softmax)
        if scores is not None and weighted is not None and (found := _put_together(scores, *weighted)) is not None:
            yield found


def _put_together(scores: _Scores, weights: Term, product: _Product) -> WrittenOut | None:
    """The attention that has these scores, whose `weights` are an operand of `product`."""
    letters = scores.product.letters
    batch, queries, keys = letters[:-2], letters[-2], letters[-1]
    query, key = scores.product.left, scores.product.right
    if queries in key.letters:
        query, key = key, query
    # The weights are the scores' own dimensions, under the letters of the second product.
    names = dict(zip(weights.letters, scores.product.letters, strict=True))
    other = product.right if product.left is weights else product.left
    value = replace(other, letters=_renamed(other.letters, names))
    result = Term(product.node, _renamed(product.letters, names))
    channels, features = ({*one.letters} - {*batch, keys} for one in (key, value))
    if len(channels) != 1 or len(features) != 1:
        return None
    (channel,), (feature,) = channels, features
    wanted = (batch + queries + channel, batch + keys + channel, batch + keys + feature, batch + queries + feature)
    terms = (query, key, value, result)
    if any(sorted(term.letters) != sorted(letters) for term, letters in zip(terms, wanted, strict=True)):
        return None
    if any(len({term.size(letter) for term in terms if letter in term.letters}) > 1 for letter in batch + keys):
        return None  # broadcast
    types = {node.meta["val"].dtype for node in (*(term.node for term in terms), *scores.added)}
    dtype = query.node.meta["val"].dtype
    if types != {dtype} or not dtype.is_floating_point:
        return None
    filled = _in_type(scores.filled, dtype)
    if filled is None:
        return None
    if query.size(channel) >= query.size(queries) and query.size(channel) >= key.size(keys):
        return None
    return WrittenOut(
        result, query, key, value, batch, queries, keys, channel, feature, scores.scale, scores.added, filled
    )


def _in_type(filled: tuple[Filled, ...], dtype: torch.dtype) -> tuple[Filled, ...] | None:
    """The numbers as the operands' type has them, where scores were wider; None where they would not hide any more.

    A score that such a number is added to is that number: where a query sees no key, all count alike, as before.
    """
    range_of = torch.finfo(dtype)
    if any(number != -math.inf for _, number, _ in filled) and range_of.max < _HIDES:
        return None
    return tuple(
        (mask, number if number == -math.inf else max(number, range_of.min), inverted)
        for mask, number, inverted in filled
    )


def _renamed(letters: str, names: dict[str, str]) -> str:
    """Letters by the names that the scores have for them; what the scores lack in capitals, which are no names."""
    return "".join(names.get(letter, letter.upper()) for letter in letters)


# From softmax up


def _scores_of(node: fx.Node) -> _Scores | None:
    """What is softmaxed, read up to the product that it is made from."""
    if len(node.users) != 1:
        return None
    product = _product(node)
    if product is not None:
        return _Scores(product, product.scale, product.added)
    if node.target is aten._to_copy.default:
        return _scores_of(node.all_input_nodes[0]) if _only_casts(node) else None
    if node.target not in _SCALES and node.target is not aten.add.Tensor:
        return _filled(node)
    arguments = named_arguments(node)
    if node.target in _SCALES:
        return _scaled(arguments["self"], arguments["other"], divides=_SCALES[node.target])
    pair = (arguments["self"], arguments["other"])
    for one, other in (pair, pair[::-1]) if arguments["alpha"] == 1 else ():
        scores = _scores_of(one) if isinstance(one, fx.Node) and _as_large(one, node) else None
        if scores is not None and isinstance(other, fx.Node) and not scores.filled:
            return replace(scores, added=(*scores.added, other))
    return None


def _scaled(one: object, other: object, *, divides: bool) -> _Scores | None:
    """Scores times a number, or divided by one."""
    if not isinstance(other, (int, float)) or not isinstance(one, fx.Node) or other == 0:
        return None
    scores = _scores_of(one)
    if scores is None or scores.is_masked:
        return None
    return replace(scores, scale=scores.scale / other if divides else scores.scale * other)


def _filled(node: fx.Node) -> _Scores | None:
    """Scores of which some are replaced by a number so small that nothing of it is left behind softmax."""
    if node.target is aten.masked_fill.Scalar:
        source, mask, number = node.args[:3]
        inverted = False
    elif node.target is aten.where.ScalarOther:
        mask, source, number = node.args[:3]
        inverted = True
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(mask, fx.Node) or not isinstance(number, (int, float)):
        return None
    if not _as_large(source, node) or number > -_HIDES:
        return None
    scores = _scores_of(source)
    return None if scores is None else replace(scores, filled=(*scores.filled, (mask, float(number), inverted)))


# From softmax down


def _weighted_by(node: fx.Node) -> tuple[Term, _Product] | None:
    """The product in which the weights that `node` makes are an operand, and that operand."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    product = _product(user)
    if product is not None:
        terms = [term for term in (product.left, product.right) if term.node is node]
        is_plain = product.scale == 1 and not product.added
        return (terms[0], product) if len(terms) == 1 and is_plain else None
    if user.target is aten.clone.default or (user.target is aten._to_copy.default and _only_casts(user)):
        return _weighted_by(user)
    return None


# Products


def _product(node: fx.Node) -> _Product | None:
    """A product of two operands, each of whose dimensions has a letter; None where `node` is something else."""
    if node.target in (aten.matmul.default, aten.bmm.default):
        return _matrices(node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default:
        arguments = named_arguments(node)
        product = _matrices(node, arguments["batch1"], arguments["batch2"])
        if product is None or arguments["beta"] not in (0, 1):
            return None
        added = (arguments["self"],) if arguments["beta"] else ()
        return replace(product, scale=float(arguments["alpha"]), added=added)
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _matrices(node: fx.Node, left: object, right: object) -> _Product | None:
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank = left.meta["val"].dim()
    if rank < 2 or right.meta["val"].dim() != rank or rank > 10:
        return None
    batch = "abcdefgh"[: rank - 2]
    return _Product(node, Term(left, f"{batch}ik"), Term(right, f"{batch}kj"), f"{batch}ij")


def _einsum(node: fx.Node) -> _Product | None:
    text, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, Sequence)
    terms, arrow, letters = text.partition("->")
    parts = terms.split(",")
    if not arrow or "." in text or len(parts) != 2 or not text.replace(",", "").replace("->", "").islower():
        return None
    if any(len({*part}) != len(part) for part in (*parts, letters)):
        return None  # a diagonal
    left, right = operands
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _Product(node, Term(left, parts[0]), Term(right, parts[1]), letters)


def _only_casts(node: fx.Node) -> bool:
    """Whether a copy changes a floating type and nothing else."""
    (source,) = node.all_input_nodes
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.device == after.device and before.dtype.is_floating_point and after.dtype.is_floating_point)


def _as_large(one: fx.Node, other: fx.Node) -> bool:
    return sizes_of(one.meta["val"]) == sizes_of(other.meta["val"])
