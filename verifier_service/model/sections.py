"""Attention whose result for a row follows from what the row sees alone: not from the rows or ranks beside it.

The context is cut into sections at multiples of SECTION tokens from a sequence's first one; TILE queries of one KV head
at a time meet the sections in products of one shape, and the sections' sums are added in order. A section that a row
does not see adds zeros. The definition is that of the `paged_attention` kernel with a fixed `split_tokens`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier_service.model.step import Segment, Step

SECTION = 64  # tokens
TILE = 16  # queries of one KV head: rows times the heads of its group


def sectioned_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As paged_attention. Rows beyond the step's tokens, which are padding, are not written and get zeros."""
    cache = step.caches[module.layer_idx]  # type: ignore[index]
    tokens = len(step.kv_rows)
    cache.write(step.kv_rows, key[0, :, :tokens].transpose(0, 1), value[0, :, :tokens].transpose(0, 1))
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    for work in step.works:
        keys, values = cache.read(work[-1].blocks)
        own, start = rows_of(work)
        output[own] = attend(
            query[0, :, own], keys, values, start=start, scaling=scaling, window=sliding_window, sinks=s_aux
        )
    return output[None], None


def rows_of(work: tuple[Segment, ...]) -> tuple[slice, int]:
    """Which tokens of the step a piece of work is, and the position of its first."""
    first, stop = work[0].first, work[-1].stop
    return slice(first, stop), work[-1].context - (stop - first)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    start: int,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [heads, rows, dim] at positions start, start + 1, ... over keys [tokens, kv_heads, dim] and values [tokens,
    kv_heads, width] of positions 0, 1, ... -> [rows, heads, width] in query's dtype.

    window: tokens that a row sees, its own included. sinks [heads]: as in paged_attention.
    """
    heads, rows, dim = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    stop = start + rows
    first = 0 if window is None else max(0, start - window + 1) // SECTION * SECTION
    keys, values = _cut(keys[first:stop]), _cut(values[first:stop])

    packed = (query.float() * scaling).view(kv_heads, groups, rows, dim).transpose(1, 2).flatten(1, 2)
    places = torch.arange(start, stop, device=query.device).repeat_interleave(groups)
    missing = -len(places) % TILE
    packed = F.pad(packed, (0, 0, 0, missing))
    places = F.pad(places, (0, missing), value=stop - 1)
    floor = None
    if sinks is not None:
        floor = F.pad(sinks.float().view(kv_heads, 1, groups).expand(-1, rows, -1).flatten(1), (0, missing))
    made = []
    for at in range(0, len(places), TILE):
        tile = slice(at, at + TILE)
        newest = min(start + (at + TILE - 1) // groups, stop - 1)
        seen = slice(0, (newest - first) // SECTION + 1)
        own = None if floor is None else floor[:, tile]
        made.append(_look(packed[:, tile], keys[seen], values[seen], first, places[tile], window, own))
    output = torch.cat(made, dim=1)[:, : rows * groups].view(kv_heads, rows, groups, -1)
    return output.transpose(0, 1).reshape(rows, heads, -1).to(query.dtype)


def _cut(context: Tensor) -> Tensor:
    """[tokens, kv_heads, width] -> float32 [sections, kv_heads, SECTION, width], zeros at the end."""
    padded = F.pad(context.float(), (0, 0, 0, 0, 0, -len(context) % SECTION))
    return padded.unflatten(0, (-1, SECTION)).transpose(1, 2).contiguous()


def _look(
    query: Tensor, keys: Tensor, values: Tensor, first: int, places: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    """query [kv_heads, TILE, dim], scaled, at places [TILE] over sections from position `first` on; sinks [kv_heads,
    TILE] -> [kv_heads, TILE, width]."""
    sections, kv_heads, _, dim = keys.shape
    queries = query.expand(sections, *query.shape).reshape(-1, TILE, dim)
    scores = torch.bmm(queries, keys.flatten(0, 1).mT).view(sections, kv_heads, TILE, SECTION)
    tokens = torch.arange(first, first + sections * SECTION, device=query.device).view(sections, 1, 1, SECTION)
    hidden = tokens > places[:, None]
    if window is not None:
        hidden |= tokens <= places[:, None] - window
    scores.masked_fill_(hidden, float("-inf"))
    best = scores.amax(dim=(0, 3))
    if sinks is not None:
        best = torch.maximum(best, sinks)
    weights = scores.sub_(best[..., None]).exp_()
    brought = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(sections, kv_heads, TILE, -1)
    mass = weights.sum(dim=-1, keepdim=True)
    total, share = torch.zeros_like(brought[0]), torch.zeros_like(mass[0])
    for section in range(sections):
        total += brought[section]
        share += mass[section]
    if sinks is not None:
        share += (sinks - best).exp_()[..., None]
    return total / share
