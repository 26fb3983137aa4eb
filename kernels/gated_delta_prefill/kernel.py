"""The gated delta rule over chunks of prompts in Triton, in tiles of TILE tokens (arXiv 2412.06464, section 3.3).

Within a tile the corrected values c_i = beta_i (v_i - exp(g_i) S_{i-1}^T k_i) are a unit lower triangular system in
what precedes them. With G_i the log decays summed up from the tile's first token, A_ij = beta_i (k_i . k_j)
exp(G_i - G_j) below the diagonal and T = (I + A)^-1, they are

    c = U - W S,  U = T (beta v),  W = T (beta exp(G) k),

for whatever state S the tile begins with. So three launches do it: U and W of all tiles at once; a walk over a row's
tiles, which carries the state and leaves behind c and what each tile began with; outputs of all tiles at once. Sums
run in float32; factors of products are rounded to the values' dtype. T is solved for in float32 (its blocks of the
diagonal row by row, those below by products, for values of half precision in TF32) and rounded at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gated_delta.reference import check_arguments
from kernels.ragged_tiles import request_of

TILE = 64
LEAST = 16  # of a side of a product


def gated_delta_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    *,
    tile: int = TILE,
) -> torch.Tensor:
    """As kernels.gated_delta_prefill.reference. Inputs may have any strides but in the last dimension of query, key,
    value and memory; query and key have the same, so have log_decay and beta. key_dim, value_dim and tile are powers of
    two of at least 16. Raises ValueError otherwise. A row's tiles begin with its first token, so that nothing depends
    on the rows beside it.
    """
    check_arguments(key, value, memory, slots, starts[1:])
    tokens, heads, value_dim = value.shape
    key_heads, key_dim = key.shape[1:]
    for name, size in (("key_dim", key_dim), ("value_dim", value_dim), ("tile", tile)):
        if size < LEAST or size & (size - 1):
            raise ValueError(f"{name} is {size}: the kernel wants a power of two, {LEAST} at least; use the reference")
    if query.stride() != key.stride():
        raise ValueError(f"query has strides {query.stride()}, key {key.stride()}: they must lie in memory alike")
    if log_decay.stride() != beta.stride():
        raise ValueError(f"log_decay has strides {log_decay.stride()}, beta {beta.stride()}: they must lie alike")

    rows = slots.shape[0]
    tiles = tokens // tile + rows  # that there may be, at most
    seen = torch.empty(tokens, heads, key_dim, dtype=value.dtype, device=value.device)  # W
    corrected = torch.empty(tokens, heads, value_dim, dtype=value.dtype, device=value.device)  # U, then c
    decay = torch.empty(tokens, heads, dtype=torch.float32, device=value.device)  # G
    begun = torch.empty(tiles, heads, key_dim, value_dim, dtype=value.dtype, device=value.device)
    output = torch.empty(tokens, heads, value_dim, dtype=torch.float32, device=value.device)
    shape = {"HEADS": heads, "KEY_HEADS": key_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "TILE": tile}
    exact = value.dtype == torch.float32
    _solve_tiles[(tiles, heads)](
        *(key, value, log_decay, beta, starts, seen, corrected, decay, rows),
        *(*key.stride()[:2], *value.stride()[:2], *beta.stride()),
        **shape,
        BLOCK=LEAST,
        PRECISION="ieee" if exact else "tf32",
        num_warps=8,
    )
    columns = min(value_dim, 32)
    _walk_tiles[(value_dim // columns, heads, rows)](
        *(key, memory, slots, starts, seen, corrected, decay, begun),
        *(*key.stride()[:2], *memory.stride()[:3]),
        **shape,
        VALUES=columns,
        num_warps=4,
        num_stages=2,  # two programs' tiles find room in a multiprocessor's shared memory
    )
    columns = min(value_dim, 64)
    _read_tiles[(value_dim // columns, heads, tiles)](
        *(query, key, starts, corrected, decay, begun, output, rows, *key.stride()[:2]),
        **shape,
        VALUES=columns,
        num_warps=4,
    )
    return output


@triton.jit(do_not_specialize=["rows"])
def _solve_tiles(
    key,
    value,
    log_decay,
    beta,
    starts,
    seen,
    corrected,
    decay,
    rows,
    key_token,
    key_head,
    value_token,
    value_head,
    gate_token,
    gate_head,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = request_of(starts, rows, tile, TILE)
    start = tl.load(starts + row).to(tl.int64)
    first = start + (tile - (start // TILE + row)) * TILE
    stop = tl.load(starts + row + 1).to(tl.int64)
    if first >= stop:
        return
    within = tl.arange(0, TILE)
    at = first + within
    live = at < stop
    kind = seen.dtype.element_ty

    # Tokens beyond the row's end: nothing fades, nothing is written.
    gate = head * gate_head + at * gate_token
    total = tl.cumsum(tl.load(log_decay + gate, mask=live, other=0.0), 0)
    share = tl.load(beta + gate, mask=live, other=0.0)
    tl.store(decay + at * HEADS + head, total, mask=live)
    dim = tl.arange(0, KEY_DIM)
    where = at[:, None] * key_token + head // (HEADS // KEY_HEADS) * key_head + dim[None, :]
    keys = tl.load(key + where, mask=live[:, None], other=0.0).to(kind)
    below = within[:, None] > within[None, :]
    reach = tl.exp(tl.where(below, total[:, None] - total[None, :], float("-inf")))
    system = tl.dot(keys, tl.trans(keys), input_precision="ieee") * reach * share[:, None]
    inverse = _inverse(system, TILE, BLOCK, PRECISION)

    inverse = inverse.to(kind)
    keys = tl.load(key + where, mask=live[:, None], other=0.0)  # once more, rather than held in registers so long
    scaled = (keys.to(tl.float32) * (share * tl.exp(total))[:, None]).to(kind)
    own = (at[:, None] * HEADS + head) * KEY_DIM + dim[None, :]
    tl.store(seen + own, tl.dot(inverse, scaled, input_precision="ieee").to(kind), mask=live[:, None])
    column = tl.arange(0, VALUE_DIM)
    where = at[:, None] * value_token + head * value_head + column[None, :]
    values = tl.load(value + where, mask=live[:, None], other=0.0).to(tl.float32)
    scaled = (values * share[:, None]).to(kind)
    own = (at[:, None] * HEADS + head) * VALUE_DIM + column[None, :]
    tl.store(corrected + own, tl.dot(inverse, scaled, input_precision="ieee").to(kind), mask=live[:, None])


@triton.jit
def _inverse(system, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1 [TILE, TILE], of a strictly lower triangular system, by blocks.

    Blocks of the diagonal row by row, all at once; then pairs of blocks become one, [[P, 0], [M, Q]] having the
    inverse [[P', 0], [-Q' M P', Q']], until one is left.
    """
    COUNT: tl.constexpr = TILE // BLOCK
    block = tl.arange(0, COUNT)
    inside = tl.arange(0, BLOCK)
    diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(system, (COUNT, BLOCK, COUNT, BLOCK)), 0.0), 2)
    solved = tl.where(inside[:, None] == inside[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(blocks)
    for index in range(1, BLOCK):
        chosen = (inside == index)[None, :, None]
        weights = tl.sum(tl.where(chosen, blocks, 0.0), 1)  # [COUNT, BLOCK], of rows above only
        moved = tl.sum(weights[:, :, None] * solved, 1)
        solved -= tl.where(chosen, moved[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(diagonal, solved[:, :, None, :], 0.0), (TILE, TILE))
    within = tl.arange(0, TILE)
    for level in tl.static_range(1, 8):
        if BLOCK * 2**level <= TILE:
            pair = within // (BLOCK * 2**level)
            half = within // (BLOCK * 2 ** (level - 1))
            joins = (pair[:, None] == pair[None, :]) & (half[:, None] != half[None, :])
            between = tl.dot(tl.where(joins, system, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, between, input_precision=PRECISION)
    return inverse


@triton.jit
def _walk_tiles(
    key,
    memory,
    slots,
    starts,
    seen,
    corrected,
    decay,
    begun,
    key_token,
    key_head,
    memory_slot,
    memory_head,
    memory_key,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A program carries VALUES columns of one head's state through a row."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(starts + row).to(tl.int64)
    stop = tl.load(starts + row + 1).to(tl.int64)
    if start >= stop:
        return
    slot = tl.load(slots + row).to(tl.int64)
    tile = start // TILE + row
    within = tl.arange(0, TILE)
    dim = tl.arange(0, KEY_DIM)
    column = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    kind = seen.dtype.element_ty
    where = memory + slot * memory_slot + head * memory_head + dim[:, None] * memory_key + column[None, :]
    state = tl.load(where)
    for first in range(start, stop, TILE):
        at = first + within
        live = at < stop
        rounded = state.to(kind)
        tl.store(begun + ((tile * HEADS + head) * KEY_DIM + dim[:, None]) * VALUE_DIM + column[None, :], rounded)
        cell = at * HEADS + head
        seen_keys = tl.load(seen + cell[:, None] * KEY_DIM + dim[None, :], mask=live[:, None], other=0.0)
        place = corrected + cell[:, None] * VALUE_DIM + column[None, :]
        fix = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
        fix -= tl.dot(seen_keys, rounded, input_precision="ieee")
        tl.store(place, fix.to(kind), mask=live[:, None])
        total = tl.load(decay + cell, mask=live, other=0.0)
        last = tl.load(decay + (tl.minimum(first + TILE, stop) - 1) * HEADS + head)
        own = at[None, :] * key_token + head // (HEADS // KEY_HEADS) * key_head + dim[:, None]
        keys = tl.load(key + own, mask=live[None, :], other=0.0).to(kind)  # [KEY_DIM, TILE]
        lasting = tl.where(live, tl.exp(last - total), 0.0)
        state = state * tl.exp(last) + tl.dot(keys, (fix * lasting[:, None]).to(kind), input_precision="ieee")
        tile += 1
    tl.store(where, state)


@triton.jit(do_not_specialize=["rows"])
def _read_tiles(
    query,
    key,
    starts,
    corrected,
    decay,
    begun,
    output,
    rows,
    key_token,
    key_head,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    VALUES: tl.constexpr,
):
    head = tl.program_id(1)
    tile = tl.program_id(2)
    row = request_of(starts, rows, tile, TILE)
    start = tl.load(starts + row).to(tl.int64)
    first = start + (tile - (start // TILE + row)) * TILE
    stop = tl.load(starts + row + 1).to(tl.int64)
    if first >= stop:
        return
    within = tl.arange(0, TILE)
    at = first + within
    live = at < stop
    dim = tl.arange(0, KEY_DIM)
    column = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    kind = corrected.dtype.element_ty
    cell = at * HEADS + head
    shared = at[:, None] * key_token + head // (HEADS // KEY_HEADS) * key_head + dim[None, :]
    queries = tl.load(query + shared, mask=live[:, None], other=0.0).to(kind)
    keys = tl.load(key + shared, mask=live[:, None], other=0.0).to(kind)
    total = tl.load(decay + cell, mask=live, other=0.0)
    upto = within[:, None] >= within[None, :]
    reach = tl.exp(tl.where(upto & live[:, None], total[:, None] - total[None, :], float("-inf")))
    weights = (tl.dot(queries, tl.trans(keys), input_precision="ieee") * reach).to(kind)
    fix = tl.load(corrected + cell[:, None] * VALUE_DIM + column[None, :], mask=live[:, None], other=0.0)
    state = tl.load(begun + ((tile.to(tl.int64) * HEADS + head) * KEY_DIM + dim[:, None]) * VALUE_DIM + column[None, :])
    read = tl.dot(queries, state, input_precision="ieee") * tl.exp(total)[:, None]
    read += tl.dot(weights, fix, input_precision="ieee")
    tl.store(output + cell[:, None] * VALUE_DIM + column[None, :], read, mask=live[:, None])
