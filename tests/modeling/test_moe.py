"""A loop over experts with packed weights and a grouped product are the same sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeling.moe import GroupedExperts, LoopedExperts

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 32, 16


@pytest.mark.parametrize("kind", [LoopedExperts, GroupedExperts])
@pytest.mark.parametrize("packed_from", [0, 10**9])
@pytest.mark.parametrize("tokens", [1, 2, 8, 70])
def test_every_token_gets_the_weighted_sum_of_its_experts(
    monkeypatch: pytest.MonkeyPatch, kind: type[LoopedExperts | GroupedExperts], packed_from: int, tokens: int
) -> None:
    monkeypatch.setattr("modeling.fixed_linear.PACKED_FROM", {torch.float32: packed_from})
    torch.manual_seed(tokens)
    gate_up, down = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(EXPERTS, HIDDEN, WIDTH)
    x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(tokens)])  # nobody chooses the last
    with torch.inference_mode():
        got = kind(gate_up, down)(x, weights, chosen)
        gate, up = torch.einsum("th,eoh->teo", x, gate_up).chunk(2, dim=-1)
        every = torch.einsum("teo,eho->teh", F.silu(gate) * up, down)  # [tokens, experts, hidden]
        want = (every.gather(1, chosen[..., None].expand(-1, -1, HIDDEN)) * weights[..., None]).sum(1)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
