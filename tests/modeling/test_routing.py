"""Routing by sigmoid scores is transformers' routing of DeepSeek-V3."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from modeling.routing import SigmoidTopK

EXPERTS, HIDDEN, TOKENS = 16, 32, 50


@pytest.mark.parametrize(("groups", "best"), [(1, 1), (4, 2), (8, 3), (4, 4)])
@pytest.mark.parametrize("normalized", [True, False])
def test_sigmoid_routing_chooses_and_weighs_as_the_stock_router_does(groups: int, best: int, normalized: bool):
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        n_group=groups,
        topk_group=best,
        num_experts_per_tok=4,
        norm_topk_prob=normalized,
        routed_scaling_factor=2.827,
    )
    stock = DeepseekV3TopkRouter(config)
    torch.manual_seed(groups)
    torch.nn.init.normal_(stock.weight)
    stock.e_score_correction_bias.normal_(0, 0.3)
    route = SigmoidTopK(stock.e_score_correction_bias, 4, groups, best, normalized, 2.827)
    with torch.inference_mode():
        logits, want_weights, want_chosen = stock(torch.randn(TOKENS, HIDDEN))
        weights, chosen = route(logits)
    want = torch.zeros(TOKENS, EXPERTS).scatter_(1, want_chosen, want_weights)
    got = torch.zeros(TOKENS, EXPERTS).scatter_(1, chosen, weights)
    torch.testing.assert_close(got, want)
