"""Mixture of experts with a slice of every expert on each rank: one all-reduce for routed and shared experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from modeling.experts import Experts
from modeling.gates import silu_gate
from modeling.operations import Operations
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup
from modeling.routing import Route


@dataclass(frozen=True)
class SharedExpert:
    """An expert that sees every token; gate: weighs it by a sigmoid. gate_up: [2 x width / size, hidden]."""

    gate_up: Weight
    down: Weight  # [hidden, width / size]
    gate: torch.Tensor | None  # [1, hidden]


class SparseMoe(nn.Module):
    """Experts, of which `route` chooses some for every token, and perhaps one that sees them all.

    router [experts, hidden], multiplied in its own dtype; router_bias [experts].
    """

    def __init__(
        self,
        router: torch.Tensor,
        experts: Experts,
        shared: SharedExpert | None,
        *,
        route: Route,
        ranks: RankGroup,
        operations: Operations,
        router_bias: torch.Tensor | None = None,
    ):
        super().__init__()
        self.count, self.router_dtype = router.shape[0], router.dtype
        self.gated = shared is not None and shared.gate is not None
        if shared is not None and shared.gate is not None:
            assert router_bias is None, "no family has both"
            router = torch.cat([router, shared.gate])  # both read the same input: one product serves both
        self.router = operations.linear(router, router_bias)
        self.experts = experts
        self.shared_gate_up = None if shared is None else operations.linear(shared.gate_up)
        self.shared_down = None if shared is None else operations.partial_linear(shared.down)
        self.gate, self.sigmoid = operations.gate(silu_gate), operations.elementwise(torch.sigmoid)
        self.route, self.ranks, self.total = operations.route(route), ranks, operations.total

    def forward(self, hidden: torch.Tensor, live: torch.Tensor | None = None) -> torch.Tensor:
        """[..., hidden] -> the same shape, summed over ranks.

        live: bool [tokens]; the others are padding, for which no expert's weights need to be read. Only for experts
        that know a choice of -1.
        """
        x = hidden.view(-1, hidden.shape[-1])
        scores = self.router(x.to(self.router_dtype))
        weights, chosen = self.route(scores[:, : self.count].float())
        if live is not None:
            chosen = chosen.masked_fill(~live[:, None], -1)
        total = self.experts(x, weights.to(x.dtype), chosen)
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = self.shared_down(self.gate(self.shared_gate_up(x)))
            if self.gated:  # a product and a sum: in one, only some entries would be rounded in between
                shared = shared.mul_(self.sigmoid(scores[:, self.count :]))
            total = total.add_(shared)
        return self.total(total, self.ranks).view(hidden.shape)
