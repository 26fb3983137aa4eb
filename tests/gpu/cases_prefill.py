"""The gated delta rule over chunks of prompts, in the shapes of Qwen3.5's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kernels.gated_delta_prefill import kernel as gated_delta_prefill
from kernels.gated_delta_prefill import reference as gated_delta_prefill_reference
from tests.gpu.case import Case, Machine


def prefill_cases(machine: Machine) -> Iterator[Case]:
    """One long chunk, several short ones; one of eight ranks of the 397B, which has few heads to share the work."""
    small = machine.shrink
    for rows, tokens, heads in ((1, 8192, 64), (16, 512, 64), (1, 8192, 8)):
        yield _prefill(machine, max(1, rows // small), max(20, tokens // small), heads=max(2, heads // small))


def _prefill(machine: Machine, rows: int, tokens: int, heads: int) -> Case:
    dim, count, key_heads = 128, rows * tokens, max(1, heads // 4)
    query, key = F.normalize(machine.normal(2, count, key_heads, dim, dtype=torch.float32), dim=-1).unbind()
    query, value = query * dim**-0.5, machine.normal(count, heads, dim)
    beta, fade = torch.rand(2, count, heads, device=machine.device).unbind()
    memory = machine.normal(rows, heads, dim, dim, dtype=torch.float32)
    slots, starts = machine.ints(torch.randperm(rows)), machine.ints([tokens * row for row in range(rows + 1)])
    states = memory, memory.clone()  # advanced again by each run: equal numbers of runs stay comparable

    def run(way: Any, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return way.gated_delta_prefill(query, key, value, -fade, beta, state, slots, starts), state

    # By token and head, of a state of dim x dim: read by the corrected value and by the output, written.
    return Case(
        f"gated_delta_prefill {rows} x {tokens} tokens, {heads} heads x {dim}",
        lambda: run(gated_delta_prefill, states[0]),
        lambda: run(gated_delta_prefill_reference, states[1]),
        moved=2 * memory.nbytes + query.nbytes + key.nbytes + value.nbytes + 4 * value.numel() + 8 * beta.numel(),
        flops=3 * 2 * dim * dim * heads * count,
    )
