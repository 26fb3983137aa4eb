"""What a cached vector takes in each dtype of the KV cache. No torch: plans are made where there is none."""

from __future__ import annotations

from typing import Literal

KvDtype = Literal["auto", "float32", "bfloat16", "float8_e4m3"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 2  # bfloat16: a power of two


def vector_bytes(width: int, kv_dtype: KvDtype, itemsize: int) -> int:
    """Bytes of one token's key or value of one head. itemsize: of the compute dtype, which "auto" stands for."""
    if kv_dtype == "float8_e4m3":
        return width + SCALE_BYTES
    return width * (itemsize if kv_dtype == "auto" else DTYPE_BYTES[kv_dtype])


def latent_bytes(latent: int, rotary: int, kv_dtype: KvDtype, itemsize: int) -> int:
    """Bytes of one token's latent and the rotary key beside it, which is never narrower than bfloat16."""
    return vector_bytes(latent, kv_dtype, itemsize) + vector_bytes(rotary, rotary_dtype(kv_dtype), itemsize)


def rotary_dtype(kv_dtype: KvDtype) -> KvDtype:
    """One short key that all heads share: an error in it does not average out over heads, and it is a tenth of all."""
    return "bfloat16" if kv_dtype == "float8_e4m3" else kv_dtype
