"""Element by element: gates of MLPs, and what lies before and behind the delta rule of Qwen3.5's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kernels.delta_inputs import kernel as delta_inputs
from kernels.delta_inputs import reference as delta_inputs_reference
from kernels.gated_activation import kernel as gated_activation
from kernels.gated_activation import reference as gated_activation_reference
from kernels.gated_norm import kernel as gated_norm
from kernels.gated_norm import reference as gated_norm_reference
from tests.gpu.case import Case, Machine


def gate_cases(machine: Machine) -> Iterator[Case]:
    small = machine.shrink
    tokens = max(2, 1024 // small)
    for clamp in (None, (1.702, 7.0)):
        yield _activation(machine, tokens, 12_288 // small, clamp)
    yield _norm(machine, min(tokens, 1024), heads=max(2, 64 // small), dim=128)
    yield _inputs(machine, min(tokens, 1024), key_heads=max(1, 16 // small), heads=max(2, 64 // small), dim=128)


def _activation(machine: Machine, tokens: int, width: int, clamp: tuple[float, float] | None) -> Case:
    gate_up = machine.normal(tokens, 2 * width)

    def library() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Case(
        f"gated_activation {tokens} x {width}{' clamped' if clamp else ''}",
        lambda: gated_activation.gated_activation(gate_up, clamp),
        lambda: gated_activation_reference.gated_activation(gate_up, clamp),
        moved=gate_up.nbytes * 3 // 2,
        library=None if clamp else library,
    )


def _norm(machine: Machine, tokens: int, heads: int, dim: int) -> Case:
    x, weight = machine.normal(tokens, heads, dim, dtype=torch.float32), machine.normal(dim)
    gate = machine.normal(tokens, heads * dim)
    return Case(
        f"gated_norm {tokens} x {heads} heads x {dim}",
        lambda: gated_norm.gated_norm(x, weight, 1e-6, gate),
        lambda: gated_norm_reference.gated_norm(x, weight, 1e-6, gate),
        moved=x.nbytes + 2 * gate.nbytes,
        library=lambda: F.rms_norm(x.to(gate.dtype), (dim,), weight, 1e-6).flatten(1) * F.silu(gate),
    )


def _inputs(machine: Machine, tokens: int, key_heads: int, heads: int, dim: int) -> Case:
    convolved = machine.normal(tokens, (2 * key_heads + heads) * dim)
    a, b = machine.normal(2, tokens, heads).unbind()
    rate, dt_bias = -torch.rand(heads, device=machine.device), torch.randn(heads, device=machine.device)

    def call(way: Any) -> tuple[torch.Tensor, ...]:
        found = way.delta_inputs(convolved, a, b, rate, dt_bias, key_heads=key_heads, key_dim=dim)
        return found.query, found.key, found.log_decay, found.beta

    width = 2 * key_heads * dim
    return Case(
        f"delta_inputs {tokens} tokens, {key_heads} key heads x {dim}, {heads} heads",
        lambda: call(delta_inputs),
        lambda: call(delta_inputs_reference),
        moved=tokens * (width * (convolved.itemsize + 4) + heads * 2 * (convolved.itemsize + 4)),
        library=lambda: F.normalize(convolved[:, :width].float().unflatten(1, (2 * key_heads, dim)), dim=-1),
        tolerance=1e-4,
    )
