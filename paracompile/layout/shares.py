"""How a segment of tokens is shared out: how many of them each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from paracompile.layout.sizes import Size

Lengths = tuple[int, ...]
"""The lengths of segments, in order."""


@dataclass(frozen=True)
class Shares:
    """How many tokens of a segment each rank holds.

    A segment that does not divide leaves a remainder of one token for some ranks: those of the longest segment
    (`longest` tokens, the image) go to the first ranks, those of all others to the last, so that no rank gets all.

    attributes:
        ranks: over how many ranks each segment is cut.
        longest: length of the longest segment in the graph.
        chunked: cut as `torch.chunk` cuts instead: every rank the length divided by the ranks, rounded up, while it
            lasts.
    """

    ranks: int
    longest: int
    chunked: bool = False

    def of(self, length: int) -> tuple[int, ...]:
        """Tokens of a segment of `length` on each rank."""
        if self.chunked:
            most = -(-length // self.ranks)
            return tuple(max(0, min(most, length - rank * most)) for rank in range(self.ranks))
        sizes = tuple((length + self.ranks - 1 - rank) // self.ranks for rank in range(self.ranks))
        return sizes if length == self.longest else sizes[::-1]

    def window(self, length: int, rank: int) -> tuple[int, int]:
        """First position and number of the tokens that `rank` holds of a segment of `length`."""
        sizes = self.of(length)
        return sum(sizes[:rank]), sizes[rank]

    def most(self, segments: Lengths) -> int:
        """No rank holds more tokens of all `segments`; of open lengths some may not hold so many."""
        if any(isinstance(length, Size) for length in segments):
            return sum((length + self.ranks - 1) // self.ranks for length in segments)
        return max(self.local(segments, rank) for rank in range(self.ranks))

    def local(self, segments: Lengths, rank: int) -> int:
        """Tokens of all `segments` on `rank`."""
        return sum(self.of(length)[rank] for length in segments)
