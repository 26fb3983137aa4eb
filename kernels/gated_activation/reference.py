"""Gated activations in plain torch (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_activation(gate_up: torch.Tensor, clamp: tuple[float, float] | None = None) -> torch.Tensor:
    """gate_up [tokens, 2 x width], all gates first -> [tokens, width], computed in float32 and rounded once.

    silu(gate) x up, or with clamp = (alpha, limit) that of gpt-oss: gate x sigmoid(alpha x gate) x (up + 1), the gate
    at most `limit`, |up| at most `limit`. Raises ValueError for an odd width.
    """
    check_arguments(gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    if clamp is None:
        return (F.silu(gate) * up).to(gate_up.dtype)
    alpha, limit = clamp
    gate = gate.clamp(max=limit)
    return (gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)).to(gate_up.dtype)


def check_arguments(gate_up: torch.Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must be [tokens, 2 x width]")
