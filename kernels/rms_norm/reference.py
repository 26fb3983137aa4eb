"""RMSNorm in plain torch (arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, sum), both like x [tokens, width]: sum = x + residual in x's dtype (x itself without a residual), and
    normed = sum / rms(sum) * weight, computed in float32 and rounded once. weight [width], of any floating dtype; for
    zero-centred checkpoints it is 1 + the stored scale. Raises ValueError for shapes that do not fit.
    """
    check_arguments(x, weight, residual)
    total = x if residual is None else x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), total


def check_arguments(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} must be [tokens, width] and weight {tuple(weight.shape)} [width]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} must be like x {tuple(x.shape)} {x.dtype}")
