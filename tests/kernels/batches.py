"""Ragged batches over scattered cache blocks, for the kernels that attend."""

from __future__ import annotations

import torch

from kernels.paged_batch import PagedBatch

BLOCK_TOKENS = 16


def a_batch(rows: list[int], contexts: list[int], spare: int = 2) -> PagedBatch:
    """Blocks of the requests lie scattered over a pool that also holds `spare` foreign ones."""
    width = -(-max(contexts) // BLOCK_TOKENS)
    scattered = torch.randperm(len(rows) * width + spare, dtype=torch.int32)
    return PagedBatch(
        block_tables=scattered[: len(rows) * width].view(len(rows), width),
        query_starts=torch.tensor([0, *rows]).cumsum(0).int(),
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
        longest_context=max(contexts),
    )


def alone(batch: PagedBatch, request: int, rows: int, context: int) -> PagedBatch:
    """One request of a batch by itself, with other numbers of rows and context tokens."""
    return PagedBatch(
        batch.block_tables[request : request + 1],
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        longest_context=context,
    )
