"""Which expert and which pairs of token and choice a tile holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileMap:
    """Pairs of token and choice sorted by expert, every expert's filled up to whole tiles; made on the device.

    Pair p is choice p % top_k of token p // top_k. experts: int32 [tiles], -1 of tiles that hold nothing, which come
    last and whose pairs mean nothing. pairs: int32 [tiles, rows], an expert's in their order, then -1.
    """

    experts: Tensor
    pairs: Tensor

    @property
    def rows(self) -> int:
        return self.pairs.shape[1]


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """No routing of so many pairs fills more tiles: what a host knows without asking the device."""
    hit = min(pairs, experts)
    return hit + (pairs - hit) // rows
