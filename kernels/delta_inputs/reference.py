"""The inputs of the gated delta rule in plain torch (Gated DeltaNet, arXiv 2412.06464)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

EPS = 1e-6  # under the root of a vector's squared length


class DeltaInputs(NamedTuple):
    """As kernels.gated_delta takes them. query, key float32 [tokens, key_heads, key_dim], lying in memory alike; value
    [tokens, heads, value_dim], a view of what came out of the convolution; log_decay, beta float32 [tokens, heads].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor


def delta_inputs(
    convolved: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    negative_rate: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    key_heads: int,
    key_dim: int,
) -> DeltaInputs:
    """Queries and keys of unit length (queries also over sqrt(key_dim)), beta = sigmoid(b), log_decay = negative_rate x
    softplus(a + dt_bias).

    convolved [tokens, channels]: key_heads queries, as many keys, then the values of all heads, activated already. a, b
    [tokens, heads]; negative_rate (-exp(A_log)) and dt_bias float32 [heads]. Repeating queries and keys for the value
    heads that share them is left to the delta rule. Computed in float32. Raises ValueError for shapes that do not fit.
    """
    value_dim = check_arguments(convolved, a, b, negative_rate, dt_bias, key_heads, key_dim)
    width = key_heads * key_dim
    both = convolved[:, : 2 * width].float().unflatten(1, (2 * key_heads, key_dim))
    both = both * torch.rsqrt(both.square().sum(-1, keepdim=True) + EPS)
    query, key = both.split(key_heads, dim=1)
    return DeltaInputs(
        query * key_dim**-0.5,
        key.contiguous(),
        convolved[:, 2 * width :].unflatten(1, (a.shape[1], value_dim)),
        F.softplus(a.float() + dt_bias) * negative_rate,
        torch.sigmoid(b.float()),
    )


def check_arguments(
    convolved: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    negative_rate: torch.Tensor,
    dt_bias: torch.Tensor,
    key_heads: int,
    key_dim: int,
) -> int:
    """The width of a value."""
    tokens, heads = a.shape
    values = convolved.shape[1] - 2 * key_heads * key_dim
    if convolved.shape[0] != tokens or values <= 0 or values % heads:
        raise ValueError(
            f"convolved {tuple(convolved.shape)} must be [{tokens}, 2 x {key_heads} x {key_dim} + {heads} x value_dim]"
        )
    if b.shape != a.shape or negative_rate.shape != (heads,) or dt_bias.shape != (heads,):
        raise ValueError(
            f"b {tuple(b.shape)} must be [{tokens}, {heads}], negative_rate {tuple(negative_rate.shape)} and dt_bias "
            f"{tuple(dt_bias.shape)} [{heads}]"
        )
    return values // heads
