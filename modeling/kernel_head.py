"""The output head over the Triton kernels: logits for rows that need them, tokens for those that do not."""

from __future__ import annotations

from torch import Tensor

from kernels.head.kernel import head_logits, head_race
from modeling.kernel_weights import matrices_of
from modeling.quantized.packed import Weight


class TritonHead:
    """hidden [rows, hidden] -> logits float32 [rows, out]; a Linear. weight: this rank's share, plain or packed.

    Logits are as they were summed up, in float32 whatever the model's dtype, and those that `race` decides by, to the
    bit: which token a row gets does not depend on whether it, or one beside it, needs its logits as well.
    """

    def __init__(self, weight: Weight):
        (self._matrix,) = matrices_of(weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        return head_logits(hidden, self._matrix)

    def race(self, hidden: Tensor, keys: Tensor, temperatures: Tensor, first_token: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 and scores float64, [rows], as kernels.acceptance's `sample` gives them for the logits."""
        return head_race(hidden, self._matrix, keys, temperatures, first_token=first_token)
