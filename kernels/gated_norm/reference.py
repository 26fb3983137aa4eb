"""RMSNorm of each head, weighed by a gate, in plain torch (the output of Gated DeltaNet, arXiv 2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, gate: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim] -> x / rms(x) x weight x silu(gate), [tokens, heads x dim] like gate.

    The mean square is that of a head; weight [dim], of any floating dtype; gate [tokens, heads x dim]. Computed in
    float32 and rounded once, to gate's dtype. Raises ValueError for shapes that do not fit.
    """
    check_arguments(x, weight, gate)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed.flatten(1) * F.silu(gate.float())).to(gate.dtype)


def check_arguments(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> None:
    if x.dim() != 3 or weight.shape != x.shape[2:] or gate.shape != (x.shape[0], x.shape[1] * x.shape[2]):
        raise ValueError(
            f"x {tuple(x.shape)} must be [tokens, heads, dim], weight {tuple(weight.shape)} [dim] and gate "
            f"{tuple(gate.shape)} [tokens, heads x dim]"
        )
