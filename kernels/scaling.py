"""How a cached vector is brought into the range of fp8, on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_to_fp8(vector, in_dim, scale):
    """The vector divided by its scale, float32, which is stored at `scale`: a power of two, so that nothing rounds."""
    largest = tl.maximum(tl.max(tl.where(in_dim, tl.abs(vector.to(tl.float32)), 0.0), 0), 7.888609052210118e-31)
    bits = (largest * (2.0 / 448.0)).to(tl.int32, bitcast=True) & 0x7F800000
    own = bits.to(tl.float32, bitcast=True)
    tl.store(scale, own.to(scale.dtype.element_ty))
    return vector.to(tl.float32) / own
