"""The race's random numbers on the device: the same bits as the reference's, as Gumbel noise exactly or roughly."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(key, token):
    """float64, as reference.uniform and then -log(-log(u))."""
    uniform = (random_bits(key, token).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def rough_gumbel(bits):
    """float32, within 2e-5 of the noise that `gumbel` makes of random_bits: what float64 logarithms take a tenth of.

    -log(u) is summed up from 1 - u where u is close to 1, which is where the winners are.
    """
    from_one = ((9007199254740991 - bits).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    from_zero = (bits.to(tl.float32) + 0.5) * 1.1102230246251565e-16
    series = 1.0 / 5 + from_one * (1.0 / 6 + from_one * (1.0 / 7))
    series = 1.0 + from_one * (1.0 / 2 + from_one * (1.0 / 3 + from_one * (1.0 / 4 + from_one * series)))
    return -tl.log(tl.where(from_one < 0.125, from_one * series, -tl.log(from_zero)))


@triton.jit
def random_bits(key, token):
    """int64 of 53 random bits: reference.uniform is (they + 0.5) / 2^53."""
    GOLDEN: tl.constexpr = -7046029254386353131
    MIX1: tl.constexpr = -4658895280553007687
    MIX2: tl.constexpr = -7723592293110705685
    bits = token * GOLDEN + key
    bits = (bits ^ _shift(bits, 30)) * MIX1
    bits = (bits ^ _shift(bits, 27)) * MIX2
    return _shift(bits ^ _shift(bits, 31), 11)


@triton.jit
def _shift(bits, COUNT: tl.constexpr):
    """Logical shift to the right of an int64."""
    return (bits >> COUNT) & ((1 << (64 - COUNT)) - 1)
