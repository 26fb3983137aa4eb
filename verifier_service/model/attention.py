"""Paged attention over ragged batches: the function that transformers' attention layers call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from verifier_service.model.step import Segment, Step

PACKED_ROWS = 64  # up to so many (query row, group head) pairs share one pass over a KV head
ENTRIES = 1 << 24  # scores that may be in memory at once where they are written out


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
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values into the cache, then attend slot by slot.

    query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, head_dim].
    s_aux [heads]: each head's sink, a score that takes its share of the attention and brings nothing.
    Layers with a sliding window keep what has left it: a verify may be rolled back, and one block table serves all.
    """
    cache = step.caches[module.layer_idx]  # type: ignore[index]
    cache.write(step.kv_rows, key[0].transpose(0, 1), value[0].transpose(0, 1))
    outputs = []
    for work in step.works if sliding_window is None else step.windowed[sliding_window]:
        keys, values = cache.read(work[-1].blocks)  # what the last piece sees, those before it see a part of
        if len(work) == 1:
            outputs.append(_piece(query, keys, values, work[0], scaling, s_aux))
            continue
        # Into one tensor at once: pieces left where they came keep the next, larger mask from using the memory of the
        # last, and a step over 70,000 tokens took a gigabyte more.
        base = work[0].first
        output = query.new_empty(work[-1].stop - base, query.shape[1], query.shape[3])
        for segment in work:
            output[segment.first - base : segment.stop - base] = _piece(query, keys, values, segment, scaling, s_aux)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _piece(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segment: Segment,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, seen = query[0, :, segment.first : segment.stop], slice(segment.skip, segment.context)
    if sinks is None:
        return _attend(rows, keys[seen], values[seen], segment.bias, scaling)
    return _attend_with_sinks(rows, keys[seen], values[seen], segment.bias, scaling, sinks)


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


def _attend_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """As _attend, with one more column of scores. Written out: torch's fused attention takes no score per head."""
    heads, rows, dim = query.shape
    context, kv_heads, _ = keys.shape
    groups = heads // kv_heads
    share = max(1, ENTRIES // (groups * rows * context))
    if kv_heads > share:
        parts = zip(
            query.split(share * groups), keys.split(share, 1), values.split(share, 1), sinks.split(share * groups)
        )
        return torch.cat([_attend_with_sinks(q, k, v, bias, scaling, s) for q, k, v, s in parts], dim=1)
    scores = torch.bmm(query.reshape(kv_heads, groups * rows, dim) * scaling, keys.permute(1, 2, 0))
    scores = scores.view(heads, rows, context)
    if bias is not None:
        scores += bias
    scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, rows, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1].to(values.dtype)
    output = torch.bmm(weights.reshape(kv_heads, groups * rows, context), values.transpose(0, 1))
    return output.view(heads, rows, dim).transpose(0, 1)
