"""Weights as they lie packed in memory: values that a product dequantizes when it needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Packed(ABC):
    """A matrix [out, in], or a stack of them [count, out, in], that is dequantized only when it is used.

    Whoever takes a Weight may ask for `shape`, `nbytes`, `len()` and, of a stack, `weight[index]`, as of a tensor.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole as a new tensor of `shape`, multiplied in float32 and rounded to dtype once."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes in memory."""

    @abstractmethod
    def __getitem__(self, index: int) -> Packed:
        """One matrix of a stack; shares its memory."""

    def __len__(self) -> int:
        return self.shape[0]


Weight = Tensor | Packed


@dataclass(frozen=True, eq=False)
class BlockPacked(Packed):
    """Codes with a scale for every block of them.

    codes: float8_e4m3fn [..., out, in], or uint8 [..., out, in / 2] with the first of two codes in the low half.
    values: float32 [256, 2], what the two codes of a byte mean; None if codes are numbers themselves.
    scales: a float dtype [..., block rows, block columns]; block: their (rows, columns). first: the place within its
    block of the matrix's first entry, for a rank's part may begin and end inside of blocks. factor: float32 [...], of
    whole matrices, or None.
    """

    codes: Tensor
    values: Tensor | None
    scales: Tensor
    block: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        *lead, columns = self.codes.shape
        return (*lead, columns if self.values is None else 2 * columns)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.factor) if tensor is not None)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.float()
        if self.factor is not None:
            scales = scales * self.factor[..., None, None]
        if self.values is None:
            numbers = self.codes.float()
        else:
            numbers = F.embedding(self.codes.int(), self.values).flatten(-2)
        return _scaled(numbers, scales, self.block, self.first).to(dtype)

    def __getitem__(self, index: int) -> BlockPacked:
        factor = None if self.factor is None else self.factor[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], factor=factor)

    def every(self, first: int, step: int) -> BlockPacked:
        """Rows first, first + step, ... of every matrix, copied."""
        assert self.block[0] == 1, "rows that share a scale stay together"
        codes, scales = (part[..., first::step, :].contiguous() for part in (self.codes, self.scales))
        return replace(self, codes=codes, scales=scales)

    def to(self, device: str | torch.device) -> BlockPacked:
        tensors = {name: getattr(self, name) for name in ("codes", "values", "scales", "factor")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


class StackedRows(Packed):
    """Weights of equal width, one below the other, each as it is: packed or not."""

    def __init__(self, parts: Sequence[Weight]):
        *lead, _, columns = parts[0].shape
        assert all((*part.shape[:-2], part.shape[-1]) == (*lead, columns) for part in parts), "widths differ"
        self.parts = tuple(parts)
        self.shape = (*lead, sum(part.shape[-2] for part in parts), columns)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([dense(part, dtype) for part in self.parts], dim=-2)

    def __getitem__(self, index: int) -> StackedRows:
        return StackedRows([part[index] for part in self.parts])


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a plain tensor of dtype: itself if it is one already."""
    return weight.dequantize(dtype) if isinstance(weight, Packed) else weight.to(dtype)


def stacked_rows(parts: Sequence[Weight]) -> Weight:
    """Weights one below the other: one tensor if none is packed, as they are otherwise."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-2)
    return parts[0] if len(parts) == 1 else StackedRows(parts)


def stack_of(count: int, read: Callable[[int], BlockPacked], device: str | torch.device) -> BlockPacked:
    """Matrices read one after the other into one stack on `device`; one of them is in memory twice at a time.

    Raises ValueError if one of them is packed otherwise than the first.
    """
    first = read(0).to(device)

    def room(tensor: Tensor) -> Tensor:
        return torch.empty((count, *tensor.shape), dtype=tensor.dtype, device=device)

    factor = None if first.factor is None else room(first.factor)
    stack = replace(first, codes=room(first.codes), scales=room(first.scales), factor=factor)
    for index in range(count):
        one = first if index == 0 else read(index)
        if (one.codes.shape, one.block, one.first, one.codes.dtype) != (
            first.codes.shape,
            first.block,
            first.first,
            first.codes.dtype,
        ):
            raise ValueError(f"number {index} is packed otherwise than number 0")
        stack.codes[index].copy_(one.codes)
        stack.scales[index].copy_(one.scales)
        if stack.factor is not None and one.factor is not None:
            stack.factor[index].copy_(one.factor)
    return stack


def nibble_values(kind: str) -> Tensor:
    """float32 [256, 2]: what the low and the high half of a byte mean. kind: "e2m1" (OCP Microscaling), or "int4"."""
    if kind == "e2m1":
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    else:
        values = torch.arange(16, dtype=torch.float32) - 8
    codes = torch.arange(256)
    return torch.stack([values[codes & 15], values[codes >> 4]], dim=-1)


def _scaled(numbers: Tensor, scales: Tensor, block: tuple[int, int], first: tuple[int, int]) -> Tensor:
    """numbers [..., out, in], overwritten: each times the scale of its block."""
    *lead, rows, columns = numbers.shape
    if first == (0, 0) and rows % block[0] == 0 and columns % block[1] == 0:
        blocks = numbers.view(*lead, rows // block[0], block[0], columns // block[1], block[1])
        blocks.mul_(scales[..., :, None, :, None])
        return numbers
    scales = scales.repeat_interleave(block[0], -2)[..., first[0] : first[0] + rows, :]
    return numbers.mul_(scales.repeat_interleave(block[1], -1)[..., first[1] : first[1] + columns])
