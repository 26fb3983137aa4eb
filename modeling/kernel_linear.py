"""Linear layers over the Triton kernels: packed weights are dequantized tile by tile and never as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.kernel import linear, linear_leaves
from kernels.linear.matrix import Matrix
from modeling.kernel_weights import matrices_of
from modeling.quantized.packed import Weight

PREFILL_ROWS = (
    256  # from here on a product is bound by arithmetic, which torch's library does faster if weights are plain
)
LONGEST_SECTION = 1024  # columns that a deterministic product adds up in one piece, about
MOST_SECTIONS = 8


class TritonLinear:
    """x [..., in] -> x weight^T + bias [..., out]; a Linear. The weight may not change afterwards.

    deterministic: a row's bits depend on nothing but the row, the format and the width of the input; otherwise also on
    this rank's share of the weight, and on whether there are PREFILL_ROWS.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None, *, deterministic: bool = False):
        matrices = matrices_of(weight)
        ends = torch.tensor([matrix.shape[-2] for matrix in matrices]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self._out = ends[-1]
        self._parts: list[tuple[Matrix, Tensor | None, slice]] = [
            (matrix, None if bias is None else bias.detach()[start:end], slice(start, end))
            for matrix, start, end in zip(matrices, starts, ends, strict=True)
        ]
        self._sections = sections_of_input(matrices[0].shape[-1]) if deterministic else None
        self._plain = not deterministic and all(matrix.kind == "plain" for matrix in matrices)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._plain and len(rows) >= PREFILL_ROWS and len(self._parts) == 1:
            matrix, bias, _ = self._parts[0]
            return F.linear(x, matrix.codes.to(x.dtype), bias)
        y = x.new_empty(len(rows), self._out)
        for matrix, bias, own in self._parts:
            linear(rows, matrix, bias, sections=self._sections, out=y[:, own])
        return y.view(*x.shape[:-1], self._out)


class TritonLeaves:
    """x [tokens, in] -> float32 [leaves, tokens, out], sums of equal parts of the input; a deterministic partial.

    Raises ValueError for a weight of several formats, or one that cannot be cut so.
    """

    def __init__(self, weight: Weight, leaves: int):
        matrices = matrices_of(weight)
        if len(matrices) != 1:
            raise ValueError(f"a weight of {len(matrices)} formats cannot be divided along its input")
        self._matrix, self._leaves = matrices[0], leaves

    def __call__(self, x: Tensor) -> Tensor:
        return linear_leaves(x, self._matrix, self._leaves)


def sections_of_input(width: int) -> int:
    """A power of two that follows from the input alone: however many rows of the weight this rank has."""
    sections = 1
    while sections < MOST_SECTIONS and width >= 2 * sections * LONGEST_SECTION:
        sections *= 2
    return sections
