"""Block attention in plain torch, block by block. The definition that the kernel is tested against."""

from __future__ import annotations

import torch

from kernels.block_attention.batch import BlockBatch, check_arguments

SECTION_ROWS = 512


def block_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    positions: torch.Tensor,
    batch: BlockBatch,
    *,
    scaling: float,
    causal: bool = False,
    sliding_window: int | None = None,
    section_rows: int = SECTION_ROWS,
    spread: bool = True,
) -> torch.Tensor:
    """query [tokens, heads, head_dim] over pool [rows, 2, kv_heads, head_dim] -> like query. Source: arXiv 2602.06036.

    positions int64 [rows]: of the pool's context rows. A block row sees the context rows at positions before its
    block's base and its own block: all rows of it, or with causal=True only those up to itself. sliding_window w: only
    keys less than w positions away. Query head h reads KV head h // (heads / kv_heads). Computes in float32.
    section_rows, spread have no effect here: they only say how the kernel arranges its sums. Rows from starts[-1] on
    are padding. Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, pool, positions, batch, sliding_window, section_rows)
    output = torch.zeros_like(query)
    group = query.shape[1] // pool.shape[2]
    starts, first_rows, held, bases = (x.tolist() for x in (batch.starts, batch.first_rows, batch.held, batch.bases))
    for block, base in enumerate(bases):
        begin, end = starts[block], starts[block + 1]
        first, behind = first_rows[block], first_rows[block] + held[block]
        rows = torch.arange(base, base + end - begin, device=query.device)
        at = torch.cat([positions[first:behind], rows])
        hidden = torch.cat([positions[first:behind] >= base, torch.zeros_like(rows, dtype=torch.bool)])
        ahead = at - rows[:, None]
        hidden = hidden | (ahead > 0) if causal else hidden.expand(len(rows), -1)
        if sliding_window is not None:
            hidden = hidden | (ahead.abs() >= sliding_window)
        keys, values = pool[first : behind + len(rows)].float().repeat_interleave(group, dim=2).permute(1, 2, 0, 3)
        scores = query[begin:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scaling  # [heads, rows, keys]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        output[begin:end] = (weights @ values).transpose(0, 1).to(query.dtype)
    return output
