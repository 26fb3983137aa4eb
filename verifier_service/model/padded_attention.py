"""Attention modules of transformers over a number of tokens that fills torch's vectors.

What they compute beside attention itself, such as Qwen3.5's output gate, is elementwise and theirs: see
modeling/full_vectors.py for why its last bit would depend on the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TOKENS = 16  # with widths of a multiple of four, 64 entries


class PaddedAttention(nn.Module):
    """Calls `attention` with zeros after the step's tokens, up to a multiple of TOKENS."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, tokens, hidden] -> the same."""
        tokens = hidden_states.shape[1]
        padding = (0, 0, 0, -tokens % TOKENS)
        cos, sin = (F.pad(part, padding) for part in position_embeddings)
        output, _ = self.attention(F.pad(hidden_states, padding), position_embeddings=(cos, sin), **kwargs)
        return output[:, :tokens], None
