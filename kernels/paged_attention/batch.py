"""What the reference and the kernel check before they begin."""

from __future__ import annotations

import torch

from kernels.paged_batch import PagedBatch

__all__ = ["PagedBatch", "check_arguments"]


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
    if keys.dim() != 4 or values.shape[:-1] != keys.shape[:-1] or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be [blocks, block_tokens, kv_heads, "
            f"{head_dim}] and the same with any width of values"
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
