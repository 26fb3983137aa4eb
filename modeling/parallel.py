"""Tensor-parallel modules: column- and row-parallel linears, the vocabulary-parallel head.

Partial sums are added by one all-reduce.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from modeling.operations import Operations
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup


class ColumnParallelLinear(nn.Module):
    """y_r = x W_r^T (+ bias_r). weight: [out / size, in], this rank's output columns."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, operations: Operations):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.multiply = operations.linear(weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_r W_r^T (+ bias, once). weight: [out, in / size], this rank's input columns."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, ranks: RankGroup, operations: Operations):
        super().__init__()
        self.multiply, self.total = operations.partial_linear(weight), operations.total
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in / size] -> [..., out]."""
        y = self.total(self.multiply(x.flatten(0, -2)), self.ranks)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


class VocabularyHead(nn.Module):
    """Output head divided by vocabulary: logits reach rank 0 only. weight: [vocabulary / size, hidden]."""

    def __init__(self, weight: Weight, vocabulary: int, ranks: RankGroup, operations: Operations):
        super().__init__()
        self.multiply = operations.head(weight)
        self.vocabulary = vocabulary
        self.ranks = ranks
        self.share = -(-vocabulary // ranks.size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [rows, hidden] -> float32 logits [rows, vocabulary] on rank 0, None on the others."""
        return self.whole(self.own(hidden))

    def own(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, share], this rank's part of the logits as `multiply` makes them; -inf beyond the vocabulary's end."""
        logits = self.multiply(hidden)
        if logits.shape[-1] < self.share:  # the last rank's share of an uneven vocabulary
            logits = F.pad(logits, (0, self.share - logits.shape[-1]), value=float("-inf"))
        return logits

    def whole(self, own: torch.Tensor) -> torch.Tensor | None:
        """Any rows of `own` -> as `forward` has them. Collective."""
        if self.ranks.size == 1:
            return own.float()
        parts = self.ranks.gather_to_first(own)
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocabulary].float()
