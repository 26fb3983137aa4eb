"""How a gate weighs values, on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, alpha, limit, CLAMP: tl.constexpr):
    """silu(gate) x up; with CLAMP gate x sigmoid(alpha x gate) x (up + 1), gate and |up| at most `limit`. float32."""
    if CLAMP:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
    else:
        alpha = 1.0
    return gate / (1.0 + tl.exp(-alpha * gate)) * up
