"""A weight as it lies in memory, and what its codes mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["plain", "e4m3", "int4", "e2m1"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix [out, in], or a stack of them [count, out, in], whose last dimension is contiguous.

    codes: "plain" numbers in any floating dtype; "e4m3" float8_e4m3fn; "int4" and "e2m1" uint8 [..., out, in / 2], two
    codes to a byte, the first in its low half, an "int4" code being 8 more than it means. Of all but plain ones:
    scales [..., block rows, block columns], float32, float16, bfloat16, float8_e4m3fn or float8_e8m0fnu; block: the
    (rows, columns) that share one; first: the place of the matrix's first entry within its block; factor: float32
    [...], of whole matrices, or None.
    """

    codes: Tensor
    kind: Kind = "plain"
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)
    first: tuple[int, int] = (0, 0)
    factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, columns = self.codes.shape
        return (*lead, columns * self.to_byte)

    @property
    def to_byte(self) -> int:
        """Numbers in one entry of `codes`."""
        return 2 if self.kind in ("int4", "e2m1") else 1

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.factor) if tensor is not None)

    def rows(self, begin: int, end: int) -> Matrix:
        """Rows begin..end of every matrix, in the same memory."""
        codes = self.codes[..., begin:end, :]
        if self.scales is None:
            return replace(self, codes=codes)
        tall = self.block[0]
        top, bottom = self.first[0] + begin, self.first[0] + end
        scales = self.scales[..., top // tall : -(-bottom // tall), :]
        return replace(self, codes=codes, scales=scales, first=(top % tall, self.first[1]))

    def columns(self, begin: int, end: int) -> Matrix:
        """Columns begin..end of every matrix, in the same memory; of two codes to a byte, both even."""
        assert begin % self.to_byte == 0 == end % self.to_byte, "a byte is not divided"
        codes = self.codes[..., begin // self.to_byte : end // self.to_byte]
        if self.scales is None:
            return replace(self, codes=codes)
        wide = self.block[1]
        left, right = self.first[1] + begin, self.first[1] + end
        scales = self.scales[..., left // wide : -(-right // wide)]
        return replace(self, codes=codes, scales=scales, first=(self.first[0], left % wide))

    def __getitem__(self, index: int) -> Matrix:
        """One matrix of a stack, in the same memory."""
        scales = None if self.scales is None else self.scales[index]
        factor = None if self.factor is None else self.factor[index]
        return replace(self, codes=self.codes[index], scales=scales, factor=factor)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers as a tensor of `shape`, multiplied in float32 and rounded to dtype once."""
        if self.scales is None:
            return self.codes.to(dtype)
        scales = self.scales.float()
        if self.factor is not None:
            scales = scales * self.factor[..., None, None]
        out, width = self.shape[-2:]
        for dim, size, block, first in zip((-2, -1), (out, width), self.block, self.first, strict=True):
            at = (torch.arange(size, device=scales.device) + first) // block
            scales = scales.index_select(dim, at)
        return (self._numbers() * scales).to(dtype)

    def _numbers(self) -> Tensor:
        if self.kind == "e4m3":
            return self.codes.float()
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(-2)
        if self.kind == "int4":
            return codes.float() - 8
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
        return values[codes.int()]


def check_matrix(weight: Matrix) -> None:
    """Raises ValueError for parts that do not fit each other."""
    *lead, out, width = weight.shape
    if weight.codes.stride(-1) != 1:
        raise ValueError(f"the weight's last dimension must be contiguous, its strides are {weight.codes.stride()}")
    if weight.kind == "plain":
        return
    if weight.scales is None:
        raise ValueError(f"a weight of {weight.kind} codes needs scales")
    stored = torch.float8_e4m3fn if weight.kind == "e4m3" else torch.uint8
    if weight.codes.dtype != stored:
        raise ValueError(f"{weight.kind} codes must be {stored}, not {weight.codes.dtype}")
    grid = tuple(
        -(-(size + first) // block) for size, first, block in zip((out, width), weight.first, weight.block, strict=True)
    )
    if tuple(weight.scales.shape) != (*lead, *grid):
        raise ValueError(f"scales are {tuple(weight.scales.shape)}, blocks of {weight.block} want {(*lead, *grid)}")
    if weight.to_byte == 2 and weight.first[1] % 2:
        raise ValueError(f"first column {weight.first[1]} within its block is odd: two codes of a byte share a scale")
    if weight.to_byte == 2 and weight.block[1] % 2 and grid[1] > 1:
        raise ValueError(f"blocks of {weight.block[1]} columns divide a byte's two codes")
