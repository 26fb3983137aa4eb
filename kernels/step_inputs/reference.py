"""Step inputs in plain torch. Rows of all requests flat, one request after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class TokenPlaces(NamedTuple):
    """token_ids int64 [tokens]; positions int32 [tokens]; cache_rows int64 [tokens]: block * block_tokens + offset, or
    -1 for padding; context_lengths int32 [requests]: tokens of each request, those of this step included.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cache_rows: torch.Tensor
    context_lengths: torch.Tensor


def step_inputs(
    token_ids: torch.Tensor,
    starts: torch.Tensor,
    query_starts: torch.Tensor,
    slots: torch.Tensor,
    tables: torch.Tensor,
    taken: torch.Tensor,
    *,
    block_tokens: int,
) -> TokenPlaces:
    """Request r's tokens are query_starts[r] to before query_starts[r + 1]; the first is at position starts[r].

    token_ids int32 [tokens], a negative one -1 - i standing for taken[i]; starts, slots int32 [requests]; query_starts
    int32 [requests + 1], ascending from 0; tables int32 [slots, max_blocks]: the blocks of each slot's tokens, in
    order; taken int64 [any]. Tokens from query_starts[-1] on are padding: token 0 at position 0. Raises ValueError for
    shapes that do not fit.
    """
    check_arguments(starts, query_starts, slots)
    ids = torch.where(token_ids < 0, taken[(-1 - token_ids).clamp(min=0).long()], token_ids.long())
    positions, cache_rows = torch.zeros_like(token_ids), torch.full_like(ids, -1)
    bounds = query_starts.tolist()
    for start, slot, (first, stop) in zip(starts.tolist(), slots.tolist(), pairwise(bounds), strict=True):
        at = torch.arange(start, start + stop - first, device=ids.device)
        positions[first:stop] = at
        cache_rows[first:stop] = tables[slot, at // block_tokens].long() * block_tokens + at % block_tokens
    ids[bounds[-1] :] = 0
    return TokenPlaces(ids, positions, cache_rows, starts + query_starts.diff())


def check_arguments(starts: torch.Tensor, query_starts: torch.Tensor, slots: torch.Tensor) -> None:
    requests = starts.shape[0]
    if slots.shape != (requests,) or query_starts.shape != (requests + 1,):
        raise ValueError(
            f"slots {tuple(slots.shape)} and query_starts {tuple(query_starts.shape)} do not fit starts "
            f"{tuple(starts.shape)}: want [{requests}] and [{requests + 1}]"
        )
