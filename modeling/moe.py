"""Mixture of experts with a slice of every expert on each rank: one all-reduce for routed and shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from modeling.parallel import RankGroup

LOOP_PAIRS = 4  # up to so many (token, expert) pairs a loop over the pairs beats sorting them (measured on CPU)


@dataclass(frozen=True)
class SharedExpert:
    """An expert that sees every token, weighted by a sigmoid gate. gate_up: [2 x width / size, hidden]."""

    gate_up: torch.Tensor
    down: torch.Tensor  # [hidden, width / size]
    gate: torch.Tensor  # [1, hidden]


class SparseMoe(nn.Module):
    """Top-k routing over softmax probabilities (Qwen3-MoE, Qwen3.5-MoE). SiLU-gated experts.

    router [experts, hidden]; gate_up [experts, 2 x width / size, hidden]; down [experts, hidden, width / size].
    normalized: the chosen probabilities are scaled to add up to one.
    """

    def __init__(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        shared: SharedExpert | None,
        *,
        top_k: int,
        normalized: bool,
        ranks: RankGroup,
    ):
        super().__init__()
        self.experts = router.shape[0]
        # The router and the shared expert's gate read the same input: one product serves both.
        self.router = _frozen(router if shared is None else torch.cat([router, shared.gate]))
        self.gate_up, self.down = _frozen(gate_up), _frozen(down)
        self.shared_gate_up = None if shared is None else _frozen(shared.gate_up)
        self.shared_down = None if shared is None else _frozen(shared.down)
        self.top_k, self.normalized, self.ranks = top_k, normalized, ranks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape, summed over ranks."""
        x = hidden.view(-1, hidden.shape[-1])
        scores = F.linear(x, self.router)
        weights, chosen = self._route(scores[:, : self.experts].float())
        weights = weights.to(x.dtype)
        if chosen.numel() <= LOOP_PAIRS and not x.is_cuda:
            total = self._few(x, weights, chosen)
        else:
            total = self._many(x, weights, chosen)
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = F.linear(_silu_gate(F.linear(x, self.shared_gate_up)), self.shared_down)
            total.addcmul_(shared, torch.sigmoid(scores[:, self.experts :]))
        return self.ranks.sum_(total).view(hidden.shape)

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.normalized:  # a softmax over the chosen ones is the whole softmax scaled to add up to one
            best, chosen = torch.topk(logits, self.top_k, dim=-1)
            return torch.softmax(best, dim=-1), chosen
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
        return weights, chosen

    def _few(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """One small product per (token, expert) pair: no sorting, no gathering, touches only the chosen experts."""
        rows = []
        for token, experts in enumerate(chosen.tolist()):
            row, parts = x[token : token + 1], weights[token : token + 1]
            outputs = [F.linear(_silu_gate(F.linear(row, self.gate_up[e])), self.down[e]) for e in experts]
            rows.append(parts @ torch.cat(outputs))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _many(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Pairs sorted by expert, one grouped product each way."""
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        ends = torch.cumsum(torch.bincount(pairs, minlength=self.experts), 0, dtype=torch.int32)
        rows = x[order // self.top_k]  # [pairs, hidden], grouped by expert
        rows = _grouped(_silu_gate(_grouped(rows, self.gate_up, ends)), self.down, ends)
        unsorted = torch.empty_like(rows)
        unsorted[order] = rows
        return torch.bmm(weights.unsqueeze(1), unsorted.view(-1, self.top_k, rows.shape[-1])).squeeze(1)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [n, in] in runs that end at `ends` [experts], each times its expert's weight [experts, out, in]^T."""
    if rows.is_cuda and rows.dtype != torch.bfloat16:  # CUDA's grouped product knows bf16 only
        bounds = [0, *ends.tolist()]
        return torch.cat([F.linear(rows[a:b], weight[e]) for e, (a, b) in enumerate(pairwise(bounds))])
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
