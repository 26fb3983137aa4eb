"""Gated activations in Triton: one program for a part of a token's width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gated_activation.reference import check_arguments
from kernels.gating import gated

BLOCK = 1024  # columns of a program


def gated_activation(gate_up: torch.Tensor, clamp: tuple[float, float] | None = None) -> torch.Tensor:
    """As kernels.gated_activation.reference. gate_up contiguous in its last dimension."""
    check_arguments(gate_up)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    alpha, limit = clamp or (0.0, 0.0)
    output = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _activate[(tokens, triton.cdiv(width, block))](
        *(gate_up, output, alpha, limit, gate_up.stride(0)),
        WIDTH=width,
        CLAMP=clamp is not None,
        BLOCK=block,
        num_warps=4,
    )
    return output


@triton.jit
def _activate(
    gate_up, output, alpha, limit, token_stride, WIDTH: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < WIDTH
    own = gate_up + token * token_stride + at
    gate = tl.load(own, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(own + WIDTH, mask=exists, other=0.0).to(tl.float32)
    result = gated(gate, up, alpha, limit, CLAMP)
    tl.store(output + token * WIDTH + at, result.to(output.dtype.element_ty), mask=exists)
