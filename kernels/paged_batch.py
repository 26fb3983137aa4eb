"""Who attends to what: the ragged batch of one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedBatch:
    """Query rows of several requests, one request after the other, and the cache blocks they attend to.

    Tensors live on the device of the queries and are only read; a launch never waits for their contents, so that they
    may still be in the making on the device (and be static buffers of a CUDA graph).

    block_tables: int32 [requests, max_blocks], cache block ids of each request's tokens, in order.
    query_starts: int32 [requests + 1], ascending from 0: request r owns the rows from query_starts[r] to before
        query_starts[r + 1].
    context_lengths: int32 [requests], tokens of the request in the cache, those of its query rows included. The rows
        are its last tokens: row i of q sits at position context_length - q + i and sees the positions up to its own.
    longest_context: upper bound of context_lengths, known to the host. It sizes the split launch only.
    """

    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    longest_context: int

    @property
    def requests(self) -> int:
        return self.context_lengths.shape[0]
