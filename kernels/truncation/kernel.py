"""Truncation in Triton, without sorting and without anything of the size [rows, vocabulary].

A float32's bits, put in order, are a 32-bit number, and the threshold's is found four bits at a time: of the 16 numbers
that the next four bits can make, take the largest from which on upwards there are still k tokens, or still the mass p.
The logits are read once, for the largest of each tile. k tiles have a largest logit of at least the k-th best of these,
so that only tokens above that, a few of every thousand, are gathered and searched. Where that is not enough (a flat
row's top_p), the row itself is searched, tile by tile but for those that cannot matter. Counts are exact; masses are
float64 and added in the order of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.truncation.open_rows import settle_shards as settle_shards
from kernels.truncation.reference import Candidates, check_arguments, check_count, total_mass
from kernels.truncation.search import copy_from, last_to_reach, mass_of, order_of, read, value_of, weigh

TILE = 512  # tokens
ROOM = 1024  # tokens that are gathered of a row
NUCLEUS_TILES = 64  # without top_k: tiles of whose largest logits the least bounds what is gathered


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
    rows, vocabulary = logits.shape
    params = temperatures, top_k, top_p, min_p
    peaks, masses = _surveyed(logits, *params, tile)
    gathered = torch.empty(rows, ROOM, dtype=torch.float32, device=logits.device)
    counts = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _gather[(rows,)](
        *(logits, *params, peaks, gathered, counts, vocabulary, logits.stride(0), peaks.shape[1]),
        TILES=NUCLEUS_TILES,
        ROOM=ROOM,
        TILE=tile,
        num_warps=8,
    )
    thresholds = torch.empty(rows, dtype=torch.float64, device=logits.device)
    unused = torch.empty(1, dtype=torch.bool, device=logits.device)
    # Of what was gathered in smaller steps, so that three programs find room for their registers on a processor
    for source, width, step, warps, each in ((gathered, ROOM, 128, 4, True), (logits, vocabulary, tile, 8, False)):
        _threshold[(rows,)](
            *(source, *params, peaks, masses, counts, masses, peaks, thresholds, unused),
            *(width, source.stride(0), peaks.shape[1]),
            GATHERED=each,
            SHARDS=False,
            TILE=step,
            BLOCK=triton.next_power_of_2(peaks.shape[1]),
            num_warps=warps,
        )
    return thresholds


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
    params = temperatures, top_k, top_p, min_p
    peaks, masses = _surveyed(together, *params, tile)
    thresholds = torch.empty_like(temperatures)
    settled = torch.empty(thresholds.shape, dtype=torch.bool, device=thresholds.device)
    _threshold[thresholds.shape](
        *(together, *params, peaks, masses, top_k, total_mass(shards, temperatures), shards.bound.amax(0)),
        *(thresholds, settled, together.shape[1], together.stride(0), peaks.shape[1]),
        GATHERED=False,
        SHARDS=True,
        TILE=tile,
        BLOCK=triton.next_power_of_2(peaks.shape[1]),
        num_warps=8,
    )
    return thresholds, settled


def _surveyed(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit and the mass of each tile of the rows that something truncates: [rows, tiles]."""
    peaks, masses = _tiles(logits, tile)
    _survey[peaks.shape[::-1]](
        *(logits, temperatures, top_k, top_p, min_p, peaks, masses, logits.shape[1], logits.stride(0)),
        EVERY_ROW=False,
        TILE=tile,
        num_warps=1,
    )
    return peaks, masses


