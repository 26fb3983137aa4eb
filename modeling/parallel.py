"""Tensor-parallel pieces: the group of ranks, row-parallel linears, the vocabulary-parallel head.

Column-parallel linears are plain ones that hold fewer rows. Partial sums are added by one all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one target. group: a torch.distributed process group of `size` members; None if size is 1."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.size > 1 and self.group is None:
            raise ValueError(f"{self.size} ranks need a process group")

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        """Add the ranks' partial sums, in place; every rank gets the total."""
        if self.group is not None and self.size > 1:
            dist.all_reduce(partial, group=self.group)
        return partial

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """The equally shaped parts of all ranks, in rank order, on rank 0; None elsewhere."""
        if self.group is None or self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, group=self.group, group_dst=0)
        return parts


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_r W_r^T (+ bias, once). weight: [out, in / size], this rank's input columns."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, ranks: RankGroup):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ranks.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = self.ranks.sum_(F.linear(x, self.weight))
        return y if self.bias is None else y.add_(self.bias)


class VocabularyHead(nn.Module):
    """Output head divided by vocabulary: logits reach rank 0 only. weight: [vocabulary / size, hidden]."""

    def __init__(self, weight: torch.Tensor, vocabulary: int, ranks: RankGroup):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.vocabulary = vocabulary
        self.ranks = ranks
        self.share = -(-vocabulary // ranks.size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [rows, hidden] -> float32 logits [rows, vocabulary] on rank 0, None on the others."""
        logits = F.linear(hidden, self.weight)
        if self.ranks.size == 1:
            return logits.float()
        if logits.shape[-1] < self.share:  # the last rank's share of an uneven vocabulary
            logits = F.pad(logits, (0, self.share - logits.shape[-1]))
        parts = self.ranks.gather_to_first(logits)
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocabulary].float()
