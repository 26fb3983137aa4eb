"""Weights as the kernels take them: the same memory, under the kernels' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.linear.matrix import Kind, Matrix
from modeling.quantized.packed import BlockPacked, StackedRows, Weight, nibble_values


def matrices_of(weight: Weight) -> list[Matrix]:
    """What a weight consists of, from top to bottom; parts that are packed alike are one (copied, if there were more).

    Raises ValueError for codes that no kernel knows.
    """
    if isinstance(weight, StackedRows):
        return merged([matrix for part in weight.parts for matrix in matrices_of(part)])
    if isinstance(weight, Tensor):
        return [Matrix(weight.detach())]
    assert isinstance(weight, BlockPacked), f"{type(weight).__name__} is none of the packed weights"
    return [Matrix(weight.codes, _kind(weight.values), weight.scales, weight.block, weight.first, weight.factor)]


def merged(parts: Sequence[Matrix]) -> list[Matrix]:
    """Neighbours of one format one below the other, where blocks of scales go on without a gap: one launch for all."""
    result = [parts[0]]
    for part in parts[1:]:
        if _goes_on(result[-1], part):
            result[-1] = _below(result[-1], part)
        else:
            result.append(part)
    return result


def _goes_on(upper: Matrix, lower: Matrix) -> bool:
    if (upper.kind, upper.block, upper.codes.dtype) != (lower.kind, lower.block, lower.codes.dtype):
        return False
    if upper.scales is None or lower.scales is None:
        return upper.scales is lower.scales
    return (
        upper.factor is None
        and lower.factor is None
        and upper.first[1] == lower.first[1]
        and upper.scales.dtype == lower.scales.dtype
        and lower.first[0] == (upper.first[0] + upper.shape[-2]) % upper.block[0] == 0
    )


def _below(upper: Matrix, lower: Matrix) -> Matrix:
    codes = torch.cat([upper.codes, lower.codes], dim=-2)
    if upper.scales is None or lower.scales is None:
        return replace(upper, codes=codes)
    stored = upper.scales.dtype  # not every dtype of scales can be concatenated, bytes can
    scales = torch.cat([upper.scales.view(torch.uint8), lower.scales.view(torch.uint8)], dim=-2)
    return replace(upper, codes=codes, scales=scales.view(stored))


def _kind(values: Tensor | None) -> Kind:
    if values is None:
        return "e4m3"
    kinds: tuple[Kind, ...] = ("int4", "e2m1")
    for kind in kinds:
        if torch.equal(values.cpu(), nibble_values(kind)):
            return kind
    raise ValueError("no kernel knows these values of 4-bit codes: int4 and e2m1 are known")
