"""The target's output head in plain torch: all logits in float32, and each row's own token of them."""

from __future__ import annotations

from torch import Tensor

from kernels.acceptance.reference import sample
from kernels.linear.matrix import Matrix
from kernels.linear.reference import check_arguments


def head_logits(hidden: Tensor, weight: Matrix) -> Tensor:
    """hidden [rows, width] times weight [vocabulary, width]^T -> float32 [rows, vocabulary], never rounded to less.

    The weight is dequantized to hidden's dtype. Raises ValueError for shapes that do not fit.
    """
    check_arguments(hidden, weight, None)
    return hidden.float() @ weight.dense(hidden.dtype).float().t()


def head_race(
    hidden: Tensor, weight: Matrix, keys: Tensor, temperatures: Tensor, *, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """kernels.acceptance's `sample` of `head_logits`: (token ids int64 [rows], scores float64 [rows]).

    keys int64 [rows], temperatures float64 [rows] (0, or 1e-20 to 1e20) and first_token as there; shards of a
    vocabulary become one by kernels.acceptance's `join`. Raises ValueError for shapes or dtypes that do not fit.
    """
    return sample(head_logits(hidden, weight), keys, temperatures, first_token=first_token)
