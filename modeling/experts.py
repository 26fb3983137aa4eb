"""Routed experts, a slice of every one of them on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

from modeling.fixed_linear import Linear, fixed_linear
from modeling.gates import Gate, silu_gate
from modeling.quantized.packed import Weight


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [experts, 2 x width / size, hidden], all gates first; down [experts, hidden, width / size].

    Biases [experts, the same rows]; down's is added once: only the first rank has it.
    """

    gate_up: Weight
    down: Weight
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class Experts(Protocol):
    """This rank's slices of all routed experts."""

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], weights and chosen [tokens, top_k] -> weighted partial sums [tokens, hidden]."""


def make_experts(weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
    """Experts computed the way that suits their weights: of packed ones, the chosen are dequantized one at a time."""
    grouped = all(isinstance(weight, torch.Tensor) and weight.is_cuda for weight in (weights.gate_up, weights.down))
    return GroupedExperts(weights, gate) if grouped else LoopedExperts(weights, gate)


class LoopedExperts:
    """On CPU, or if quantized: the chosen experts one after the other, each over its own tokens.

    On CPU as fast as a grouped product over unpacked weights, or faster, from one token to a long prefill.
    """

    def __init__(self, weights: ExpertWeights, gate: Gate):
        self.gate_up = _linears(weights.gate_up, weights.gate_up_bias)
        self.down = _linears(weights.down, weights.down_bias)
        self.gate = gate

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return weights @ torch.cat([self.down[e](self.gate(self.gate_up[e](x))) for e in chosen[0].tolist()])
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        counts = torch.bincount(pairs, minlength=len(self.gate_up)).tolist()
        hit = [(expert, count) for expert, count in enumerate(counts) if count]
        sizes = [count for _, count in hit]
        parts = x.index_select(0, order // chosen.shape[1]).split(sizes)
        inner = torch.cat([self.gate_up[e](part) for (e, _), part in zip(hit, parts, strict=True)])
        parts = self.gate(inner).split(sizes)
        outer = torch.cat([self.down[e](part) for (e, _), part in zip(hit, parts, strict=True)])
        return _combined(outer, order, weights)


class GroupedExperts:
    """On CUDA: pairs of token and expert sorted by expert, one grouped product each way."""

    def __init__(self, weights: ExpertWeights, gate: Gate):
        assert isinstance(weights.gate_up, torch.Tensor), "a grouped product wants plain matrices"
        assert isinstance(weights.down, torch.Tensor), "a grouped product wants plain matrices"
        self.gate_up, self.down = weights.gate_up, weights.down
        self.gate_up_bias, self.down_bias, self.gate = weights.gate_up_bias, weights.down_bias, gate

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        counts = torch.zeros(
            len(self.gate_up), dtype=torch.int32, device=x.device
        )  # bincount would wait for the device
        counts.index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = _grouped(x[order // chosen.shape[1]], self.gate_up, ends)  # [pairs, 2 x width], grouped by expert
        if self.gate_up_bias is not None:
            rows = rows.add_(self.gate_up_bias[pairs[order]])
        rows = _grouped(self.gate(rows), self.down, ends)
        if self.down_bias is not None:
            rows = rows.add_(self.down_bias[pairs[order]])
        return _combined(rows, order, weights)


def _linears(weight: Weight, bias: torch.Tensor | None) -> list[Linear]:
    return [fixed_linear(weight[e], None if bias is None else bias[e]) for e in range(len(weight))]


def _combined(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [pairs, hidden], row i of pair order[i]: summed by token, weighted."""
    unsorted = torch.empty_like(rows)
    unsorted[order] = rows
    return torch.bmm(weights.unsqueeze(1), unsorted.view(*weights.shape, rows.shape[-1])).squeeze(1)


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [n, in] in runs that end at `ends` [experts], each times its expert's weight [experts, out, in]^T."""
    if rows.is_cuda and rows.dtype != torch.bfloat16:  # CUDA's grouped product knows bf16 only
        bounds = [0, *ends.tolist()]
        return torch.cat([F.linear(rows[a:b], weight[e]) for e, (a, b) in enumerate(pairwise(bounds))])
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
