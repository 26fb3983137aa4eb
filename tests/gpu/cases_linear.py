"""Linear layers of decode and verify steps: plain and packed weights of the flagships' sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.linear import kernel, reference
from kernels.linear.matrix import Kind, Matrix
from tests.gpu.case import Call, Case, Machine

# label: kind, block, dtype of the scales, whether there is a factor
FORMATS: dict[str, tuple[Kind, tuple[int, int], torch.dtype, bool]] = {
    "FP8": ("e4m3", (128, 128), torch.float32, False),
    "INT4": ("int4", (1, 32), torch.bfloat16, False),
    "MXFP4": ("e2m1", (1, 32), torch.float8_e8m0fnu, False),
    "NVFP4": ("e2m1", (1, 16), torch.float8_e4m3fn, True),
}


def linear_cases(machine: Machine) -> Iterator[Case]:
    """Inputs stay long enough for whole tiles in small sizes too, so that these compile as the large ones do."""
    for label, rows, width, out in (
        ("plain", 1, 4096, 6144),
        ("plain", 16, 4096, 24_576),
        ("plain", 64, 12_288, 4096),
        ("plain", 256, 4096, 24_576),
        ("FP8", 1, 4096, 24_576),
        ("FP8", 16, 12_288, 4096),
        ("FP8", 64, 4096, 24_576),
        ("FP8", 256, 4096, 24_576),
        ("INT4", 16, 7168, 16_384),
        ("INT4", 64, 7168, 16_384),
        ("MXFP4", 16, 2880, 5120),
        ("NVFP4", 16, 4096, 24_576),
    ):
        yield _linear(machine, label, rows, _shrunk(machine, width), _shrunk(machine, out))
    for label in ("plain", "FP8"):
        yield _leaves(machine, label, rows=16, width=max(2048, 12_288 // machine.shrink), out=_shrunk(machine, 4096))
    for label in ("plain",) if machine.device == "cpu" else ("plain", *FORMATS):
        yield _same_bits(machine, label, _shrunk(machine, 4096), _shrunk(machine, 4096))


def random_matrix(machine: Machine, label: str, *shape: int) -> Matrix:
    """[..., out, in] whose products with normal numbers are about as large as those. label: of FORMATS, or "plain"."""
    *lead, out, width = shape
    if label == "plain":
        return Matrix(machine.normal(*shape) * width**-0.5)
    kind, block, stored, factor = FORMATS[label]
    grid = (*lead, -(-out // block[0]), -(-width // block[1]))
    scales = (torch.rand(grid, device=machine.device) + 0.5) * width**-0.5 / 4
    if kind == "e4m3":
        codes = machine.normal(*shape).mul_(2).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8, device=machine.device)
    factors = torch.full(lead, 0.25, device=machine.device) if factor else None
    return Matrix(codes, kind, (scales * 4 if factor else scales).to(stored), block, factor=factors)


def _shrunk(machine: Machine, size: int) -> int:
    return max(256, size // machine.shrink // 32 * 32)


def _linear(machine: Machine, label: str, rows: int, width: int, out: int) -> Case:
    x, weight = machine.normal(rows, width), random_matrix(machine, label, out, width)
    return Case(
        f"linear {label}, {rows} rows, {width} -> {out}",
        lambda: kernel.linear(x, weight),
        lambda: reference.linear(x, weight),
        moved=weight.nbytes + x.itemsize * rows * (width + out),
        library=_torchs(x, weight, machine),
    )


def _torchs(x: torch.Tensor, weight: Matrix, machine: Machine) -> Call | None:
    """torch's product of the same bytes: what comes nearest for packed ones, on a GPU only."""
    if weight.kind == "plain":
        return lambda: torch.nn.functional.linear(x, weight.codes)
    if machine.device == "cpu" or len(x) % 16:
        return None
    if weight.kind == "e4m3":  # x in fp8 too, one scale for all
        left, one = x.to(torch.float8_e4m3fn), torch.ones((), device=machine.device)
        return lambda: torch._scaled_mm(left, weight.codes.t(), one, one, out_dtype=x.dtype)
    if weight.kind == "int4":
        swapped = (weight.codes << 4) | (weight.codes >> 4)  # this one wants the first code in the high half
        packed = torch._convert_weight_to_int4pack(swapped.contiguous(), 8)
        grouped = torch.ones(weight.shape[1] // 32, weight.shape[0], 2, dtype=x.dtype, device=machine.device)
        return lambda: torch._weight_int4pack_mm(x, packed, 32, grouped)
    return None


def _leaves(machine: Machine, label: str, rows: int, width: int, out: int) -> Case:
    x, weight = machine.normal(rows, width), random_matrix(machine, label, out, width)

    def call(way: Any) -> torch.Tensor:
        return way.add_leaves(way.linear_leaves(x, weight, 8), dtype=x.dtype)

    return Case(
        f"linear {label} in 8 leaves, {rows} rows, {width} -> {out}",
        lambda: call(kernel),
        lambda: call(reference),
        moved=weight.nbytes + x.itemsize * rows * (width + out),
        library=_torchs(x, weight, machine),
    )


def _same_bits(machine: Machine, label: str, width: int, out: int) -> Case:
    """130 rows at once against the same rows one, 16, 32 and 64 at a time: the difference must be none at all."""
    x, weight = machine.normal(130, width), random_matrix(machine, label, out, width)
    parts = x.split([1, 16, 32, 64, 17])
    # in the interpreter a product is BLAS's, which rounds by the whole's shape
    return Case(
        f"linear {label}, 130 rows, {width} -> {out}, bit by bit against 1, 16, 32, 64 and 17 rows",
        lambda: kernel.linear(x, weight),
        lambda: torch.cat([kernel.linear(part, weight) for part in parts]),
        moved=weight.nbytes + x.itemsize * 130 * (width + out),
        tolerance=1e-12 if machine.device == "cuda" else 1e-4,
    )
