"""Attention modules over full vectors: an output gate's bits do not depend on the number of tokens."""

from __future__ import annotations

import torch
from torch import nn

from verifier_service.model.padded_attention import PaddedAttention


class Gate(nn.Module):
    def forward(self, hidden_states, *, position_embeddings, factor):
        cos, sin = position_embeddings
        assert cos.shape == sin.shape == (1, hidden_states.shape[1], 2)
        return torch.sigmoid(hidden_states) * factor, None


def test_a_tokens_bits_do_not_depend_on_how_many_there_are():
    x, rope = torch.randn(1, 400, 4), torch.randn(1, 400, 2)
    padded = PaddedAttention(Gate())
    whole, _ = padded(x, position_embeddings=(rope, rope), factor=3)
    assert torch.allclose(whole, torch.sigmoid(x) * 3)
    for count in range(1, 60):
        some = torch.randperm(400)[:count]
        part, _ = padded(x[:, some], position_embeddings=(rope[:, some], rope[:, some]), factor=3)
        assert torch.equal(part, whole[:, some])
