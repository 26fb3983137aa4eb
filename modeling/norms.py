"""RMSNorm in one fused call, equal to transformers' many-kernel one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class FusedRMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension. Zero-centred checkpoints store scale - 1 and multiply in fp32."""

    def __init__(self, weight: torch.Tensor, eps: float, zero_centered: bool):
        super().__init__()
        scale = 1.0 + weight.float() if zero_centered else weight
        self.weight = nn.Parameter(scale, requires_grad=False)
        self.eps = eps
        self.shape = tuple(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.rms_norm(x.to(self.weight.dtype), self.shape, self.weight, self.eps).to(x.dtype)
