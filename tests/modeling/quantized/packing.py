"""Packs matrices as the published formats document it, written out by hand, number by number where that is quick.

Each function returns the stored tensors by the end of their name, and the matrix that they stand for (float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8(weight: Tensor, block: tuple[int, int] = (128, 128)) -> Stored:
    """Fine-grained FP8: value = code x weight_scale_inv of its block; blocks at the edges are cut off."""
    rows, columns = weight.shape
    codes, dense = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            own = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[own].abs().max() / 448
            codes[own] = (weight[own] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[own] = codes[own].float() * scales[i, j]
    return {".weight": codes, ".weight_scale_inv": scales}, dense


def int4(weight: Tensor, group: int = 32) -> Stored:
    """compressed-tensors' pack-quantized: code + 8 in four bits, eight to an int32, the first in its lowest bits."""
    rows, columns = weight.shape
    grouped = weight.view(rows, -1, group)
    scales = (grouped.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (grouped / scales.float()).round().clamp(-8, 7)
    words = torch.zeros(rows, columns // 8, dtype=torch.int64)
    unsigned = (codes + 8).long().view(rows, columns)
    for place in range(8):
        words |= unsigned[:, place::8] << (4 * place)
    stored = {
        ".weight_packed": words.to(torch.int32),  # wraps
        ".weight_scale": scales[..., 0],
        ".weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    return stored, (codes * scales.float()).view(rows, columns)


def mxfp4(weight: Tensor) -> Stored:
    """gpt-oss, of one expert: blocks of 32 e2m1 codes [.., groups, 16], scales 2^(byte - 127)."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 32, 32)
    exponents = torch.floor(torch.log2(grouped.abs().amax(-1, keepdim=True))) - 2
    codes = _e2m1_codes(grouped / 2.0**exponents)
    stored = {"_blocks": _in_bytes(codes), "_scales": (exponents[..., 0] + 127).to(torch.uint8)}
    return stored, (_e2m1(codes) * 2.0**exponents).view(rows, columns)


def nvfp4(weight: Tensor, *, modelopt: bool) -> Stored:
    """e2m1 codes in groups of 16 with e4m3 scales, and a scale of the whole matrix, or its inverse."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 16, 16)
    whole = weight.abs().max() / (6 * 448)
    scales = (grouped.abs().amax(-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn)
    codes = _e2m1_codes(grouped / (scales.float() * whole))
    dense = (_e2m1(codes) * (scales.float() * whole)).view(rows, columns)
    packed = _in_bytes(codes).view(rows, columns // 2)
    if modelopt:
        extra = {".weight": packed, ".weight_scale_2": whole, ".input_scale": torch.tensor(0.5)}
        return {".weight_scale": scales[..., 0], **extra}, dense
    extra = {".weight_packed": packed, ".weight_global_scale": (1 / whole).view(1)}
    return {".weight_scale": scales[..., 0], **extra, ".input_global_scale": torch.ones(1)}, dense


def _e2m1_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 code of each: three bits of magnitude below the sign."""
    nearest = (values.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    return nearest + 8 * (values < 0)


def _e2m1(codes: Tensor) -> Tensor:
    return torch.tensor([E2M1[code & 7] * (-1 if code & 8 else 1) for code in codes.view(-1).tolist()]).view(
        codes.shape
    )


def _in_bytes(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
