"""A loop over experts with packed weights and a grouped product are the same sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from modeling.experts import ExpertWeights, GroupedExperts, LoopedExperts
from modeling.gates import ClampedGate, silu_gate

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
        got = kind(ExpertWeights(gate_up, down), silu_gate)(x, weights, chosen)
        gate, up = torch.einsum("th,eoh->teo", x, gate_up).chunk(2, dim=-1)
        every = torch.einsum("teo,eho->teh", F.silu(gate) * up, down)  # [tokens, experts, hidden]
        want = (every.gather(1, chosen[..., None].expand(-1, -1, HIDDEN)) * weights[..., None]).sum(1)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", [LoopedExperts, GroupedExperts])
@pytest.mark.parametrize("tokens", [1, 9])
def test_biases_and_clamped_gates_are_those_of_gpt_oss(kind: type[LoopedExperts | GroupedExperts], tokens: int) -> None:
    torch.manual_seed(tokens)
    config = GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, swiglu_limit=2.0)
    stock = GptOssExperts(config)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)  # gates and values beyond the limit
    x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
    chosen = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    with torch.inference_mode():
        gate_up, bias = stock.gate_up_proj.mT, stock.gate_up_proj_bias
        own = ExpertWeights(
            gate_up=torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1),
            down=stock.down_proj.mT.contiguous(),
            gate_up_bias=torch.cat([bias[:, ::2], bias[:, 1::2]], dim=1),
            down_bias=stock.down_proj_bias,
        )
        got = kind(own, ClampedGate(alpha=1.702, limit=2.0))(x, weights, chosen)
        torch.testing.assert_close(got, stock(x, chosen, weights), atol=1e-4, rtol=1e-4)
