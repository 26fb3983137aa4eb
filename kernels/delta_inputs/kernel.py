"""The inputs of the gated delta rule in Triton, in one launch: a program for each query or key head of a token, and
one for the token's gates. Values stay where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.delta_inputs.reference import EPS, DeltaInputs, check_arguments


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
    """As kernels.delta_inputs.reference. convolved, a and b may have any strides but in the last dimension."""
    value_dim = check_arguments(convolved, a, b, negative_rate, dt_bias, key_heads, key_dim)
    tokens, heads = a.shape
    query, key = torch.empty(2, tokens, key_heads, key_dim, dtype=torch.float32, device=a.device).unbind()
    log_decay, beta = torch.empty(2, tokens, heads, dtype=torch.float32, device=a.device).unbind()
    _delta_inputs[(tokens, 2 * key_heads + 1)](
        *(convolved, a, b, negative_rate, dt_bias, query, key, log_decay, beta),
        *(key_dim**-0.5, EPS, convolved.stride(0), a.stride(0), b.stride(0)),
        KEY_HEADS=key_heads,
        KEY_DIM=key_dim,
        BLOCK_DIM=triton.next_power_of_2(key_dim),
        HEADS=heads,
        BLOCK_HEADS=triton.next_power_of_2(heads),
        num_warps=1,
    )
    value = convolved[:, 2 * key_heads * key_dim :].unflatten(1, (heads, value_dim))
    return DeltaInputs(query, key, value, log_decay, beta)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), as exact for a very negative x as for any other."""
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    tail = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    return tl.maximum(x, 0.0) + tail


@triton.jit
def _delta_inputs(
    convolved,
    a,
    b,
    negative_rate,
    dt_bias,
    query,
    key,
    log_decay,
    beta,
    scale,
    eps,
    convolved_token,
    a_token,
    b_token,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < 2 * KEY_HEADS:
        at = tl.arange(0, BLOCK_DIM)
        exists = at < KEY_DIM
        own = convolved + token * convolved_token + part * KEY_DIM + at
        vector = tl.load(own, mask=exists, other=0.0).to(tl.float32)
        vector *= 1.0 / tl.sqrt(tl.sum(vector * vector, 0) + eps)
        place = (token * KEY_HEADS + part % KEY_HEADS) * KEY_DIM + at
        tl.store(query + place, vector * scale, mask=exists & (part < KEY_HEADS))
        tl.store(key + place, vector, mask=exists & (part >= KEY_HEADS))
    else:
        head = tl.arange(0, BLOCK_HEADS)
        in_heads = head < HEADS
        rate = tl.load(negative_rate + head, mask=in_heads, other=0.0)
        step = tl.load(a + token * a_token + head, mask=in_heads, other=0.0).to(tl.float32)
        step = _softplus(step + tl.load(dt_bias + head, mask=in_heads, other=0.0))
        share = tl.load(b + token * b_token + head, mask=in_heads, other=0.0).to(tl.float32)
        tl.store(log_decay + token * HEADS + head, rate * step, mask=in_heads)
        tl.store(beta + token * HEADS + head, 1.0 / (1.0 + tl.exp(-share)), mask=in_heads)
