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


def check_arguments(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    split_tokens: int | None,
) -> None:
    """Raises ValueError naming the argument that does not fit the others. Looks at shapes only, never at contents."""
    heads, head_dim = query.shape[1:]
    if keys.shape != values.shape or keys.dim() != 4 or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be "
            f"[blocks, block_tokens, kv_heads, {head_dim}]"
        )
    if heads % keys.shape[2]:
        raise ValueError(f"query has {heads} heads, which {keys.shape[2]} KV heads cannot share evenly")
    if batch.query_starts.shape[0] != batch.requests + 1 or batch.block_tables.shape[0] != batch.requests:
        raise ValueError(
            f"query_starts {tuple(batch.query_starts.shape)} and block_tables {tuple(batch.block_tables.shape)} "
            f"do not describe {batch.requests} requests: want [requests + 1] and [requests, max_blocks]"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{heads}], one a query head")
    if (key_scales is None) != (value_scales is None):
        raise ValueError("key_scales and value_scales go together: give both or neither")
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if scales is not None and (scales.shape != keys.shape[:3] or not scales.is_contiguous()):
            raise ValueError(f"{name} {tuple(scales.shape)} must be {tuple(keys.shape[:3])}, contiguous")
    for name, value in (("sliding_window", sliding_window), ("soft_cap", soft_cap), ("split_tokens", split_tokens)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: want a positive number, or None to leave it out")
