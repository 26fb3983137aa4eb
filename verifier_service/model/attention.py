"""Paged attention over ragged batches: the function that transformers' attention layers call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from verifier_service.model.step import Segment, Step

PACKED_ROWS = 64  # up to so many (query row, group head) pairs share one pass over a KV head


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values into the cache, then attend slot by slot.

    query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, head_dim].
    """
    cache = step.caches[module.layer_idx]  # type: ignore[index]
    cache.write(step.kv_rows, key[0].transpose(0, 1), value[0].transpose(0, 1))
    outputs = []
    for segment in step.segments:
        keys, values = cache.read(segment.blocks)
        bias = segment.bias if sliding_window is None else _windowed(segment, sliding_window, query.dtype)
        outputs.append(
            _attend(
                query[0, :, segment.first : segment.stop],
                keys[: segment.context],
                values[: segment.context],
                bias,
                scaling,
            )
        )
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """query [heads, rows, dim] over keys, values [context, kv_heads, dim] -> [rows, heads, dim]."""
    heads, rows, dim = query.shape
    context, kv_heads, _ = keys.shape
    groups = heads // kv_heads
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    if groups * rows <= PACKED_ROWS:
        packed = query.reshape(1, kv_heads, groups * rows, dim)
        mask = None if bias is None else bias.repeat(groups, 1)
        output = F.scaled_dot_product_attention(packed, keys[None], values[None], mask, scale=scaling)
        return output.view(heads, rows, dim).transpose(0, 1)
    shape = (kv_heads, groups, context, dim)  # the group's heads read the same keys: a stride of zero, no copy
    output = F.scaled_dot_product_attention(
        query.view(kv_heads, groups, rows, dim),
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        bias,
        scale=scaling,
    )
    return output.reshape(heads, rows, dim).transpose(0, 1)


def _windowed(segment: Segment, window: int, dtype: torch.dtype) -> torch.Tensor:
    """The segment's causal bias with everything older than `window` tokens hidden as well."""
    rows = segment.stop - segment.first
    at = torch.arange(segment.context, device=segment.blocks.device)
    query_at = at[segment.context - rows :, None]
    hidden = (at > query_at) | (at <= query_at - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
