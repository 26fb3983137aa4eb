"""Choosing experts in Triton: one program a token, its scores read once and kept in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.routing.reference import Routed, check_arguments


def softmax_top_k(logits: Tensor, top_k: int, *, normalized: bool, count: Tensor | None = None) -> Routed:
    """As kernels.routing.reference. The last dimension of logits is contiguous."""
    check_arguments(logits, top_k)
    return _choose(logits, logits, count, top_k, 1, 1, normalized, scale=1.0, sigmoid=False)


def sigmoid_top_k(
    logits: Tensor,
    correction: Tensor,
    top_k: int,
    *,
    groups: int,
    best_groups: int,
    normalized: bool,
    scale: float,
    count: Tensor | None = None,
) -> Routed:
    """As kernels.routing.reference. The last dimension of logits is contiguous."""
    check_arguments(logits, top_k, groups, best_groups)
    return _choose(logits, correction, count, top_k, groups, best_groups, normalized, scale=scale, sigmoid=True)


def _choose(
    logits: Tensor,
    correction: Tensor,
    count: Tensor | None,
    top_k: int,
    groups: int,
    best_groups: int,
    normalized: bool,
    *,
    scale: float,
    sigmoid: bool,
) -> Routed:
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            *(logits, correction, weights if count is None else count, weights, chosen, logits.stride(0), scale),
            EXPERTS=experts,
            BLOCK=triton.next_power_of_2(experts),
            TOP_K=top_k,
            SLOTS=triton.next_power_of_2(top_k),
            GROUPS=groups,
            GROUP_SLOTS=triton.next_power_of_2(groups),
            BEST_GROUPS=best_groups,
            NORMALIZED=normalized,
            SIGMOID=sigmoid,
            COUNT=count is not None,
            num_warps=1 if experts <= 256 else 2,
        )
    return weights, chosen


@triton.jit
def _route(
    logits,
    correction,
    count,
    weights,
    chosen,
    logits_row,
    scale,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    BEST_GROUPS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SIGMOID: tl.constexpr,
    COUNT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    exists = expert < EXPERTS
    row = tl.load(logits + token * logits_row + expert, mask=exists, other=float("-inf")).to(tl.float32)
    score = row
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-row))
        left = tl.where(
            exists, score + tl.load(correction + expert, mask=exists, other=0.0).to(tl.float32), float("-inf")
        )
        if BEST_GROUPS < GROUPS:
            left = _of_best_groups(left, expert, GROUPS, GROUP_SLOTS, BEST_GROUPS, EXPERTS // GROUPS)
    else:
        left = row
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((SLOTS,), tl.int32)
    best = tl.full((SLOTS,), float("-inf"), tl.float32)
    for choice in tl.static_range(TOP_K):
        top = tl.max(left, 0)
        first = tl.min(tl.where(left == top, expert, EXPERTS - 1), 0)  # NaN equals nothing: stay within the experts
        own = tl.sum(tl.where(expert == first, score, 0.0), 0)
        ids = tl.where(slot == choice, first, ids)
        best = tl.where(slot == choice, own, best)
        left = tl.where(expert == first, float("-inf"), left)
    if SIGMOID:
        weight = tl.where(slot < TOP_K, best, 0.0)
        if NORMALIZED:
            weight = weight / (tl.sum(weight, 0) + 1e-20)
        weight = weight * scale
    else:
        highest = tl.max(best, 0)
        weight = tl.exp(best - highest)
        if NORMALIZED:
            weight = weight / tl.sum(weight, 0)
        else:
            weight = weight / tl.sum(tl.exp(row - highest), 0)
    if COUNT:
        real = token < tl.load(count)
        weight = tl.where(real, weight, 0.0)
        ids = tl.where(real, ids, -1)
    tl.store(weights + token * TOP_K + slot, weight, mask=slot < TOP_K)
    tl.store(chosen + token * TOP_K + slot, ids, mask=slot < TOP_K)


@triton.jit
def _of_best_groups(left, expert, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BEST: tl.constexpr, SIZE: tl.constexpr):
    """left, minus infinity outside of the groups with the highest sums of their two best."""
    group = tl.arange(0, SLOTS)
    value = tl.full((SLOTS,), float("-inf"), tl.float32)
    for number in tl.static_range(GROUPS):
        own = tl.where(expert // SIZE == number, left, float("-inf"))
        top = tl.max(own, 0)
        first = tl.min(tl.where(own == top, expert, 2147483647), 0)
        second = tl.max(tl.where(expert == first, float("-inf"), own), 0)
        value = tl.where(group == number, top + second, value)
    kept = expert < 0
    for _ in tl.static_range(BEST):
        top = tl.max(value, 0)
        first = tl.min(tl.where(value == top, group, 2147483647), 0)
        kept = kept | (expert // SIZE == first)
        value = tl.where(group == first, float("-inf"), value)
    return tl.where(kept, left, float("-inf"))
