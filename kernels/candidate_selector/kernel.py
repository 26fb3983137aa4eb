"""The candidate selector in Triton: one program a block, which walks its rows; choices never leave the chip's cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.candidate_selector.reference import Path, check_arguments


def select_path(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    starts: torch.Tensor,
    predecessors: torch.Tensor,
    successors: torch.Tensor,
) -> Path:
    """As kernels.candidate_selector.reference. All tensors contiguous. Padding rows stay undefined."""
    check_arguments(candidates, logits, hidden, anchors, starts, predecessors, successors)
    rows, k = candidates.shape
    rank = hidden.shape[1]
    path = Path(
        torch.empty(rows, dtype=torch.int64, device=candidates.device),
        torch.empty(rows, dtype=torch.float32, device=candidates.device),
    )
    _walk[(len(anchors),)](
        *(candidates, logits, hidden, anchors, starts, predecessors, successors, *path),
        K=k,
        BLOCK_K=triton.next_power_of_2(k),
        RANK=rank,
        BLOCK_RANK=triton.next_power_of_2(rank),
        num_warps=4,
    )
    return path


@triton.jit
def _walk(
    candidates,
    logits,
    hidden,
    anchors,
    starts,
    predecessors,
    successors,
    token_ids,
    confidence,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    block = tl.program_id(0)
    option = tl.arange(0, BLOCK_K)
    dim = tl.arange(0, BLOCK_RANK)
    exists, in_rank = option < K, dim < RANK
    previous = tl.load(anchors + block)
    for row in range(tl.load(starts + block), tl.load(starts + block + 1)):
        candidate = tl.load(candidates + row * K + option, mask=exists, other=0)
        own = tl.load(logits + row * K + option, mask=exists, other=float("-inf"))
        behind = tl.load(
            successors + candidate[:, None] * RANK + dim[None, :], mask=exists[:, None] & in_rank[None, :], other=0.0
        ).to(tl.float32)
        wanted = tl.load(hidden + row * RANK + dim, mask=in_rank, other=0.0).to(tl.float32)
        wanted *= tl.load(predecessors + previous * RANK + dim, mask=in_rank, other=0.0).to(tl.float32)
        score = own + tl.sum(behind * wanted[None, :], 1)
        top = tl.max(score, 0)
        best = tl.min(tl.where(score == top, option, BLOCK_K - 1), 0)
        previous = tl.sum(tl.where(option == best, candidate, 0), 0)
        tl.store(token_ids + row, previous)
        tl.store(confidence + row, 1.0 / tl.sum(tl.exp(score - top), 0))
