"""Linear layers whose weights never change: on CPU, prepacked for oneDNN; quantized ones are dequantized when used.

With few rows a GEMM is bound by reading its weights; in oneDNN's own order that takes half the time (2 to 16 rows of
float32, measured), and the result differs in the last bits only. Elsewhere this is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.quantized.packed import Packed, Weight

PACKED_FOR_ROWS = 64  # a hint: as good for 1 and for 500 rows
# Entries. torch multiplies float32 by MKL, whose call is 10 us shorter: small weights do not win that back (measured).
PACKED_FROM = {torch.float32: 100_000, torch.bfloat16: 0}
PACKED_MACHINES = ("x86_64", "AMD64")

Linear = Callable[[Tensor], Tensor]


def fixed_linear(weight: Weight, bias: Tensor | None = None) -> Linear:
    """x [..., in] -> x weight^T + bias [..., out]. weight [out, in]; neither may change afterwards.

    A weight packed for oneDNN is a copy: let go of the one that was given, and there is one of each in memory. Of a
    quantized one nothing else is kept: every call makes the plain matrix anew, in x's dtype.
    """
    if isinstance(weight, Packed):
        return _dequantizing(weight, bias)
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if weight.numel() >= PACKED_FROM.get(weight.dtype, 0) and _packable(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise
        return lambda x: multiply(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def _dequantizing(weight: Packed, bias: Tensor | None) -> Linear:
    return lambda x: F.linear(x, weight.dequantize(x.dtype), bias)


def _packable(weight: Tensor) -> bool:
    """The operators are torch's own (its compiler uses them) but not part of its public face: ask first."""
    operators = torch.ops.mkldnn
    if (
        weight.device.type != "cpu"
        or platform.machine() not in PACKED_MACHINES
        or not torch.backends.mkldnn.is_available()
        or not all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    ):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
