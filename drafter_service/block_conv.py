"""DFlash 2's convolutions in a draft layer: a row sees the row before it, in front of a branch and behind it.

Method: z-lab/dflash (PyPI dflash 0.1.0), `GroupedDynamicCausalConv`. A branch is attention or MLP; the weights of both
convolutions come from its normed input. Context features are not convolved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.block_conv.reference import convolve_block
from modeling.dflash_config import DFlash2
from modeling.fixed_linear import fixed_linear


class BlockConv(nn.Module):
    """The two convolutions around one branch. Parameters carry the checkpoint's names."""

    def __init__(self, hidden: int, sizes: DFlash2):
        super().__init__()
        self.taps = sizes.conv_kernel_size
        groups = hidden // sizes.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * self.taps * groups, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """[..., 2, taps, groups]: in front of a branch and behind it, from its normed input [..., hidden]."""
        return self.kernel_projection(x).unflatten(-1, (2, self.taps, -1))

    def mix(self, x: Tensor, weights: Tensor, places: Tensor, which: int) -> Tensor:
        """x [N, Q, hidden], convolved in front (0) or behind (1). places [N, Q]: of the rows in their blocks."""
        flat = x.flatten(0, 1), weights[..., which, :, :].flatten(0, 1)
        return convolve_block(*flat, self.base_kernel[which], places.flatten()).view_as(x)


class FusedConv:
    """The same for serving, over flat rows. base [2, taps, hidden]."""

    def __init__(self, conv: BlockConv):
        self.base = conv.base_kernel.detach()
        self._taps = conv.taps
        self._project = fixed_linear(conv.kernel_projection.weight)

    def weights(self, x: Tensor) -> Tensor:
        """[rows, 2, taps, groups]: in front of a branch and behind it, from its normed input [rows, hidden]."""
        return self._project(x).view(len(x), 2, self._taps, -1)
