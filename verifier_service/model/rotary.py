"""Rotary cosines and sines by position, computed once by the model's own module."""

from __future__ import annotations

import torch
from torch import nn


class RotaryTable:
    """Grows to the longest context seen, so that a long-context model does not pay for positions nobody uses."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str | torch.device, first: int = 2048):
        self._module, self._first = module, first
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._cos = self._sin = torch.empty(0, 0, dtype=dtype, device=device)

    def rows(self, positions: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, tokens, rotary_dim] of positions [tokens], all below `longest`."""
        if longest > self._cos.shape[0]:
            self._grow(longest)
        return self._cos.index_select(0, positions)[None], self._sin.index_select(0, positions)[None]

    def _grow(self, longest: int) -> None:
        size = max(self._first, 1 << (longest - 1).bit_length())
        cos, sin = self._module(self._like, torch.arange(size, device=self._like.device)[None])
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
