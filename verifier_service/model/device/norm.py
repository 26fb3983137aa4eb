"""RMSNorm over a kernel, with the addition of the residual in front of it."""

from __future__ import annotations

import torch
from torch import nn

from kernels.rms_norm.kernel import rms_norm


class KernelNorm(nn.Module):
    """Zero-centred checkpoints store scale - 1."""

    def __init__(self, weight: torch.Tensor, eps: float, zero_centered: bool):
        super().__init__()
        self.weight = nn.Parameter(1.0 + weight.float() if zero_centered else weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [tokens, width] -> the norm of their sum, and the sum."""
        return rms_norm(x, self.weight, self.eps, residual)


class LoneKernelNorm(KernelNorm):
    """Where there is no residual to add."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, residual)[0]
