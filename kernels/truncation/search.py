"""The search for the last of a row's logits that is still needed, on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(logits, tile, vocabulary, TILE: tl.constexpr):
    """Tile number `tile` of the row at `logits`: float32, -inf past the vocabulary's end, and one zero only."""
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(value == 0.0, 0.0, value), at < vocabulary


@triton.jit
def order_of(value):
    """Of a float32, an int64 from 0 to 2 ** 32 - 1 in the same order."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def value_of(order):
    """The float32 of an order; -inf for 0, which is none's."""
    bits = tl.where(order >= 0x80000000, order - 0x80000000, 0xFFFFFFFF - order)
    return tl.where(order == 0, float("-inf"), bits.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def weigh(value, peak, temperature):
    """float64: exp((value - peak) / temperature); a peak of -inf makes all weights zero."""
    peak = tl.where(peak == float("-inf"), 0.0, peak).to(tl.float64)
    return tl.exp(value.to(tl.float64) / temperature - peak / temperature)


@triton.jit
def mass_of(peaks, masses, peak, temperature, tiles, BLOCK: tl.constexpr):
    """float64: the mass of all tiles over that of the largest logit."""
    at = tl.arange(0, BLOCK)
    own = tl.load(peaks + at, mask=at < tiles, other=float("-inf"))
    return tl.sum(tl.load(masses + at, mask=at < tiles, other=0.0) * weigh(own, peak, temperature), 0)


@triton.jit
def last_to_reach(
    logits,
    peaks,
    vocabulary,
    tiles,
    target,
    peak,
    temperature,
    COUNT: tl.constexpr,
    PEAKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest order from which on upwards tokens reach `target` in number (COUNT) or mass; 0 if all do not.

    PEAKS: tiles whose peak cannot matter are not read.
    """
    found = tl.full((), 0, tl.int64)
    digit = tl.arange(0, 16)
    for level in range(8):
        shift = 28 - 4 * level
        steps = found + (digit.to(tl.int64) << shift)
        next_step = found + (tl.full((), 1, tl.int64) << shift)
        reached = tl.zeros((16,), tl.float64)
        for tile in range(tiles):
            matters = True
            if PEAKS:
                matters = order_of(tl.load(peaks + tile)) >= next_step
            if matters:
                value, exists = read(logits, tile, vocabulary, TILE)
                order = tl.where(exists, order_of(value), -1)
                amount = tl.full((TILE,), 1.0, tl.float64)
                if not COUNT:
                    amount = weigh(value, peak, temperature)
                reached += tl.sum(tl.where(order[:, None] >= steps[None, :], amount[:, None], 0.0), 0)
        best = tl.max(tl.where((digit > 0) & (reached >= target), digit, 0), 0)
        found += best.to(tl.int64) << shift
    return found


@triton.jit
def copy_from(logits, peaks, vocabulary, tiles, least, target, room, TILE: tl.constexpr):
    """Copies what has an order of at least `least`, up to `room` logits; returns how many, or more than room."""
    stored = 0
    for tile in range(tiles):
        if (order_of(tl.load(peaks + tile)) >= least) & (stored <= room):
            value, exists = read(logits, tile, vocabulary, TILE)
            wanted = (exists & (order_of(value) >= least)).to(tl.int32)
            place = stored + tl.cumsum(wanted, 0) - 1
            tl.store(target + place, value, mask=(wanted > 0) & (place < room))
            stored += tl.sum(wanted, 0)
    return stored
