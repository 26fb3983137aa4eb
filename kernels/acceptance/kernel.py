"""Acceptance in Triton: logits are read once; nothing of the size [rows, vocabulary] is stored beside them.

Two stages find a row's token: sections of the vocabulary side by side, then the best of them. Random bits are integer
arithmetic and the same everywhere; scores are float64, in which an implementation's rounding of a logarithm decides
between two tokens about once in 10^13 draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.acceptance.reference import check_arguments, check_parts

SECTION = 4096  # tokens of one program
TILE = 1024


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
    _finish[(rows,)](
        *(scores, token_ids, joined, best, parts, *scores.stride()), BLOCK=triton.next_power_of_2(parts), num_warps=1
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


@triton.jit
def _shift(bits, COUNT: tl.constexpr):
    """Logical shift to the right of an int64."""
    return (bits >> COUNT) & ((1 << (64 - COUNT)) - 1)


@triton.jit
def _hash_bits(key, token):
    GOLDEN: tl.constexpr = -7046029254386353131
    MIX1: tl.constexpr = -4658895280553007687
    MIX2: tl.constexpr = -7723592293110705685
    bits = token * GOLDEN + key
    bits = (bits ^ _shift(bits, 30)) * MIX1
    bits = (bits ^ _shift(bits, 27)) * MIX2
    return bits ^ _shift(bits, 31)


@triton.jit
def _gumbel(key, token):
    """float64, as reference.uniform and then -log(-log(u))."""
    uniform = (_shift(_hash_bits(key, token), 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(-tl.log(uniform))


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
                score += _gumbel(key, token)
        tile_top = tl.where(broken, float("inf"), tl.max(score, 0))
        tile_id = tl.where(broken, -1, tl.min(tl.where((score == tile_top) & exists, token, NEVER), 0))
        top_id = tl.where(tile_top > top, tile_id, top_id)
        top = tl.maximum(top, tile_top)
    tl.store(best + row * sections + section, top)
    tl.store(best_id + row * sections + section, top_id)


@triton.jit(do_not_specialize=["part_stride", "row_stride"])
def _finish(best, best_id, token_ids, scores, parts, part_stride, row_stride, BLOCK: tl.constexpr):
    NEVER: tl.constexpr = 9223372036854775807
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    cell = row * row_stride + part * part_stride
    own = tl.load(best + cell, mask=part < parts, other=float("-inf"))
    own_id = tl.load(best_id + cell, mask=part < parts, other=NEVER)
    top = tl.max(own, 0)
    tl.store(token_ids + row, tl.min(tl.where(own == top, own_id, NEVER), 0))
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
