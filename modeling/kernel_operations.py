"""The Operations of a GPU: products, experts and their choice by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_activation.kernel import gated_activation
from kernels.linear.kernel import add_leaves
from modeling.experts import Experts, ExpertWeights
from modeling.fixed_linear import Linear
from modeling.full_vectors import FullVectors
from modeling.gates import Gate, silu_gate
from modeling.kernel_experts import TritonExperts, triton_route
from modeling.kernel_head import TritonHead
from modeling.kernel_linear import TritonLeaves, TritonLinear
from modeling.operations import Elementwise, TorchOperations
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup
from modeling.routing import Route
from modeling.tiles import LEAVES, leaves_of


class TritonOperations(TorchOperations):
    """An Operations over kernels; norms and other elementwise functions are torch's: of each row's or entry's own.

    A partial has x's dtype and no parts.
    """

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        return TritonLinear(weight, bias)

    def head(self, weight: Weight) -> TritonHead:
        return TritonHead(weight)

    def partial_linear(self, weight: Weight) -> Linear:
        return TritonLinear(weight)

    def experts(self, weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
        return TritonExperts(weights, gate)

    def route(self, route: Route) -> Route:
        return triton_route(route)

    def gate(self, gate: Gate) -> Gate:
        return gated_activation if gate is silu_gate else gate


class DeterministicTritonOperations(TritonOperations):
    """Results of every row depend on nothing but the row: not on the batch, nor on how ranks divide the model.

    A partial is float32 [leaves of this rank, tokens, out]; totals have `dtype`. size: ranks, 1, 2, 4 or 8. device: a
    GPU runs torch's elementwise functions entry by entry; a CPU, where kernels are interpreted, wants full vectors.
    """

    def __init__(self, dtype: torch.dtype, size: int = 1, *, device: str = "cuda"):
        if LEAVES % size:
            raise ValueError(f"{size} ranks cannot share {LEAVES} leaves: 1, 2, 4 and 8 can")
        self._dtype, self._size, self._device = dtype, size, device

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        return TritonLinear(weight, bias, deterministic=True)

    def partial_linear(self, weight: Weight) -> Linear:
        """Raises CheckpointError for a weight that cannot be cut into leaves."""
        return TritonLeaves(weight, self._leaves(weight))

    def experts(self, weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
        """Raises CheckpointError as partial_linear does."""
        return TritonExperts(weights, gate, leaves=self._leaves(weights.down))

    def elementwise(self, function: Elementwise) -> Elementwise:
        return FullVectors(function) if self._device == "cpu" else function

    def total(self, partial: Tensor, ranks: RankGroup) -> Tensor:
        if ranks.size == 1:
            return add_leaves(partial, dtype=self._dtype)
        return add_leaves(torch.stack(ranks.gather(add_leaves(partial))), dtype=self._dtype)

    def _leaves(self, weight: Weight) -> int:
        return leaves_of(weight.shape[-1] * self._size, self._size)
