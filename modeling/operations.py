"""Which code computes a rank's layers: one seam for everything that a family's modules have in common.

A target is built by calling an Operations for each of its linears, experts and norms, so that the same modules run over
torch's operations, over Triton kernels, or in a form whose results depend on nothing but their own row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from modeling.experts import Experts, ExpertWeights, make_experts
from modeling.fixed_linear import Linear, fixed_linear
from modeling.gates import Gate, silu_gate
from modeling.norms import FusedRMSNorm
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup
from modeling.routing import Route

Elementwise = Callable[[Tensor], Tensor]


class Operations(Protocol):
    """Makes the functions that one rank's layers call; weights may not change afterwards.

    A `partial` is what one rank contributes to a sum over ranks: [tokens, out], or with a leading dimension of parts,
    each of them summed on its own. Only `total` knows what it means; partials of one product may be added up before.
    """

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """x [..., in] -> x weight^T + bias [..., out]; weight [out (/ size), in], whole along its input."""

    def head(self, weight: Weight) -> Linear:
        """The output head: as linear, though its logits may be float32 whatever x is."""

    def partial_linear(self, weight: Weight) -> Linear:
        """x [tokens, in / size] -> a partial of x weight^T; weight [out, in / size], divided along its input."""

    def experts(self, weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
        """This rank's slices of all routed experts, which give partials."""

    def norm(self, weight: Tensor, eps: float, zero_centered: bool) -> nn.Module:
        """RMSNorm over the last dimension."""

    def elementwise(self, function: Elementwise) -> Elementwise:
        """The same function of each entry, which may not change its input; in a form that suits."""

    def gate(self, gate: Gate) -> Gate:
        """Likewise of a gate."""

    def route(self, route: Route) -> Route:
        """Likewise of a choice of experts."""

    def total(self, partial: Tensor, ranks: RankGroup) -> Tensor:
        """The sum over ranks [tokens, out], the same to the last bit on every rank; may overwrite `partial`."""


class TorchOperations:
    """An Operations over torch's own, the fastest on a CPU."""

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        return fixed_linear(weight, bias)

    def head(self, weight: Weight) -> Linear:
        return fixed_linear(weight)

    def partial_linear(self, weight: Weight) -> Linear:
        return fixed_linear(weight)

    def experts(self, weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
        return make_experts(weights, gate)

    def norm(self, weight: Tensor, eps: float, zero_centered: bool) -> nn.Module:
        return FusedRMSNorm(weight, eps, zero_centered)

    def elementwise(self, function: Elementwise) -> Elementwise:
        return function

    def gate(self, gate: Gate) -> Gate:
        return gate

    def route(self, route: Route) -> Route:
        return route

    def total(self, partial: Tensor, ranks: RankGroup) -> Tensor:
        return ranks.sum_(partial)
