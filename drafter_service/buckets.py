"""The sizes for which a draft forward is prepared: a batch is padded to the next one, so that few graphs serve all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bucket:
    """Room for so many blocks with so many rows in all, bonus tokens included, of which `asked` are to be read."""

    blocks: int
    rows: int
    asked: int


class Buckets:
    """Powers of two of blocks, up to most_blocks, times powers of two of rows a block, up to block_size."""

    def __init__(self, most_blocks: int, block_size: int):
        self._blocks = _powers(1, most_blocks)
        self._rows = _powers(2, block_size)

    def __iter__(self) -> Iterator[Bucket]:
        """Largest first: graphs that share memory want the largest one to reserve it."""
        return (Bucket(n, n * rows, n * (rows - 1)) for n in reversed(self._blocks) for rows in reversed(self._rows))

    def choose(self, blocks: int, rows: int) -> Bucket:
        """The smallest that holds a batch; one made to measure for a batch of more blocks than any holds."""
        for n in self._blocks:
            if n >= blocks:
                for each in self._rows:
                    if n * each >= rows and n * (each - 1) >= rows - blocks:
                        return Bucket(n, n * each, n * (each - 1))
        return Bucket(blocks, rows, rows - blocks)


def _powers(first: int, last: int) -> list[int]:
    """first, 2 * first, ... below last, and last."""
    powers = []
    while first < last:
        powers.append(first)
        first *= 2
    return [*powers, last]
