"""Step inputs in Triton: one launch instead of a dozen small ones. A program serves BLOCK tokens and requests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.step_inputs.reference import TokenPlaces, check_arguments

BLOCK = 64


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
    """As kernels.step_inputs.reference. All contiguous in their last dimension."""
    check_arguments(starts, query_starts, slots)
    tokens, requests = token_ids.shape[0], starts.shape[0]
    ids = torch.empty(tokens, dtype=torch.int64, device=token_ids.device)
    cache_rows = torch.empty_like(ids)  # no view of one tensor: it would be aligned in some steps only
    positions = torch.empty(tokens, dtype=torch.int32, device=token_ids.device)
    context_lengths = torch.empty(requests, dtype=torch.int32, device=token_ids.device)
    _step_inputs[(triton.cdiv(max(tokens, requests), BLOCK),)](
        *(token_ids, starts, query_starts, slots, tables, taken, ids, positions, cache_rows, context_lengths),
        *(tokens, requests, tables.stride(0)),
        STEPS=requests.bit_length() + 1,
        BLOCK_TOKENS=block_tokens,
        BLOCK=BLOCK,
        num_warps=2,
    )
    return TokenPlaces(ids, positions, cache_rows, context_lengths)


@triton.jit(do_not_specialize=["tokens", "requests"])
def _step_inputs(
    token_ids,
    starts,
    query_starts,
    slots,
    tables,
    taken,
    ids,
    positions,
    cache_rows,
    context_lengths,
    tokens,
    requests,
    table_stride,
    STEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    is_request = at < requests
    first = tl.load(query_starts + at, mask=is_request, other=0)
    stop = tl.load(query_starts + at + 1, mask=is_request, other=0)
    start = tl.load(starts + at, mask=is_request, other=0)
    tl.store(context_lengths + at, start + stop - first, mask=is_request)

    is_token = at < tokens
    low = tl.full((BLOCK,), -1, tl.int32)  # the last request that begins at this token or before it
    high = tl.full((BLOCK,), 0, tl.int32) + requests + 1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        inside = high - low > 1
        begins = tl.load(query_starts + middle, mask=is_token & inside, other=0)
        low = tl.where(inside & (begins <= at), middle, low)
        high = tl.where(inside & (begins > at), middle, high)
    live = is_token & (low < requests)

    position = tl.load(starts + low, mask=live, other=0) + at - tl.load(query_starts + low, mask=live, other=0)
    position = tl.where(live, position, 0)
    slot = tl.load(slots + low, mask=live, other=0).to(tl.int64)
    block = tl.load(tables + slot * table_stride + position // BLOCK_TOKENS, mask=live, other=0).to(tl.int64)
    cache_row = tl.where(live, block * BLOCK_TOKENS + position % BLOCK_TOKENS, -1)
    token = tl.load(token_ids + at, mask=live, other=0).to(tl.int64)
    late = tl.load(taken - 1 - token, mask=live & (token < 0), other=0)
    tl.store(ids + at, tl.where(token < 0, late, token), mask=is_token)
    tl.store(positions + at, position, mask=is_token)
    tl.store(cache_rows + at, cache_row, mask=is_token)
