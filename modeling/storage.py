"""How many bytes a tensor takes in memory, by the checkpoint's quantization_config. Plain arithmetic, no torch.

Packed weights stay packed: a published FP8, MXFP4, NVFP4 or INT4 tensor takes its own bytes and those of its scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modeling.footprint import Storage, part_of

_PACKED_PARTS = ("attention", "GDN", "experts", "shared experts", "MLP", "head")


@dataclass(frozen=True)
class Packing:
    """label: for people. bits: of a weight; scale_bytes for each `block` of weights (rows, columns)."""

    label: str
    bits: int
    block: tuple[int, int]
    scale_bytes: int

    def bytes(self, shape: tuple[int, ...]) -> int:
        *lead, rows, columns = shape
        scales = math.ceil(rows / self.block[0]) * math.ceil(columns / self.block[1])
        return math.prod(lead) * (rows * columns * self.bits // 8 + scales * self.scale_bytes)


def plain(itemsize: int) -> Storage:
    """Every tensor unpacked, `itemsize` bytes an entry."""
    return lambda name, shape: math.prod(shape) * itemsize


def packed(packing: Packing, converts: Callable[[str], bool], itemsize: int) -> Storage:
    """Matrices that `converts` says yes to (by tensor name) packed, the rest as `plain`."""
    unpacked = plain(itemsize)

    def size(name: str, shape: tuple[int, ...]) -> int:
        matrix = len(shape) >= 2 and not name.endswith(("_bias", ".bias", "conv1d.weight"))
        if matrix and part_of(name) in _PACKED_PARTS and converts(name):
            return packing.bytes(shape)
        return unpacked(name, shape)

    return size


FP8 = Packing("FP8", 8, (128, 128), 4)


def storage_of(quantization: Mapping[str, Any] | None, itemsize: int) -> tuple[str, Storage]:
    """(what to call it, storage) of a checkpoint with this quantization_config; itemsize: of what is not packed.

    Raises ValueError for a method that is not known.
    """
    if not quantization:
        return "unquantized", plain(itemsize)
    packing = _packing(quantization)
    if quantization.get("quant_method") == "mxfp4":  # of the experts only
        return packing.label, packed(packing, lambda name: part_of(name) == "experts", itemsize)
    skipped = [*(quantization.get("modules_to_not_convert") or ()), *(quantization.get("ignore") or ())]
    return packing.label, packed(packing, lambda name: not _listed(name.removesuffix(".weight"), skipped), itemsize)


def _packing(quantization: Mapping[str, Any]) -> Packing:
    method = quantization.get("quant_method")
    if method == "fp8":
        rows, columns = quantization.get("weight_block_size") or (128, 128)
        return Packing("FP8", 8, (rows, columns), 4)
    if method == "mxfp4":
        return Packing("MXFP4", 4, (1, 32), 1)
    if method == "compressed-tensors":
        weights = next(iter(quantization["config_groups"].values()))["weights"]
        bits, group = int(weights["num_bits"]), int(weights.get("group_size") or 1 << 30)
        if weights["type"] == "int":
            return Packing(f"INT{bits}", bits, (1, group), 2)
        return Packing("NVFP4", 4, (1, group), 1) if bits == 4 else Packing("FP8", bits, (1, group), 4)
    raise ValueError(f"quantization_config.quant_method {method!r} is not known: fp8, mxfp4 or compressed-tensors are")


def _listed(module: str, skipped: list[str]) -> bool:
    """Is a module named by one of `skipped`: its full name, its end, or a regular expression after `re:`?"""
    for name in (f"model.{module}", f"model.language_model.{module}", f"language_model.model.{module}", module):
        for entry in skipped:
            if entry.startswith("re:"):
                if re.match(entry.removeprefix("re:"), name):
                    return True
            elif name == entry or name.endswith(f".{entry}"):
                return True
    return False
