"""Thresholds of rows that their candidates leave open, searched by all shards of a vocabulary at once, on the device.

As for whole rows, the bits of the threshold's logit are found a few at a time: each shard weighs its own tokens from
every possible next step on upwards, and all take the last step that their weights together reach. What is launched does
not depend on whether a row is open; programs of the others leave at once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import triton
import triton.language as tl

from kernels.truncation.reference import Candidates
from kernels.truncation.search import order_of, read, value_of, weigh

BITS = 6  # of the threshold that are found at a time
TILE = 64  # tokens


def settle_shards(
    logits: torch.Tensor,
    shards: Candidates,
    thresholds: torch.Tensor,
    settled: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """As kernels.truncation.reference. logits float32, float16 or bfloat16, contiguous in the last dimension."""
    rows, vocabulary = logits.shape
    peaks, bounds = shards.peak.amax(0), shards.bound.amax(0)
    found = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    targets = torch.empty(rows, dtype=torch.float64, device=logits.device)
    own = torch.empty(rows, 1 << BITS, dtype=torch.float64, device=logits.device)
    everyones = own[None]  # at first there are none, and none are read
    levels = [32, *range(32 - BITS, 0, -BITS), 0]  # the lowest bits found so far
    for before, after in pairwise([*levels, -1]):
        _narrow[(rows,)](
            *(logits, temperatures, top_k, top_p, min_p, peaks, bounds, settled, everyones, found, targets, own),
            *(thresholds, vocabulary, logits.stride(0), len(everyones), before, after),
            FIRST=before == 32,
            SECOND=before == levels[1],
            LAST=before == 0,
            DIGITS=1 << BITS,
            TILE=TILE,
            num_warps=8,
        )
        if before:
            everyones = gather(own)


@triton.jit(do_not_specialize=["vocabulary", "shards", "before", "after"])
def _narrow(
    logits,
    temperatures,
    top_k,
    top_p,
    min_p,
    peaks,
    bounds,
    settled,
    everyones,
    found,
    targets,
    own,
    thresholds,
    vocabulary,
    logits_row,
    shards,
    before,
    after,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LAST: tl.constexpr,
    DIGITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Takes the step in the bits from `before` on, by everyone's weights, then weighs those in the bits below."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(settled + row):
        return
    digit = tl.arange(0, DIGITS)
    temperature = tl.load(temperatures + row)
    keeps = tl.load(top_k + row)
    # A top_k within the candidates leaves a row open only if its last logit is the bound: others of it may be missing.
    kth = tl.where(keeps > 0, order_of(tl.load(bounds + row)), 0)
    order = tl.load(found + row)
    if not FIRST:
        reached = tl.zeros((DIGITS,), tl.float64)
        for shard in range(shards):
            reached += tl.load(everyones + (shard * tl.num_programs(0) + row) * DIGITS + digit)
        if SECOND:  # from no step on upwards is all there is
            target = tl.load(top_p + row) * tl.sum(tl.where(digit == 0, reached, 0.0), 0)
            tl.store(targets + row, target)
        else:
            target = tl.load(targets + row)
        best = tl.max(tl.where((digit > 0) & (reached >= target), digit, 0), 0)
        order += best.to(tl.int64) << before
        tl.store(found + row, order)
    peak = tl.load(peaks + row)
    if LAST:
        least_share = tl.load(min_p + row)
        least = value_of(tl.maximum(kth, order)).to(tl.float64) / temperature
        floor = peak.to(tl.float64) / temperature + tl.log(tl.where(least_share > 0.0, least_share, 1.0))
        tl.store(thresholds + row, tl.maximum(least, tl.where(least_share > 0.0, floor, float("-inf"))))
    else:
        steps = order + (digit.to(tl.int64) << after)
        reached = tl.zeros((DIGITS,), tl.float64)
        for tile in range(tl.cdiv(vocabulary, TILE)):
            value, exists = read(logits + row * logits_row, tile, vocabulary, TILE)
            own_order = order_of(value)
            amount = tl.where(exists & (own_order >= kth), weigh(value, peak, temperature), 0.0)
            reached += tl.sum(tl.where(own_order[:, None] >= steps[None, :], amount[:, None], 0.0), 0)
        tl.store(own + row * DIGITS + digit, reached)
