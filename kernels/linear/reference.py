"""Linear layers in plain torch: dequantized weights, partial sums of equal parts of the input, the tree that adds them.

The tree is that of arXiv 2511.17826: neighbours first, so that ranks which hold neighbouring leaves add their own and
then each other's, and every number of ranks gives the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.matrix import Matrix, check_matrix


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None, *, sections: int | None = None) -> Tensor:
    """x [rows, in] times weight [out, in]^T (+ bias [out]) -> [rows, out] in x's dtype, accumulated in float32.

    The weight is dequantized to x's dtype. sections: a power of two; the input is cut into so many parts, each summed
    by itself, and the sums are added as a tree (the same numbers here, other bits); None = what suits the shape. Raises
    ValueError for shapes that do not fit.
    """
    check_arguments(x, weight, bias)
    return F.linear(x, weight.dense(x.dtype), bias)


def linear_leaves(x: Tensor, weight: Matrix, leaves: int) -> Tensor:
    """float32 [leaves, rows, out]: the partial sums of `leaves` equal parts of the input, for `add_leaves`.

    A leaf's bits are those of a rank that holds nothing else. Raises ValueError if the input has no such parts.
    """
    check_arguments(x, weight, None)
    check_leaves(weight, leaves)
    dense = weight.dense(x.dtype).float()
    parts = zip(x.float().chunk(leaves, dim=1), dense.chunk(leaves, dim=1), strict=True)
    return torch.stack([part @ own.t() for part, own in parts])


def add_leaves(partials: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[leaves, rows, out] float32, leaves a power of two -> ((0 + 1) + (2 + 3)) + ... (+ bias [out]), as dtype."""
    check_partials(partials)
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    total = partials[0] if bias is None else partials[0] + bias.float()
    return total.to(dtype)


def check_arguments(x: Tensor, weight: Matrix, bias: Tensor | None) -> None:
    check_matrix(weight)
    if x.dim() != 2 or len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be [rows, in] and the weight {weight.shape} [out, in]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a weight {weight.shape}")


def check_leaves(weight: Matrix, leaves: int) -> None:
    width = weight.shape[-1]
    if leaves < 1 or leaves & (leaves - 1) or width % (leaves * weight.to_byte):
        raise ValueError(f"{leaves} leaves: a power of two that divides the input's {width} columns is wanted")


def check_partials(partials: Tensor) -> None:
    count = len(partials)
    if partials.dim() != 3 or partials.dtype != torch.float32 or count not in (1, 2, 4, 8, 16):
        raise ValueError(
            f"partials {tuple(partials.shape)} {partials.dtype} must be float32 [leaves, rows, out] with 1, 2, 4, 8 or "
            "16 leaves"
        )
