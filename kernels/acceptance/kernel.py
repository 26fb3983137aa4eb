"""Acceptance in Triton: logits are read once; nothing of the size [rows, vocabulary] is stored beside them.

Two stages find a row's token: sections of the vocabulary side by side, then the best of them. Random bits are integer
arithmetic and the same everywhere; scores are float64, in which an implementation's rounding of a logarithm decides
between two tokens about once in 10^13 draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.acceptance.noise import gumbel
from kernels.acceptance.reference import check_arguments, check_parts

SECTION = 4096  # tokens of one program
TILE = 1024
JOINED = 1024  # parts of a row that are looked at together


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    thresholds: torch.Tensor | None = None,
    first_token: int = 0,
    section: int = SECTION,
    tile: int = TILE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.acceptance.reference.sample. logits float32, float16 or bfloat16, contiguous in the last dimension.

    section, tile: tokens of a program and of one of its rounds; they do not change the result.
    """
    check_arguments(logits, keys, temperatures, thresholds)
    rows, vocabulary = logits.shape
    sections = triton.cdiv(vocabulary, section)
    best = torch.empty(rows, sections, dtype=torch.float64, device=logits.device)
    best_id = torch.empty(rows, sections, dtype=torch.int64, device=logits.device)
    _race[(sections, rows)](
        *(logits, keys, temperatures, temperatures if thresholds is None else thresholds, best, best_id),
        *(vocabulary, first_token, logits.stride(0), sections),
        TRUNCATED=thresholds is not None,
        SECTION=section,
        TILE=tile,
        num_warps=4,
    )
    return join(best_id.t(), best.t())


def join(token_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.acceptance.reference.join. token_ids and scores have the same strides."""
    check_parts(token_ids, scores)
    parts, rows = token_ids.shape
    if token_ids.stride() != scores.stride():
        token_ids, scores = token_ids.contiguous(), scores.contiguous()
    joined = torch.empty(rows, dtype=torch.int64, device=scores.device)
    best = torch.empty(rows, dtype=torch.float64, device=scores.device)
    block = min(JOINED, triton.next_power_of_2(parts))
    _finish[(rows,)](
        *(scores, token_ids, joined, best, parts, *scores.stride()), BLOCK=block, num_warps=max(1, block // 256)
    )
    return joined, best


def accept(
    samples: torch.Tensor, row_tokens: torch.Tensor, starts: torch.Tensor, *, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.acceptance.reference.accept. One program a request, `longest` rows wide."""
    requests = starts.shape[0] - 1
    accepted = torch.empty(requests, dtype=torch.int32, device=samples.device)
    following = torch.empty(requests, dtype=torch.int64, device=samples.device)
    _accept[(requests,)](
        *(samples, row_tokens, starts, accepted, following), BLOCK=triton.next_power_of_2(longest), num_warps=1
    )
    return accepted, following


@triton.jit(do_not_specialize=["first_token"])
def _race(
    logits,
    keys,
    temperatures,
    thresholds,
    best,
    best_id,
    vocabulary,
    first_token,
    logits_row,
    sections,
    TRUNCATED: tl.constexpr,
    SECTION: tl.constexpr,
    TILE: tl.constexpr,
):
    section = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + row)
    temperature = tl.load(temperatures + row)
    NEVER: tl.constexpr = 9223372036854775807
    if TRUNCATED:
        threshold = tl.load(thresholds + row)
    top = tl.full((), float("-inf"), tl.float64)
    top_id = tl.full((), -1, tl.int64)
    for begin in range(section * SECTION, tl.minimum((section + 1) * SECTION, vocabulary), TILE):
        at = begin + tl.arange(0, TILE)
        exists = at < vocabulary
        token = at.to(tl.int64) + first_token
        score = tl.load(logits + row * logits_row + at, mask=exists, other=float("-inf")).to(tl.float64)
        broken = tl.max(((score != score) | (score == float("inf"))).to(tl.int32), 0) > 0
        if temperature != 0.0:
            score = score / temperature
            if TRUNCATED:
                score = tl.where(score >= threshold, score, float("-inf"))
            if tl.max(score, 0) > float("-inf"):  # else there is no noise to make
                score += gumbel(key, token)
        tile_top = tl.where(broken, float("inf"), tl.max(score, 0))
        tile_id = tl.where(broken, -1, tl.min(tl.where((score == tile_top) & exists, token, NEVER), 0))
        top_id = tl.where(tile_top > top, tile_id, top_id)
        top = tl.maximum(top, tile_top)
    tl.store(best + row * sections + section, top)
    tl.store(best_id + row * sections + section, top_id)


@triton.jit(do_not_specialize=["parts", "part_stride", "row_stride"])
def _finish(best, best_id, token_ids, scores, parts, part_stride, row_stride, BLOCK: tl.constexpr):
    NEVER: tl.constexpr = 9223372036854775807
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    lowest = tl.full((BLOCK,), NEVER, tl.int64)
    for begin in range(0, parts, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        cell = row * row_stride + part * part_stride
        own = tl.load(best + cell, mask=part < parts, other=float("-inf"))
        own_id = tl.load(best_id + cell, mask=part < parts, other=NEVER)
        ahead = (own > highest) | ((own == highest) & (own_id < lowest))
        highest = tl.where(ahead, own, highest)
        lowest = tl.where(ahead, own_id, lowest)
    top = tl.max(highest, 0)
    tl.store(token_ids + row, tl.min(tl.where(highest == top, lowest, NEVER), 0))
    tl.store(scores + row, top)


@triton.jit
def _accept(samples, row_tokens, starts, accepted, following, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    first = tl.load(starts + request)
    count = tl.load(starts + request + 1) - first
    at = tl.arange(0, BLOCK)
    drafted = at + 1 < count
    draft = tl.load(row_tokens + first + at + 1, mask=drafted, other=-1)
    own = tl.load(samples + first + at, mask=drafted, other=-2)
    stands = tl.min(tl.where(draft == own, BLOCK, at), 0)  # the first draft that falls, or the end of the row
    tl.store(accepted + request, stands)
    tl.store(following + request, tl.load(samples + first + stands))
