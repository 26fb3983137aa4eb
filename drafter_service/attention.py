"""Attention of draft blocks over (context ++ block) in the context pool. Two ways, the same result.

`AttendEach` goes context by context and copies nothing: best where a launch is cheap and memory is slow (CPU).
`AttendPadded` gathers all contexts into one padded batch: a constant number of launches a layer (GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter_service.fused import FusedDFlash
from drafter_service.model import layer_masks
from drafter_service.pool import ContextPool


@dataclass(frozen=True, slots=True)
class Block:
    """One block to draft. first_row, held: of its context in the pool. base: position of its bonus token.

    rows: block rows, bonus included. stale: the context also holds positions from base on, which must not be seen.
    """

    first_row: int
    held: int
    base: int
    rows: int
    stale: bool


class AttendEach:
    """blocks: in the order of the flat rows. positions [T]: of the flat rows."""

    def __init__(self, model: FusedDFlash, pool: ContextPool, blocks: Sequence[Block], positions: Tensor):
        self._pool = pool
        self._heads, self._kv_heads = model.heads, model.kv_heads
        self._spans: list[tuple[int, int, int, int]] = []  # flat rows begin..end, pool rows first..last
        self._masks: list[Sequence[Tensor | None]] = []
        begin = 0
        for block in blocks:
            end = begin + block.rows
            first, last = block.first_row, block.first_row + block.held + block.rows
            self._spans.append((begin, end, first, last))
            self._masks.append(self._block_masks(model, block, positions[begin:end], pool.positions[first:last]))
            begin = end

    def __call__(self, layer: int, query: Tensor, kv: Tensor) -> Tensor:
        """query [T, heads, head_dim], kv [T, 2, kv_heads, head_dim] -> [T, heads * head_dim]."""
        pool = self._pool.kv[layer]
        out = []
        for (begin, end, first, last), masks in zip(self._spans, self._masks):
            pool[last - (end - begin) : last] = kv[begin:end]
            keys, values = pool[first:last].permute(1, 2, 0, 3)[:, None].unbind()  # [1, kv_heads, K, head_dim]
            # Query heads that share a key head become more rows of it: [1, kv_heads, rows * group, head_dim]
            rows = query[begin:end].unflatten(1, (self._kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)[None]
            seen = F.scaled_dot_product_attention(rows, keys, values, attn_mask=masks[layer])[0]
            out.append(seen.unflatten(1, (end - begin, -1)).transpose(0, 1).flatten(1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _block_masks(
        self, model: FusedDFlash, block: Block, positions: Tensor, keys: Tensor
    ) -> Sequence[Tensor | None]:
        """Per layer [rows * group, K], None where every row sees every key."""
        if not block.stale and not model.masked:
            return [None] * len(model.layers)
        keys[block.held :] = positions  # in the pool: where a block stands is scratch
        seen = keys < block.base
        seen[block.held :] = True
        masks = layer_masks(model.config, positions[None], keys[None], seen.expand(1, block.rows, -1))
        group = self._heads // self._kv_heads
        return [mask[0].repeat_interleave(group, dim=0) for mask in masks]


class AttendPadded:
    """blocks: in the order of the flat rows. positions [T]: of the flat rows."""

    def __init__(self, model: FusedDFlash, pool: ContextPool, blocks: Sequence[Block], positions: Tensor):
        self._pool = pool
        device = positions.device
        first, held, base, rows = torch.tensor([[b.first_row, b.held, b.base, b.rows] for b in blocks]).to(device).T
        self._height = max(block.rows for block in blocks)
        width = max(block.held + block.rows for block in blocks)
        self._block = torch.arange(len(blocks), device=device).repeat_interleave(rows)  # [T]
        self._row = positions - base[self._block]  # [T], within the block
        self._scratch = first[self._block] + held[self._block] + self._row  # [T], pool rows
        pool.positions.index_copy_(0, self._scratch, positions)
        column = torch.arange(width, device=device)
        self._columns = (first[:, None] + column).clamp(max=pool.positions.numel() - 1)  # [N, K], pool rows
        keys = pool.positions[self._columns]
        in_block = (column >= held[:, None]) & (column < (held + rows)[:, None])
        in_context = (column < held[:, None]) & (keys < base[:, None])
        # Padding rows see what the last row of their block sees: a row that sees nothing would be NaN.
        query = base[:, None] + torch.arange(self._height, device=device).minimum((rows - 1)[:, None])
        seen = (in_context | in_block)[:, None].expand(-1, self._height, -1)
        self._masks = [mask[:, None] for mask in layer_masks(model.config, query, keys, seen)]  # [N, 1, R, K]
        self._grouped = model.heads != model.kv_heads

    def __call__(self, layer: int, query: Tensor, kv: Tensor) -> Tensor:
        """query [T, heads, head_dim], kv [T, 2, kv_heads, head_dim] -> [T, heads * head_dim]."""
        pool = self._pool.kv[layer]
        pool.index_copy_(0, self._scratch, kv)
        keys, values = pool[self._columns].permute(2, 0, 3, 1, 4).unbind()  # [N, kv_heads, K, head_dim]
        rows = query.new_zeros(len(self._columns), self._height, *query.shape[1:])
        rows[self._block, self._row] = query
        seen = F.scaled_dot_product_attention(
            rows.transpose(1, 2), keys, values, attn_mask=self._masks[layer], enable_gqa=self._grouped
        )
        return seen.transpose(1, 2)[self._block, self._row].flatten(1)
