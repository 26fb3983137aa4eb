"""What a case of the GPU measurement is, and the machine it is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel in one shape. run, reference and library take no arguments and return a tensor or tuple of tensors.

    moved: bytes that have to pass between memory and chip at least; flops: of its products, where many rows make those
    the longer part, else 0. library: torch's own way to do the same on inputs
    laid out as it likes best (its result is not compared), or None. tolerance: for `run` against `reference`.
    """

    name: str
    run: Call
    reference: Call
    moved: int
    library: Call | None = None
    tolerance: float = 2e-2
    flops: int = 0


@dataclass(frozen=True)
class Machine:
    """Where tensors go and in what dtype, and by what to divide the large sizes (1 on a GPU)."""

    device: str
    dtype: torch.dtype
    shrink: int = 1

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)
