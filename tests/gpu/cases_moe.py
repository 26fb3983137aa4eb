"""Routed experts of decode and verify steps, one rank's share of the flagships, and the choice of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.linear.matrix import Matrix
from kernels.moe import kernel, reference
from kernels.routing import kernel as routing
from kernels.routing import reference as routing_reference
from modeling.experts import ExpertWeights, GroupedExperts
from modeling.gates import silu_gate
from tests.gpu.case import Case, Machine
from tests.gpu.cases_linear import random_matrix


def moe_cases(machine: Machine) -> Iterator[Case]:
    """label, tokens, experts, chosen of them, hidden size, a rank's width: Qwen3.5-397B and Kimi-K2.5 at TP 8, others
    whole. Small sizes keep whole tiles, and one of them hidden sizes that are cut into sections."""
    small = machine.shrink > 1
    for label, tokens, experts, top_k, hidden, width in (
        ("FP8", 1, 512, 10, 2048 if small else 4096, 128),
        ("FP8", 16, 512, 10, 4096, 128),
        ("FP8", 256, 512, 10, 4096, 128),
        ("INT4", 1, 384, 8, 7168, 256),
        ("INT4", 64, 384, 8, 7168, 256),
        ("plain", 1, 256, 8, 2048, 512),
        ("plain", 64, 256, 8, 2048, 512),
        ("plain", 1024, 256, 8, 2048, 512),
        ("MXFP4", 64, 128, 4, 2880, 2880),
    ):
        if small:
            tokens, hidden = min(tokens, 20 if tokens < 256 else 100), 2048 if (label, tokens) == ("FP8", 1) else 256
            width, experts, top_k = min(width, 256), 3, 2
        yield _experts(machine, label, tokens, experts, top_k, hidden, width)
    yield _experts(machine, "FP8", 4 if small else 16, 3 if small else 512, 2, 256 if small else 4096, 128, leaves=1)
    if machine.device != "cpu":  # in the interpreter a product is BLAS's, which rounds by the whole's shape
        for label in ("plain", "FP8", "INT4"):
            yield _same_bits(machine, label)
    yield _assign(machine, 256 if small else 8192, 5 if small else 512, 5 if small else 10)
    tokens = 3 if small else 256
    yield _softmax(machine, tokens, 512, 10)
    yield _sigmoid(machine, tokens, 384, 8, groups=1, best_groups=1)
    yield _sigmoid(machine, tokens, 256, 8, groups=8, best_groups=4)


def _experts(
    machine: Machine,
    label: str,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    width: int,
    leaves: int | None = None,
) -> Case:
    gate_up = random_matrix(machine, label, experts, 2 * width, hidden)
    gate, up = gate_up.rows(0, width), gate_up.rows(width, 2 * width)
    down = random_matrix(machine, label, experts, hidden, width)
    x = machine.normal(tokens, hidden)
    weights = torch.softmax(machine.normal(tokens, top_k, dtype=torch.float32), -1)
    chosen = torch.rand(tokens, experts, device=machine.device).topk(top_k).indices.int()
    rows = kernel.tile_rows(chosen.numel(), gate)
    dtype = x.dtype if leaves is None else torch.float32

    def call(way: Any) -> torch.Tensor:
        tiles = way.assign(chosen, experts, rows)
        inner = way.gate_up(x, gate, up, tiles, chosen)
        return way.combine(way.down(inner, down, tiles, leaves=leaves), weights, chosen, dtype=dtype)

    hit = len(chosen.unique())
    return Case(
        f"experts {label}, {tokens} tokens x {top_k} of {experts}, {hidden} x {width}"
        f"{'' if leaves is None else f' in {leaves} leaf'}",
        lambda: call(kernel),
        lambda: call(reference),
        moved=hit * (gate_up.nbytes + down.nbytes) // experts + 2 * x.nbytes,
        library=_torchs(x, weights, chosen, gate_up, down),
    )


def _torchs(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: Matrix, down: Matrix) -> Any:
    """torch's grouped product, over the unpacked weights."""
    experts = GroupedExperts(ExpertWeights(gate_up.dense(x.dtype), down.dense(x.dtype)), silu_gate)
    own = weights.to(x.dtype), chosen.long()
    return lambda: experts(x, *own)


def _same_bits(machine: Machine, label: str) -> Case:
    """256 tokens at once against each half by itself, in other tiles: the difference must be none at all."""
    gate, up = (random_matrix(machine, label, 16, 256, 2048) for _ in range(2))
    down = random_matrix(machine, label, 16, 2048, 256)
    x, weights = machine.normal(256, 2048), torch.rand(256, 4, device=machine.device)
    chosen = torch.rand(256, 16, device=machine.device).topk(4).indices.int()

    def call(rows: int, own: slice) -> torch.Tensor:
        tiles = kernel.assign(chosen[own], 16, rows)
        inner = kernel.gate_up(x[own], gate, up, tiles, chosen[own])
        return kernel.combine(kernel.down(inner, down, tiles), weights[own], chosen[own], dtype=x.dtype)

    return Case(
        f"experts {label}, 256 tokens x 4 of 16, 2048 x 256, bit by bit against halves in smaller tiles",
        lambda: call(kernel.tile_rows(1024, gate), slice(256)),
        lambda: torch.cat([call(16, slice(128)), call(32, slice(128, 256))], dim=1),
        moved=3 * gate.nbytes + 2 * x.nbytes,
        tolerance=1e-12,
    )


def _assign(machine: Machine, tokens: int, experts: int, top_k: int) -> Case:
    chosen = torch.rand(tokens, experts, device=machine.device).topk(top_k).indices.int()

    def call(way: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = way.assign(chosen, experts, 64)
        return tiles.experts, tiles.pairs.masked_fill(tiles.experts[:, None] < 0, -1)

    return Case(
        f"assign {tokens} tokens x {top_k} of {experts}",
        lambda: call(kernel),
        lambda: call(reference),
        moved=2 * chosen.nbytes,
        library=lambda: torch.sort(chosen.flatten(), stable=True),
        tolerance=1e-12,
    )


def _softmax(machine: Machine, tokens: int, experts: int, top_k: int) -> Case:
    logits = machine.normal(tokens, experts, dtype=torch.float32)

    def library() -> tuple[torch.Tensor, torch.Tensor]:
        best, chosen = torch.topk(logits, top_k, dim=-1)
        return torch.softmax(best, dim=-1), chosen

    return Case(
        f"softmax_top_k {tokens} tokens, {top_k} of {experts}",
        lambda: routing.softmax_top_k(logits, top_k, normalized=True),
        lambda: routing_reference.softmax_top_k(logits, top_k, normalized=True),
        moved=logits.nbytes,
        library=library,
        tolerance=1e-5,
    )


def _sigmoid(machine: Machine, tokens: int, experts: int, top_k: int, groups: int, best_groups: int) -> Case:
    """Only the weights are compared: of scores a rounding apart, either may win."""
    logits, correction = (
        machine.normal(tokens, experts, dtype=torch.float32),
        torch.rand(experts, device=machine.device),
    )

    def call(way: Any) -> torch.Tensor:
        return way.sigmoid_top_k(
            logits, correction, top_k, groups=groups, best_groups=best_groups, normalized=True, scale=2.5
        )[0]

    return Case(
        f"sigmoid_top_k {tokens} tokens, {top_k} of {experts} in {best_groups} of {groups} groups",
        lambda: call(routing),
        lambda: call(routing_reference),
        moved=logits.nbytes,
        tolerance=1e-4,
    )
