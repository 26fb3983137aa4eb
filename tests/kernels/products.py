"""Random packed weights, and products in the interpreter whose bits do not depend on the whole's shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.linear.matrix import Kind, Matrix

FORMATS: dict[str, tuple[Kind, tuple[int, int], torch.dtype, bool]] = {
    "fp8": ("e4m3", (128, 128), torch.float32, False),
    "fp8 small blocks": ("e4m3", (16, 48), torch.float32, False),
    "int4": ("int4", (1, 32), torch.bfloat16, False),
    "mxfp4": ("e2m1", (1, 32), torch.float8_e8m0fnu, False),
    "nvfp4": ("e2m1", (1, 16), torch.float8_e4m3fn, True),
}


def random_matrix(name: str, *shape: int) -> Matrix:
    """name: of FORMATS, or "plain". Codes and scales are all possible ones, NaN apart."""
    if name == "plain":
        return Matrix(torch.randn(*shape))
    kind, block, stored, factor = FORMATS[name]
    *lead, out, width = shape
    grid = (*lead, -(-out // block[0]), -(-width // block[1]))
    if kind == "e4m3":
        codes = (torch.randn(*shape) * 50).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    scales = torch.rand(grid).add_(0.1) / 8
    if stored == torch.float8_e8m0fnu:
        scales = torch.randint(120, 127, grid, dtype=torch.uint8).view(stored)
    return Matrix(codes, kind, scales.to(stored), block, factor=torch.rand(lead) + 0.5 if factor else None)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To a few roundings of the largest numbers: sums of many terms may cancel."""
    tolerance = (2e-3 if want.dtype == torch.float16 else 2e-6) * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def sum_products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of a product is a sum of its own, in order, as in tensor cores; BLAS rounds by the whole's shape."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = a.data.astype(np.float32), b.data.astype(np.float32)
        total = left[:, :1] * right[:1]
        for at in range(1, len(right)):
            total += left[:, at : at + 1] * right[at]
        return TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
