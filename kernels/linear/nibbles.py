"""Codes of four bits turned into numbers: arithmetic that runs anywhere, and PTX for bfloat16, two numbers at a time.

Triton would take one code at a time, eight to twelve instructions each, which binds a product by arithmetic long before
memory. The PTX takes four bytes to eight numbers in 12 (int4) or 22 (e2m1) instructions; tests run it instruction by
instruction. Both ways give the same numbers, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

# In: four bytes. Out: their low halves' numbers as bfloat16, two a register, then their high halves'.
# A code in the mantissa of 128 (0x4300) is 128 more than itself, and its number 136 less than that (fma with 1, -136).
INT4_PAIRS = tl.constexpr("""{
    .reg .b32 a, b, one, less;
    mov.b32 one, 0x3f803f80;
    mov.b32 less, 0xc308c308;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
    shr.u32 a, a, 4;
    shr.u32 b, b, 4;
    lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, b, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    fma.rn.bf16x2 $2, $2, one, less;
    fma.rn.bf16x2 $3, $3, one, less;
}""")
# Sign, exponent and mantissa moved to where bfloat16 has them: 2^126 times too small, denormals included.
E2M1_PAIRS = tl.constexpr("""{
    .reg .b32 a, b, c, scale, zero;
    mov.b32 scale, 0x7e807e80;
    mov.b32 zero, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shl.b32 c, a, 12;
    and.b32 c, c, 0x80008000;
    shl.b32 $0, a, 6;
    lop3.b32 $0, $0, 0x01c001c0, c, 0xea;
    shl.b32 c, b, 12;
    and.b32 c, c, 0x80008000;
    shl.b32 $1, b, 6;
    lop3.b32 $1, $1, 0x01c001c0, c, 0xea;
    shl.b32 c, a, 8;
    and.b32 c, c, 0x80008000;
    shl.b32 $2, a, 2;
    lop3.b32 $2, $2, 0x01c001c0, c, 0xea;
    shl.b32 c, b, 8;
    and.b32 c, c, 0x80008000;
    shl.b32 $3, b, 2;
    lop3.b32 $3, $3, 0x01c001c0, c, 0xea;
    fma.rn.bf16x2 $0, $0, scale, zero;
    fma.rn.bf16x2 $1, $1, scale, zero;
    fma.rn.bf16x2 $2, $2, scale, zero;
    fma.rn.bf16x2 $3, $3, scale, zero;
}""")


@triton.jit
def numbers(stored, KIND: tl.constexpr, PAIRS: tl.constexpr):
    """Bytes -> the numbers of their low and of their high halves: bfloat16 by PTX if PAIRS, else float32."""
    if PAIRS:
        if KIND == "int4":
            low, high = tl.inline_asm_elementwise(
                INT4_PAIRS, "=&r,=&r,=&r,=&r,r", [stored], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                E2M1_PAIRS, "=&r,=&r,=&r,=&r,r", [stored], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        low = _number(stored & 15, KIND)
        high = _number(stored >> 4, KIND)
    return low, high


@triton.jit
def _number(code, KIND: tl.constexpr):
    if KIND == "int4":
        # the code in the mantissa of 2^23: no conversion, which is slow
        number = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    else:
        # sign, exponent, mantissa moved to where float16 has them; its exponents are 14 less, its denormals the same
        wide = code.to(tl.uint16)
        half = ((wide & 7) << 9) | ((wide & 8) << 12)
        number = half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    return number
