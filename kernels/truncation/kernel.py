"""Truncation in Triton, without sorting and without anything of the size [rows, vocabulary].

A float32's bits, put in order, are a 32-bit number, and the threshold's is found four bits at a time: of the 16 numbers
that the next four bits can make, take the largest from which on upwards there are still k tokens, or still the mass p.
A round reads only the tiles whose largest logit can matter, so that after the first two hardly anything is read.
Counts are exact; masses are float64 and added in the order of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.truncation.reference import Candidates, check_arguments, check_count, total_mass

TILE = 512  # tokens


def truncate(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    tile: int = TILE,
) -> torch.Tensor:
    """As kernels.truncation.reference. logits float32, float16 or bfloat16, contiguous in the last dimension.

    tile: tokens that are read at once; masses may round differently with it.
    """
    check_arguments(logits, temperatures, top_k, top_p, min_p)
    return _cut(logits, temperatures, top_k, top_p, min_p, None, None, tile)[0]


def candidates(logits: torch.Tensor, temperatures: torch.Tensor, count: int, *, tile: int = TILE) -> Candidates:
    """As kernels.truncation.reference."""
    check_count(count)
    rows, vocabulary = logits.shape
    count = min(count, vocabulary)
    peaks, masses = _tiles(logits, tile)
    _survey[peaks.shape[::-1]](
        *(logits, temperatures, temperatures, temperatures, temperatures, peaks, masses, vocabulary, logits.stride(0)),
        EVERY_ROW=True,
        TILE=tile,
        num_warps=1,
    )
    values = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    bound, peak = torch.empty_like(values[:, 0]), torch.empty_like(values[:, 0])
    mass = torch.empty(rows, dtype=torch.float64, device=logits.device)
    _collect[(rows,)](
        *(logits, temperatures, peaks, masses, values, bound, peak, mass),
        *(vocabulary, logits.stride(0), count, peaks.shape[1]),
        TILE=tile,
        BLOCK=triton.next_power_of_2(peaks.shape[1]),
        num_warps=8,
    )
    return Candidates(values, bound, peak, mass)


def truncate_shards(
    shards: Candidates,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    tile: int = TILE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.truncation.reference."""
    together = shards.values.transpose(0, 1).flatten(1)
    check_arguments(together, temperatures, top_k, top_p, min_p)
    total, bound = total_mass(shards, temperatures), shards.bound.amax(0)
    return _cut(together, temperatures, top_k, top_p, min_p, total, bound, tile)


