"""Which blocks attend to what: the ragged batch of one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockBatch:
    """Rows of several draft blocks, one block after the other, and the pool rows that each attends to.

    Tensors are int64, live on the device and are only read; a launch never waits for their contents.

    starts [blocks + 1], ascending from 0: block b owns the query rows from starts[b] to before starts[b + 1]. A block
        without rows is padding.
    first_rows, held [blocks]: the block's context stands in the pool's rows from first_row to before first_row + held,
        in any order; behind it, the block's own keys and values in the order of its rows.
    bases [blocks]: position of the block's first row. The others follow it.
    longest_block, longest_context: upper bounds of rows and held, known to the host and the same for all batches: they
        choose the tiles.
    """

    starts: torch.Tensor
    first_rows: torch.Tensor
    held: torch.Tensor
    bases: torch.Tensor
    longest_block: int
    longest_context: int

    @property
    def blocks(self) -> int:
        return self.bases.shape[0]


def check_arguments(
    query: torch.Tensor,
    pool: torch.Tensor,
    positions: torch.Tensor,
    batch: BlockBatch,
    sliding_window: int | None,
    section_rows: int,
) -> None:
    """Raises ValueError naming the argument that does not fit the others. Looks at shapes only, never at contents."""
    heads, head_dim = query.shape[1:]
    if pool.dim() != 4 or pool.shape[1] != 2 or pool.shape[3] != head_dim or not pool.is_contiguous():
        raise ValueError(f"pool {tuple(pool.shape)} must be [rows, 2, kv_heads, {head_dim}], contiguous")
    if heads % pool.shape[2]:
        raise ValueError(f"query has {heads} heads, which {pool.shape[2]} KV heads cannot share evenly")
    if positions.shape != pool.shape[:1]:
        raise ValueError(f"positions {tuple(positions.shape)} must be [{pool.shape[0]}], one a pool row")
    blocks = (batch.blocks,)
    if batch.starts.shape != (batch.blocks + 1,) or batch.first_rows.shape != blocks or batch.held.shape != blocks:
        raise ValueError(
            f"starts {tuple(batch.starts.shape)}, first_rows {tuple(batch.first_rows.shape)} and held "
            f"{tuple(batch.held.shape)} do not describe {batch.blocks} blocks: want [blocks + 1], [blocks], [blocks]"
        )
    for name, value in (("sliding_window", sliding_window), ("section_rows", section_rows)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: want a positive number")
