"""Products cut into tiles of one shape, and sums over what ranks divide: an entry's bits do not depend on its company.

A tile is ROWS x COLUMNS over a depth that follows from the whole model's shape, the last ones padded. So an entry is
made by the same instructions in the same order wherever it stands and whatever is beside it. (That a product of one
shape treats all places alike is no library's promise: check_places looks.) A product over a dimension that ranks divide
is cut into LEAVES parts first; their sums are added as a balanced tree, of which a rank adds its own branch, so that 1,
2, 4 and 8 ranks make the same sum (arXiv 2511.17826).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.errors import CheckpointError
from modeling.quantized.packed import Packed, Weight, dense

ROWS = 8  # a single row costs as much: a plain step of one request is bound by this
COLUMNS = 64
LEAVES = 8  # hence at most so many ranks


class TiledProduct:
    """A stack of `count` products that share nothing. On CPU, in float32 whatever the weight is.

    weight [count, out, depth], or [out, count x depth] if `leaves` says how many parts its depth is cut into.
    """

    def __init__(self, weight: Weight, leaves: int | None = None):
        self._leaves = leaves
        self._out = weight.shape[-2]
        self._packed = weight if isinstance(weight, Packed) else None
        self._tiles = torch.empty(0) if isinstance(weight, Packed) else self._cut(weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """x [count, rows, depth] -> float32 [count, rows, out]."""
        tiles = self._tiles if self._packed is None else self._cut(dense(self._packed, torch.float32))
        products = _multiply(x.float(), tiles.float())[:, : x.shape[1]]
        return products if products.shape[2] == self._out else products[:, :, : self._out].contiguous()

    def _cut(self, weight: Tensor) -> Tensor:
        """[count, column tiles, COLUMNS, depth]; the weight's own memory if nothing has to be padded or moved."""
        if self._leaves is not None:
            weight = weight.unflatten(1, (self._leaves, -1)).transpose(0, 1)
        return _padded(weight, COLUMNS).contiguous().unflatten(1, (-1, COLUMNS))


def leaves_of(depth: int, size: int) -> int:
    """Of one rank of `size`, for a product whose whole depth is `depth`. Raises CheckpointError if it has no parts."""
    if depth % LEAVES:
        raise CheckpointError(
            f"deterministic: true cuts what ranks divide into {LEAVES} parts, but a weight of this checkpoint is "
            f"{depth} wide there: set deterministic to false"
        )
    return LEAVES // size


def check_places(depth: int) -> None:
    """Raises CheckpointError if this machine's products of such a depth depend on where rows and columns stand."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(1, count, depth, generator=generator) for count in (ROWS, COLUMNS))
    rows, columns = (torch.randperm(count, generator=generator) for count in (ROWS, COLUMNS))
    whole = TiledProduct(weight)(x)[:, rows][:, :, columns]
    moved = TiledProduct(weight[:, columns])(x[:, rows].repeat(1, 3, 1))
    if not torch.equal(moved, whole.repeat(1, 3, 1)):
        raise CheckpointError(
            f"deterministic: true cannot be kept on this machine: its matrix products of {depth} entries depend on "
            "where a row stands; set deterministic to false"
        )


def tree_sum(parts: Tensor) -> Tensor:
    """[1, 2, 4 or 8, ...] -> [...]: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


def _multiply(x: Tensor, tiles: Tensor) -> Tensor:
    """x [count, rows, depth], tiles [count, n, COLUMNS, depth] -> [count, rows padded to ROWS, n x COLUMNS]."""
    count, n, _, depth = tiles.shape
    x = _padded(x, ROWS).contiguous()
    tall = x.shape[1] // ROWS
    if tall <= count * n:  # few rows: one call for each tile of rows
        made = x.new_empty(tall, count, n, ROWS, COLUMNS)
        columns = tiles.view(count * n, COLUMNS, depth).mT
        for index in range(tall):
            rows = x[:, None, index * ROWS : (index + 1) * ROWS].expand(count, n, ROWS, depth)
            torch.bmm(rows.reshape(count * n, ROWS, depth), columns, out=made[index].view(count * n, ROWS, COLUMNS))
        made = made.permute(1, 0, 3, 2, 4)
    else:
        made = x.new_empty(count, n, tall, ROWS, COLUMNS)
        for index in range(count * n):
            leaf, column = divmod(index, n)
            right = tiles[leaf, column].t().expand(tall, depth, COLUMNS)
            torch.bmm(x[leaf].view(tall, ROWS, depth), right, out=made[leaf, column])
        made = made.permute(0, 2, 3, 1, 4)
    return made.reshape(count, tall * ROWS, n * COLUMNS)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros after dimension 1 of [a, b, c], up to a multiple."""
    missing = -x.shape[1] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x
