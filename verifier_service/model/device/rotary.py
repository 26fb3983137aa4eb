"""Cosines and sines of every position: fixed places for CUDA graphs to read from."""

from __future__ import annotations

import torch
from torch import nn

from verifier_service.model import touchpoints


def whole_rotary(
    module: nn.Module, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [positions, rotary_dim], both halves alike, by the model's own module."""
    like = torch.empty(0, dtype=dtype, device=device)
    cos, sin = (table[0] for table in module(like, torch.arange(positions, device=device)[None]))
    if touchpoints.gives_half_of_rotary(module):
        cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    return cos.contiguous(), sin.contiguous()
