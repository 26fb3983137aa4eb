"""A decoder layer over kernels: additions of the residual are done by the norms that follow them."""

from __future__ import annotations

import torch
from torch import nn

from modeling.gates import silu_gate
from modeling.moe import SparseMoe
from modeling.operations import Operations
from modeling.parallel import RowParallelLinear
from modeling.quantized.packed import Weight
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.step import DeviceStep


class GatedMlp(nn.Module):
    """gate_up: [2 x width / size, hidden], all gates first."""

    def __init__(self, gate_up: Weight, down: RowParallelLinear, operations: Operations):
        super().__init__()
        self.gate_up, self.down, self.gate = operations.linear(gate_up), down, operations.gate(silu_gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same, summed over ranks."""
        return self.down(self.gate(self.gate_up(x)))


class KernelLayer(nn.Module):
    """input_norm, mixer (attention or Gated DeltaNet), mixed_norm, mlp: the order that all families have.

    Call input_norm first, with what the layer before returned.
    """

    def __init__(self, input_norm: KernelNorm, mixer: nn.Module, mixed_norm: KernelNorm, mlp: nn.Module):
        super().__init__()
        self.input_norm, self.mixer, self.mixed_norm, self.mlp = input_norm, mixer, mixed_norm, mlp
        self._sparse = isinstance(mlp, SparseMoe)

    def forward(
        self, normed: torch.Tensor, residual: torch.Tensor, step: DeviceStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [tokens, hidden] -> two tensors of which the layer's output is the sum."""
        normed, residual = self.mixed_norm(self.mixer(normed, step), residual)
        return (self.mlp(normed, step.live) if self._sparse else self.mlp(normed)), residual
