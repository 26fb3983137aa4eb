"""Reads packed matrices, or the part of them that a rank holds, from a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modeling.errors import CheckpointError
from modeling.quantized.packed import BlockPacked, nibble_values
from modeling.quantized.scheme import Format, QuantScheme
from modeling.reader import CheckpointReader


class PackedReader:
    """Knows by a checkpoint's scheme and its tensors how each matrix is packed, and reads parts of it."""

    def __init__(self, reader: CheckpointReader, scheme: QuantScheme | None):
        self.reader, self.scheme = reader, scheme
        formats = () if scheme is None else scheme.formats
        self._values = {kind: nibble_values(kind) for kind in {f.values for f in formats} - {"e4m3"}}

    def format_of(self, module: str, name: str) -> Format | None:
        """How a module's weight is packed, by what is stored of it; None = not, or there is none.

        module: as stored, without `.weight`; name: in the text model. Raises CheckpointError for packed codes without
        their scales, or of a module that the configuration calls unpacked.
        """
        for packed in () if self.scheme is None else self.scheme.formats:
            codes = module + packed.codes
            if codes not in self.reader or self.reader.dtype(codes) != packed.dtype:
                continue
            for suffix in (packed.scales, packed.factor, packed.shape):
                if suffix and module + suffix not in self.reader:
                    raise CheckpointError(
                        f"checkpoint {self.reader.directory} has {codes} ({packed.label}) but not {module + suffix}: "
                        "download the missing file, or take another export"
                    )
            if self.scheme is not None and self.scheme.ignores(name):
                raise CheckpointError(
                    f"{codes} in {self.reader.directory} is packed as {packed.label}, but quantization_config lists "
                    "its module as not converted: the configuration belongs to another checkpoint"
                )
            return packed
        return None

    def read(
        self, module: str, packed: Format, shape: tuple[int, ...], part: tuple[slice, ...] | None = None
    ) -> BlockPacked:
        """The part of a matrix, or stack of them, that `part` selects, on the CPU.

        shape: [..., out, in], what the whole must measure. part: leading dimensions, missing ones are whole; those
        before `out` must be. Raises CheckpointError for misshapen tensors, and for a part that splits a byte.
        """
        self._check_shapes(module, packed, shape)
        *lead, out, width = shape
        whole = (slice(None),) * len(shape)
        rows, columns = ((part or ()) + whole[len(part or ()) :])[-2:]
        top, bottom, _ = rows.indices(out)
        left, right, _ = columns.indices(width)
        tall, wide = packed.block[0] or out, packed.block[1] or width
        grid = (*lead, _blocks(out, tall), _blocks(width, wide))
        own = (slice(top // tall, _blocks(bottom, tall)), slice(left // wide, _blocks(right, wide)))
        scales = self._scales(module + packed.scales, grid, (*whole[:-2], *own))
        one_row, one_column = scales.shape[-2] == 1, scales.shape[-1] == 1  # then it covers all there is
        return BlockPacked(
            codes=self._codes(module, packed, len(lead), (top, bottom), (left, right)),
            values=self._values.get(packed.values),
            scales=scales,
            block=(bottom - top if one_row else tall, right - left if one_column else wide),
            first=(0 if one_row else top % tall, 0 if one_column else left % wide),
            factor=self._factor(module, packed, tuple(lead)),
        )

    def _codes(self, module: str, packed: Format, lead: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        (left, right), unit = columns, packed.unit
        stored = slice(left // unit, -(-right // unit))
        raw = self.reader.read(module + packed.codes, (*(slice(None),) * lead, slice(*rows), stored))
        if unit == 1:
            return raw
        if left % 2 or right % 2:
            raise CheckpointError(
                f"{module} in {self.reader.directory} is packed as {packed.label}, two values in a byte: columns "
                f"{left}..{right} of a rank split one; choose a smaller tensor_parallel_size"
            )
        codes = raw.view(torch.uint8).flatten(lead + 1)
        start = (left - stored.start * unit) // 2
        return codes[..., start : start + (right - left) // 2].contiguous()

    def _scales(self, tensor: str, grid: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """In the dtype that they have on disk; e8m0 is often stored as plain bytes."""
        if self.reader.shape(tensor) == grid:
            scales = self.reader.read(tensor, part)
        else:  # a vector or a single number
            scales = self.reader.read(tensor).view(grid)[part].clone()
        return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales

    def _factor(self, module: str, packed: Format, lead: tuple[int, ...]) -> Tensor | None:
        if packed.factor is None:
            return None
        factor = self.reader.read(module + packed.factor, dtype=torch.float32).view(lead)
        return factor.reciprocal() if packed.inverted else factor

    def _check_shapes(self, module: str, packed: Format, shape: tuple[int, ...]) -> None:
        *lead, out, width = shape
        blocks = (*lead, _blocks(out, packed.block[0] or out), _blocks(width, packed.block[1] or width))
        codes = (*lead, out, -(-width // packed.unit), *(() if not packed.inner else (packed.unit // 2,)))
        self._check(module + packed.codes, self.reader.shape(module + packed.codes) == codes, codes)
        count = math.prod(self.reader.shape(module + packed.scales))
        self._check(module + packed.scales, count == math.prod(blocks), blocks)
        if packed.shape is not None:
            told = tuple(self.reader.read(module + packed.shape).tolist())
            self._check(module + packed.shape, told == shape, shape)

    def _check(self, tensor: str, fine: bool, expected: tuple[int, ...]) -> None:
        if not fine:
            raise CheckpointError(
                f"{tensor} in {self.reader.directory} has shape {self.reader.shape(tensor)}, but config.json implies "
                f"{expected}: the configuration belongs to another checkpoint"
            )


def _blocks(entries: int, block: int) -> int:
    return -(-entries // block)
