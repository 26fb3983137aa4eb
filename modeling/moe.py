"""Mixture of experts with a slice of every expert on each rank: one all-reduce for routed and shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from modeling.fixed_linear import fixed_linear
from modeling.parallel import RankGroup

# float32 logits [tokens, experts] -> weights and chosen experts, both [tokens, top_k]
Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SharedExpert:
    """An expert that sees every token; gate: weighs it by a sigmoid. gate_up: [2 x width / size, hidden]."""

    gate_up: torch.Tensor
    down: torch.Tensor  # [hidden, width / size]
    gate: torch.Tensor | None  # [1, hidden]


class SparseMoe(nn.Module):
    """SiLU-gated experts, of which `route` chooses some for every token.

    router [experts, hidden], multiplied in its own dtype; gate_up [experts, 2 x width / size, hidden];
    down [experts, hidden, width / size].
    """

    def __init__(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        shared: SharedExpert | None,
        *,
        route: Route,
        ranks: RankGroup,
    ):
        super().__init__()
        self.count, self.router_dtype = router.shape[0], router.dtype
        self.gated = shared is not None and shared.gate is not None
        # The router and the shared expert's gate read the same input: one product serves both.
        self.router = fixed_linear(
            router if shared is None or shared.gate is None else torch.cat([router, shared.gate])
        )
        self.experts = GroupedExperts(gate_up, down) if gate_up.is_cuda else LoopedExperts(gate_up, down)
        self.shared_gate_up = None if shared is None else fixed_linear(shared.gate_up)
        self.shared_down = None if shared is None else fixed_linear(shared.down)
        self.route, self.ranks = route, ranks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape, summed over ranks."""
        x = hidden.view(-1, hidden.shape[-1])
        scores = self.router(x.to(self.router_dtype))
        weights, chosen = self.route(scores[:, : self.count].float())
        total = self.experts(x, weights.to(x.dtype), chosen)
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = self.shared_down(_silu_gate(self.shared_gate_up(x)))
            total = total.addcmul_(shared, torch.sigmoid(scores[:, self.count :])) if self.gated else total.add_(shared)
        return self.ranks.sum_(total).view(hidden.shape)


class LoopedExperts:
    """On CPU: the chosen experts one after the other, each over its own tokens with its own packed weights.

    As fast as a grouped product over unpacked weights, or faster, from one token to a long prefill.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        self.gate_up = [fixed_linear(weight) for weight in gate_up]
        self.down = [fixed_linear(weight) for weight in down]

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], weights and chosen [tokens, top_k] -> weighted sums [tokens, hidden]."""
        if len(x) == 1:
            return weights @ torch.cat([self.down[e](_silu_gate(self.gate_up[e](x))) for e in chosen[0].tolist()])
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        counts = torch.bincount(pairs, minlength=len(self.gate_up)).tolist()
        hit = [(expert, count) for expert, count in enumerate(counts) if count]
        sizes = [count for _, count in hit]
        parts = x.index_select(0, order // chosen.shape[1]).split(sizes)
        inner = torch.cat([self.gate_up[e](part) for (e, _), part in zip(hit, parts, strict=True)])
        parts = _silu_gate(inner).split(sizes)
        outer = torch.cat([self.down[e](part) for (e, _), part in zip(hit, parts, strict=True)])
        return _combined(outer, order, weights)


class GroupedExperts:
    """On CUDA: pairs of token and expert sorted by expert, one grouped product each way."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], weights and chosen [tokens, top_k] -> weighted sums [tokens, hidden]."""
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        ends = torch.cumsum(torch.bincount(pairs, minlength=len(self.gate_up)), 0, dtype=torch.int32)
        rows = x[order // chosen.shape[1]]  # [pairs, hidden], grouped by expert
        rows = _grouped(_silu_gate(_grouped(rows, self.gate_up, ends)), self.down, ends)
        return _combined(rows, order, weights)


def _combined(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [pairs, hidden], row i of pair order[i]: summed by token, weighted."""
    unsorted = torch.empty_like(rows)
    unsorted[order] = rows
    return torch.bmm(weights.unsqueeze(1), unsorted.view(*weights.shape, rows.shape[-1])).squeeze(1)


def _silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [n, in] in runs that end at `ends` [experts], each times its expert's weight [experts, out, in]^T."""
    if rows.is_cuda and rows.dtype != torch.bfloat16:  # CUDA's grouped product knows bf16 only
        bounds = [0, *ends.tolist()]
        return torch.cat([F.linear(rows[a:b], weight[e]) for e, (a, b) in enumerate(pairwise(bounds))])
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