def _tiles(logits: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the largest logit and the mass of each tile: [rows, tiles]."""
    shape = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    peaks = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return peaks, torch.empty(shape, dtype=torch.float64, device=logits.device)


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
    value, exists = read(logits + row * logits_row, tile, vocabulary, TILE)
    cell = row * tl.num_programs(0) + tile
    peak = tl.max(value, 0)
    tl.store(peaks + cell, peak)
    if weighs:
        mass = weigh(value, peak, tl.where(temperature == 0.0, 1.0, temperature))
        tl.store(masses + cell, tl.sum(tl.where(exists, mass, 0.0), 0))


@triton.jit
def _gather(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    peaks,
    gathered,
    counts,
    vocabulary,
    logits_row,
    tiles,
    TILES: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row's logits from a bound on upwards that k of them, or its TILES best tiles, reach. Count: -1 for too many."""
    row = tl.program_id(0).to(tl.int64)
    keeps = tl.load(top_k + row)
    if (tl.load(temperatures + row) == 0.0) | ((keeps <= 0) & (tl.load(top_p + row) >= 1.0)):
        tl.store(counts + row, 0)
        return
    logits += row * logits_row
    peaks += row * tiles
    rank = tl.where(keeps > 0, keeps, tl.minimum(TILES, tiles))
    least = last_to_reach(peaks, peaks, tiles, tl.cdiv(tiles, TILE), rank, 0.0, 1.0, True, False, TILE)
    stored = 0
    if least > 0:
        stored = copy_from(logits, peaks, vocabulary, tiles, least, gathered + row * ROOM, ROOM, TILE)
    tl.store(counts + row, tl.where((least > 0) & (stored <= ROOM), stored, -1))


@triton.jit
def _threshold(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    peaks,
    masses,
    counts,
    totals,
    bounds,
    thresholds,
    settled,
    vocabulary,
    logits_row,
    tiles,
    GATHERED: tl.constexpr,
    SHARDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GATHERED: logits are what was gathered of the rows; else they are whole, and only rows where that is not enough
    are searched. SHARDS: logits are the candidates of a vocabulary's shards; totals and bounds are of the rest.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    keeps = tl.load(top_k + row)
    share = tl.load(top_p + row)
    least_share = tl.load(min_p + row)
    if (temperature == 0.0) | ((keeps <= 0) & (share >= 1.0) & (least_share <= 0.0)):
        tl.store(thresholds + row, float("-inf"))
        if SHARDS:
            tl.store(settled + row, True)
        return
    searched = tiles
    if not SHARDS:
        count = tl.load(counts + row)
        if (count >= 0) != GATHERED:
            return
        if GATHERED:
            vocabulary = count
            searched = tl.cdiv(count, TILE)
    logits += row * logits_row
    peaks += row * tiles
    masses += row * tiles
    at = tl.arange(0, BLOCK)
    peak = tl.max(tl.load(peaks + at, mask=at < tiles, other=float("-inf")), 0)

    kth = tl.full((), 0, tl.int64)
    if keeps > 0:
        kth = last_to_reach(logits, peaks, vocabulary, searched, keeps, peak, temperature, True, not GATHERED, TILE)
    nucleus = tl.full((), 0, tl.int64)
    if share < 1.0:
        total = tl.zeros((), tl.float64)
        if keeps > 0:
            for tile in range(searched):
                matters = True
                if not GATHERED:
                    matters = order_of(tl.load(peaks + tile)) >= kth
                if matters:
                    value, exists = read(logits, tile, vocabulary, TILE)
                    kept = exists & (order_of(value) >= kth)
                    total += tl.sum(tl.where(kept, weigh(value, peak, temperature), 0.0), 0)
        elif SHARDS:
            total = tl.load(totals + row)
        else:
            total = mass_of(peaks, masses, peak, temperature, tiles, BLOCK)
        target = share * total
        nucleus = last_to_reach(
            logits, peaks, vocabulary, searched, target, peak, temperature, False, not GATHERED, TILE
        )
        if GATHERED and (keeps <= 0) & (nucleus == 0):
            tl.store(counts + row, -1)  # for the whole row's turn
            return

    least = value_of(tl.maximum(kth, nucleus)).to(tl.float64) / temperature
    floor = peak.to(tl.float64) / temperature + tl.log(tl.where(least_share > 0.0, least_share, 1.0))
    tl.store(thresholds + row, tl.maximum(least, tl.where(least_share > 0.0, floor, float("-inf"))))
    if SHARDS:
        bound = order_of(tl.load(bounds + row))
        known = (keeps <= 0) | (kth > bound) | ((share >= 1.0) & (kth == bound))
        known &= (share >= 1.0) | (keeps > 0) | (nucleus >= bound)
        tl.store(settled + row, known | (value_of(bound) == float("-inf")))


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
    tl.store(mass + row, mass_of(peaks, masses, top, temperature, tiles, BLOCK))

    last = last_to_reach(logits, peaks, vocabulary, tiles, count, top, 1.0, True, True, TILE)
    tl.store(bound + row, tl.where(count < vocabulary, value_of(last), float("-inf")))
    stored = copy_from(logits, peaks, vocabulary, tiles, last + 1, values, count, TILE)
    for begin in range(stored, count, TILE):
        place = begin + tl.arange(0, TILE)
        tl.store(values + place, tl.full((TILE,), 0.0, tl.float32) + value_of(last), mask=place < count)