def _cut(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    total: torch.Tensor | None,
    bound: torch.Tensor | None,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds, and whether they are settled. total, bound: of all tokens, if logits are candidates only."""
    rows, vocabulary = logits.shape
    peaks, masses = _tiles(logits, tile)
    _survey[peaks.shape[::-1]](
        *(logits, temperatures, top_k, top_p, min_p, peaks, masses, vocabulary, logits.stride(0)),
        EVERY_ROW=False,
        TILE=tile,
        num_warps=1,
    )
    thresholds = torch.empty(rows, dtype=torch.float64, device=logits.device)
    settled = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _threshold[(rows,)](
        *(logits, temperatures, top_k, top_p, min_p, peaks, masses),
        *(masses if total is None else total, peaks if bound is None else bound, thresholds, settled),
        *(vocabulary, logits.stride(0), peaks.shape[1]),
        ALL=total is None,
        TILE=tile,
        BLOCK=triton.next_power_of_2(peaks.shape[1]),
        num_warps=8,
    )
    return thresholds, settled


def _tiles(logits: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the largest logit and the mass of each tile: [rows, tiles]."""
    shape = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return peaks, torch.empty(shape, dtype=torch.float64, device=logits.device)


@triton.jit
def _read(logits, tile, vocabulary, TILE: tl.constexpr):
    """Tile number `tile` of the row at `logits`: float32, -inf past the vocabulary's end, and one zero only."""
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(value == 0.0, 0.0, value), at < vocabulary


@triton.jit
def _order(value):
    """Of a float32, an int64 from 0 to 2 ** 32 - 1 in the same order."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _value(order):
    """The float32 of an _order; -inf for 0, which is none's."""
    bits = tl.where(order >= 0x80000000, order - 0x80000000, 0xFFFFFFFF - order)
    return tl.where(order == 0, float("-inf"), bits.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _weight(value, peak, temperature):
    """float64: exp((value - peak) / temperature); a peak of -inf makes all weights zero."""
    peak = tl.where(peak == float("-inf"), 0.0, peak).to(tl.float64)
    return tl.exp(value.to(tl.float64) / temperature - peak / temperature)


@triton.jit
def _total(peaks, masses, peak, temperature, tiles, BLOCK: tl.constexpr):
    """float64: the mass of all tiles over that of the largest logit."""
    at = tl.arange(0, BLOCK)
    own = tl.load(peaks + at, mask=at < tiles, other=float("-inf"))
    return tl.sum(tl.load(masses + at, mask=at < tiles, other=0.0) * _weight(own, peak, temperature), 0)


@triton.jit
def _last_to_reach(
    logits, peaks, vocabulary, tiles, target, peak, temperature, COUNT: tl.constexpr, TILE: tl.constexpr
):
    """The largest order from which on upwards tokens reach `target` in number (COUNT) or mass; 0 if all do not."""
    found = tl.full((), 0, tl.int64)
    digit = tl.arange(0, 16)
    for level in range(8):
        shift = 28 - 4 * level
        steps = found + (digit.to(tl.int64) << shift)
        next_step = found + (tl.full((), 1, tl.int64) << shift)
        reached = tl.zeros((16,), tl.float64)
        for tile in range(tiles):
            if _order(tl.load(peaks + tile)) >= next_step:
                value, exists = _read(logits, tile, vocabulary, TILE)
                order = tl.where(exists, _order(value), -1)
                amount = tl.full((TILE,), 1.0, tl.float64)
                if not COUNT:
                    amount = _weight(value, peak, temperature)
                reached += tl.sum(tl.where(order[:, None] >= steps[None, :], amount[:, None], 0.0), 0)
        best = tl.max(tl.where((digit > 0) & (reached >= target), digit, 0), 0)
        found += best.to(tl.int64) << shift
    return found


@triton.jit
def _survey(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    peaks,
    masses,
    vocabulary,
    logits_row,
    EVERY_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest logit of a tile, and the tile's mass over that; rows that nothing truncates are left out."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    weighs = True
    if not EVERY_ROW:
        keeps = tl.load(top_k + row)
        share = tl.load(top_p + row)
        if (temperature == 0.0) | ((keeps <= 0) & (share >= 1.0) & (tl.load(min_p + row) <= 0.0)):
            return
        weighs = (keeps <= 0) & (share < 1.0)
    value, exists = _read(logits + row * logits_row, tile, vocabulary, TILE)
    cell = row * tl.num_programs(0) + tile
    peak = tl.max(value, 0)
    tl.store(peaks + cell, peak)
    if weighs:
        mass = _weight(value, peak, tl.where(temperature == 0.0, 1.0, temperature))
        tl.store(masses + cell, tl.sum(tl.where(exists, mass, 0.0), 0))


@triton.jit
def _threshold(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    peaks,
    masses,
    totals,
    bounds,
    thresholds,
    settled,
    vocabulary,
    logits_row,
    tiles,
    ALL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    keeps = tl.load(top_k + row)
    share = tl.load(top_p + row)
    least_share = tl.load(min_p + row)
    if (temperature == 0.0) | ((keeps <= 0) & (share >= 1.0) & (least_share <= 0.0)):
        tl.store(thresholds + row, float("-inf"))
        tl.store(settled + row, True)
        return
    logits += row * logits_row
    peaks += row * tiles
    masses += row * tiles
    at = tl.arange(0, BLOCK)
    peak = tl.max(tl.load(peaks + at, mask=at < tiles, other=float("-inf")), 0)

    kth = tl.full((), 0, tl.int64)
    if keeps > 0:
        kth = _last_to_reach(logits, peaks, vocabulary, tiles, keeps, peak, temperature, True, TILE)
    nucleus = tl.full((), 0, tl.int64)
    if share < 1.0:
        total = tl.zeros((), tl.float64)
        if keeps > 0:
            for tile in range(tiles):
                if _order(tl.load(peaks + tile)) >= kth:
                    value, exists = _read(logits, tile, vocabulary, TILE)
                    kept = exists & (_order(value) >= kth)
                    total += tl.sum(tl.where(kept, _weight(value, peak, temperature), 0.0), 0)
        elif ALL:
            total = _total(peaks, masses, peak, temperature, tiles, BLOCK)
        else:
            total = tl.load(totals + row)
        target = share * total
        nucleus = _last_to_reach(logits, peaks, vocabulary, tiles, target, peak, temperature, False, TILE)

    least = _value(tl.maximum(kth, nucleus)).to(tl.float64) / temperature
    floor = peak.to(tl.float64) / temperature + tl.log(tl.where(least_share > 0.0, least_share, 1.0))
    tl.store(thresholds + row, tl.maximum(least, tl.where(least_share > 0.0, floor, float("-inf"))))
    if ALL:
        tl.store(settled + row, True)
    else:
        bound = _order(tl.load(bounds + row))
        known = (keeps <= 0) | (kth > bound) | ((share >= 1.0) & (kth == bound))
        known &= (share >= 1.0) | (keeps > 0) | (nucleus >= bound)
        tl.store(settled + row, known | (_value(bound) == float("-inf")))


@triton.jit
def _collect(
    logits,
    temperatures,
    peaks,
    masses,
    values,
    bound,
    peak,
    mass,
    vocabulary,
    logits_row,
    count,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The `count` largest of a row: those above the count-th, in the vocabulary's order, then copies of it."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    logits += row * logits_row
    peaks += row * tiles
    masses += row * tiles
    values += row * count
    at = tl.arange(0, BLOCK)
    top = tl.max(tl.load(peaks + at, mask=at < tiles, other=float("-inf")), 0)
    tl.store(peak + row, top)
    tl.store(mass + row, _total(peaks, masses, top, temperature, tiles, BLOCK))

    last = _last_to_reach(logits, peaks, vocabulary, tiles, count, top, 1.0, True, TILE)
    tl.store(bound + row, tl.where(count < vocabulary, _value(last), float("-inf")))
    stored = 0
    for tile in range(tiles):
        if _order(tl.load(peaks + tile)) > last:
            value, exists = _read(logits, tile, vocabulary, TILE)
            above = (exists & (_order(value) > last)).to(tl.int32)
            place = stored + tl.cumsum(above, 0) - 1
            tl.store(values + place, value, mask=(above > 0) & (place < count))
            stored += tl.sum(above, 0)
    for begin in range(stored, count, TILE):
        place = begin + tl.arange(0, TILE)
        tl.store(values + place, tl.full((TILE,), 0.0, tl.float32) + _value(last), mask=place < count)
