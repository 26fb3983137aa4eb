"""Paged attention in plain torch, request by request. The definition that the kernel is tested against."""

from __future__ import annotations

import torch

from kernels.paged_attention.batch import check_arguments
from kernels.paged_batch import PagedBatch


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    *,
    scaling: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    split_tokens: int | None = None,
) -> torch.Tensor:
    """query [tokens, heads, head_dim] over keys, values [blocks, block_tokens, kv_heads, width] -> as wide as values.

    Keys are as wide as queries; values may have a width of their own (expanded latent attention: 192 and 128). Query
    head h reads KV head h // (heads / kv_heads). Scores are scaling * q.k, then soft_cap * tanh(score / soft_cap);
    sinks [heads] join the softmax's denominator as one more score without a value. sliding_window w: a row at position
    p sees p - w + 1 .. p. key_scales, value_scales [blocks, block_tokens, kv_heads]: what one unit of each stored (fp8)
    key or value is worth. split_tokens has no effect here: it only says how the kernel arranges its sums.
    Computes in float32. Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, keys, values, batch, sliding_window, soft_cap, sinks, key_scales, value_scales, split_tokens)
    output = torch.zeros(*query.shape[:2], values.shape[3], dtype=query.dtype, device=query.device)
    starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
    for request, context in enumerate(contexts):
        own = slice(starts[request], starts[request + 1])
        rows = own.stop - own.start
        scores = _scores(query[own], _gather(keys, batch, request, context, key_scales) * scaling)
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill_(_hidden(rows, context, sliding_window, query.device), float("-inf"))
        seen = _gather(values, batch, request, context, value_scales)
        output[own] = (_weights(scores, sinks) @ _spread(seen, query.shape[1])).transpose(0, 1).to(query.dtype)
    return output


def _gather(
    cache: torch.Tensor, batch: PagedBatch, request: int, context: int, scales: torch.Tensor | None
) -> torch.Tensor:
    """float32 [context, kv_heads, head_dim]."""
    blocks = batch.block_tables[request, : -(-context // cache.shape[1])].long()
    # fp8 tensors can be indexed as bytes only
    stored = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    found = stored[blocks].view(cache.dtype).flatten(0, 1)[:context].float()
    return found if scales is None else found * scales[blocks].flatten(0, 1)[:context, :, None].float()


def _spread(cache: torch.Tensor, heads: int) -> torch.Tensor:
    """[context, kv_heads, head_dim] -> [heads, context, head_dim]."""
    return cache.repeat_interleave(heads // cache.shape[1], dim=1).transpose(0, 1)


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[heads, rows, context]."""
    return query.float().transpose(0, 1) @ _spread(keys, query.shape[1]).transpose(1, 2)


def _hidden(rows: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [rows, context]."""
    at = torch.arange(context, device=device)
    own = at[context - rows :, None]
    hidden = at > own
    return hidden if window is None else hidden | (at <= own - window)


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float()[:, None, None].expand(*scores.shape[:2], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
