"""Tensor-parallel pieces: the group of ranks, column- and row-parallel linears, the vocabulary-parallel head.

Partial sums are added by one all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modeling.fixed_linear import fixed_linear
from modeling.host_exchange import HostExchange, open_host_exchange
from modeling.quantized.packed import Weight


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one target. group: a torch.distributed process group of `size` members; None if size is 1.

    host: shortcut for small tensors between CPU ranks of one host; None = the group carries everything.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host: HostExchange | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.size > 1 and self.group is None:
            raise ValueError(f"{self.size} ranks need a process group")

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        """Add the ranks' partial sums, in place; every rank gets the total, the same to the last bit."""
        if self.group is None or self.size == 1:
            return partial
        if self.host is None or not self.host.fits(partial):
            dist.all_reduce(partial, group=self.group)
            return partial
        first, second, *rest = self.host.exchange(partial)
        total = torch.add(first, second)
        for part in rest:
            total.add_(part)
        return partial.copy_(total.view(partial.shape))

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """All ranks' equally shaped parts, in rank order, on rank 0; None elsewhere. Copy before the next call."""
        if self.group is None or self.size == 1:
            return [part]
        if self.host is not None and self.host.fits(part):
            everyones = self.host.exchange(part)
            return [one.view(part.shape) for one in everyones] if self.rank == 0 else None
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, group=self.group, group_dst=0)
        return parts


def join_ranks(rank: int, size: int, group: dist.ProcessGroup | None, device: str | torch.device) -> RankGroup:
    """The group of a target's ranks; between CPU ranks of one host with the shared-memory shortcut. Collective."""
    ranks = RankGroup(rank, size, group)
    if group is None or size == 1 or torch.device(device).type != "cpu":
        return ranks
    return RankGroup(rank, size, group, open_host_exchange(rank, size, group))


class ColumnParallelLinear(nn.Module):
    """y_r = x W_r^T (+ bias_r). weight: [out / size, in], this rank's output columns."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.multiply = fixed_linear(weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_r W_r^T (+ bias, once). weight: [out, in / size], this rank's input columns."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, ranks: RankGroup):
        super().__init__()
        alone = ranks.size == 1
        self.multiply = fixed_linear(weight, bias if alone else None)
        self.bias = None if alone or bias is None else nn.Parameter(bias, requires_grad=False)
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ranks.sum_(self.multiply(x))
        return y if self.bias is None else y.add_(self.bias)


class VocabularyHead(nn.Module):
    """Output head divided by vocabulary: logits reach rank 0 only. weight: [vocabulary / size, hidden]."""

    def __init__(self, weight: Weight, vocabulary: int, ranks: RankGroup):
        super().__init__()
        self.multiply = fixed_linear(weight)
        self.vocabulary = vocabulary
        self.ranks = ranks
        self.share = -(-vocabulary // ranks.size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [rows, hidden] -> float32 logits [rows, vocabulary] on rank 0, None on the others."""
        logits = self.multiply(hidden)
        if self.ranks.size == 1:
            return logits.float()
        if logits.shape[-1] < self.share:  # the last rank's share of an uneven vocabulary
            logits = F.pad(logits, (0, self.share - logits.shape[-1]))
        parts = self.ranks.gather_to_first(logits)
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocabulary].float()
