"""A matrix for each head, over the Triton kernels: heads take the place of experts, each of which sees every token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.matrix import Matrix
from kernels.moe.kernel import assign, down, tile_rows


class TritonHeadProducts:
    """x [tokens, heads, in] -> [tokens, heads, out], every entry summed up in one piece, whatever else there is.

    weight [heads, out, in], contiguous.
    """

    def __init__(self, weight: Tensor):
        self._matrix = Matrix(weight.detach())
        self._heads = torch.arange(len(weight), dtype=torch.int32, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        chosen = self._heads.expand(x.shape[:2]).contiguous()
        tiles = assign(chosen, len(self._heads), tile_rows(chosen.numel(), self._matrix))
        return down(x.flatten(0, 1), self._matrix, tiles)[0].unflatten(0, chosen.shape)
